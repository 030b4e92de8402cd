"""Means and variances of the channels of features, over all images and processes, and features that get others."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional.blocks import cut_into_blocks


def image_moments(feature: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean and variance of each channel of each image over its cells.

    Args:
        feature: (N, C, H, W).
        valid: (N, H, W) bool; the other cells are left out.

    Returns:
        (N, 2, C): means, and variances (biased: divided by the number of cells); both 0 of an image without cells.

    Example:
        >>> image_moments(torch.tensor([[[[1.0, 3.0]]]]))
        tensor([[[2.],
                 [1.]]])
    """
    if valid is None:
        variance, mean = torch.var_mean(feature, (2, 3), correction=0)
        return torch.stack([mean, variance], 1)
    inside = valid[:, None].to(feature.dtype)
    count = inside.sum((2, 3)).clamp(min=1)
    mean = (feature * inside).sum((2, 3)) / count
    centred = (feature - mean[..., None, None]) * inside
    return torch.stack([mean, centred.square().sum((2, 3)) / count], 1)


def block_moments(feature: Tensor, valid: Tensor) -> Tensor:
    """As :func:`image_moments`, by blocks that stay in a CPU's cache, and with a gradient by hand.

    Nothing is kept for the backward pass but the feature.

    Args:
        feature: (N, C, H, W).
        valid: (N, H, W) bool.

    Returns:
        (N, 2, C).

    Example:
        >>> feature = torch.tensor([[[[1.0, 3.0, 9.0]]]])
        >>> block_moments(feature, torch.tensor([[[True, True, False]]]))
        tensor([[[2.],
                 [1.]]])
    """
    moments: Tensor = _BlockMoments.apply(feature, valid)
    return moments


class _BlockMoments(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, feature: Tensor, valid: Tensor) -> Tensor:
        cells, inside = feature.flatten(2), valid.flatten(1)[:, None].to(feature.dtype)
        count = inside.sum(2).clamp(min=1)
        moments = feature.new_empty(len(feature), 2, feature.shape[1])
        for (images, channels), (scratch, ) in cut_into_blocks(cells, 1):
            block = cells[images, channels]
            mean = torch.mul(block, inside[images], out=scratch).sum(2) / count[images]
            centred = torch.sub(block, mean[..., None], out=scratch).mul_(inside[images])
            moments[images, 0, channels], moments[images, 1, channels] = mean, centred.square_().sum(2) / count[images]
        ctx.save_for_backward(feature, inside, count, moments)
        return moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        feature, inside, count, moments = ctx.saved_tensors
        of_mean, of_variance = (gradient / count[:, None])[..., None].unbind(1)
        cells = feature.flatten(2)
        found = torch.empty_like(cells)
        for (images, channels), _ in cut_into_blocks(cells, 0):
            block = torch.sub(cells[images, channels], moments[images, 0, channels, None], out=found[images, channels])
            block.mul_(2 * of_variance[images, channels]).add_(of_mean[images, channels]).mul_(inside[images])
        return found.view_as(feature), None


def pool_moments(moments: Sequence[Tensor], counts: Sequence[Tensor],
                 total: Callable[[Tensor], Tensor] = torch.clone) -> list[Tensor]:
    """Mean and variance over all images from those of each, for several features at once.

    Args:
        moments: (N, 2, C) of each feature, see :func:`image_moments`.
        counts: (N,) cells of each image that they are of, of each feature.
        total: Sums a tensor over the processes of data-parallel training, with its gradient: their batches are one.

    Returns:
        (2, C) of each feature.

    Example:
        >>> moments = torch.tensor([[[0.0], [1.0]], [[2.0], [1.0]]])
        >>> pool_moments([moments], [torch.tensor([4, 4])])
        [tensor([[1.],
                [2.]])]
    """
    widths = [each.shape[2] for each in moments]
    weights = [count[:, None].to(each.dtype) for each, count in zip(moments, counts)]
    sums = [torch.cat([(weight * each[:, 0]).sum(0), weight.sum()[None]]) for each, weight in zip(moments, weights)]
    means, numbers = zip(*((each[:-1] / each[-1].clamp(min=1), each[-1].clamp(min=1))
                           for each in total(torch.cat(sums)).split([width + 1 for width in widths])))
    squares = [(weight * (each[:, 1] + (each[:, 0] - mean).square())).sum(0)
               for each, weight, mean in zip(moments, weights, means)]
    return [torch.stack([mean, square / number])
            for mean, square, number in zip(means, total(torch.cat(squares)).split(widths), numbers)]


def normalize_channels(feature: Tensor, moments: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Each channel with mean 0 and deviation 1: (x − μ) / √(σ² + ε), batch normalisation without weights of its own.

    Args:
        feature: x, (N, C, H, W).
        moments: μ and σ², (2, C), see :func:`pool_moments`.
        epsilon: ε.

    Returns:
        (N, C, H, W).

    Example:
        >>> normalize_channels(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[2.0], [1.0]]), epsilon=0)
        tensor([[[[-1.,  1.]]]])
    """
    mean, variance = moments[..., None, None]
    scale = (variance + epsilon).rsqrt()
    return torch.addcmul(-mean * scale, feature, scale)


def align_channels(feature: Tensor, moments: Tensor, target: Tensor) -> Tensor:
    """Each channel with another mean and deviation: (x − μ)·(σ' + ε) / (σ + ε) + μ', as CrossKD (arXiv 2306.11369).

    ε = 1e-6. The feature itself where both are the same, to the last bit.

    Args:
        feature: x, (N, C, H, W).
        moments: Its μ and σ², (2, C), see :func:`pool_moments`; a gradient passes.
        target: μ' and σ'², (2, C).

    Returns:
        (N, C, H, W).

    Example:
        >>> align_channels(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([[2.0], [1.0]]), torch.tensor([[5.0], [4.0]]))
        tensor([[[[3.0000, 7.0000]]]])
    """
    (mean, deviation), (target_mean, target_deviation) = (
        (each[0][:, None, None], _root(each[1])[:, None, None]) for each in (moments, target))
    ratio = (target_deviation + 1e-6) / (deviation + 1e-6)
    return torch.addcmul(target_mean - mean * ratio, feature, ratio)


def _root(variance: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0."""
    return torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
