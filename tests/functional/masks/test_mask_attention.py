"""Attentions against a plain loop over cells and channels."""
import pytest
import torch

from kd_det.functional import masks


def loop_attention(feature, temperature):
    """Both attentions of one image (C, H, W)."""
    channels, height, width = feature.shape
    cells = torch.stack([feature[:, i, j].abs().sum() / channels for i in range(height) for j in range(width)])
    means = torch.stack([feature[c].abs().sum() / (height * width) for c in range(channels)])
    cells, means = (cells / temperature).exp(), (means / temperature).exp()
    return (height * width * cells / cells.sum()).view(height, width), channels * means / means.sum()


def test_attentions_equal_the_loop():
    feature = torch.randn(2, 5, 3, 4)
    for image in range(2):
        spatial, channel = loop_attention(feature[image], 0.5)
        torch.testing.assert_close(masks.spatial_attention(feature, 0.5)[image], spatial)
        torch.testing.assert_close(masks.channel_attention(feature, 0.5)[image], channel)


@pytest.mark.parametrize('attention', [masks.spatial_attention, masks.channel_attention])
def test_attentions_of_valid_cells_are_those_of_the_cropped_feature(attention):
    feature = torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    valid[:, :4, :5] = True
    actual, cropped = attention(feature, 0.5, valid), attention(feature[:, :, :4, :5], 0.5)
    if attention is masks.spatial_attention:
        assert actual[~valid].abs().max() == 0
        actual = actual[:, :4, :5]
    torch.testing.assert_close(actual, cropped)
    gradient, = torch.autograd.grad(actual.square().sum(), feature)
    assert gradient[:, :, 4:].abs().max() == 0 and gradient[:, :, :4, :5].abs().max() > 0


@pytest.mark.parametrize('attention', [masks.spatial_attention, masks.channel_attention])
def test_attentions_of_padding_alone_are_zero_with_finite_gradient(attention):
    feature = torch.randn(1, 3, 2, 2, requires_grad=True)
    actual = attention(feature, 0.5, torch.zeros(1, 2, 2, dtype=torch.bool))
    assert actual.abs().max() == 0
    gradient, = torch.autograd.grad(actual.sum(), feature)
    assert gradient.abs().max() == 0


def test_attention_of_one_cell_is_one():
    assert torch.equal(masks.spatial_attention(torch.randn(2, 3, 1, 1), 0.5), torch.ones(2, 1, 1))
