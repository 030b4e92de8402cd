"""Masks from what the detectors predict."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.functional.blocks import map_rows
from kd_det.functional.boxes import concatenate, iou, slices
from kd_det.functional.logits import class_probabilities
from kd_det.functional.masks.foreground import list_cells


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
    corners, image, label, known = _find_boxes(boxes, labels, probabilities.shape[-1])
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
        _raise_importance(importance, points, image[part], best, cell)
    return importance.view(len(boxes), len(points))


@torch.no_grad()
def prediction_quality_of_grids(
    logits: Sequence[Tensor],
    predictions: Sequence[Tensor],
    points: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    activation: str,
    objectness: Sequence[Tensor] | None = None,
    xi: float = 0.8,
    top_k: int = 30,
) -> Tensor:
    """:func:`prediction_quality` of cells that are grids, level by level, which looks at the cells inside boxes alone.

    Time and memory are linear in them, and nothing is made of what the teacher says of other cells and other classes.
    For the CPU: how many cells those are, a GPU would have to tell the host; and memory that is enough whatever the
    boxes are has room for each cell beside each box, which is the table.

    Args:
        logits: One (N, H·W·A, classes) per level, the background's as the last where they are a softmax's.
        predictions: One (N, H·W·A, 4) per level: decoded boxes in pixels.
        points: One (H, W, 2) per level: the cells' centres (x, y) in pixels, x of its column and y of its row.
        boxes: One (n, 4) tensor of ground truth per image.
        labels: One (n,) tensor of classes per image; a box of a class that the teacher does not have gives nothing.
        activation: ``'sigmoid'`` or ``'softmax'``.
        objectness: One (N, H·W·A) per level, where class logits are conditional on an object.
        xi: ξ, the share of localisation in the quality.
        top_k: Number of cells per box.

    Returns:
        (N, ΣH·W) in [0, 1].
    """
    corners, image, label, known = _find_boxes(boxes, labels, logits[0].shape[-1] - (activation == 'softmax'))
    centres = torch.cat([each.flatten(0, 1) for each in points])
    found = []
    for level, grid in enumerate(points):
        first, stop = (torch.stack([torch.searchsorted(line.to(corners).contiguous(), side.contiguous(), right=right)
                                    for line, side in zip((grid[0, :, 0], grid[:, 0, 1]), sides.unbind(1))], 1)
                       for sides, right in ((corners[:, :2], False), (corners[:, 2:], True)))
        box, cell = list_cells(first, torch.where(known[:, None], stop, first), grid.shape[1])
        anchors = torch.arange(logits[level].shape[1] // grid[..., 0].numel(), device=box.device)

        def measure(box: Tensor, cell: Tensor, level: int = level, anchors: Tensor = anchors) -> Tensor:
            prior, where = cell[:, None] * len(anchors) + anchors, image[box][:, None]
            of_object = None if objectness is None else objectness[level][where, prior]
            classes = label[box][:, None, None].expand(-1, len(anchors), -1)
            if activation == 'sigmoid':  # each class has a probability of its own
                probability = class_probabilities(logits[level][where, prior, classes[..., 0]][..., None], activation,
                                                  of_object)
            else:
                probability = class_probabilities(logits[level][where, prior], activation, of_object).gather(2, classes)
            overlap = iou(corners[box][:, None], predictions[level][where, prior].to(corners))
            return (probability[..., 0].to(corners)**(1 - xi) * overlap**xi).amax(1)

        width = len(anchors) * max(8, logits[level].shape[-1] * (activation == 'softmax'))
        before = sum(each[..., 0].numel() for each in points[:level])
        found.append((box, cell + before, map_rows(measure, box, cell, width=width)))
    box, cell, quality = map(torch.cat, zip(*found))
    order = quality.argsort(descending=True)
    order = order[box[order].argsort(stable=True)]  # box by box, the best first
    box, cell, quality = box[order], cell[order], quality[order]
    counts = torch.bincount(box, minlength=len(corners))
    rank = torch.arange(len(box), device=box.device) - (counts.cumsum(0) - counts)[box]
    box, cell, quality, rank = (each[rank < top_k] for each in (box, cell, quality, rank))
    best, chosen = quality.new_zeros(len(corners), top_k), cell.new_zeros(len(corners), top_k)
    best[box, rank], chosen[box, rank] = quality, cell
    importance = corners.new_zeros(len(boxes) * len(centres))
    _raise_importance(importance, centres, image, best, chosen)
    return importance.view(len(boxes), len(centres))


def _find_boxes(boxes: Sequence[Tensor], labels: Sequence[Tensor],
                classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All boxes of the batch, the image and the class of each, and whether the teacher has that class."""
    corners, image = concatenate(boxes)
    label = torch.cat(list(labels)).to(corners.device)
    known = (label >= 0) & (label < classes)
    return corners, image, torch.where(known, label, 0), known


def _raise_importance(importance: Tensor, points: Tensor, image: Tensor, best: Tensor, cell: Tensor) -> None:
    """Raises (N·P,) where the best cells of boxes (B, K) give more."""
    weight = _gaussian_height(points[cell], best > 0).to(importance)
    importance.scatter_reduce_(0, (image[:, None] * len(points) + cell).flatten(), weight.flatten(), 'amax')


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
