"""Images of which nobody says what they show."""
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData

from kd_det.config.files import ConfigurationError


@pytest.mark.parametrize('boxes', [True, False])
def test_marks_and_empties_what_was_packed(coco_folder, boxes):
    """Of a data set of mmdet, with any annotations or none."""
    load = [dict(type='LoadAnnotations', with_bbox=True)] if boxes else []
    dataset = DATASETS.build(dict(
        type='CocoDataset', data_root=str(coco_folder), ann_file='all.json', data_prefix=dict(img=''),
        metainfo=dict(classes=('blue', 'green', 'red')), filter_cfg=dict(filter_empty_gt=False),
        pipeline=[dict(type='LoadImageFromFile'), *load, dict(type='PackDetInputs'), dict(type='Unlabelled')]))
    sample = dataset[0]['data_samples']
    assert sample.metainfo['unlabelled'] is True and sample.img_shape == (64, 64)
    for instances in (sample.gt_instances, sample.ignored_instances):
        assert instances.bboxes.shape == (0, 4)
        assert instances.labels.shape == (0, ) and instances.labels.dtype == torch.long
    assert len(dataset) == 8


def test_masks_are_emptied_too():
    sample = DetDataSample(gt_instances=InstanceData(
        bboxes=torch.rand(2, 4), labels=torch.arange(2), masks=BitmapMasks(np.ones((2, 8, 8)), 8, 8)))
    truth = TRANSFORMS.build(dict(type='Unlabelled'))(dict(data_samples=sample))['data_samples'].gt_instances
    assert len(truth.masks) == len(truth.bboxes) == 0 and truth.masks.masks.shape == (0, 8, 8)


def test_it_comes_last():
    with pytest.raises(ConfigurationError, match='make it the last step'):
        TRANSFORMS.build(dict(type='Unlabelled'))(dict(img=None))
