"""Boxes of a file as pseudo-labels: where they end up after each transform, which images they are of, and bad files."""
import copy
import json
import pickle
import shutil
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, HOOKS, MODELS
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.runner import set_random_seed
from mmengine.structures import InstanceData

from kd_det.config.classes import match_classes
from kd_det.config.files import ConfigurationError
from kd_det.datasets import CARRIED, drop_detections
from kd_det.teachers import TeacherError
from kd_det.teachers.detections import Detections, insert_detections
from kd_det.teachers.guide import build_guide
from kd_det.teachers.results import index_names
from kd_det.training.probe import HeldOut

CLASSES = ('blue', 'green', 'red')
LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
PACK = dict(type='PackDetInputs')


@pytest.fixture
def content(coco_folder):
    return json.loads((coco_folder / 'all.json').read_text())


@pytest.fixture
def write(tmp_path):
    """Writes a JSON file, and returns its path."""

    def make(content, name='results.json') -> str:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return str(tmp_path / name)

    return make


@pytest.fixture
def truth(content):
    """The ground truth as results: each box with a score of its own."""
    return [dict(image_id=each['image_id'], category_id=each['category_id'], bbox=each['bbox'],
                 score=0.5 + each['id'] / 100) for each in content['annotations']]


@pytest.fixture
def build(coco_folder):
    """Builds a data set over :func:`coco_folder`, within a wrapper where transforms mix images."""

    def make(pipeline=(), mixing=(), load=LOAD, pack=(PACK, ), **changes):
        leaf = dict(type='CocoDataset', data_root=str(coco_folder), ann_file='all.json', data_prefix=dict(img=''),
                    metainfo=dict(classes=CLASSES), pipeline=[*load, *pipeline, *(() if mixing else pack)],
                    serialize_data=False)  # which would collect garbage for most of the test's time
        leaf.update(changes)
        return DATASETS.build(dict(type='MultiImageMixDataset', dataset=leaf, pipeline=[*mixing, *pack])
                              if mixing else leaf)

    return make


def _decode(guide, sample):
    found = guide.detect(torch.zeros(0), [sample])[0]
    own = drop_detections(sample).gt_instances
    return found, getattr(own.bboxes, 'tensor', own.bboxes), own.labels


SIZE = (96, 80)
ONE = {
    'nothing': [],
    'flip': [dict(type='RandomFlip', prob=1.0, direction=['horizontal', 'vertical', 'diagonal'])],
    'resize': [dict(type='Resize', scale=(150, 90), keep_ratio=False)],
    'random resize': [dict(type='RandomResize', scale=SIZE, ratio_range=(0.5, 2.0), keep_ratio=True)],
    'crop': [dict(type='RandomCrop', crop_size=(40, 40), allow_negative_crop=True)],
    'crop by boxes': [dict(type='MinIoURandomCrop')],
    'expand': [dict(type='Expand', prob=1.0)],
    'affine': [dict(type='RandomAffine')],
    'shift': [dict(type='RandomShift', prob=1.0, max_shift_px=16)],
    'geometric': [dict(type='Rotate', prob=1.0), dict(type='ShearX', prob=1.0), dict(type='TranslateY', prob=1.0)],
    'filter': [dict(type='FilterAnnotations', min_gt_bbox_wh=(14, 14), keep_empty=False)],
    'cached mosaic': [dict(type='CachedMosaic', img_scale=SIZE, max_cached_images=8),
                      dict(type='CachedMixUp', img_scale=SIZE, max_cached_images=8)],
    'choice': [dict(type='RandomChoice', transforms=[[dict(type='RandomFlip', prob=1.0), dict(
        type='Resize', scale=(40, 90))], [dict(type='Resize', scale=(100, 100))]])],
    'replayed': [dict(type='ReplayedRandomness', transforms=[dict(type='RandomFlip', prob=0.5),
                                                             dict(type='RandomCrop', crop_size=(48, 48))])],
}
MIXED = {
    'mosaic': [dict(type='Mosaic', img_scale=SIZE), dict(type='RandomAffine', border=(-48, -40))],
    'mixup': [dict(type='MixUp', img_scale=SIZE), dict(type='RandomFlip', prob=0.5)],
    'yolox': [dict(type='Mosaic', img_scale=SIZE), dict(type='MixUp', img_scale=SIZE), dict(type='YOLOXHSVRandomAug'),
              dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False)],
}


