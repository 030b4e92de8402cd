"""FGD (arXiv 2111.11837): features where boxes and teacher look, the attentions, and what relates cells to the image.

Twice: first the formula, :func:`fgd_loss` and the parts of which it consists, as it stands in the paper; then the same
for training, in few passes over the features. :func:`fgd_sums` reads the features once and keeps no tensor of their
size, with a gradient by hand; :func:`fgd_loss_of_sums` makes of these sums what :func:`fgd_loss` makes of the features.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional.blocks import cut_into_blocks
from kd_det.functional.features import check_shapes, sum_cells, sum_channels
from kd_det.functional.masks import (
    attend_to_cells,
    attend_to_channels,
    channel_attention,
    spatial_attention,
    spatial_softmax,
)

# ----------------------------------------------------------------------------------------------------- the formula


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 0.5,
    student_relation: Tensor | None = None,
    teacher_relation: Tensor | None = None,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 5e-4,
    lambda_: float = 5e-6,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Focal and global distillation of one level (FGD, arXiv 2111.11837).

    The focal parts are Σ M · A_sp(t) · A_ch(t) · (s - t)² / N with the attentions of the teacher and each of the two
    masks; the others are :func:`attention_distance` and :func:`relation_distance`. The default weights are the paper's
    for one-stage detectors.

    Args:
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        foreground: (N, H, W), :func:`kd_det.functional.masks.box_foreground` with ``'inverse_area'``.
        background: (N, H, W), :func:`kd_det.functional.masks.normalized_background`.
        temperature: T of the attentions, > 0.
        student_relation: (N, C, H, W), the student's feature after its global context block, see
            :func:`context_pool`; None leaves the relation part out.
        teacher_relation: (N, C, H, W), the same of the teacher; its block trains too.
        alpha: Weight of the foreground.
        beta: Weight of the background.
        gamma: Weight of the attention.
        lambda_: Weight of the relation.
        valid: (N, H, W) bool; cells of padding take no part.

    Returns:
        The weighted scalars ``foreground``, ``background``, ``attention`` and, with relations, ``relation``.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
        >>> cells = torch.tensor([[[1.0, 0.0]]])  # both attentions are 1 everywhere: all cells and channels are alike
        >>> fgd_loss(student, teacher, cells, 1 - cells, alpha=2, beta=3, gamma=1)
        {'foreground': tensor(2.), 'background': tensor(3.), 'attention': tensor(0.)}
    """
    check_shapes(student, teacher)
    teacher = teacher.detach()
    teacher_attention = _attentions(teacher, temperature, valid)
    student_attention = _attentions(student, temperature, valid)
    spatial, channel = teacher_attention
    attention = _sum_absolute_differences(student_attention, teacher_attention) / len(student)
    difference = sum_channels((student - teacher).square(), channel).squeeze(1) * spatial / len(student)
    parts = dict(
        foreground=alpha * (difference * foreground.detach()).sum(),
        background=beta * (difference * background.detach()).sum(),
        attention=gamma * attention,
    )
    if student_relation is not None and teacher_relation is not None:
        parts['relation'] = lambda_ * relation_distance(student_relation, teacher_relation, valid)
    return parts


