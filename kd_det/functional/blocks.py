"""Sums over channels or cells, evaluated a few channels at a time, so that a CPU finds them in its cache."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block on the CPU: 1 MB in float32, so that the few that are at work stay in its cache.
BLOCK = 2**18


def by_channels(loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
    """``loss(*features)`` of a loss that is a sum over channels, by blocks of channels.

    Value and gradient are those of ``loss(*features)``, up to rounding. Temporaries have the size of a block, and stay
    in the cache of a CPU; on a GPU one block holds all channels. For the backward pass nothing is kept but the
    features: each block is computed once more there (arXiv 1604.06174).

    Args:
        loss: Of the same channels of all features. Its result has one shape for any number of channels; other tensors
            that it uses get no gradient.
        features: (N, C, ...), the first of which is the largest.

    Returns:
        The sum of the results.

    Example:
        >>> feature = torch.arange(6.0).view(1, 3, 1, 2)
        >>> by_channels(lambda x: x.square().sum(1), feature)
        tensor([[[20., 35.]]])
    """
    if features[0].numel() <= BLOCK:
        return loss(*features)
    total: Tensor = _ByChannels.apply(loss, *features)
    return total


def cut_into_blocks(feature: Tensor, scratch: int) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Cuts a feature into blocks of images and channels, one that holds all on a GPU.

    Args:
        feature: (N, C, K), with K cells.
        scratch: Number of buffers.

    Yields:
        The slices of images and channels, and the buffers, each of the block's size, for what is made of it; the next
        block gets the same memory.
    """
    batch, channels, cells = feature.shape
    images, step = 1, max(1, BLOCK // cells)
    if feature.device.type != 'cpu' or feature.numel() <= BLOCK:
        images, step = batch, channels
    buffers = feature.new_empty(scratch, images, min(step, channels), cells)
    for image in range(0, batch, images):
        for first in range(0, channels, step):
            yield ((slice(image, image + images), slice(first, first + step)),
                   [buffer[:, :channels - first] for buffer in buffers])


class _ByChannels(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(*features)
        first, *others = _cut_channels(features[0])
        total = loss(*(feature[:, first] for feature in features))
        for block in others:
            total = total + loss(*(feature[:, block] for feature in features))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(feature) if need else None for feature, need in zip(features, needed)]
        learning = [each for each in gradients if each is not None]
        for block in _cut_channels(features[0]):
            inputs = [feature[:, block].detach().requires_grad_(need) for feature, need in zip(features, needed)]
            with torch.enable_grad():
                value = ctx.loss(*inputs)
            found = torch.autograd.grad(value, [each for each in inputs if each.requires_grad], gradient)
            for whole, part in zip(learning, found):
                whole[:, block] = part
        return (None, *gradients)


def _cut_channels(feature: Tensor) -> list[slice]:
    channels = feature.shape[1]
    step = max(1, BLOCK * channels // feature.numel()) if feature.device.type == 'cpu' else channels
    return [slice(first, first + step) for first in range(0, channels, step)]
