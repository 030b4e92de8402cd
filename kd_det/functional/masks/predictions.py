"""Masks from what the detectors predict."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.functional.boxes import concatenate, iou, slices


@torch.no_grad()
def prediction_difference(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """Where the two detectors disagree: mean over classes of (p_t - p_s)² (PFI, arXiv 2112.04840).

    Args:
        student_probs: (N, classes, ...) class probabilities of the student, of cells (H, W) or of regions ().
        teacher_probs: (N, classes, ...) class probabilities of the teacher.

    Returns:
        (N, ...).
    """
    return (teacher_probs - student_probs).square().mean(1)


@torch.no_grad()
def teacher_confidence(teacher_probs: Tensor) -> Tensor:
    """The richness of a cell: its largest class probability (FRS, arXiv 2111.00674).

    Args:
        teacher_probs: (N, classes, H, W) class probabilities of the teacher.

    Returns:
        (N, H, W).
    """
    return teacher_probs.amax(1)


@torch.no_grad()
def prediction_quality(
    probabilities: Tensor,
    predictions: Tensor,
    points: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    xi: float = 0.8,
    top_k: int = 30,
    cells: Tensor | None = None,
) -> Tensor:
    """The cells from which the teacher detects each box best (PGD, arXiv 2203.05469).

    The quality of a cell inside a box is p(class)^(1 - ξ) · IoU(prediction, box)^ξ, of its best prediction. The
    ``top_k`` best cells of a box, over all levels, get the height of the Gaussian fitted to their positions (1 at its
    mean), all other cells 0. Where boxes meet, the largest value counts.

    Args:
        probabilities: (N, Q, classes) class probabilities of the teacher, for all levels.
        predictions: (N, Q, 4) its decoded boxes in pixels.
        points: (P, 2) the cells' centres (x, y) in pixels.
        boxes: One (n, 4) tensor of ground truth per image.
        labels: One (n,) tensor of classes per image; a box of a class that the teacher does not have gives nothing.
        xi: ξ, the share of localisation in the quality.
        top_k: Number of cells per box.
        cells: (Q,) long, the cell of each prediction; by default there is one for each, and Q = P.

    Returns:
        (N, P) in [0, 1].
    """
    corners, image = concatenate(boxes)
    label = torch.cat(list(labels)).to(corners.device)
    known = (label >= 0) & (label < probabilities.shape[-1])
    label = torch.where(known, label, 0)
    importance = corners.new_zeros(len(boxes) * len(points))
    centres = points.to(corners)
    for part in slices(len(corners), 4 * predictions.shape[1]):
        box = corners[part, None]
        overlap = iou(box, predictions[image[part]].to(corners))
        probability = probabilities.transpose(1, 2)[image[part], label[part]].to(corners)
        inside = ((centres >= box[..., :2]) & (centres <= box[..., 2:])).all(-1) & known[part, None]
        quality = probability**(1 - xi) * overlap**xi
        if cells is not None:
            quality = quality.new_zeros(inside.shape).scatter_reduce(1, cells.expand_as(quality), quality, 'amax')
        best, cell = (quality * inside).topk(min(top_k, len(points)), dim=1)
        weight = _gaussian_height(points[cell], best > 0).to(corners)
        importance.scatter_reduce_(0, (image[part, None] * len(points) + cell).flatten(), weight.flatten(), 'amax')
    return importance.view(len(boxes), len(points))


def _gaussian_height(points: Tensor, chosen: Tensor) -> Tensor:
    """exp(-½ d' Σ⁻¹ d) of the points (B, K, 2) under the Gaussian fitted to the chosen ones (B, K); 0 for the rest."""
    points = points.double()
    share = chosen.double() / chosen.sum(1, keepdim=True).clamp(min=1)
    x, y = (points - (share[..., None] * points).sum(1, keepdim=True)).unbind(-1)
    xx, xy, yy = ((share * product).sum(1, keepdim=True) for product in (x * x, x * y, y * y))
    # Points on a line have a singular covariance: double precision leaves room for a ridge too small to matter.
    ridge = 1e-9 * (1 + xx + yy)
    xx, yy = xx + ridge, yy + ridge
    distance = (yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy)
    return (-0.5 * distance).exp() * chosen