def _sorted(boxes, labels):
    order = np.lexsort(np.c_[boxes.numpy().round(2), labels.numpy()].T)
    return boxes[order], labels[order]


@pytest.mark.parametrize('name', [*ONE, *MIXED])
def test_boxes_go_where_the_ground_truth_goes(name, build, truth, write):
    """Results that are the ground truth stay that, whatever moves it; scores and classes are those of the file."""
    dataset = build(pipeline=ONE.get(name, ()), mixing=MIXED.get(name, ()))
    plain, guide, seen = copy.deepcopy(dataset), Detections(write(truth)), 0
    insert_detections(dataset, guide)
    for index in range(5):
        set_random_seed(index)
        sample = dataset[index]['data_samples']
        found, boxes, labels = _decode(guide, sample)
        assert len(found) == len(boxes) == sample.metainfo[CARRIED]
        (moved, found_labels), (own, own_labels) = _sorted(found.bboxes, found.labels), _sorted(boxes, labels)
        assert torch.equal(found_labels, own_labels) and torch.allclose(moved, own, atol=1e-4)
        assert set(found.scores.tolist()) <= {np.float32(each['score']).item() for each in truth}
        seen += len(found)
        if name == 'nothing':  # the ground truth, its order and its scores are as they were
            before = plain[index]['data_samples'].gt_instances
            assert torch.equal(boxes, before.bboxes.tensor) and torch.equal(labels, before.labels)
            assert found.scores.tolist() == pytest.approx(
                [each['score'] for each in truth if each['image_id'] == index])
    assert seen >= 4


def test_boxes_are_resized_with_the_batch(build, truth, write):
    preprocessor = MODELS.build(dict(type='DetDataPreprocessor', pad_size_divisor=32, batch_augments=[
        dict(type='BatchSyncRandomResize', random_size_range=(96, 128), size_divisor=32, interval=1)]))
    dataset, guide = build(), Detections(write(truth))
    insert_detections(dataset, guide)
    MessageHub.get_current_instance().update_info('iter', 0)
    for _ in range(2):  # the first one draws the size of the next
        data = preprocessor(pseudo_collate([dataset[index] for index in range(4)]), True)
    assert data['inputs'].shape[-1] > 64
    for sample in data['data_samples']:
        found, boxes, labels = _decode(guide, sample)
        assert torch.equal(found.bboxes, boxes) and torch.equal(found.labels, labels) and len(found) == 2


def test_only_what_was_asked_for_is_carried(build, truth, write):
    """Boxes under the score or without area stay behind; images without boxes, or without ground truth, are served."""
    flat = dict(truth[0], bbox=[3, 3, 0, 9], score=0.9)
    results = [flat, *(each for each in truth if each['image_id'] != 3)]
    expected = [sum(each['score'] >= 0.6 for each in truth if each['image_id'] == index != 3) for index in range(8)]
    for load in (LOAD, [LOAD[0], dict(type='LoadEmptyAnnotations', with_bbox=True, with_label=True)], LOAD[:1]):
        dataset, guide = build(load=load, pipeline=[dict(type='Resize', scale=(128, 128))]), Detections(write(results))
        for _ in range(2):  # as where a run is trained twice
            insert_detections(dataset, guide, score=0.6)
        found = [_decode(guide, dataset[index]['data_samples']) for index in range(8)]
        assert [len(each) for each, *_ in found] == expected
        assert sum(len(boxes) for _, boxes, _ in found) == (len(truth) if load is LOAD else 0)
        assert torch.equal(found[7][0].bboxes[-1, :2] / 2, torch.tensor(truth[-1]['bbox'][:2], dtype=torch.float32))


def test_boxes_survive_workers_and_copies(build, truth, write):
    dataset, guide = build(), Detections(write(truth))
    insert_detections(dataset, guide)
    there = pickle.loads(pickle.dumps(copy.deepcopy(dataset)))
    assert len(_decode(guide, there[0]['data_samples'])[0]) == 2


