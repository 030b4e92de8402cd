"""Channel by channel, whatever their scale."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.blocks import by_channels
from kd_det.functional.features.shapes import check_shapes


def channel_wise_kl(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Each channel as a distribution over the cells: T² · Σ KL(t ‖ s) / (N·C) (CWD, arXiv 2011.13256).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        temperature: T of the softmax over the H·W cells.
        valid: (N, H, W) bool; the softmax runs over these cells alone.

    Returns:
        Scalar.
    """
    check_shapes(student, teacher)

    def divergence(*features: Tensor) -> Tensor:
        logits = (feature / temperature for feature in features)
        if valid is not None:
            # A finite floor: both sides give such a cell probability 0, and 0 · (finite - finite) is 0.
            logits = (each.masked_fill(~valid[:, None], torch.finfo(each.dtype).min) for each in logits)
        return F.kl_div(*(each.flatten(2).log_softmax(2) for each in logits), reduction='sum', log_target=True)

    return temperature**2 * by_channels(divergence, student, teacher.detach()) / (student.shape[0] * student.shape[1])


def pearson_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Half the mean squared difference of standardised channels, 1 - Pearson (PKD, arXiv 2207.02039).

    Each channel is standardised over (N, H, W), with the unbiased deviation and ε = 1e-6; so the loss ignores scale and
    offset of either side. Channels without variation, such as those of a single cell, count as 0.

    Args:
        student: (N, C, H, W) of one level.
        teacher: (N, C, H, W) of one level.
        valid: (N, H, W) bool; statistics and mean run over these cells alone.

    Returns:
        Scalar.
    """
    check_shapes(student, teacher)

    def square(student: Tensor, teacher: Tensor) -> Tensor:
        return (_standardize(student, valid) - _standardize(teacher, valid)).square().sum()

    count = student.numel() if valid is None else student.shape[1] * valid.sum().clamp(min=1)
    return by_channels(square, student, teacher.detach()) / count / 2


def _standardize(feature: Tensor, valid: Tensor | None) -> Tensor:
    """Each channel over (N, H, W) with mean 0 and deviation 1; (N, C, H, W), 0 in cells that are not valid."""
    dims = (0, 2, 3)
    if valid is None:
        count = feature.numel() // feature.shape[1]
        centred = feature - feature.mean(dims, keepdim=True)
        freedom = max(count - 1, 1)
    else:
        weight = valid[:, None].to(feature.dtype)
        count = valid.sum()
        mean = (feature * weight).sum(dims, keepdim=True) / count.clamp(min=1)
        centred = (feature - mean) * weight
        freedom = (count - 1).clamp(min=1)
    # The norm, unlike the root of the variance, has a finite gradient at 0.
    deviation = torch.linalg.vector_norm(centred, dim=dims, keepdim=True) / freedom**0.5
    return centred / (deviation + 1e-6)
