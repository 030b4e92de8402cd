"""Winograd's convolutions: the plain ones up to rounding, and only where they may stand for them."""
import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from kd_det.teachers import winograd
from kd_det.teachers.winograd import use_winograd, winograd_conv2d


@pytest.mark.parametrize('shape', [(1, 5, 8, 8), (2, 5, 7, 11), (3, 1, 1, 1), (1, 7, 4, 30), (2, 6, 33, 3)])
@pytest.mark.parametrize('block', [1, 3000, 2**20])
def test_it_is_the_convolution_whatever_the_shape_and_the_block(shape, block, monkeypatch):
    monkeypatch.setattr(winograd, 'BLOCK', block)
    torch.manual_seed(0)
    images, weight, bias = torch.randn(shape), torch.randn(4, shape[1], 3, 3), torch.randn(4)
    expected = conv2d(images.double(), weight.double(), bias.double(), padding=1)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = winograd_conv2d(images.to(memory_format=memory_format), weight.to(memory_format=memory_format), bias)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    torch.testing.assert_close(winograd_conv2d(images, weight) + bias[:, None, None], found)


def test_rounding_stays_far_below_what_an_engine_may_change():
    torch.manual_seed(0)
    images, weight = torch.randn(2, 256, 40, 40), torch.randn(256, 256, 3, 3)
    expected = conv2d(images.double(), weight.double(), padding=1)
    assert (winograd_conv2d(images, weight) - expected).norm() <= 3e-6 * expected.norm()


@pytest.fixture
def calls(monkeypatch):
    """How often Winograd's algorithm ran."""
    made = []
    monkeypatch.setattr(winograd, 'winograd_conv2d', lambda *given: made.append(1) or winograd_conv2d(*given))
    return made


@torch.no_grad()
def test_it_stands_for_wide_convolutions_on_large_maps(calls):
    conv = nn.Conv2d(128, 128, 3, padding=1)
    images = torch.randn(1, 128, 32, 32)
    expected = conv(images)
    use_winograd(nn.Sequential(conv))
    assert (conv(images) - expected).norm() <= 1e-5 * expected.norm()
    assert len(calls) == 1


@pytest.mark.parametrize('options', [dict(stride=2), dict(dilation=2), dict(groups=2), dict(padding=0),
                                     dict(padding_mode='reflect'), dict(kernel_size=5), dict(out_channels=64)])
@torch.no_grad()
def test_other_convolutions_stay_as_they_are(options, calls):
    conv = nn.Conv2d(**{**dict(in_channels=128, out_channels=128, kernel_size=3, padding=1), **options})
    images = torch.randn(1, 128, 32, 32)
    expected = conv(images)
    use_winograd(conv)
    assert torch.equal(conv(images), expected) and not calls


def test_where_it_can_not_be_faster_or_would_have_to_be_differentiated_it_does_not_run(calls):
    conv = nn.Conv2d(128, 128, 3, padding=1)
    use_winograd(conv)
    images = torch.randn(1, 128, 32, 32)
    conv(images).sum().backward()
    with torch.no_grad():
        conv(images[..., :12, :12]), conv(images[0])
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert conv(images).dtype == torch.bfloat16
        conv.double()(images.double())
    assert conv.weight.grad is not None and not calls