def test_every_data_set_within_wrappers_brings_them(build, truth, write, content, monkeypatch):
    """Labelled and unlabelled images side by side, repeated; the pipeline that a hook switches to as well."""
    some = [image['id'] for image in content['images'][:3]]
    labelled = write(dict(content, images=content['images'][:3], annotations=[
        each for each in content['annotations'] if each['image_id'] in some]), 'labelled.json')
    others = write(dict(content, images=content['images'][3:], annotations=[]), 'unlabelled.json')
    parts = [dict(type='RepeatDataset', times=2, dataset=build(ann_file=labelled)),
             build(ann_file=others, pack=(PACK, dict(type='Unlabelled')), filter_cfg=dict(filter_empty_gt=False))]
    dataset = DATASETS.build(dict(type='ConcatDataset', datasets=parts))
    guide = Detections(write(truth))
    insert_detections(dataset, guide)
    samples = [dataset[index]['data_samples'] for index in range(len(dataset))]
    decoded = [_decode(guide, sample) for sample in samples]
    assert [(len(found), len(boxes)) for found, boxes, _ in decoded] == [(2, 2)] * 6 + [(2, 0)] * 5
    assert [sample.metainfo.get('unlabelled', False) for sample in samples] == [False] * 6 + [True] * 5
    assert guide.report(None, 64, 0.9).startswith(f"'{guide.file}' has 16 boxes of a score of 0 or more "
                                                  'on 8 of the 8 training images (100.0%). Against')

    for holds_out in (False, True):  # which passes the pipeline on to the data set within
        hook = HOOKS.build(dict(type='PipelineSwitchHook', switch_epoch=0, switch_pipeline=[
            *LOAD, dict(type='RandomFlip', prob=1.0), PACK]))
        alone = build()
        if holds_out:
            monkeypatch.setattr(HeldOut, '__init__', lambda self: None)
            within, alone = alone, HeldOut()
            alone.dataset, alone.indices = within, range(len(within))
        insert_detections(alone, guide, hooks=[hook])
        hook.before_train_epoch(SimpleNamespace(epoch=0, train_dataloader=SimpleNamespace(
            dataset=alone, persistent_workers=False), logger=SimpleNamespace(info=print)))
        sample = alone[0]['data_samples']
        found, boxes, _ = _decode(guide, sample)
        assert sample.flip and torch.equal(found.bboxes, boxes)


@pytest.mark.parametrize('changes, message', [
    (dict(load=[LOAD[0], dict(LOAD[1], with_mask=True)]), 'have no masks.*leave with_mask=True out'),
    (dict(pipeline=[dict(type='RandomSamplingNegPos', tokenizer_name='bert')]), 'RandomSamplingNegPos .* as rows'),
    (dict(pack=()), 'end it with PackDetInputs')])
def test_pipelines_that_can_not_carry_boxes(changes, message, build, truth, write, monkeypatch):
    monkeypatch.setattr('mmdet.datasets.transforms.text_transformers.AutoTokenizer', mock.MagicMock())
    with pytest.raises(ConfigurationError, match=message):
        insert_detections(build(**changes), Detections(write(truth)))


# ------------------------------------------------------------------------------------------ whose boxes they are


def _found(dataset, guide):
    insert_detections(dataset, guide)
    return [_decode(guide, dataset[index]['data_samples'])[0] for index in range(len(dataset))]


def _renumber(content, truth):
    """The same images and classes under other ids: those of another file."""
    other = dict(images=[dict(image, id=f'a{image["id"]}', file_name=f'all/{image["file_name"]}')
                         for image in content['images']],
                 categories=[dict(category, id=90 - category['id']) for category in content['categories'][::-1]])
    return other, [dict(each, image_id=f'a{each["image_id"]}', category_id=90 - each['category_id'])
                   for each in truth]


