"""Noise in place of training data: its sizes follow the pipeline, its images and ground truth the detector."""
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from kd_det.checks.synthetic import synthetic_batch, training_sizes

WIDE, HIGH = (480, 640), (640, 480)


def sizes_of(*pipeline, originals=(WIDE, HIGH), **wrapper):
    dataset = dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile'), *pipeline])
    dataset = dict(wrapper, dataset=dataset) if wrapper else dataset
    return training_sizes(Config(dict(train_dataloader=dict(dataset=dataset))), originals)


@pytest.mark.parametrize('steps, expected', [
    ([], [WIDE, HIGH]),
    ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], [(800, 1067), (1067, 800)]),
    ([dict(type='mmdet.Resize', scale=(300, 200))], [(200, 300)]),
    ([dict(type='Resize', scale_factor=0.5)], [(240, 320), (320, 240)]),
    ([dict(type='RandomResize', scale=[(1333, 640), (1333, 800)], keep_ratio=True)],
     [(640, 853), (800, 1067), (853, 640), (1067, 800)]),
    ([dict(type='RandomChoiceResize', scales=[(200, 100), (7, 7), (400, 300)], keep_ratio=True)],
     [(100, 133), (300, 400), (133, 100), (400, 300)]),
    ([dict(type='RandomChoiceResize', scales=[100, 7, 300])], [(100, 100), (300, 300)]),
    ([dict(type='RandomResize', scale=(1280, 1280), ratio_range=(0.1, 2.0), keep_ratio=True),
      dict(type='RandomCrop', crop_size=(640, 600)), dict(type='Pad', size=(640, 700))],
     [(700, 640)]),
    ([dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600))], [(480, 600), (600, 480)]),
    ([dict(type='RandomCrop', crop_type='relative', crop_size=(0.5, 0.25))], [(240, 160), (320, 120)]),
    ([dict(type='RandomCenterCropPad', crop_size=(512, 511))], [(512, 511)]),
    ([dict(type='ResizeShortestEdge', scale=100, max_size=120)], [(90, 120), (120, 90)]),
    ([dict(type='FixShapeResize', width=97, height=65)], [(65, 97)]),
    ([dict(type='Pad', pad_to_square=True)], [(640, 640)]),
    ([dict(type='Pad', size_divisor=64)], [(512, 640), (640, 512)]),
    ([dict(type='RandomChoice', transforms=[[dict(type='Resize', scale=(64, 64))],
                                            [dict(type='Resize', scale=(96, 96)), dict(type='Pad', size=(100, 90))]])],
     [(64, 64), (96, 100)]),
    ([dict(type='ReplayedRandomness', transforms=[dict(type='Resize', scale=(50, 40))])], [(40, 50)]),
    ([dict(type='Resize', scale=None), dict(type='RandomCrop', crop_size='all'), dict(type='Unknown')], [WIDE, HIGH])])
def test_sizes_follow_the_pipeline(steps, expected):
    assert sizes_of(*steps) == expected


def test_transforms_of_wrappers_come_last():
    wrapper = dict(type='MultiImageMixDataset', pipeline=[
        dict(type='Mosaic', img_scale=(320, 256)), dict(type='RandomAffine', border=(-160, -128)),
        dict(type='MixUp', img_scale=(320, 256))])
    assert sizes_of(dict(type='Resize', scale=(50, 50)), **wrapper) == [(256, 320)]
    parts = [dict(type='CocoDataset', pipeline=[dict(type='Resize', scale=(side, side))]) for side in (40, 60)]
    config = Config(dict(train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dict(
        type='ConcatDataset', datasets=parts)))))
    assert training_sizes(config) == [(40, 40), (60, 60)]
    assert training_sizes(Config(dict(model={}))) == [WIDE, HIGH]


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_noise_suits_the_detector(channels, retinanet):
    model = retinanet(classes=2)
    model.backbone.in_channels = channels
    model = MODELS.build(model)
    batch = synthetic_batch(model, images=2, size=(50, 70), boxes=20)
    assert [image.shape for image in batch['inputs']] == [(channels, 50, 70)] * 2
    truth = batch['data_samples'][1].gt_instances
    assert truth.labels.max() == 1 and 'masks' not in truth and 'gt_sem_seg' not in batch['data_samples'][1]
    assert (truth.bboxes >= 0).all() and (truth.bboxes <= torch.tensor([70, 50, 70, 50])).all()


def test_a_detector_of_masks_gets_those_of_its_boxes(faster_rcnn):
    model = MODELS.build(faster_rcnn())
    model.roi_head.mask_head = torch.nn.Identity()
    truth = synthetic_batch(model, images=1, size=(50, 70), boxes=3)['data_samples'][0].gt_instances
    for mask, (x1, y1, x2, y2) in zip(truth.masks.masks, truth.bboxes.tolist()):
        assert mask.shape == (50, 70)
        assert mask[:, int(x1):int(x2) + 1].any() and abs(mask.sum() - (x2 - x1) * (y2 - y1)) < 80