def attention_distance(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Σ |A_s - A_t| / N of the spatial and of the channel attention, added (FGD, arXiv 2111.11837).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        temperature: T of the attentions, > 0.
        valid: (N, H, W) bool; the attentions are those of these cells alone.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> feature = torch.tensor([[[[1.0, 3.0]]]])
        >>> attention_distance(feature, feature, 0.5), attention_distance(feature, -2 * feature, 0.5) > 0
        (tensor(0.), tensor(True))
    """
    check_shapes(student, teacher)
    attentions = (_attentions(student, temperature, valid), _attentions(teacher.detach(), temperature, valid))
    return _sum_absolute_differences(*attentions) / len(student)


def context_pool(feature: Tensor, logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The context vector of GcBlock, Σ_hw softmax(logits)·x (arXiv 1904.11492), as in FGD's global part.

    Args:
        feature: x, (N, C, H, W).
        logits: (N, 1, H, W), a 1×1 convolution of the feature.
        valid: (N, H, W) bool; the softmax runs over these cells alone.

    Returns:
        (N, C, 1, 1).

    Example:
        >>> context_pool(torch.tensor([[[[2.0, 4.0]]]]), torch.zeros(1, 1, 1, 2))
        tensor([[[[3.]]]])
    """
    attention = spatial_softmax(logits.squeeze(1), valid)
    return sum_cells(feature, attention)[:, :, None, None]


def relation_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Σ (G_s(s) - G_t(t))² / N between what the global context blocks G make of both features (FGD, arXiv 2111.11837).

    The teacher's side keeps its gradient, since the block that makes it is trained: make it from a detached feature.

    Args:
        student: G_s(s), (N, C, H, W).
        teacher: G_t(t), (N, C, H, W).
        valid: (N, H, W) bool; cells of padding do not count.

    Returns:
        Scalar.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> relation_distance(torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1))
        tensor(3.)
    """
    check_shapes(student, teacher)
    difference = (student - teacher).square()
    if valid is not None:
        difference = difference * valid[:, None]
    return difference.sum() / len(student)


def _attentions(feature: Tensor, temperature: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spatial (N, H, W) and channel attention (N, C) of a feature."""
    return spatial_attention(feature, temperature, valid), channel_attention(feature, temperature, valid)


