"""The operators through ``mmcv.ops``' public functions against compiled mmcv's answers (mmcv 2.x CPU kernels)."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv import ops

GOLDENS = Path(__file__).parents[2] / 'goldens'


def load(name):
    with np.load(GOLDENS / f'{name}.npz') as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files if key != 'meta'}
        return dict(values, meta=json.loads(str(file['meta']))) if 'meta' in file.files else values


@pytest.fixture(scope='module')
def golden():
    return load('mmcv_ops')


@pytest.fixture(scope='module')
def plain_golden():
    """Operators that torchvision lacks: those of mmcv that run on the GPU alone, compiled as C++; and ``nms_match``."""
    return load('mmcv_ops_without_torchvision')


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    error = (actual - expected).abs().max() / (scale if scale > 0 else 1)
    assert error < 1e-5, f'relative error {error}'


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


@pytest.mark.parametrize('version, module', [('v1', ops.DeformConv2dPack), ('v2', ops.ModulatedDeformConv2dPack)])
def test_offsets_on_the_border_get_no_gradient(version, module):
    # At zero offsets, where training starts, the padding's innermost ring lies exactly on -1, H and W.
    golden = {name[3:]: tensor for name, tensor in load('dcn_border').items() if name.startswith(version)}
    conv = module(4, 6, 3, padding=1, bias=False)
    conv.weight.data.copy_(golden['weight'])
    x = golden['x'].clone().requires_grad_()
    output = conv(x)
    output.backward(golden['g'])
    assert_close(output, golden['o'])
    assert_close(x.grad, golden['gx'])
    assert_close(conv.conv_offset.weight.grad, golden['gow'])
    assert_close(conv.conv_offset.bias.grad, golden['gob'])


def test_dyhead():
    from mmdet.models.necks import DyHead
    golden = load('dyhead')
    neck = DyHead(16, 16, num_blocks=2, zero_init_offset=False).eval()
    neck.load_state_dict({name[3:]: tensor for name, tensor in golden.items() if name.startswith('sd_')})
    inputs = [golden[f'x{level}'].clone().requires_grad_() for level in range(3)]
    outputs = neck(inputs)
    sum((output * golden[f'w{level}']).sum() for level, output in enumerate(outputs)).backward()
    for level, (feature, output) in enumerate(zip(inputs, outputs)):
        assert_close(output, golden[f'o{level}'])
        assert_close(feature.grad, golden[f'g{level}'])
    for name, parameter in neck.named_parameters():
        assert_close(parameter.grad, golden[f'pg_{name}'])


def test_carafe(plain_golden):
    feat, mask = (plain_golden[name].clone().requires_grad_() for name in ('carafe_feat', 'carafe_mask'))
    output = ops.carafe(feat, mask, *plain_golden['meta']['carafe'].values())
    output.backward(plain_golden['carafe_gout'])
    assert_close(output, plain_golden['carafe_out'])
    assert_close(feat.grad, plain_golden['carafe_gfeat'])
    assert_close(mask.grad, plain_golden['carafe_gmask'])


@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('moved', [False, True])
def test_deform_roi_pool(plain_golden, moved, sampling_ratio):
    key, options = f'droi_{"moved" if moved else "plain"}_sr{sampling_ratio}', plain_golden['meta']['droi']
    feat, offset = (plain_golden[name].clone().requires_grad_() for name in ('droi_feat', 'droi_offset'))
    output = ops.deform_roi_pool(feat, plain_golden['droi_rois'], offset if moved else None, options['out_size'],
                                 options['spatial_scale'], sampling_ratio, options['gamma'])
    output.backward(plain_golden['droi_gout'])
    assert_close(output, plain_golden[key])
    assert_close(feat.grad, plain_golden[key + '_gin'])
    if moved:
        assert_close(offset.grad, plain_golden[key + '_goffset'])


def test_nms_match(plain_golden):
    groups = ops.nms_match(plain_golden['match_dets'], plain_golden['meta']['match_iou'])
    assert [len(group) for group in groups] == plain_golden['match_sizes'].tolist()
    assert torch.equal(torch.cat(groups), plain_golden['match_indices'])


def test_masked_conv2d(plain_golden):
    output = ops.masked_conv2d(*(plain_golden[f'masked_{name}'] for name in ('feat', 'mask', 'weight', 'bias')),
                               plain_golden['meta']['masked_padding'])
    assert_close(output, plain_golden['masked_out'])
