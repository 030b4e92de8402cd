"""Where the teacher attends, the attention itself, and how cells relate to the image (FGD)."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd_det.functional import blocks
from kd_det.functional.features import check_shapes, sum_channels
from kd_det.functional.masks import channel_attention, spatial_attention, spatial_softmax


def fgd_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    background: Tensor,
    temperature: float = 0.5,
    student_context: Tensor | None = None,
    teacher_context: Tensor | None = None,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 5e-4,
    lambda_: float = 5e-6,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Focal and global distillation of one level (FGD, arXiv 2111.11837).

    The focal parts are Σ M · A_spatial · A_channel · (s - t)² / N with the attentions of the teacher and each of the
    two masks; the others are :func:`attention_distance` and :func:`relation_distance`. The default weights are the
    paper's for one-stage detectors.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        foreground: (N, H, W), :func:`kd_det.functional.masks.box_foreground` with ``'inverse_area'``.
        background: (N, H, W), :func:`kd_det.functional.masks.normalized_background`.
        temperature: T of the attentions.
        student_context: (N, C, H, W) global context of the student's feature; None leaves the relation part out.
        teacher_context: (N, C, H, W) global context of the teacher's feature; its block trains too.
        alpha: Weight of the foreground.
        beta: Weight of the background.
        gamma: Weight of the attention.
        lambda_: Weight of the relation.
        valid: (N, H, W) bool; cells of padding take no part.

    Returns:
        The weighted scalars ``foreground``, ``background``, ``attention`` and, with contexts, ``relation``.
    """
    check_shapes(student, teacher)
    teacher = teacher.detach()
    teacher_attention = _attentions(teacher, temperature, valid)
    student_attention = _attentions(student, temperature, valid)
    spatial, channel = teacher_attention
    difference = sum_channels((student - teacher).square(), channel).squeeze(1) * spatial / len(student)
    parts = dict(
        foreground=alpha * (difference * foreground.detach()).sum(),
        background=beta * (difference * background.detach()).sum(),
        attention=gamma * _l1(student_attention, teacher_attention),
    )
    if student_context is not None and teacher_context is not None:
        parts['relation'] = lambda_ * relation_distance(student_context, teacher_context, valid)
    return parts