def _sum_absolute_differences(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Σ|s - t| of both pairs."""
    spatial, channel = ((s - t).abs().sum() for s, t in zip(student, teacher))
    return spatial + channel


# ----------------------------------------------------------------------------------------- the same in few passes


class FGDSums(NamedTuple):
    """What FGD needs to know of the features of a level; all but the teacher's attentions have a gradient.

    Attributes:
        student_spatial: (N, H, W), the student's spatial attention.
        student_channel: (N, C), the student's channel attention.
        teacher_spatial: (N, H, W).
        teacher_channel: (N, C).
        attended: (N, H, W), Σ over channels of (s - t)² times the teacher's channel attention.
        square: (N, H, W), Σ over channels of (s - t)².
        drift: (N, C), Σ over valid cells of s - t.
        student_pooled: (N, C, 1, 1), :func:`context_pool` of the student.
        teacher_pooled: (N, C, 1, 1), the same of the teacher.
    """
    student_spatial: Tensor
    student_channel: Tensor
    teacher_spatial: Tensor
    teacher_channel: Tensor
    attended: Tensor
    square: Tensor
    drift: Tensor
    student_pooled: Tensor
    teacher_pooled: Tensor


def fgd_sums(student: Tensor, teacher: Tensor, student_attend: Tensor, teacher_attend: Tensor, temperature: float,
             valid: Tensor | None = None) -> FGDSums:
    """Reads the features of one level once (FGD, arXiv 2111.11837).

    Args:
        student: s, (N, C, H, W).
        teacher: t, (N, C, H, W).
        student_attend: (C,) weight of the 1×1 convolution to the logits of the student's context block. Its bias is the
            same for all cells, and their softmax does not see it.
        teacher_attend: (C,), the same of the teacher's block; trains too.
        temperature: T of the attentions, > 0.
        valid: (N, H, W) bool; cells of padding take part neither in the attentions nor in the contexts or the drift.

    Raises:
        ValueError: Shapes that differ.

    Example:
        >>> student, teacher = torch.zeros(1, 2, 1, 3), torch.ones(1, 2, 1, 3)
        >>> sums = fgd_sums(student, teacher, torch.zeros(2), torch.zeros(2), temperature=0.5)
        >>> sums.square, sums.drift
        (tensor([[[2., 2., 2.]]]), tensor([[-3., -3.]]))
    """
    check_shapes(student, teacher)
    sums: tuple[Tensor, ...] = _Sums.apply(
        student, teacher.detach(), student_attend, teacher_attend, temperature, valid)
    cells, channels, teacher_spatial, teacher_channel, attended, square, drift, student_pooled, teacher_pooled = sums
    return FGDSums(*_attentions_of_sums(cells, channels, temperature, valid), teacher_spatial, teacher_channel,
                   attended, square, drift, student_pooled[:, :, None, None], teacher_pooled[:, :, None, None])


def fgd_loss_of_sums(sums: FGDSums, shift: Tensor, foreground: Tensor, background: Tensor, alpha: float = 1e-3,
                     beta: float = 5e-4, gamma: float = 5e-4, lambda_: float = 5e-6,
                     valid: Tensor | None = None) -> dict[str, Tensor]:
    """:func:`fgd_loss` from the sums over the features.

    A context block adds the same vector to every cell, so the relations differ by s - t + shift, and
    Σ (s - t + shift)² = Σ (s - t)² + shift·(2·Σ (s - t) + cells·shift).

    Args:
        sums: See :func:`fgd_sums`.
        shift: (N, C, 1, 1), what the student's context block adds to every cell, minus what the teacher's adds.
        foreground: (N, H, W).
        background: (N, H, W).
        alpha: Weight of the foreground.
        beta: Weight of the background.
        gamma: Weight of the attention.
        lambda_: Weight of the relation.
        valid: As for the sums.

    Returns:
        The weighted scalars ``foreground``, ``background``, ``attention`` and ``relation``.

    Example:
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.ones(1, 1, 1, 2)
        >>> sums, cells = fgd_sums(student, teacher, torch.zeros(1), torch.zeros(1), 0.5), torch.tensor([[[1.0, 0.0]]])
        >>> fgd_loss_of_sums(sums, torch.ones(1, 1, 1, 1), cells, 1 - cells, alpha=2, beta=3, gamma=1, lambda_=1)
        {'foreground': tensor(2.), 'background': tensor(3.), 'attention': tensor(0.), 'relation': tensor(0.)}
    """
    attended = sums.attended * sums.teacher_spatial
    attention = _sum_absolute_differences((sums.student_spatial, sums.student_channel),
                                          (sums.teacher_spatial, sums.teacher_channel))
    square = sums.square
    count: Tensor | int = square[0].numel()
    if valid is not None:
        square, count = square * valid, valid.sum((1, 2))[:, None]
    shift = shift.flatten(1)
    relation = square.sum() + (shift * (2 * sums.drift + count * shift)).sum()
    batch = len(shift)
    return dict(foreground=alpha / batch * (attended * foreground.detach()).sum(),
                background=beta / batch * (attended * background.detach()).sum(),
                attention=gamma / batch * attention, relation=lambda_ / batch * relation)


class _Sums(torch.autograd.Function):
    """Σ|s| over channels (N, H, W) and over valid cells (N, C), then :class:`FGDSums` after the student's attentions.

    Within, features are (N, C, K) and what belongs to cells (N, K), with K = H·W.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, student_attend: Tensor, teacher_attend: Tensor,
                temperature: float, valid: Tensor | None) -> tuple[Tensor, ...]:
        batch, _, height, width = student.shape
        s, t = student.flatten(2), teacher.flatten(2)
        inside = torch.ones_like(s[:, 0]) if valid is None else valid.flatten(1).to(s.dtype)
        cells, channels, student_logits = _sum_responses(s, student_attend, inside)
        teacher_cells, teacher_channels, teacher_logits = _sum_responses(t, teacher_attend, inside)
        student_focus, teacher_focus = (spatial_softmax(logits.view(batch, height, width), valid).flatten(1)
                                        for logits in (student_logits, teacher_logits))
        teacher_spatial, teacher_channel = _attentions_of_sums(
            teacher_cells.view(batch, height, width), teacher_channels, temperature, valid)

        drift, student_pooled, teacher_pooled = (torch.empty_like(channels) for _ in range(3))
        factors = torch.stack([teacher_channel, torch.ones_like(teacher_channel)], 1)
        squares = s.new_zeros(batch, 2, height * width)
        for block, (difference, ) in cut_into_blocks(s, scratch=1):
            images, chosen = block
            torch.sub(s[block], t[block], out=difference)
            drift[block] = sum_cells(difference, inside[images])
            student_pooled[block] = sum_cells(s[block], student_focus[images])
            teacher_pooled[block] = sum_cells(t[block], teacher_focus[images])
            squares[images].baddbmm_(factors[images, :, chosen], difference.square_())

        ctx.save_for_backward(student, teacher, student_attend, teacher_attend, inside, teacher_channel, student_focus,
                              teacher_focus)
        ctx.mark_non_differentiable(teacher_spatial, teacher_channel)
        attended, square = squares.view(batch, 2, height, width).unbind(1)
        return (cells.view(batch, height, width), channels, teacher_spatial, teacher_channel, attended, square, drift,
                student_pooled, teacher_pooled)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cells, channels, _, _, attended, square, drift, student_pooled, teacher_pooled = gradients
        student, teacher, student_attend, _, *saved = ctx.saved_tensors
        inside, teacher_channel, student_focus, teacher_focus = saved
        s, t = student.flatten(2), teacher.flatten(2)
        cells, attended, square = (gradient.flatten(1)[:, None] for gradient in (cells, 2 * attended, 2 * square))
        student_logits = _softmax_backward(student_focus, student_pooled[:, None] @ s)
        teacher_logits = _softmax_backward(teacher_focus, teacher_pooled[:, None] @ t)
        # What is linear in channels times cells: the drift, the context, and the logits of its softmax.
        of_channels = torch.stack([drift, student_pooled, student_attend.expand_as(drift)], 2)
        of_cells = torch.stack([inside, student_focus, student_logits], 1)

        gradient = torch.empty_like(s)
        of_student_attend, of_teacher_attend = torch.empty_like(drift), torch.empty_like(drift)
        for block, (factor, sign) in cut_into_blocks(s, scratch=2):
            images, _ = block
            part = torch.sub(s[block], t[block], out=gradient[block])
            part *= torch.addcmul(square[images], teacher_channel[block][:, :, None], attended[images], out=factor)
            torch.addcmul(cells[images], channels[block][:, :, None], inside[images, None], out=factor)
            part.addcmul_(torch.sign(s[block], out=sign), factor)
            part.baddbmm_(of_channels[block], of_cells[images])
            of_student_attend[block] = sum_cells(s[block], student_logits[images])
            of_teacher_attend[block] = sum_cells(t[block], teacher_logits[images])
        return gradient.view(student.shape), None, of_student_attend.sum(0), of_teacher_attend.sum(0), None, None


