"""Only features of one shape can be compared."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.blocks import by_channels


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Raises a ValueError, with what to do, where two features differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(f'student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape: '
                         'adapt the channels and pair the levels by stride.')


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


def fkd_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    student_channels: Tensor,
    student_cells: Tensor,
    student_relation: Tensor | None = None,
    teacher_relation: Tensor | None = None,
    feature_weight: float = 7e-5,
    pooling_weight: float = 4e-3,
    relation_weight: float = 7e-5,
) -> dict[str, Tensor]:
    """Attention-guided and non-local distillation of one level (FKD, ICLR 2021, openreview uKhGRvM8QNH).

    All parts are L2 norms over the whole batch, not their squares: the difference weighted by the attention, the
    difference of the means over cells and over channels, and that of the non-local relations
    (:func:`kd_det.functional.relations.non_local`). The default weights are the released ones.

    Args:
        student: (N, C, H, W), after its 1×1 adapter.
        teacher: (N, C, H, W).
        mask: (N, H, W), the mean of both spatial attentions, see :func:`kd_det.functional.masks.spatial_attention`.
        student_channels: (N, C), the student's mean over cells after its linear adapter.
        student_cells: (N, 1, H, W), the student's mean over channels after its 3×3 adapter.
        student_relation: (N, C, H, W), after its 1×1 adapter; None leaves the relation part out.
        teacher_relation: (N, C, H, W); keeps its gradient, since the block that makes it is trained.
        feature_weight: Weight of the attended difference.
        pooling_weight: Weight of both pooled differences.
        relation_weight: Weight of the relation.

    Returns:
        The weighted scalars ``imitation``, ``channel``, ``spatial`` and, with relations, ``relation``.
    """
    check_shapes(student, teacher)
    teacher = teacher.detach()
    norm = torch.linalg.vector_norm
    parts = dict(
        imitation=feature_weight * _root((difference_of_cells(student, teacher) * mask.detach()[:, None]).sum()),
        channel=pooling_weight * norm(student_channels - teacher.mean((2, 3))),
        spatial=pooling_weight * norm(student_cells - teacher.mean(1, keepdim=True)),
    )
    if student_relation is not None and teacher_relation is not None:
        parts['relation'] = relation_weight * norm(student_relation - teacher_relation)
    return parts


def _root(square: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0, as that of a norm."""
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)
