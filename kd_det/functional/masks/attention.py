"""How strongly a feature map responds, by cell and by channel.

Differentiable, because the student's is also compared with the teacher's; the functions that use an attention as a
weight detach it.
"""
from __future__ import annotations

import torch
from torch import Tensor


def spatial_attention(feature: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """How strongly each cell responds: H·W · softmax over cells of mean_c |F| / T (FGD, FKD).

    Args:
        feature: (N, C, H, W).
        temperature: T; the smaller, the sharper.
        valid: (N, H, W) bool; the softmax runs over these cells alone, their number replaces H·W, others get 0.

    Returns:
        (N, H, W); each image has mean 1 over its (valid) cells.
    """
    return attend_to_cells(feature.abs().mean(1), temperature, valid)


def channel_attention(feature: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """How strongly each channel responds: C · softmax over channels of mean_hw |F| / T (FGD, FKD).

    Args:
        feature: (N, C, H, W).
        temperature: T; the smaller, the sharper.
        valid: (N, H, W) bool; the mean runs over these cells alone.

    Returns:
        (N, C); each image has mean 1 over its channels, or 0 if none of its cells is valid.
    """
    if valid is None:
        return attend_to_channels(feature.abs().mean((2, 3)), temperature)
    count = valid.sum((1, 2))[:, None]
    response = (feature.abs() * valid[:, None]).sum((2, 3)) / count.clamp(min=1)
    return attend_to_channels(response, temperature) * (count > 0)


def attend_to_cells(response: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """:func:`spatial_attention` from mean_c |F|, (N, H, W)."""
    count = response[0].numel() if valid is None else valid.sum((1, 2), keepdim=True)
    return count * spatial_softmax(response / temperature, valid)


def attend_to_channels(response: Tensor, temperature: float) -> Tensor:
    """:func:`channel_attention` from mean_hw |F|, (N, C)."""
    return response.shape[1] * (response / temperature).softmax(1)


def spatial_softmax(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Softmax over the cells of each map, or over its valid cells alone, where the others get 0.

    Args:
        logits: (N, H, W).
        valid: (N, H, W) bool.

    Returns:
        (N, H, W); each image sums to 1, or to 0 if none of its cells is valid.
    """
    if valid is None:
        return logits.flatten(1).softmax(1).view_as(logits)
    # A finite floor: a softmax over -inf alone, the image that is all padding, would be nan.
    floored = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    return floored.flatten(1).softmax(1).view_as(logits) * valid