def _sum_responses(feature: Tensor, attend: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ|F| over channels (N, K) and over the cells inside (N, C), and the logits of the context (N, K)."""
    channels = torch.empty_like(feature[:, :, 0])
    cells, logits = torch.zeros_like(inside)[:, None], torch.zeros_like(inside)[:, None]
    ones, attend = torch.ones_like(channels)[:, None], attend.expand_as(channels)[:, None]
    for block, (absolute, ) in cut_into_blocks(feature, scratch=1):
        images, chosen = block
        torch.abs(feature[block], out=absolute)
        channels[block] = sum_cells(absolute, inside[images])
        cells[images].baddbmm_(ones[images, :, chosen], absolute)
        logits[images].baddbmm_(attend[images, :, chosen], feature[block])
    return cells[:, 0], channels, logits[:, 0]


def _attentions_of_sums(cells: Tensor, channels: Tensor, temperature: float,
                        valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spatial and channel attention of a feature from its Σ|F| over channels (N, H, W) and over valid cells (N, C)."""
    spatial = attend_to_cells(cells / channels.shape[1], temperature, valid)
    if valid is None:
        return spatial, attend_to_channels(channels / cells[0].numel(), temperature)
    count = valid.sum((1, 2))[:, None]
    return spatial, attend_to_channels(channels / count.clamp(min=1), temperature) * (count > 0)


def _softmax_backward(probability: Tensor, gradient: Tensor) -> Tensor:
    """Of the logits (N, K), from the gradient of the probabilities (N, 1, K)."""
    weighted = probability * gradient[:, 0]
    return weighted - probability * weighted.sum(1, keepdim=True)
