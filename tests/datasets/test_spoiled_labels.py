"""Training labels that are wrong, moved or missing on purpose."""
import random

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from kd_det.config.arguments import ArgumentError
from kd_det.config.files import ConfigurationError
from kd_det.datasets import FIRST_ROW

CLASSES, SIDE = 4, 1000


def make_image(count=2000, image=7, as_array=False, **others) -> dict:
    """An image with so many boxes, of classes in turn."""
    corners = np.random.default_rng(0).uniform(0, SIDE / 2, (count, 4)).astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    return dict(dict(img_id=image, img_shape=(SIDE, SIDE), gt_bboxes=corners if as_array else HorizontalBoxes(corners),
                     gt_bboxes_labels=np.arange(count) % CLASSES, gt_ignore_flags=np.zeros(count, bool)), **others)


def spoil(results: dict, **options) -> dict:
    return TRANSFORMS.build(dict(dict(type='NoisyLabels', classes=CLASSES), **options))(dict(results))


def test_a_share_of_the_boxes_has_another_class_each_as_likely():
    before = make_image(8000)
    after = spoil(before, share=0.3)
    turns = (after['gt_bboxes_labels'] - before['gt_bboxes_labels']) % CLASSES
    assert np.bincount(turns) / 8000 == pytest.approx([0.7, 0.1, 0.1, 0.1], abs=0.015)
    assert after['gt_bboxes_labels'].dtype == before['gt_bboxes_labels'].dtype == np.int64
    assert after['gt_bboxes'] is before['gt_bboxes']
    assert (spoil(before, share=1.0)['gt_bboxes_labels'] != before['gt_bboxes_labels']).all()


def test_a_box_is_as_wrong_whatever_was_drawn_elsewhere_and_no_other_number_moves():
    drawn = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        after = spoil(make_image(), share=0.2, shift=0.1)
        drawn.append((after['gt_bboxes_labels'].tolist(), after['gt_bboxes'].tensor.tolist()))
        numbers = random.random(), np.random.rand(), torch.rand(()).item()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        assert numbers == (random.random(), np.random.rand(), torch.rand(()).item())
    assert drawn[0] == drawn[1]


def test_image_place_and_seed_tell_which_boxes():
    labels = [spoil(each, share=0.5, **options)['gt_bboxes_labels'].tolist()
              for each, options in ((make_image(), {}), (make_image(image=8), {}), (make_image(), dict(seed=1)))]
    assert len({tuple(each) for each in labels}) == 3
    fewer = spoil(make_image(100), share=0.5)['gt_bboxes_labels'].tolist()
    assert fewer == labels[0][:100]
    by_path = make_image()
    del by_path['img_id']
    moved = [spoil(dict(by_path, img_path=f'{folder}/7.jpg'), share=0.5)['gt_bboxes_labels'].tolist()
             for folder in ('here', 'there')]
    assert moved[0] == moved[1]


def test_what_is_wrong_at_a_share_is_so_at_a_larger_one():
    before = make_image()['gt_bboxes_labels']
    less, more = (spoil(make_image(), share=share)['gt_bboxes_labels'] for share in (0.1, 0.3))
    wrong = less != before
    assert 0 < wrong.sum() < (more != before).sum() and (more[wrong] == less[wrong]).all()


@pytest.mark.parametrize('as_array', [False, True])
def test_boxes_move_by_a_share_of_their_size(as_array):
    before, after = make_image(as_array=as_array), spoil(make_image(as_array=as_array), shift=0.2, classes=None)
    assert type(after['gt_bboxes']) is type(before['gt_bboxes'])
    assert (after['gt_bboxes_labels'] == before['gt_bboxes_labels']).all()
    old, new = (torch.as_tensor(getattr(each['gt_bboxes'], 'tensor', each['gt_bboxes'])) for each in (before, after))
    sizes = old[:, 2:] - old[:, :2]
    inside = ((new > 0) & (new < SIDE)).all(1)  # not cut off
    assert 0.5 < inside.float().mean() < 1 and new.min() == 0 and new.max() <= SIDE and new.dtype == torch.float32
    for measure in (lambda boxes: (boxes[:, :2] + boxes[:, 2:]) / 2, lambda boxes: boxes[:, 2:] - boxes[:, :2]):
        moved = ((measure(new) - measure(old)) / sizes)[inside]
        for axis in (0, 1):
            assert moved[:, axis].abs().max() == pytest.approx(0.2, abs=0.005)
            assert moved[:, axis].std() == pytest.approx(0.2 / 3**0.5, rel=0.1)
        assert abs(np.corrcoef(moved.T)[0, 1]) < 0.1  # along x and y apart


