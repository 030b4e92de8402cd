"""What to compare in the structure of features: local windows (SSIM), bands of a wavelet transform (FreeKD).

The teacher is taken as a constant. Results are finite for maps of any size, and exactly 0 where the student equals the
teacher.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf
from typing import Any

import torch
import torch.nn.functional as F
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


def haar(feature: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the Haar wavelet transform, in 'zero' mode: an odd side has a row or column of zeros added.

    Of each 2 × 2 cells (a b; c d) the mean (a + b + c + d) / 2, and the differences (a + b - c - d) / 2,
    (a - b + c - d) / 2 and (a - b - c + d) / 2: a rotation of the four.

    Args:
        feature: (N, C, H, W).

    Returns:
        The lower half of the frequencies, (N, C, ⌈H/2⌉, ⌈W/2⌉), and the three bands of the upper, (N, C, 3, …, …).

    Example:
        >>> low, bands = haar(torch.tensor([[[[1.0, 1.0], [3.0, 3.0]]]]))
        >>> low, bands.flatten()
        (tensor([[[[4.]]]]), tensor([-2.,  0.,  0.]))
    """
    height, width = feature.shape[-2:]
    if height % 2 or width % 2:
        feature = F.pad(feature, (0, width % 2, 0, height % 2))
    above, below = feature[..., ::2, :], feature[..., 1::2, :]
    low, columns, rows, diagonal = ((side[..., ::2] + sign * side[..., 1::2]) / 2
                                    for side in (above + below, above - below) for sign in (1, -1))
    return low, torch.stack([rows, columns, diagonal], 2)


def inverse_haar(low: Tensor, bands: Tensor, cells: tuple[int, int]) -> Tensor:
    """The feature of which :func:`haar` makes these.

    Args:
        low: (N, C, h, w).
        bands: (N, C, 3, h, w).
        cells: H and W of the feature.

    Returns:
        (N, C, H, W).

    Example:
        >>> feature = torch.arange(9.0).view(1, 1, 3, 3)
        >>> torch.equal(inverse_haar(*haar(feature), (3, 3)), feature)
        True
    """
    rows, columns, diagonal = bands.unbind(2)
    above = torch.stack([low + rows + columns + diagonal, low + rows - columns - diagonal], -1).flatten(-2)
    below = torch.stack([low - rows + columns - diagonal, low - rows - columns + diagonal], -1).flatten(-2)
    return torch.stack([above, below], -2).flatten(-3, -2)[..., :cells[0], :cells[1]] / 2


def prompt_masks(frequencies: Tensor, prompts: Tensor) -> Tensor:
    """Where each prompt finds what it looks for: σ(prompt · frequencies) (FreeKD, arXiv 2311.12079).

    Args:
        frequencies: (N, C, h, w), of a band or the sum of several.
        prompts: (T, C).

    Returns:
        (N, T, h, w), from 0 to 1.

    Example:
        >>> prompt_masks(torch.tensor([[[[0.0, 9.0]]]]), torch.ones(1, 1)).round(decimals=2)
        tensor([[[[0.5000, 1.0000]]]])
    """
    return torch.einsum('tc,nchw->nthw', prompts, frequencies).sigmoid()


def dice_similarity(masks: Tensor) -> Tensor:
    """How alike masks are: the mean of Dice's 2·ab / (a² + b²) over all pairs of an image, 0 for a single one.

    Args:
        masks: (N, T, h, w).

    Returns:
        Scalar, from 0 to 1.

    Example:
        >>> apart, alike = torch.eye(2).view(1, 2, 1, 2), torch.ones(1, 2, 1, 2)
        >>> dice_similarity(apart), dice_similarity(alike)
        (tensor(0.), tensor(1.))
    """
    batch, count = masks.shape[:2]
    products = torch.einsum('nthw,nuhw->ntu', masks, masks)
    squares = products.diagonal(dim1=1, dim2=2)
    floor = torch.finfo(masks.dtype).tiny
    dice = 2 * products / (squares[:, :, None] + squares[:, None]).clamp(min=floor)
    pairs = 1 - torch.eye(count, dtype=masks.dtype, device=masks.device)
    return (dice * pairs).sum() / max(batch * count * (count - 1), 1)


