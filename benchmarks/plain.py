"""The losses as one writes them down: operator by operator, FGD's masks box by box. A measure for the package's."""
from __future__ import annotations

from math import ceil, floor

import torch
from torch import Tensor


def fgd(student: Tensor, teacher: Tensor, boxes: list, batch_shape: tuple, student_block: torch.nn.Module,
        teacher_block: torch.nn.Module, temperature: float = 0.5, alpha: float = 1e-3, beta: float = 5e-4,
        gamma: float = 5e-4, lambda_: float = 5e-6) -> Tensor:
    """FGD (arXiv 2111.11837) on one level without padding.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        boxes: One (n, 4) per image, pixels.
        batch_shape: (h, w) in pixels.
        student_block: Global context block of the student's side.
        teacher_block: Of the teacher's.
        temperature: T.
        alpha: Weight of the foreground.
        beta: Weight of the background.
        gamma: Weight of the attention.
        lambda_: Weight of the relation.
    """
    batch, channels, height, width = student.shape
    foreground, background = torch.zeros_like(student[:, 0]), torch.ones_like(student[:, 0])
    for image, image_boxes in enumerate(boxes):
        for x1, y1, x2, y2 in image_boxes:
            left, right = max(floor(x1 * width / batch_shape[1]), 0), ceil(x2 * width / batch_shape[1])
            top, bottom = max(floor(y1 * height / batch_shape[0]), 0), ceil(y2 * height / batch_shape[0])
            area = (right + 1 - left) * (bottom + 1 - top)
            window = foreground[image, top:bottom + 1, left:right + 1]
            window.copy_(window.clamp(min=1 / area))
            background[image, top:bottom + 1, left:right + 1] = 0
        background[image] /= background[image].sum().clamp(min=1)

    def attentions(feature):
        spatial = (feature.abs().mean(1) / temperature).flatten(1).softmax(1).view(batch, height, width)
        channel = (feature.abs().mean((2, 3)) / temperature).softmax(1)
        return height * width * spatial, channels * channel

    spatial, channel = attentions(teacher)
    student_spatial, student_channel = attentions(student)
    attention = spatial[:, None] * channel[:, :, None, None]
    imitation = [(mask[:, None] * attention * (student - teacher)**2).sum() for mask in (foreground, background)]
    distance = (student_spatial - spatial).abs().sum() + (student_channel - channel).abs().sum()
    relation = ((student_block(student) - teacher_block(teacher))**2).sum()
    return (alpha * imitation[0] + beta * imitation[1] + gamma * distance + lambda_ * relation) / batch


def defeat(student: Tensor, teacher: Tensor, foreground: Tensor) -> Tensor:
    """DeFeat (arXiv 2103.14475): foreground and background apart, each Σ M·(s - t)² / (2·C·ΣM)."""
    value = 0
    for mask in (foreground, 1 - foreground):
        errors = (mask[:, None] * (student - teacher)**2).sum()
        value = value + errors / (2 * student.shape[1] * mask.sum().clamp(min=1))
    return value


def fkd_imitation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """FKD's attended difference (openreview uKhGRvM8QNH): ‖√M·(s - t)‖."""
    return torch.linalg.vector_norm((student - teacher) * mask[:, None].sqrt())


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """CWD (arXiv 2011.13256): T²·Σ KL(softmax_hw(t / T) ‖ softmax_hw(s / T)) / (N·C)."""
    log_student, log_teacher = ((feature / temperature).flatten(2).log_softmax(2) for feature in (student, teacher))
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum() / (len(student) * student.shape[1])


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """PKD (arXiv 2207.02039): half the mean squared difference of channels standardised over the batch."""
    student, teacher = ((feature - feature.mean((0, 2, 3), keepdim=True))
                        / (feature.std((0, 2, 3), keepdim=True) + 1e-6)
                        for feature in (student, teacher))
    return ((student - teacher)**2).mean() / 2


def mgd(generated: Tensor, teacher: Tensor) -> Tensor:
    """MGD (arXiv 2205.01529), after its generation block: Σ(G(s) - t)² / N."""
    return ((generated - teacher)**2).sum() / len(generated)