def test_images_and_classes_are_matched_by_what_they_are_called(build, content, truth, write, coco_folder, tmp_path):
    plain = _found(build(), Detections(write(truth)))
    other, results = _renumber(content, truth)
    shutil.copytree(coco_folder, tmp_path / 'all')
    dataset = build(data_root=str(tmp_path), ann_file=str(coco_folder / 'all.json'), data_prefix=dict(img='all/'))
    by_file = Detections(write(results), annotations=write(other, 'other.json'))
    names = [f'{each["image_id"]}.png' for each in truth]
    by_name = [dict(each, image_id=name) for each, name in zip(truth, names)]
    by_path = [dict(each, image_id=str(tmp_path / 'all' / name)) for each, name in zip(truth, names)]
    guides = [
        by_file,
        Detections(write(by_name, '1.json')),
        Detections(write(by_path, '2.json'), classes=['-', 'Blue', 'GREEN', 'red']),
        Detections(write([dict(each, image_id=float(each['image_id'])) for each in truth], '3.json')),
        Detections(write([dict(each, image_id=str(each['image_id'])) for each in truth], '4.json')),
        Detections(write(truth, '5.json'), annotations=coco_folder / 'all.json'),
    ]
    for guide in guides:
        found = _found(copy.deepcopy(dataset), guide)
        match = match_classes(CLASSES, guide.classes)
        assert guide.num_classes == len(guide.classes)
        for mine, theirs in zip(found, plain):
            mine = match.translate(mine)
            assert torch.equal(mine.bboxes, theirs.bboxes) and torch.equal(mine.labels, theirs.labels)
    assert by_file.classes == ('red', 'green', 'blue')


def test_paths_of_windows_are_read(monkeypatch):
    monkeypatch.setattr('kd_det.teachers.results.os.sep', '\\')
    find = index_names([('a/1.jpg', 7), ('b\\2.jpg', 8), ('C:/data/all/3.jpg', 9)])
    names = ('a\\1.jpg', 'b\\2.jpg', '3.jpg', 'c\\1.jpg')
    assert [find(f'C:\\data\\all\\{name}', 'C:\\data/all') for name in names] == [7, 8, 9, -1]


def test_names_in_other_folders_are_other_images(build, content, truth, write):
    other, results = _renumber(content, truth)  # in a folder all/, where those of the data are not
    with pytest.raises(TeacherError, match='0 of them are among the 8 of the training data'):
        _found(build(), Detections(write(results), annotations=write(other, 'other.json')))


def test_one_id_of_two_images(build, truth, write, coco_folder, tmp_path):
    shutil.copytree(coco_folder, tmp_path / 'more')
    dataset = DATASETS.build(dict(type='ConcatDataset', datasets=[build(), build(data_root=str(tmp_path / 'more'))]))
    with pytest.raises(TeacherError, match="image_id 0 of .* may be '.*coco.*0.png' or '.*more/0.png'"):
        insert_detections(dataset, Detections(write(truth)))
    swapped = dict(json.loads((coco_folder / 'all.json').read_text()), categories=[
        dict(id=1, name='red'), dict(id=2, name='green'), dict(id=3, name='blue')])
    dataset = DATASETS.build(dict(type='ConcatDataset', datasets=[build(), build(ann_file=write(swapped, 'b.json'))]))
    with pytest.raises(TeacherError, match="category_id 1 of .* may be 'blue' or 'red'.*annotations=…"):
        insert_detections(dataset, Detections(write(truth)))


def _with(**changes):
    return lambda truth: [truth[0], dict(truth[1], **changes)]