def test_the_largest_shift_leaves_an_area_within_the_image():
    corners = np.array([[0, 0, 10, 10], [SIDE - 10, SIDE - 10, SIDE, SIDE]] * 500, np.float32)
    new = spoil(make_image(1000, gt_bboxes=HorizontalBoxes(corners)), shift=0.5)['gt_bboxes'].tensor
    assert ((new[:, 2:] - new[:, :2]) > 0.5).all()


def test_ignored_regions_and_boxes_of_a_file_stay():
    before = make_image(100)
    before['gt_ignore_flags'][::2] = True
    before['gt_bboxes_labels'][1::4] = FIRST_ROW + 5
    after = spoil(before, share=1.0, shift=0.3)
    changed = (after['gt_bboxes'].tensor != before['gt_bboxes'].tensor).all(1).numpy()
    assert (changed == (np.arange(100) % 4 == 3)).all()
    assert ((after['gt_bboxes_labels'] != before['gt_bboxes_labels']) == changed).all()


def test_an_image_without_boxes():
    assert len(spoil(make_image(0), share=0.5, shift=0.1)['gt_bboxes_labels']) == 0


def test_what_does_not_fit_is_told():
    with pytest.raises(ArgumentError, match='classes: a share above 0 is drawn among the classes'):
        spoil(make_image(), share=0.2, classes=None)
    with pytest.raises(ArgumentError, match='shift: expected a number from 0 to 0.5, got 0.6'):
        spoil(make_image(), shift=0.6)
    with pytest.raises(ConfigurationError, match='classes=3, and the data has the label 3'):
        spoil(make_image(), share=0.2, classes=3)
    for transform in (dict(type='NoisyLabels', shift=0.1), dict(type='WithoutClasses', labels=[0])):
        with pytest.raises(ConfigurationError, match=f"'{transform['type']}' changes the labels that LoadAnnotations"):
            TRANSFORMS.build(transform)(dict(img_id=7))
    with pytest.raises(ConfigurationError, match='without their masks'):
        spoil(make_image(2, gt_masks=BitmapMasks(np.ones((2, 8, 8)), 8, 8)), shift=0.1)


def test_classes_are_left_out():
    masks = BitmapMasks(np.arange(6 * 64).reshape(6, 8, 8), 8, 8)
    before = make_image(6, gt_masks=masks)
    after = TRANSFORMS.build(dict(type='WithoutClasses', labels=[1, 3]))(dict(before))
    assert after['gt_bboxes_labels'].tolist() == [0, 2, 0] and after['gt_ignore_flags'].shape == (3, )
    assert after['gt_bboxes'].tensor.equal(before['gt_bboxes'].tensor[[0, 2, 4]])
    assert (after['gt_masks'].masks == masks.masks[[0, 2, 4]]).all()


def test_of_a_data_set_labels_are_spoiled_before_anything_random(coco_folder):
    """Epoch after epoch, and where the images of one are mixed with others."""

    def build(*spoiled: dict):
        return DATASETS.build(dict(
            type='CocoDataset', data_root=str(coco_folder), ann_file='all.json', data_prefix=dict(img=''),
            metainfo=dict(classes=('blue', 'green', 'red')), pipeline=[
                dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True), *spoiled,
                dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')]))

    plain, noisy, without = (build(*each) for each in (
        (), (dict(type='NoisyLabels', share=0.5, classes=3), ), (dict(type='WithoutClasses', labels=[0]), )))

    def read(dataset) -> list:
        return [dataset[index]['data_samples'].gt_instances.labels.tolist() for index in range(len(dataset))]

    first = read(noisy)
    assert first == read(noisy) != read(plain) and [*map(len, first)] == [*map(len, read(plain))]
    assert read(without) == [[label for label in labels if label] for labels in read(plain)]
    assert len(without) == len(plain) and any(0 in labels for labels in read(plain))  # images stay
