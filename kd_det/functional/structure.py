"""What to compare in the structure of features: local windows (SSIM), bands of a wavelet transform (FreeKD).

The teacher is taken as a constant. Results are finite for maps of any size, and exactly 0 where the student equals the
teacher.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional.blocks import by_channels
from kd_det.functional.features import check_shapes


def structural_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None, window: int = 11,
                        sigma: float = 1.5) -> Tensor:
    """1 - SSIM of the Gaussian window around each cell, per channel (arXiv 2211.13133; SSIM: Wang et al., TIP 2004).

    ::

        1 - SSIM = 1 - (2·μ_s·μ_t + c₁)/(μ_s² + μ_t² + c₁) · (2·σ_st + c₂)/(σ_s² + σ_t² + c₂)
                 = a + b·(1 - a),   a = (μ_s - μ_t)²/(μ_s² + μ_t² + c₁),   b = var(s - t)/(σ_s² + σ_t² + c₂)

    with c₁ = 0.01², c₂ = 0.03², of values that are 0 and 1 at the least and the largest of the teacher's in the image
    and channel. The second form, which is computed, is 0 where the two agree. SSIM is made for pictures, which have no
    negative values: of an inverted feature both its factors would be negative, and their product 1. So where means have
    opposite signs, a > 1, the pattern does not count: a + b·max(1 - a, 0).

    The window of a cell ends at the border of the image, where the weights of what is left of it have the sum 1 again.

    Args:
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        valid: (N, H, W) bool; windows hold these cells alone, and these alone count.
        window: Cells per side, odd.
        sigma: Deviation of the Gaussian, in cells.

    Returns:
        Scalar, from 0 to 2: the mean over the images, of each over channels and cells.

    Raises:
        ValueError: Shapes that differ, or an even window.

    Example:
        >>> teacher = torch.arange(16.0).view(1, 1, 4, 4)
        >>> structural_distance(teacher, teacher), structural_distance(-teacher, teacher) > 1
        (tensor(0.), tensor(True))
    """
    check_shapes(student, teacher)
    if window % 2 == 0:
        raise ValueError(f'window={window}: expected an odd number of cells, with one in the middle.')
    batch, channels, height, width = student.shape
    cells = student.new_ones(batch, 1, height, width, dtype=torch.bool) if valid is None else valid[:, None]
    inside = cells.to(student.dtype)
    weights = [exp(-place**2 / (2 * sigma**2)) for place in range(window // 2 + 1)]
    share = 1 / _blur(inside, weights).clamp(min=torch.finfo(student.dtype).tiny)

    def mean(values: Tensor) -> Tensor:
        return _blur(values * inside, weights) * share

    def total(student: Tensor, teacher: Tensor) -> Tensor:
        """(N,), over channels and cells."""
        least = teacher.masked_fill(~cells, inf).amin((2, 3), keepdim=True)
        largest = teacher.masked_fill(~cells, -inf).amax((2, 3), keepdim=True)
        least, scale = least.nan_to_num(posinf=0.0), (largest - least).clamp(min=1e-6)
        student, teacher = ((side - least) / scale for side in (student, teacher))
        s, t = mean(student), mean(teacher)
        apart, squares = (s - t).square(), s.square() + t.square()
        a = apart / (squares + 0.01**2)
        of_difference, of_both = (mean((student - teacher).square()) - apart,
                                  mean(student.square() + teacher.square()) - squares)
        b = of_difference.clamp(min=0) / (of_both.clamp(min=0) + 0.03**2)  # rounding may lead below 0
        return ((a + b * (1 - a).clamp(min=0)) * inside).sum((1, 2, 3))

    sums = by_channels(total, student, teacher.detach())
    return (sums / (channels * inside.sum((1, 2, 3)).clamp(min=1))).mean()


class _Blur(torch.autograd.Function):
    """Sums of (N, C, H, W) over a window with weights for its rows and the same for its columns; 0 beyond.

    By shifted sums, ten times faster on a CPU than the convolutions that there are for single channels. The
    window is symmetric, so the gradient is blurred as the map was.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weights: Sequence[float]) -> Tensor:
        ctx.weights = weights
        for dim in (2, 3):
            side, blurred = maps.shape[dim], weights[0] * maps
            for shift, weight in enumerate(weights[1:side], 1):
                for source, target in ((shift, 0), (0, shift)):
                    length = side - shift
                    blurred.narrow(dim, target, length).add_(maps.narrow(dim, source, length), alpha=weight)
            maps = blurred
        return maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _blur(gradient, ctx.weights), None


def _blur(maps: Tensor, weights: Sequence[float]) -> Tensor:
    """See :class:`_Blur`; the weights are those from the middle of the window to its edge."""
    blurred: Tensor = _Blur.apply(maps, weights)
    return blurred