def attention_distance(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """Σ |A_s - A_t| / N of the spatial and of the channel attention, added (FGD, arXiv 2111.11837).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        temperature: T of the attentions.
        valid: (N, H, W) bool; the attentions are those of these cells alone.

    Returns:
        Scalar.
    """
    check_shapes(student, teacher)
    return _l1(_attentions(student, temperature, valid), _attentions(teacher.detach(), temperature, valid))


def context_pool(feature: Tensor, logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The context vector of GcBlock, Σ_hw softmax(logits)·x (arXiv 1904.11492), as in FGD's global part.

    Args:
        feature: (N, C, H, W).
        logits: (N, 1, H, W), a 1×1 convolution of the feature.
        valid: (N, H, W) bool; the softmax runs over these cells alone.

    Returns:
        (N, C, 1, 1).
    """
    attention = spatial_softmax(logits.squeeze(1), valid)
    return torch.einsum('nchw,nhw->nc', feature, attention)[:, :, None, None]


def relation_distance(student_context: Tensor, teacher_context: Tensor, valid: Tensor | None = None) -> Tensor:
    """Σ (c_s - c_t)² / N between the global contexts of both sides (FGD, arXiv 2111.11837).

    The teacher's context keeps its gradient, since the block that makes it is trained: make it from a detached feature.

    Args:
        student_context: (N, C, H, W).
        teacher_context: (N, C, H, W).
        valid: (N, H, W) bool; cells of padding do not count.

    Returns:
        Scalar.
    """
    check_shapes(student_context, teacher_context)
    difference = (student_context - teacher_context).square()
    if valid is not None:
        difference = difference * valid[:, None]
    return difference.sum() / len(student_context)


def _attentions(feature: Tensor, temperature: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    return spatial_attention(feature, temperature, valid), channel_attention(feature, temperature, valid)


def _l1(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Sum of absolute differences over the batch size, added over pairs."""
    return sum((s - t).abs().sum() for s, t in zip(student, teacher)) / len(student[0])


class FGDSums(NamedTuple):
    """What FGD needs to know of the features of a level; all but the teacher's attentions have a gradient.

    Attributes:
        spatial: (N, H, W), the student's spatial attention.
        channel: (N, C), the student's channel attention.
        teacher_spatial: (N, H, W).
        teacher_channel: (N, C).
        attended: (N, H, W), Σ over channels of (s - t)² times the teacher's channel attention.
        square: (N, H, W), Σ over channels of (s - t)².
        drift: (N, C), Σ over valid cells of s - t.
        student_context: (N, C, 1, 1), :func:`kd_det.functional.focal_global.context_pool` of the student.
        teacher_context: (N, C, 1, 1), the same of the teacher.
    """
    spatial: Tensor
    channel: Tensor
    teacher_spatial: Tensor
    teacher_channel: Tensor
    attended: Tensor
    square: Tensor
    drift: Tensor
    student_context: Tensor
    teacher_context: Tensor


def fgd_sums(student: Tensor, teacher: Tensor, student_attend: Tensor, teacher_attend: Tensor, temperature: float,
             valid: Tensor | None = None) -> FGDSums:
    """Reads the features of one level (FGD, arXiv 2111.11837).

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        student_attend: (C,) weight of the 1×1 convolution to the logits of the student's context block. Its bias is the
            same for all cells, and their softmax does not see it.
        teacher_attend: (C,), the same of the teacher's block; trains too.
        temperature: T of the attentions.
        valid: (N, H, W) bool; cells of padding take part neither in the attentions nor in the contexts or the drift.

    Raises:
        ValueError: Shapes that differ.
    """
    check_shapes(student, teacher)
    cells, channels, *sums, student_context, teacher_context = _Sums.apply(
        student, teacher.detach(), student_attend, teacher_attend, temperature, valid)
    return FGDSums(*_attentions_of_both(cells, channels, temperature, valid), *sums, student_context[:, :, None, None],
                   teacher_context[:, :, None, None])


def fgd_parts(sums: FGDSums, shift: Tensor, foreground: Tensor, background: Tensor, alpha: float = 1e-3,
              beta: float = 5e-4, gamma: float = 5e-4, lambda_: float = 5e-6,
              valid: Tensor | None = None) -> dict[str, Tensor]:
    """The parts of :func:`kd_det.functional.focal_global.fgd_loss`, from the sums over the features.

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
    """
    focus = sums.attended * sums.teacher_spatial
    attention = (sums.spatial - sums.teacher_spatial).abs().sum() + (sums.channel - sums.teacher_channel).abs().sum()
    square, cells = sums.square, sums.square[0].numel()
    if valid is not None:
        square, cells = square * valid, valid.sum((1, 2))[:, None]
    shift = shift.flatten(1)
    relation = square.sum() + (shift * (2 * sums.drift + cells * shift)).sum()
    parts = dict(foreground=alpha * (focus * foreground.detach()).sum(),
                 background=beta * (focus * background.detach()).sum(),
                 attention=gamma * attention, relation=lambda_ * relation)
    return {name: value / len(shift) for name, value in parts.items()}


class _Sums(torch.autograd.Function):
    """Σ|s| over channels (N, H, W) and over valid cells (N, C), then :class:`FGDSums` after the student's attentions.

    Within, features are (N, C, K) and what belongs to cells (N, K), with K = H·W.
    """

    @staticmethod
    def forward(ctx, student, teacher, student_attend, teacher_attend, temperature, valid):
        batch, _, height, width = student.shape
        s, t = student.flatten(2), teacher.flatten(2)
        inside = torch.ones_like(s[:, 0]) if valid is None else valid.flatten(1).to(s.dtype)
        cells, channels, student_logits = _responses(s, student_attend, inside)
        teacher_cells, teacher_channels, teacher_logits = _responses(t, teacher_attend, inside)
        student_focus, teacher_focus = (spatial_softmax(logits.view(batch, height, width), valid).flatten(1)
                                        for logits in (student_logits, teacher_logits))
        teacher_spatial, teacher_channel = _attentions_of_both(
            teacher_cells.view(batch, height, width), teacher_channels, temperature, valid)

        drift, student_context, teacher_context = (torch.empty_like(channels) for _ in range(3))
        weights = torch.stack([teacher_channel, torch.ones_like(teacher_channel)], 1)
        squares = s.new_zeros(batch, 2, height * width)
        for block, (difference, ) in _blocks(s, scratch=1):
            images, chosen = block
            torch.sub(s[block], t[block], out=difference)
            drift[block] = _over_cells(difference, inside[images])
            student_context[block] = _over_cells(s[block], student_focus[images])
            teacher_context[block] = _over_cells(t[block], teacher_focus[images])
            squares[images].baddbmm_(weights[images, :, chosen], difference.square_())

        ctx.save_for_backward(student, teacher, student_attend, teacher_attend, inside, teacher_channel, student_focus,
                              teacher_focus)
        ctx.mark_non_differentiable(teacher_spatial, teacher_channel)
        attended, square = squares.view(batch, 2, height, width).unbind(1)
        return (cells.view(batch, height, width), channels, teacher_spatial, teacher_channel, attended, square, drift,
                student_context, teacher_context)

    @staticmethod
    @once_differentiable
    def backward(ctx, cells, channels, _, __, attended, square, drift, student_context, teacher_context):
        student, teacher, *weights = ctx.saved_tensors
        student_attend, teacher_attend, inside, weight, student_focus, teacher_focus = weights
        s, t = student.flatten(2), teacher.flatten(2)
        cells, attended, square = (gradient.flatten(1)[:, None] for gradient in (cells, 2 * attended, 2 * square))
        student_logits = _softmax_backward(student_focus, student_context[:, None] @ s)
        teacher_logits = _softmax_backward(teacher_focus, teacher_context[:, None] @ t)
        # What is linear in channels times cells: the drift, the context, and the logits of its softmax.
        of_channels = torch.stack([drift, student_context, student_attend.expand_as(drift)], 2)
        of_cells = torch.stack([inside, student_focus, student_logits], 1)

        gradient = torch.empty_like(s)
        of_student_attend, of_teacher_attend = torch.empty_like(drift), torch.empty_like(drift)
        for block, (factor, sign) in _blocks(s, scratch=2):
            images, _ = block
            part = torch.sub(s[block], t[block], out=gradient[block])
            part *= torch.addcmul(square[images], weight[block][:, :, None], attended[images], out=factor)
            torch.addcmul(cells[images], channels[block][:, :, None], inside[images, None], out=factor)
            part.addcmul_(torch.sign(s[block], out=sign), factor)
            part.baddbmm_(of_channels[block], of_cells[images])
            of_student_attend[block] = _over_cells(s[block], student_logits[images])
            of_teacher_attend[block] = _over_cells(t[block], teacher_logits[images])
        return gradient.view(student.shape), None, of_student_attend.sum(0), of_teacher_attend.sum(0), None, None


def _responses(feature: Tensor, attend: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ|F| over channels (N, K) and over the cells inside (N, C), and the logits of the context (N, K)."""
    channels = torch.empty_like(feature[:, :, 0])
    cells, logits = torch.zeros_like(inside)[:, None], torch.zeros_like(inside)[:, None]
    ones, attend = torch.ones_like(channels)[:, None], attend.expand_as(channels)[:, None]
    for block, (absolute, ) in _blocks(feature, scratch=1):
        images, chosen = block
        torch.abs(feature[block], out=absolute)
        channels[block] = _over_cells(absolute, inside[images])
        cells[images].baddbmm_(ones[images, :, chosen], absolute)
        logits[images].baddbmm_(attend[images, :, chosen], feature[block])
    return cells[:, 0], channels, logits[:, 0]


def _attentions_of_both(cells: Tensor, channels: Tensor, temperature: float, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Spatial and channel attention of a feature from its Σ|F| over channels (N, H, W) and over valid cells (N, C)."""
    # To the masks a mean is a feature of one channel, or of one cell, which is valid if any cell was.
    spatial = spatial_attention(cells[:, None] / channels.shape[1], temperature, valid)
    if valid is None:
        return spatial, channel_attention(channels[:, :, None, None] / cells[0].numel(), temperature)
    count = valid.sum((1, 2))[:, None, None]
    mean = channels[:, :, None, None] / count.clamp(min=1)[..., None]
    return spatial, channel_attention(mean, temperature, count > 0)


def _softmax_backward(probability: Tensor, gradient: Tensor) -> Tensor:
    """Of the logits (N, K), from the gradient of the probabilities (N, 1, K)."""
    weighted = probability * gradient[:, 0]
    return weighted - probability * weighted.sum(1, keepdim=True)


def _over_cells(feature: Tensor, weight: Tensor) -> Tensor:
    """Σ over cells of (N, C, K) · (N, K): (N, C)."""
    if len(feature) == 1:  # as one matrix: libraries take batches of matrix · vector far slower
        return torch.mv(feature[0], weight[0])[None]
    return torch.bmm(feature, weight[:, :, None])[:, :, 0]


def _blocks(feature: Tensor, scratch: int) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Cuts (N, C, K) into slices of images and channels, with as many buffers of their size; one slice on a GPU."""
    batch, channels, cells = feature.shape
    images, step = 1, max(1, blocks.BLOCK // cells)
    if feature.device.type != 'cpu' or feature.numel() <= blocks.BLOCK:
        images, step = batch, channels
    buffers = feature.new_empty(scratch, images, min(step, channels), cells)
    for image in range(0, batch, images):
        for first in range(0, channels, step):
            yield ((slice(image, image + images), slice(first, first + step)),
                   [buffer[:, :channels - first] for buffer in buffers])
