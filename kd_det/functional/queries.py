"""Which query of one DETR belongs to which of another: the costs of pairs, and the matching that costs least.

A query predicts one object: class logits and a box, as centre x, centre y, width and height, each a share of the image.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.boxes import giou_imitation

Array = np.ndarray[Any, Any]

UNAFFORDABLE = 1e6  # takes the place of costs that are not finite


@torch.no_grad()
def query_cost(student_logits: Tensor, teacher_logits: Tensor, student_boxes: Tensor, teacher_boxes: Tensor,
               activation: str = 'sigmoid', weights: tuple[float, float, float] = (2.0, 5.0, 2.0)) -> Tensor:
    """What it costs to pair each of the student's queries with each of the teacher's.

    The divergence of the classes, KL(t ‖ s), summed over the classes of a sigmoid head; the L1 distance of the boxes;
    and 1 - GIoU (arXiv 1902.09630).

    Args:
        student_logits: (N, Q, K).
        teacher_logits: (N, M, K).
        student_boxes: (N, Q, 4), as shares of the image.
        teacher_boxes: (N, M, 4).
        activation: ``'sigmoid'`` or ``'softmax'``: what turns logits into probabilities.
        weights: Of classes, L1 and GIoU; those of Deformable DETR's matching to ground truth by default.

    Returns:
        (N, Q, M), 0 where a pair is equal, without gradient.

    Example:
        >>> logits = torch.tensor([[[9.0], [-9.0]]])
        >>> boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]]])
        >>> query_cost(logits, logits, boxes, boxes).argmin(-1)  # the same query of both
        tensor([[0, 1]])
    """
    pairs = len(student_boxes), student_boxes.shape[1], teacher_boxes.shape[1]
    first, second = (corners(boxes).unsqueeze(dim).expand(*pairs, 4).flatten(0, 2)
                     for boxes, dim in ((student_boxes, 2), (teacher_boxes, 1)))
    of_classes, of_l1, of_giou = weights
    return (of_classes * _class_divergence(student_logits, teacher_logits, activation)
            + of_l1 * torch.cdist(student_boxes, teacher_boxes, p=1)
            + of_giou * giou_imitation(first, second).view(pairs))


def match_queries(cost: Tensor, candidates: Tensor, box_cost: Tensor, num_boxes: Sequence[int],
                  assigned: Tensor) -> Tensor:
    """Finds the teacher's query for each of the student's, in P images or layers at once.

    A student's query that is assigned to a ground-truth box gets the teacher's query for the same box. Each of the
    others gets one of the candidates that have no box, none of them twice. Both matchings, of the teacher's queries to
    boxes and of the queries without a box, are those that cost least in all: the Hungarian method (scipy's), which runs
    on the host. The values go there in one transfer, the only one.

    Args:
        cost: (P, Q, C) of pairing the student's queries with the candidates, see :func:`query_cost`.
        candidates: (P, C) long: which of the teacher's M queries they are, each once.
        box_cost: (P, M, n) of assigning the teacher's queries to ground-truth boxes; a box whose costs are infinite is
            nobody's.
        num_boxes: P numbers of boxes, n or fewer; the rest of ``box_cost`` is padding.
        assigned: (P, Q) long: the index of the box to which the student's query is assigned; -1 for none.

    Returns:
        (P, Q) long: the index of the teacher's query; -1 for none, where the teacher has fewer queries.

    Example:
        >>> cost = torch.tensor([[[5.0], [1.0]]])        # of the student's two queries with the teacher's query 1
        >>> box_cost = torch.tensor([[[0.0], [2.0]]])    # the teacher's query 0 finds the only box
        >>> match_queries(cost, torch.tensor([[1]]), box_cost, [1], assigned=torch.tensor([[0, -1]]))
        tensor([[0, 1]])
    """
    tensors = [each.detach().float() for each in (cost, candidates, box_cost, assigned)]  # indices are exact up to 2²⁴
    joined = torch.cat([each.flatten(1) for each in tensors], 1).nan_to_num(UNAFFORDABLE, UNAFFORDABLE, -UNAFFORDABLE)
    parts = torch.split(joined.cpu(), [each[0].numel() for each in tensors], 1)
    problems = zip(*(part.view(each.shape).numpy() for part, each in zip(parts, tensors)), num_boxes)
    paired = [_match(cost, each.astype(int), box_cost[:, :count], of_student.astype(int))
              for cost, each, box_cost, of_student, count in problems]
    return torch.from_numpy(np.stack(paired)).to(assigned.device)


def _match(cost: Array, candidates: Array, box_cost: Array, assigned: Array) -> Array:
    """The index of the teacher's query for each of the student's, (Q,)."""
    from scipy.optimize import linear_sum_assignment  # here, for this package is to be imported with PyTorch alone
    queries, boxes = linear_sum_assignment(box_cost)
    affordable = box_cost[queries, boxes] < UNAFFORDABLE
    queries, boxes = queries[affordable], boxes[affordable]
    query_of = np.full(box_cost.shape[1] + 1, -1)  # by box; the last for no box, to which the index -1 leads
    query_of[boxes] = queries
    paired: Array = query_of[assigned]
    rest, free = np.flatnonzero(assigned < 0), np.flatnonzero(~np.isin(candidates, queries))
    rows, columns = linear_sum_assignment(cost[np.ix_(rest, free)])
    paired[rest[rows]] = candidates[free[columns]]
    return paired


def corners(boxes: Tensor) -> Tensor:
    """Boxes of queries, (..., 4), as x1, y1, x2, y2 in thousandths of the image.

    IoU and GIoU are the same in any unit; in this one, even the area of a tiny box is no rounding error.
    """
    center, size = (1000 * boxes).chunk(2, -1)
    return torch.cat([center - size / 2, center + size / 2], -1)


def _class_divergence(student: Tensor, teacher: Tensor, activation: str) -> Tensor:
    """KL(t ‖ s) of every pair, (N, Q, M), as matrix products: no (N, Q, M, K) is made."""
    if activation == 'sigmoid':
        probability, entropy = teacher.sigmoid(), _binary_entropy(teacher)
        cross = F.softplus(student).sum(-1, keepdim=True) - student @ probability.mT
    else:
        probability, log_probability = teacher.softmax(-1), teacher.log_softmax(-1)
        entropy = -(probability * log_probability).sum(-1)
        cross = -student.log_softmax(-1) @ probability.mT
    return (cross - entropy.unsqueeze(1)).clamp(min=0)  # rounding may lead below


def _binary_entropy(logits: Tensor) -> Tensor:
    return (F.softplus(logits) - logits * logits.sigmoid()).sum(-1)
