"""Folding changes nothing but the last bits, also where modules are built in unusual ways."""
import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from torch import nn

from kd_det.teachers.engine import fold_batch_norms


def _trained(model: nn.Module) -> nn.Module:
    """As after some training: statistics and scales that are not those of the start."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2), module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, 0, 0.2)
    model.eval()  # of a ResNet it returns nothing
    return model.requires_grad_(False)


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize('backbone', [
    dict(type='ResNet', depth=50, base_channels=4, stem_channels=4),
    dict(type='ResNet', depth=18, base_channels=4, deep_stem=True, norm_cfg=dict(type='SyncBN')),
    dict(type='CSPNeXt', widen_factor=0.0625, norm_cfg=dict(type='BN')),
    dict(type='MobileNetV2', widen_factor=0.1)])
def test_backbones_put_out_the_same(backbone):
    torch.manual_seed(0)
    model, images = _trained(MODELS.build(backbone)), torch.randn(1, 3, 64, 64)
    expected = model(images)
    fold_batch_norms(model)
    assert _norms(model) == 0 and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for level, other in zip(model(images), expected):
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def test_a_convolution_that_levels_share_is_folded_for_each_apart(dense_head_config):
    torch.manual_seed(0)
    head = _trained(MODELS.build(dense_head_config('rtmdet_separate')))
    assert head.cls_convs[0][0].conv is head.cls_convs[1][0].conv
    features = tuple(torch.randn(1, 8, size, size) for size in (8, 4, 2))
    expected = head(features)
    fold_batch_norms(head)
    assert _norms(head) == 0
    for maps, others in zip(head(features), expected):
        for level, other in zip(maps, others):
            torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-5)


def test_a_module_that_folds_in_each_forward_is_folded_once():
    module = _trained(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True))
    images = torch.randn(1, 4, 8, 8)
    expected = module(images)
    fold_batch_norms(module)
    assert _norms(module) == 0
    torch.testing.assert_close(module(images), expected)


class _Standardized(nn.Conv2d):

    def forward(self, image):
        return self._conv_forward(image, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize('make', [
    lambda: ConvModule(4, 4, 1, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act')),
    lambda: ConvModule(4, 4, 1, norm_cfg=dict(type='GN', num_groups=2)),
    lambda: nn.Sequential(_Standardized(4, 4, 1), nn.BatchNorm2d(4)),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
    lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))])
def test_what_is_no_such_pair_stays(make):
    module, images = make().eval().requires_grad_(False), torch.randn(2, 4, 3, 3)
    expected, before = module(images), [type(each) for each in module.modules()]
    fold_batch_norms(module)
    assert [type(each) for each in module.modules()] == before and torch.equal(module(images), expected)
