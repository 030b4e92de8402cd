"""Where the teacher attends, the attention itself, and how cells relate to the image (FGD)."""
from __future__ import annotations

import torch
from torch import Tensor

from kd_det.functional.features.imitation import sum_channels
from kd_det.functional.features.shapes import check_shapes
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
