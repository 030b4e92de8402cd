"""Mosaic and MixUp for a student whose config has neither."""
import copy

import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config

from kd_det.config.files import ConfigurationError
from kd_det.study.training_data import mix_images

LOADING = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
FLIP, PACK = dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')
FILTER = dict(type='mmdet.FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False)
FULL = dict(type='mmdet.Resize', scale=(96, 80), keep_ratio=True)


@pytest.fixture
def student(run_config, retinanet):
    """The config of a student, with other transforms between loading and packing where they are given."""

    def make(*transforms: dict) -> Config:
        config = run_config(retinanet())
        if transforms:
            config.train_dataloader.dataset.pipeline = [*LOADING, *transforms, PACK]
        return config

    return make


def mixed(config: Config, *augmentations: str) -> dict:
    mix_images(config, augmentations)
    return config.train_dataloader.dataset


def test_images_are_mixed_between_loading_and_the_rest(student):
    before = student().to_dict()
    dataset = mixed(config := student(), 'mosaic', 'mixup')
    inner = copy.deepcopy(before['train_dataloader']['dataset'])
    inner['pipeline'] = LOADING
    size = (64, 64)  # of the data; 114: the mean of the preprocessor's three
    assert dataset == dict(type='mmdet.MultiImageMixDataset', dataset=inner, pipeline=[
        dict(type='mmdet.Mosaic', img_scale=size, pad_val=114.0),
        dict(type='mmdet.RandomCrop', crop_size=size, allow_negative_crop=True),
        dict(type='mmdet.MixUp', img_scale=size, pad_val=114.0), FILTER, FLIP, PACK])
    config.train_dataloader.dataset = before['train_dataloader']['dataset']
    assert config.to_dict() == before  # nothing else changed


def test_without_augmentation_nothing_changes(student):
    before = student().to_dict()
    mix_images(config := student(), ())
    assert config.to_dict() == before


@pytest.mark.parametrize('resize, size', [
    (dict(type='Resize', scale=(96, 80), keep_ratio=False), (96, 80)),
    (dict(type='Resize', scale=(80, 96), keep_ratio=False), (80, 96)),
    (dict(type='Resize', scale=72), (72, 72)),
    (dict(type='RandomResize', scale=[(120, 60), (120, 80)], keep_ratio=True), (120, 80)),
    (dict(type='RandomChoiceResize', scales=[(48, 120), (80, 120)], keep_ratio=True), (120, 80)),  # short and long edge
    (dict(type='RandomChoice', transforms=[[FULL], [dict(type='RandomCrop', crop_size=(9, 9)), FULL]]), (96, 80)),
    (dict(type='RandomApply', transforms=FULL), (96, 80)),
])
def test_size_is_that_of_the_students_pipeline(resize, size, student):
    pipeline = mixed(student(resize, FLIP), 'mosaic')['pipeline']
    assert pipeline[0]['img_scale'] == pipeline[1]['crop_size'] == size
    assert pipeline[3:] == [resize, FLIP, PACK]


def test_padding_is_the_colour_that_the_student_sees_as_zero(student):
    config = student()
    config.model.data_preprocessor.update(mean=[10.0, 20.0, 30.0])
    assert mixed(config, 'mosaic')['pipeline'][0]['pad_val'] == 20.0


def test_a_mosaic_shows_objects_of_several_images_as_large_as_they_were(student):
    np.random.seed(0)
    plain = DATASETS.build(student(FLIP).train_dataloader.dataset)
    mosaic = DATASETS.build(mixed(student(FLIP), 'mosaic'))
    assert len(mosaic) == len(plain)
    largest = max(plain[index]['data_samples'].gt_instances.bboxes.tensor[:, 2:].max() for index in range(len(plain)))
    counts = []
    for item in (mosaic[index] for index in range(len(mosaic))):
        boxes = item['data_samples'].gt_instances.bboxes.tensor
        counts.append(len(boxes))
        assert item['inputs'].shape == (3, 64, 64) and item['data_samples'].img_shape == (64, 64)
        assert boxes.min() >= 0 and boxes.max() <= 64 and ((boxes[:, 2:] - boxes[:, :2]) > 1).all()
        objects = item['inputs'].numpy().max(0) == 220
        assert all(objects[int(y1):int(y2 + 1), int(x1):int(x2 + 1)].any() for x1, y1, x2, y2 in boxes)
    assert largest <= 64 and max(counts) > 2  # more than any one image has


def test_mixup_overlays_another_image_half_and_half(student):
    np.random.seed(0)
    plain = DATASETS.build(student(FULL).train_dataloader.dataset)
    mixup = DATASETS.build(mixed(student(FULL), 'mixup'))
    more = 0
    for index in range(len(plain)):
        alone, both = plain[index], mixup[index]
        boxes = [item['data_samples'].gt_instances.bboxes.tensor for item in (alone, both)]
        assert boxes[1][:len(boxes[0])].allclose(boxes[0])  # its own objects stay where they were
        more += len(boxes[1]) - len(boxes[0])
        other = 2 * both['inputs'].int() - alone['inputs'].int()
        assert other.min() >= -1 and other.max() <= 255 and other.float().std() > 10
        assert both['data_samples'].img_id == alone['data_samples'].img_id
    assert more > 0


@pytest.mark.parametrize('wrap', [
    lambda dataset: dict(type='RepeatDataset', times=2, dataset=dataset),
    lambda dataset: dict(type='ConcatDataset', datasets=[dataset, copy.deepcopy(dataset)]),
    lambda dataset: dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=dataset),
])
def test_wrapped_data_sets_are_mixed_as_a_whole(wrap, student):
    config = student()
    config.train_dataloader.dataset = wrap(config.train_dataloader.dataset)
    plain = len(DATASETS.build(config.train_dataloader.dataset))
    dataset = DATASETS.build(mixed(config, 'mosaic'))
    assert len(dataset) == plain and dataset[plain - 1]['inputs'].shape == (3, 64, 64)
    assert dataset.get_data_info(plain - 1)['width'] == 64  # asked for by AspectRatioBatchSampler


def test_what_can_not_be_mixed_is_told(student):

    def refused(config: Config, message: str) -> None:
        before = config.to_dict()
        with pytest.raises(ConfigurationError, match=message):
            mix_images(config, ['mosaic'])
        assert config.to_dict() == before

    refused(student(dict(type='CachedMosaic', img_scale=(64, 64))), r'mixes images already \(CachedMosaic\)')
    twice = student()
    mix_images(twice, ['mixup'])
    refused(twice, r'mixes images already \(MixUp\)')
    switching = student()
    switching.custom_hooks = [dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=[])]
    refused(switching, 'PipelineSwitchHook would exchange')
    unlike = student()
    dataset = unlike.train_dataloader.dataset
    unlike.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dataset, dict(copy.deepcopy(dataset), pipeline=[*dataset.pipeline, dict(type='Unlabelled')])])
    refused(unlike, 'have different pipelines')
    masks = student()
    masks.train_dataloader.dataset.pipeline[1].with_mask = True
    refused(masks, 'no masks')
    late = student()
    late.train_dataloader.dataset.pipeline = [LOADING[0], FULL, LOADING[1], PACK]
    refused(late, 'got LoadImageFromFile, Resize, LoadAnnotations, PackDetInputs')