def prompted_feature(feature: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """A feature of which only the frequencies are left that prompts look for, and how alike these are (FreeKD).

    The low frequencies and each scale of the others are multiplied by the sum of their prompts' masks, and the feature
    is made of them again. Prompts are learnt by what a detector can still do with that.

    Args:
        feature: (N, C, H, W).
        prompts: (1 + scales, T, C): of the low frequencies, then of each scale, the finest first.

    Returns:
        (N, C, H, W), and the sum over low frequencies and scales of :func:`dice_similarity`.

    Example:
        >>> feature = torch.arange(16.0).view(1, 1, 4, 4)
        >>> left, alike = prompted_feature(feature, torch.zeros(3, 2, 1))  # two masks of 1/2
        >>> torch.equal(left, feature), alike
        (True, tensor(3.))
    """
    low, scales, cells = feature, [], []
    for _ in range(len(prompts) - 1):
        cells.append((low.shape[-2], low.shape[-1]))
        low, bands = haar(low)
        scales.append(bands)
    masks = [prompt_masks(low, prompts[0]), *(prompt_masks(bands.sum(2), each)
                                              for bands, each in zip(scales, prompts[1:]))]
    left = low * masks[0].sum(1, keepdim=True)
    for bands, mask, size in zip(scales[::-1], masks[:0:-1], cells[::-1]):
        left = inverse_haar(left, bands * mask.sum(1)[:, None, None], size)
    return left, torch.stack([dice_similarity(mask) for mask in masks]).sum()


def frequency_imitation(student: Tensor, teacher: Tensor, prompts: Tensor, valid: Tensor | None = None) -> Tensor:
    """The student's frequencies approach the teacher's where prompts look (FreeKD, arXiv 2311.12079).

    ::

        L = Σ_scales mean over images, prompts, channels, bands and cells of M·|s - t|,   M = σ(prompt · Σ_bands t)

    of the upper bands of the Haar transform at several scales. (The release unpacks these scales under the names of the
    bands, and sums the bands of each.)

    Args:
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        prompts: (1 + scales, T, C), see :func:`prompted_feature`; the first are not looked at.
        valid: (N, H, W) bool; the other cells are 0 on both sides, and what is of them alone does not count.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> teacher = torch.tensor([[[[1.0, 1.0], [3.0, 3.0]]]])
        >>> frequency_imitation(0 * teacher, teacher, torch.zeros(2, 6, 1))  # a difference of 2 in one of three bands
        tensor(0.3333)
    """
    check_shapes(student, teacher)
    batch, channels = student.shape[:2]
    inside = None if valid is None else valid[:, None].to(student.dtype)
    teacher = teacher.detach() if inside is None else teacher.detach() * inside
    cells = torch.ones_like(teacher[:, :1]) if inside is None else inside
    weights, low = [], teacher
    with torch.no_grad():
        for each in prompts[1:]:
            low, bands = haar(low)
            cells = F.max_pool2d(cells, 2, ceil_mode=True)
            mask = prompt_masks(bands.sum(2), each).mean(1, keepdim=True) * cells
            weights.append(mask / (3 * channels * cells.sum((2, 3), keepdim=True).clamp(min=1)))

    def total(student: Tensor, teacher: Tensor) -> Tensor:
        """(N,), over scales, channels, bands and cells."""
        difference = (student if inside is None else student * inside) - teacher
        value = difference.new_zeros(batch)
        for weight in weights:
            difference, bands = haar(difference)  # the transform is linear
            value = value + (bands.abs().sum(2) * weight).sum((1, 2, 3))
        return value

    return by_channels(total, student, teacher).mean()


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
