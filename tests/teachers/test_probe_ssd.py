"""SSDs, whose last layers fit one size of image alone."""
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from kd_det.context import LevelError, pair_levels
from kd_det.taps import Taps
from kd_det.teachers import probe_config, probe_levels

STRIDES = {300: (8, 16, 32, 64, 100, 300), 512: (8, 16, 32, 64, 128, 256, 512)}
NECKS = {300: dict(level_strides=(2, 2, 1, 1), level_paddings=(1, 1, 0, 0)),
         512: dict(level_strides=(2, 2, 2, 2, 1), level_paddings=(1, ) * 5, last_kernel_size=4)}


@pytest.fixture
def ssd(one_stage):
    """Makes the model dict of a slim SSD300 or SSD512, with the levels and anchors of MMDetection's configs."""

    def make(size: int, width: int = 4) -> ConfigDict:
        model, strides = one_stage('ssd', width=width), STRIDES[size]
        channels = (2 * width, 4 * width, *(8, ) * (len(strides) - 2))
        model.backbone.out_indices = (1, 2)
        model.neck = ConfigDict(type='SSDNeck', in_channels=channels[:2], out_channels=channels, **NECKS[size])
        model.bbox_head.in_channels = channels
        model.bbox_head.anchor_generator = dict(
            type='SSDAnchorGenerator', scale_major=False, input_size=size, strides=strides, ratios=[[2]] * len(strides),
            basesize_ratio_range=(0.15 if size == 300 else 0.1, 0.9))
        return model

    return make


@pytest.mark.parametrize('size', [300, 512])
def test_the_levels_are_called_by_the_strides_of_the_anchors(ssd, size):
    config = ssd(size)
    levels = probe_config(config, ['neck', 'backbone'])
    assert tuple(level.stride for level in levels['neck']) == STRIDES[size]
    assert tuple(level.stride for level in levels['backbone']) == (8, 16)
    student = MODELS.build(config)
    assert probe_levels(student, Taps(student, ['neck', 'backbone'])) == levels


def test_masks_of_predictions_find_the_levels_of_features(ssd, distiller, batch):
    model = distiller(ssd(300), ssd(300, width=8), distill=dict(
        pfi=dict(type='FeatureImitation', mask='PredictionDifference', distance='mse', normalizer='cells'),
        frs=dict(type='FeatureImitation', mask='TeacherConfidence', normalizer='mask')))
    model.init_weights()
    losses = model.loss(**model.data_preprocessor(batch(shapes=((300, 300), ) * 2), True))
    assert losses['loss_pfi'] > 0 and torch.isfinite(losses['loss_frs'])


def test_a_random_teacher_has_weights_of_value(ssd, distiller):
    """Those of SSD's L2Norm are whatever the memory held, until they are initialised."""
    teacher = ssd(300)
    teacher.backbone.init_cfg = dict(type='Pretrained', checkpoint='nowhere.pth')
    model = distiller(ssd(300), teacher, distill=dict(pkd=dict(type='PKD')))
    weights = model.build_teachers()[0].model.state_dict()
    assert (weights['neck.l2_norm.weight'] == 20).all() and all(value.isfinite().all() for value in weights.values())


def test_two_sizes_share_four_levels(ssd):
    student, teacher = (probe_config(ssd(size), ['neck'])['neck'] for size in (300, 512))
    assert [pair.student_spec.stride for pair in pair_levels(student, teacher, 4)] == [8, 16, 32, 64]
    with pytest.raises(LevelError, match='level 4 of stride 100 has no partner'):
        pair_levels(student, teacher)
