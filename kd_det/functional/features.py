"""What to compare in features: losses between the features of student and teacher, both of one shape (N, C, H, W).

The teacher is taken as a constant. Results are scalars, finite also where a mask is empty, and 0 where the student
equals the teacher.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional.blocks import by_channels, cut_channels


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared difference of unit vectors: in sum 1 - cos, but exactly 0 where the two agree."""
    return (unit(student, 1) - unit(teacher, 1)).square() / 2


Distance = Literal['mse', 'l1', 'smooth_l1', 'cosine']
Normalizer = Literal['batch', 'cells', 'mean', 'mask', 'twice_mask', 'twice_elements']

# Of two features, element by element.
DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    'mse': lambda student, teacher: (student - teacher).square(),
    'l1': lambda student, teacher: (student - teacher).abs(),
    'smooth_l1': lambda student, teacher: F.smooth_l1_loss(student, teacher, reduction='none'),
    'cosine': _cosine,
}


def masked_imitation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    channel_weight: Tensor | None = None,
    distance: Distance = 'mse',
    normalizer: Normalizer | Tensor = 'batch',
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
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        mask: M, (N, H, W), or four dimensions that broadcast to (N, C, H, W); None for 1 everywhere.
        channel_weight: (N, C), a factor of the mask; None for 1 everywhere.
        distance: d: ``'mse'`` squared difference, ``'l1'``, ``'smooth_l1'`` with threshold 1, each summed over the
            channels; or ``'cosine'``, 1 - cos of the two channel vectors of a cell, as half the squared difference of
            the unit vectors, which is what channel weights then weigh.
        normalizer: See the table; ΣM is kept from 0, so that an empty mask gives 0. A mask that differs between
            channels counts with its mean over them, and ``channel_weight`` does not count.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ, or an unknown distance or normalizer.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, 3)
        >>> mask = torch.tensor([[[1.0, 0.5, 0.0]]])
        >>> masked_imitation(student, teacher, mask), masked_imitation(student, teacher, mask, normalizer='mask')
        (tensor(3.), tensor(2.))
    """
    check_shapes(student, teacher)
    if distance not in DISTANCES:
        raise ValueError(f'distance={distance!r}: expected one of {", ".join(DISTANCES)}.')
    teacher = teacher.detach()
    if mask is not None:
        mask = mask.detach() if mask.dim() == 4 else mask.detach()[:, None]
    # Channels are summed first where the mask is the same for all of them: no product of the full size.
    if mask is None or mask.shape[1] == 1:
        difference = sum_distance(student, teacher, channel_weight, distance)
        total = (difference if mask is None else difference * mask).sum()
    else:
        weight = mask if channel_weight is None else mask * channel_weight.detach()[:, :, None, None]
        total = (DISTANCES[distance](student, teacher) * weight).sum()
    return total / (_normalizer(normalizer, mask, student) if isinstance(normalizer, str) else normalizer)


def decoupled_imitation(student: Tensor, teacher: Tensor, foreground: Tensor,
                        valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Imitation of the foreground and of the background apart, each Σ M·(s - t)² / (2·C·ΣM) (DeFeat, arXiv 2103.14475).

    Args:
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        foreground: M, (N, H, W) in [0, 1], see :func:`kd_det.functional.masks.level_foreground`; the background is
            1 - M, and nothing where that is negative.
        valid: (N, H, W) bool; cells of padding belong to neither part.

    Returns:
        The loss of the foreground and of the background, two scalars.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, 3)
        >>> decoupled_imitation(student, teacher, torch.tensor([[[1.0, 0.0, 0.0]]]))
        (tensor(0.5000), tensor(0.5000))
    """
    check_shapes(student, teacher)
    difference = sum_distance(student, teacher.detach())
    foreground = foreground.detach()[:, None]
    background = (1 - foreground).clamp(min=0)
    if valid is not None:
        foreground, background = foreground * valid[:, None], background * valid[:, None]
    of_foreground, of_background = ((difference * mask).sum() / _normalizer('twice_elements', mask, student)
                                    for mask in (foreground, background))
    return of_foreground, of_background