BAD = {
    'nothing': (lambda truth: [], 'holds no detections: its list is empty'),
    'annotations': (lambda truth: dict(images=[], annotations=truth), 'holds a COCO annotation file, expected COCO'),
    'a number': (lambda truth: 7, 'holds int, expected COCO results'),
    'text': (lambda truth: '[{"image_id"', 'is no JSON file of COCO results'),
    'an entry': (lambda truth: [truth[0], 5], 'detection 1: it is 5, expected an object'),
    'no score': (lambda truth: [{key: truth[0][key] for key in ('image_id', 'category_id', 'bbox')}],
                 "detection 0: it has no 'score'"),
    'score': (_with(score=1.5), 'detection 1: its score is 1.5, expected a number from 0 to 1'),
    'score nan': (_with(score=float('nan')), 'detection 1: its score is nan'),
    'score text': (_with(score='0.5'), "its score is '0.5'"),
    'score bool': (_with(score=True), 'its score is True'),
    'bbox': (_with(bbox=[1, 2, 3]), r'its bbox is \[1, 2, 3\], expected 4 numbers'),
    'bbox text': (_with(bbox=['1', 2, 3, 4]), 'expected 4 numbers'),
    'bbox nan': (_with(bbox=[1, 2, float('nan'), 4]), 'which is not finite'),
    'bbox negative': (_with(bbox=[10, 10, -3, 4]), 'of negative size'),
    'image': (_with(image_id=None), 'its image_id is None, expected a whole number or a text'),
    'image half': (_with(image_id=0.5), 'its image_id is 0.5'),
    'category': (_with(category_id=True), 'its category_id is True'),
    'unknown category': (_with(category_id=9), r"has boxes of category_id 9, and '.*all.json' names 1 \('blue'\)"),
    'other images': (lambda truth: [dict(each, image_id=each['image_id'] + 100) for each in truth],
                     'has boxes of 8 images, such as image_id 100, and 0 of them are among the 8 of the training data'),
    'larger images': (lambda truth: [dict(each, bbox=[4 * side for side in each['bbox']]) for each in truth],
                      'reach beyond their images: they are of other images that have the same ids'),
    'corners': (lambda truth: [dict(each, bbox=[30, 30, 60, 60]) for each in truth],
                'and all would fit as corners x1, y1, x2, y2: COCO results are x, y, width, height'),
    'shares': (lambda truth: [dict(each, bbox=[side / 64 for side in each['bbox']]) for each in truth],
               'they are shares of its width and height'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_files(name, build, truth, write):
    make, message = BAD[name]
    with pytest.raises(TeacherError, match=message):
        insert_detections(build(), Detections(write(make(truth))))


def test_other_bad_input(build, truth, write, tmp_path):
    with pytest.raises(TeacherError, match=r"There is no file of detections '.*none.json' \(No such file"):
        insert_detections(build(), Detections(tmp_path / 'none.json'))
    with pytest.raises(TeacherError, match="classes names 0 .'blue'., 1 .'green'., 2 .'red'..*classes=.'-', …."):
        Detections(write(truth), classes=CLASSES).start(None, ())  # before the data is looked at
    with pytest.raises(TeacherError, match=r"category_id of '.*' mean is not known: '.*7.json' is no COCO annotation"):
        Detections(write(truth), annotations=write(7, '7.json')).start(None, ())
    with pytest.raises(ConfigurationError, match='file'):
        build_guide(dict(type='Detections'))
    with pytest.raises(ConfigurationError, match='score: there is no such key'):
        build_guide(dict(type='Detections', file='results.json', score=0.5))
    guide = Detections(write(truth))
    assert len(guide.start(None, ()).detect(None, [DetDataSample(gt_instances=InstanceData(
        bboxes=torch.rand(2, 4), labels=torch.zeros(2, dtype=torch.long)))])[0]) == 0  # noise of a dry run
    insert_detections(build(), guide)
    with pytest.raises(TeacherError, match='An image came without the boxes of'):
        guide.detect(None, [build()[0]['data_samples']])


def test_the_report_tells_what_the_boxes_are_worth(build, truth, write):
    guide = Detections(write([each for each in truth if each['image_id'] < 6 and each['category_id'] != 3]
                             + [dict(truth[0], image_id=77)]))
    insert_detections(build(), guide, score=0.55)
    text = guide.report(None, 64, 0.01)
    assert '1 of its ' in text and 'images are not in the training data' in text and 'It has no box of red.' in text
    assert 'boxes of a score of 0.55 or more on' in text and 'reach mAP 0.' in text
    whole = Detections(write(truth))
    insert_detections(build(), whole)
    assert 'reach mAP 1.000, mAP_50 1.000.' in whole.report(None, 64, 0.99)
    wrong = Detections(write([dict(each, category_id=each['category_id'] % 3 + 1) for each in truth]))
    insert_detections(build(), wrong)
    with pytest.raises(TeacherError, match='reach mAP 0.*That is less than min_map=0.2'):
        wrong.report(None, 64, 0.2)
    nobody = Detections(write(truth))
    insert_detections(build(pack=(PACK, dict(type='Unlabelled')), filter_cfg=dict(filter_empty_gt=False)), nobody)
    assert 'ground truth' not in nobody.report(None, 64, 0.99)
