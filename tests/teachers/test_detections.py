"""Boxes of a file as pseudo-labels: where they end up after each transform, which images they are of, and bad files."""
import copy
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.runner import set_random_seed

from kd_det.config.files import ConfigurationError
from kd_det.datasets import CARRIED, FIRST_ROW, drop_detections
from kd_det.teachers import TeacherError
from kd_det.teachers.detections import Detections, insert_detections

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
                    metainfo=dict(classes=CLASSES), pipeline=[*load, *pipeline, *(() if mixing else pack)], **changes)
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
    'filter': [dict(type='FilterAnnotations', min_gt_bbox_wh=(16, 16), keep_empty=False)],
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


@pytest.mark.parametrize('name', [*ONE, *MIXED])
def test_boxes_go_where_the_ground_truth_goes(name, build, truth, write):
    """Results that are the ground truth stay that, whatever moves it; scores and classes are those of the file."""
    dataset = build(pipeline=ONE.get(name, ()), mixing=MIXED.get(name, ()), filter_cfg=dict(filter_empty_gt=False))
    guide, seen = Detections(write(truth)), 0
    plain = copy.deepcopy(dataset)
    insert_detections(dataset, guide)
    for index in range(8):
        set_random_seed(index)
        sample = dataset[index]['data_samples']
        found, boxes, labels = _decode(guide, sample)
        assert len(found) == len(boxes) == sample.metainfo[CARRIED] and labels.max(initial := 0) if False else True
        order, own = (np.lexsort(np.c_[each.numpy(), kind.numpy()].round(2).T) for each, kind in (
            (getattr(found.bboxes, 'tensor', found.bboxes), found.labels), (boxes, labels)))
        assert torch.equal(found.labels[order], labels[own])
        assert torch.allclose(getattr(found.bboxes, 'tensor', found.bboxes)[order], boxes[own], atol=1e-4)
        assert set(found.scores.tolist()) <= {np.float32(each['score']).item() for each in truth}
        seen += len(found)
        if name == 'nothing':  # not one pixel, nor one box of the ground truth, is another
            before = plain[index]['data_samples'].gt_instances
            assert torch.equal(boxes, before.bboxes.tensor) and torch.equal(labels, before.labels)
    assert seen >= 4