def generation_distance(generated: Tensor, teacher: Tensor) -> Tensor:
    """Σ (G(s) - t)² / N for the feature generated from the randomly masked student (MGD, arXiv 2205.01529).

    Args:
        generated: G(s), (N, C, H, W), the output of the generation block.
        teacher: t, (N, C, H, W).

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> generation_distance(torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1))
        tensor(3.)
    """
    return masked_imitation(generated, teacher, normalizer='batch')


def channel_wise_kl(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Each channel as a distribution over the cells: T² · Σ KL(t ‖ s) / (N·C) (CWD, arXiv 2011.13256).

    Args:
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        temperature: T of the softmax over the H·W cells, > 0.
        valid: (N, H, W) bool; the softmax runs over these cells alone.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> teacher = torch.tensor([[[[0.0, 1.0]]]])
        >>> channel_wise_kl(teacher, teacher, temperature=1.0), channel_wise_kl(-teacher, teacher, temperature=1.0) > 0
        (tensor(0.), tensor(True))
    """
    check_shapes(student, teacher)

    def divergence(*features: Tensor) -> Tensor:
        logits = [feature / temperature for feature in features]
        if valid is not None:
            # A finite floor: both sides give such a cell probability 0, and 0 · (finite - finite) is 0.
            logits = [each.masked_fill(~valid[:, None], torch.finfo(each.dtype).min) for each in logits]
        log_student, log_teacher = (each.flatten(2).log_softmax(2) for each in logits)
        return F.kl_div(log_student, log_teacher, reduction='sum', log_target=True)

    return temperature**2 * by_channels(divergence, student, teacher.detach()) / (student.shape[0] * student.shape[1])


def pearson_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Half the mean squared difference of standardised channels, ½·mean (ŝ - t̂)² = 1 - r (PKD, arXiv 2207.02039).

    Each channel is standardised over (N, H, W), with the unbiased deviation and ε = 1e-6; so the loss ignores scale and
    offset of either side. Channels without variation, such as those of a single cell, count as 0.

    Args:
        student: s, (N, C, H, W) of one level.
        teacher: t, (N, C, H, W) of one level.
        valid: (N, H, W) bool; statistics and mean run over these cells alone.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> teacher = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> round(pearson_distance(5 * teacher + 7, teacher).item(), 4)  # scale and offset do not matter
        0.0
    """
    check_shapes(student, teacher)
    count = student.numel() if valid is None else student.shape[1] * valid.sum().clamp(min=1)
    total: Tensor = _StandardizedDifference.apply(student, teacher.detach(), valid)
    return total / count / 2


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

    All parts are L2 norms over the whole batch, not their squares: √(Σ M·(a(s) - t)²), the difference weighted by the
    attention; the differences of the means over cells and over channels; and that of the non-local relations
    (:func:`kd_det.functional.relations.non_local`). The default weights are the released ones.

    Args:
        student: a(s), (N, C, H, W), after its 1×1 adapter.
        teacher: t, (N, C, H, W).
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

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
        >>> fkd_loss(student, teacher, torch.ones(1, 2, 2), torch.zeros(1, 1), torch.zeros(1, 1, 2, 2),
        ...          feature_weight=1, pooling_weight=1)
        {'imitation': tensor(2.), 'channel': tensor(1.), 'spatial': tensor(2.)}
    """
    check_shapes(student, teacher)
    teacher = teacher.detach()
    parts = dict(
        imitation=feature_weight * _root((sum_distance(student, teacher) * mask.detach()[:, None]).sum()),
        channel=pooling_weight * torch.linalg.vector_norm(student_channels - teacher.mean((2, 3))),
        spatial=pooling_weight * torch.linalg.vector_norm(student_cells - teacher.mean(1, keepdim=True)),
    )
    if student_relation is not None and teacher_relation is not None:
        parts['relation'] = relation_weight * torch.linalg.vector_norm(student_relation - teacher_relation)
    return parts


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Raises a ValueError, with what to do, where two features differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(f'student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape: '
                         'adapt the channels and pair the levels by stride.')


def sum_distance(student: Tensor, teacher: Tensor, channel_weight: Tensor | None = None,
                 distance: Distance = 'mse') -> Tensor:
    """The distance of each cell, summed over the channels with their (N, C) weight: (N, 1, H, W)."""
    measure = DISTANCES[distance]
    if distance == 'cosine':  # not by blocks of channels: each has a part in the length
        return sum_channels(measure(student, teacher), channel_weight)
    features = [student, teacher] + ([] if channel_weight is None else [channel_weight.detach()])
    return by_channels(lambda s, t, *weight: sum_channels(measure(s, t), *weight), *features)


def sum_channels(difference: Tensor, channel_weight: Tensor | None = None) -> Tensor:
    """(N, C, H, W) to (N, 1, H, W), weighted by (N, C)."""
    if channel_weight is None:
        return difference.sum(1, keepdim=True)
    return torch.einsum('nchw,nc->nhw', difference, channel_weight)[:, None]


def sum_cells(feature: Tensor, weight: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C), weighted by (N, H, W)."""
    # As rows times matrices: matrices times columns take MKL ten times as long.
    return torch.bmm(weight.flatten(1)[:, None], feature.flatten(2).mT)[:, 0]


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors of length 1 along ``dim``; those of length 0 stay 0 and get a finite gradient."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 1e-12, length, 1)


def _normalizer(name: Normalizer, mask: Tensor | None, feature: Tensor) -> Tensor | int:
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


class _StandardizedDifference(torch.autograd.Function):
    """Σ (ŝ - t̂)² of channels that are standardised over (N, H, W), by blocks of channels, with a gradient by hand.

    With s = mean + c, σ² = Σ c² / (count - 1), ŝ = c / (σ + ε) and d = ŝ - t̂ the gradient is
    2·d / (σ + ε) - c · 2·Σ(d·ŝ) / ((count - 1)·σ·(σ + ε)): linear in both features.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        inside = None if valid is None else valid.flatten(1)[:, None].to(student.dtype)
        count: Tensor = student.new_full((), student[:, 0].numel()) if inside is None else inside.sum()
        freedom, total = (count - 1).clamp(min=1), student.new_zeros(())
        of_both = student.new_empty(2, 2, student.shape[1])  # of student and teacher: means, and their factors
        for block in cut_channels(student):
            (s, t), means = zip(*(_centre(each[:, block].flatten(2), inside, count) for each in (student, teacher)))
            deviations = [(_sum_channels_of_batch(each.square()) / freedom).sqrt() for each in (s, t)]
            scales = [1 / (deviation + 1e-6) for deviation in deviations]
            for each, scale in zip((s, t), scales):
                each.mul_(scale[:, None])
            difference = torch.sub(s, t, out=t)
            total += difference.square().sum()
            # Of a channel without variation Σ(d·ŝ) is 0, and so is this.
            pull = _sum_channels_of_batch(s.mul_(difference)) / (freedom * deviations[0]).clamp(min=1e-30)
            of_both[0, :, block] = torch.stack(means)
            of_both[1, :, block] = torch.stack([2 * scales[0] * (scales[0] - pull), -2 * scales[0] * scales[1]])
        ctx.save_for_backward(student, teacher, inside, of_both)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, inside, (means, factors) = ctx.saved_tensors
        found, factors = torch.empty_like(student), factors * gradient
        for block in cut_channels(student):
            s, t = (each[:, block].flatten(2) - mean[block, None] for each, mean in zip((student, teacher), means))
            part = s.mul_(factors[0, block, None]).addcmul_(t, factors[1, block, None])
            # Not into a flat view, which of a student whose rows and columns lie swapped in memory is a copy.
            found[:, block] = (part if inside is None else part.mul_(inside)).unflatten(2, student.shape[2:])
        return found, None, None


def _centre(feature: Tensor, inside: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """A feature (N, C, K) less the means of its channels, 0 in cells that are not inside; and these means (C,)."""
    if inside is None:
        mean = _sum_channels_of_batch(feature) / count
        return feature - mean[:, None], mean
    masked = feature * inside
    mean = _sum_channels_of_batch(masked) / count.clamp(min=1)
    return masked.addcmul_(inside, mean[:, None], value=-1), mean


def _sum_channels_of_batch(feature: Tensor) -> Tensor:
    """(N, C, K) to (C,)."""
    return feature.sum(2).sum(0)


def _root(square: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0, as that of a norm."""
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)
