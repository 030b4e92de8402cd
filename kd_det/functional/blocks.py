"""Losses that are sums over channels, evaluated a few channels at a time."""
from __future__ import annotations

from collections.abc import Callable, Iterator

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
    """
    return loss(*features) if features[0].numel() <= BLOCK else _ByChannels.apply(loss, *features)


class _ByChannels(torch.autograd.Function):

    @staticmethod
    def forward(ctx, loss, *features):
        ctx.loss = loss
        ctx.save_for_backward(*features)
        return sum(loss(*(feature[:, block] for feature in features)) for block in _blocks(features[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        features, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(feature) if need else None for feature, need in zip(features, needed)]
        learning = [each for each in gradients if each is not None]
        for block in _blocks(features[0]):
            inputs = [feature[:, block].detach().requires_grad_(need) for feature, need in zip(features, needed)]
            with torch.enable_grad():
                value = ctx.loss(*inputs)
            found = torch.autograd.grad(value, [each for each in inputs if each.requires_grad], gradient)
            for whole, part in zip(learning, found):
                whole[:, block] = part
        return (None, *gradients)


def _blocks(feature: Tensor) -> Iterator[slice]:
    channels = feature.shape[1]
    step = max(1, BLOCK * channels // feature.numel()) if feature.device.type == 'cpu' else channels
    return (slice(first, first + step) for first in range(0, channels, step))
