"""The operators through ``mmcv.ops``' public functions against compiled mmcv's answers (mmcv 2.x CPU kernels)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv import ops

GOLDENS = Path(__file__).parents[2] / 'goldens' / 'mmcv_ops.npz'


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDENS) as file:
        values = {name: torch.from_numpy(file[name]) for name in file.files if name != 'meta'}
        return dict(values, meta=json.loads(str(file['meta'])))


def assert_close(actual, expected):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.shape == expected.shape and error < 1e-5, f'relative error {error}'


@pytest.mark.parametrize('offset', [0, 1])
def test_nms(golden, offset):
    dets, inds = ops.nms(golden['boxes'], golden['scores'], golden['meta']['nms_iou'], offset=offset)
    assert torch.equal(inds, golden[f'nms_offset{offset}_inds'])
    assert torch.equal(dets, golden[f'nms_offset{offset}_dets'])


def test_nms_with_score_threshold(golden):
    # The golden keeps the twenty best of the boxes above the score.
    expected = golden['nms_thr_inds']
    dets, inds = ops.nms(golden['boxes'], golden['scores'], golden['meta']['nms_iou'], score_threshold=0.3, max_num=20)
    assert torch.equal(inds, expected)
    assert torch.equal(dets, golden['nms_thr_dets'])


def test_batched_nms(golden):
    dets, inds = ops.batched_nms(golden['boxes'], golden['scores'], golden['ids'],
                                 dict(type='nms', iou_threshold=golden['meta']['batched_iou']))
    assert torch.equal(inds, golden['batched_nms_inds'])
    assert torch.equal(dets, golden['batched_nms_dets'])


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms(golden, method):
    options = golden['meta']['soft_nms']
    dets, inds = ops.soft_nms(golden['boxes'], golden['scores'], options['iou'], options['sigma'],
                              options['min_score'], method)
    assert torch.equal(inds, golden[f'soft_nms_{method}_inds'])
    assert_close(dets, golden[f'soft_nms_{method}_dets'])


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align(golden, aligned, sampling_ratio):
    key = f'roi_align_aligned{int(aligned)}_sr{sampling_ratio}'
    feat = golden['feat'].clone().requires_grad_()
    output = ops.roi_align(feat, golden['rois'], golden['meta']['out_size'], golden['meta']['spatial_scale'],
                           sampling_ratio, 'avg', aligned)
    output.backward(golden[key + '_gout'])
    assert_close(output, golden[key])
    assert_close(feat.grad, golden[key + '_gin'])


def test_modulated_deform_conv(golden):
    feat, weight = (golden[name].clone().requires_grad_() for name in ('feat', 'dcn_weight'))
    output = ops.modulated_deform_conv2d(feat, golden['dcn_offset'], golden['dcn_mask'], weight, None, 1, 1)
    output.backward(golden['dcnv2_gout'])
    assert_close(output, golden['dcnv2_out'])
    assert_close(feat.grad, golden['dcnv2_gin'])
    assert_close(weight.grad, golden['dcnv2_gw'])


def test_deform_conv(golden):
    feat = golden['feat'].clone().requires_grad_()
    output = ops.deform_conv2d(feat, golden['dcn_offset'], golden['dcn_weight'], 1, 1)
    output.backward(golden['dcnv2_gout'])  # both versions were given the same gradient
    assert_close(output, golden['dcnv1_out'])
    assert_close(feat.grad, golden['dcnv1_gin'])
