import pytest
import torch
from torch import nn

from kd_det.losses.adapters import GlobalContext, build_adapter


@pytest.mark.parametrize('kind, student, teacher, expected', [
    ('auto', 8, 8, nn.Identity), ('auto', 8, 12, nn.Conv2d), ('none', 8, 8, nn.Identity),
    ('conv1x1', 8, 8, nn.Conv2d), ('conv3x3', 8, 12, nn.Conv2d)])
def test_adapter(kind, student, teacher, expected):
    adapter = build_adapter(kind, student, teacher)
    assert type(adapter) is expected
    assert adapter(torch.randn(2, student, 5, 7)).shape == (2, teacher, 5, 7)


def test_adapter_errors():
    with pytest.raises(ValueError, match='equal channels'):
        build_adapter('none', 8, 12)
    with pytest.raises(ValueError, match="^kind: expected one of .*, got 'linear'"):
        build_adapter('linear', 8, 12)


def test_global_context_starts_as_the_identity_and_learns():
    block, feature = GlobalContext(6), torch.randn(2, 6, 3, 4)
    assert torch.equal(block(feature), feature)
    block(feature).square().sum().backward()
    assert block.expand.weight.grad.abs().sum() > 0


def test_global_context_does_not_look_at_padding():
    block, feature, valid = GlobalContext(6), torch.randn(1, 6, 3, 4), torch.zeros(1, 3, 4, dtype=torch.bool)
    nn.init.normal_(block.expand.weight)
    valid[:, :, :2] = True
    changed = feature.clone()
    changed[..., 2:] += 5
    torch.testing.assert_close(block(feature, valid)[..., :2], block(changed, valid)[..., :2])
    torch.testing.assert_close(block(feature, valid)[..., :2], block(feature[..., :2]))
