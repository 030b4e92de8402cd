"""What to compare in box outputs: losses per box between student and teacher; and what masks of boxes are made with.

The teacher is taken as a constant. Losses are (n,), finite also for boxes without area, and 0 where the student equals
the teacher, unless stated.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.blocks import map_rows


def bounded_regression(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    """The student's error, where it is not clearly better than the teacher's (Chen et al., NeurIPS 2017).

    ‖s - y‖² where ‖s - y‖² + m > ‖t - y‖², else 0. With m > 0, a student that equals the teacher keeps its error.

    Args:
        student: s, (n, 4) box regressions.
        teacher: t, (n, 4) box regressions in the same encoding.
        target: y, (n, 4) ground truth in the same encoding; that of a box without extent may be infinite, and then
            there is no error to bound.
        margin: m, in squared units of the encoding.

    Returns:
        (n,).

    Example:
        >>> target, teacher = torch.zeros(2, 4), torch.ones(2, 4)
        >>> student = torch.tensor([[2.0, 0, 0, 0], [3.0, 0, 0, 0]])  # the teacher's error is 4
        >>> bounded_regression(student, teacher, target)
        tensor([0., 9.])
    """
    known = target.isfinite().all(-1)
    target = torch.where(known[:, None], target, 0).detach()
    student_error = (student - target).square().sum(-1)
    teacher_error = (teacher.detach() - target).square().sum(-1)
    return torch.where(known & (student_error + margin > teacher_error), student_error, 0)


def distribution_kl(student: Tensor, teacher: Tensor, temperature: float = 10.0, reduction: str = 'sum') -> Tensor:
    """Localisation distillation: T² · KL of the distributions over the offset of each side (LD, arXiv 2102.12252).

    Args:
        student: s, (n, 4, bins) logits of a distributional (DFL) head; or (n, bins) for one side each.
        teacher: t, (n, 4, bins) logits, or (n, bins).
        temperature: T, > 0.
        reduction: ``'sum'`` over sides and bins, which is the divergence, or ``'mean'``, as mmdet's ``LDHead``, for
            which the published weight 0.25 is meant.

    Returns:
        (n,).

    Raises:
        ValueError: An unknown reduction.

    Example:
        >>> logits = torch.arange(8.0).view(1, 4, 2)  # the same distribution of each of four sides
        >>> distribution_kl(logits, logits), distribution_kl(-logits, logits, reduction='sum') > 0
        (tensor([0.]), tensor([True]))
    """
    if reduction not in ('sum', 'mean'):
        raise ValueError(f"reduction={reduction!r}: expected 'sum' or 'mean'.")
    divergence = F.kl_div((student / temperature).log_softmax(-1), (teacher.detach() / temperature).log_softmax(-1),
                          reduction='none', log_target=True).flatten(1)
    return temperature**2 * (divergence.sum(1) if reduction == 'sum' else divergence.mean(1))


def giou_imitation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - GIoU of the decoded boxes (arXiv 1902.09630); the caller weighs it by the teacher's score.

    Args:
        student: (n, 4) decoded boxes x1, y1, x2, y2.
        teacher: (n, 4) decoded boxes in the same units.

    Returns:
        (n,) in [0, 2]; boxes without area have no overlap, not even with themselves.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> giou_imitation(boxes, boxes), giou_imitation(boxes, boxes + torch.tensor([2.0, 0, 2, 0]))
        (tensor([0.]), tensor([1.]))
    """
    teacher = teacher.detach()
    smallest = torch.finfo(student.dtype).eps
    overlap = _area(torch.maximum(student[:, :2], teacher[:, :2]), torch.minimum(student[:, 2:], teacher[:, 2:]))
    union = _area(student[:, :2], student[:, 2:]) + _area(teacher[:, :2], teacher[:, 2:]) - overlap
    hull = _area(torch.minimum(student[:, :2], teacher[:, :2]), torch.maximum(student[:, 2:], teacher[:, 2:]))
    iou = overlap / union.clamp(min=smallest)
    return 1 - iou + (hull - union) / hull.clamp(min=smallest)


def _area(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    """Area between two corners (n, 2), 0 where they are out of order."""
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


# Elements of the largest (boxes, predictions) table that is kept at once.
_TABLE_BUDGET = 2**24


def concatenate(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All boxes of the batch as (B, 4) float32 and the image that each belongs to as (B,) long."""
    corners = torch.cat([image_boxes.reshape(-1, 4) for image_boxes in boxes]).float()
    # Counts are known to the host: made there, the index needs no synchronisation.
    image = torch.tensor([index for index, image_boxes in enumerate(boxes) for _ in range(len(image_boxes))],
                         dtype=torch.long)
    return corners, image.to(corners.device, non_blocking=True)


def constant(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """What the host knows, as a tensor of the type of ``like`` and where that is.

    ``like.new_tensor(values)`` would let the host wait until a GPU has done all that it was given before.
    """
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def slices(count: int, width: int) -> Iterator[slice]:
    """Cuts ``count`` rows of ``width`` elements into slices that stay within the budget."""
    step = max(1, _TABLE_BUDGET // max(1, width))
    return (slice(start, start + step) for start in range(0, count, step))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (..., 4) that broadcast against each other."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    return overlap / (area_a + area_b - overlap).clamp(min=1e-6)


@torch.no_grad()
def find_nearest(predictions: Tensor, boxes: Sequence[Tensor], candidates: Tensor) -> Tensor:
    """The ground-truth box that each predicted box overlaps most.

    Args:
        predictions: (N, P, 4) boxes.
        boxes: One (n, 4) tensor of ground truth per image.
        candidates: (N, P) of bool, the predictions that are asked for.

    Returns:
        (N, P) long: the index of the box among those of all images, -1 for predictions that overlap none in their image
        or are not asked for.

    Example:
        >>> predictions = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [20.0, 20.0, 28.0, 28.0], [4.0, 0.0, 12.0, 8.0]]])
        >>> boxes = [torch.tensor([[5.0, 0.0, 12.0, 8.0], [0.0, 0.0, 8.0, 7.0]])]
        >>> find_nearest(predictions, boxes, torch.tensor([[True, True, False]]))
        tensor([[ 1, -1, -1]])
    """
    counts = [len(each) for each in boxes]
    most = max(counts, default=0)
    if not most:
        return torch.full_like(candidates, -1, dtype=torch.long)
    # Boxes without area, which nothing overlaps, fill up the images that have fewer.
    truth = torch.stack([F.pad(each.to(predictions), (0, 0, 0, most - len(each))) for each in boxes])
    start = torch.tensor([0, *counts[:-1]]).cumsum(0).to(predictions.device, non_blocking=True)

    def find(predicted: Tensor, image: Tensor) -> Tensor:
        overlap, nearest = iou(predicted[:, None], truth[image]).max(1)
        return torch.where(overlap > 0, nearest + start[image] + 1, 0)

    image = torch.arange(len(boxes), device=predictions.device).repeat_interleave(predictions.shape[1])
    found = map_rows(find, predictions.flatten(0, 1), image, width=4 * most, where=candidates.flatten())
    return found.view(candidates.shape) - 1
