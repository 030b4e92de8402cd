"""Cell by cell, where a mask says so."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.blocks import by_channels
from kd_det.functional.features.shapes import check_shapes

_DISTANCES = {
    'mse': lambda student, teacher: (student - teacher).square(),
    'l1': lambda student, teacher: (student - teacher).abs(),
    'smooth_l1': lambda student, teacher: F.smooth_l1_loss(student, teacher, reduction='none'),
    # Half the squared distance of unit vectors: equal to 1 - cos, but exactly 0 where the two agree.
    'cosine': lambda student, teacher: (unit(student, 1) - unit(teacher, 1)).square() / 2,
}


def masked_imitation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    channel_weight: Tensor | None = None,
    distance: str = 'mse',
    normalizer: str | Tensor = 'batch',
) -> Tensor:
    """Imitation of the teacher's feature where the mask says so: Σ M·d(s, t) / normalizer.

    ===================== ============================================ ============================================
    normalizer            value                                        used by
    ===================== ============================================ ============================================
    ``'batch'``           N                                            FGD (arXiv 2111.11837), MGD (2205.01529)
    ``'mask'``            ΣM over the cells                            PGD (2203.05469), within one level
    ``'twice_mask'``      2·ΣM                                         FGFI (1906.03609)
    ``'twice_elements'``  2·C·ΣM, the mask repeated over the channels  DeFeat (2103.14475)
    ``'cells'``           N·H·W                                        PFI (2112.04840), mean over images
    ``'mean'``            N·C·H·W                                      no method: the size-normalised form
    a scalar tensor       itself                                       a normalizer that the caller synchronised
    ===================== ============================================ ============================================

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        mask: (N, H, W), or four dimensions that broadcast to (N, C, H, W); None for 1 everywhere.
        channel_weight: (N, C), a factor of the mask; None for 1 everywhere.
        distance: ``'mse'`` squared difference, ``'l1'``, ``'smooth_l1'`` with threshold 1, each summed over the
            channels; or ``'cosine'``, 1 - cos of the two channel vectors of a cell, as half the squared difference of
            the unit vectors, which is what channel weights then weigh.
        normalizer: See the table; ΣM is kept from 0, so that an empty mask gives 0. A mask that differs between
            channels counts with its mean over them, and ``channel_weight`` does not count.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ, or an unknown distance or normalizer.
    """
    check_shapes(student, teacher)
    if distance not in _DISTANCES:
        raise ValueError(f'distance={distance!r}: expected one of {", ".join(_DISTANCES)}.')
    teacher = teacher.detach()
    if mask is not None:
        mask = mask.detach() if mask.dim() == 4 else mask.detach()[:, None]
    # Channels are summed first where the mask is the same for all of them: no product of the full size.
    if mask is None or mask.shape[1] == 1:
        difference = difference_of_cells(student, teacher, channel_weight, distance)
        total = (difference if mask is None else difference * mask).sum()
    else:
        weight = mask if channel_weight is None else mask * channel_weight.detach()[:, :, None, None]
        total = (_DISTANCES[distance](student, teacher) * weight).sum()
    if isinstance(normalizer, str):
        normalizer = _normalizer(normalizer, mask, student)
    return total / normalizer


def decoupled_imitation(student: Tensor, teacher: Tensor, foreground: Tensor,
                        valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Imitation of the foreground and of the background apart, each Σ M·(s - t)² / (2·C·ΣM) (DeFeat, arXiv 2103.14475).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        foreground: (N, H, W) in [0, 1], see :func:`kd_det.functional.masks.level_foreground`; the background is
            1 - foreground, and nothing where that is negative.
        valid: (N, H, W) bool; cells of padding belong to neither part.

    Returns:
        The loss of the foreground and of the background, two scalars.
    """
    check_shapes(student, teacher)
    difference = difference_of_cells(student, teacher.detach())
    foreground = foreground.detach()[:, None]
    background = (1 - foreground).clamp(min=0)
    if valid is not None:
        foreground, background = foreground * valid[:, None], background * valid[:, None]
    return tuple((difference * mask).sum() / _normalizer('twice_elements', mask, student)
                 for mask in (foreground, background))


def generation_distance(generated: Tensor, teacher: Tensor) -> Tensor:
    """Σ (G(s) - t)² / N for the feature generated from the randomly masked student (MGD, arXiv 2205.01529).

    Args:
        generated: (N, C, H, W), the output of the generation block.
        teacher: (N, C, H, W).

    Returns:
        Scalar.
    """
    return masked_imitation(generated, teacher, normalizer='batch')


def difference_of_cells(student: Tensor, teacher: Tensor, channel_weight: Tensor | None = None,
                distance: str = 'mse') -> Tensor:
    """The distance of each cell, summed over the channels with their (N, C) weight: (N, 1, H, W)."""
    if distance == 'cosine':  # no sum over channels: each has a part in the length
        return sum_channels(_DISTANCES[distance](student, teacher), channel_weight)
    features = [student, teacher] + ([] if channel_weight is None else [channel_weight.detach()])
    return by_channels(lambda s, t, *weight: sum_channels(_DISTANCES[distance](s, t), *weight), *features)


def sum_channels(difference: Tensor, channel_weight: Tensor | None = None) -> Tensor:
    """(N, C, H, W) to (N, 1, H, W), weighted by (N, C)."""
    if channel_weight is None:
        return difference.sum(1, keepdim=True)
    return torch.einsum('nchw,nc->nhw', difference, channel_weight)[:, None]


def _normalizer(name: str, mask: Tensor | None, feature: Tensor) -> Tensor | int:
    """See the table of :func:`masked_imitation`; the mask has four dimensions or is None."""
    batch, channels, height, width = feature.shape
    constants = dict(batch=batch, cells=batch * height * width, mean=feature.numel())
    factors = dict(mask=1, twice_mask=2, twice_elements=2 * channels)
    if name in constants:
        return constants[name]
    if name not in factors:
        raise ValueError(f'normalizer={name!r}: expected a tensor or one of {", ".join([*constants, *factors])}.')
    if mask is None:
        return factors[name] * batch * height * width
    total = mask.sum() * (constants['cells'] / mask[:, 0].numel() / mask.shape[1])
    return factors[name] * total.clamp(min=torch.finfo(feature.dtype).eps)


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors of length 1 along ``dim``; those of length 0 stay 0 and get a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 1e-12, length, 1)
