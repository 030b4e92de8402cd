"""Which query of one DETR belongs to which of another: the costs of pairs, and the matching that costs least.

And queries made of boxes with noise, which belong to both.

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
LEAST = 1e-3  # share of the image that a noisy box is away from 0 and 1, as in DINO: logits of shares stay finite
WORD, SEED, FACTOR = 0xFFFFFFFF, 0x9E3779B9, 0x45D9F3B  # of numbers made of 32 bits


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


@torch.no_grad()
def noisy_targets(boxes: Tensor, labels: Tensor, groups: int = 1, box_noise: float = 0.4, label_noise: float = 0.0,
                  classes: int = 1, step: int = 0) -> tuple[Tensor, Tensor]:
    """Ground truth with noise, as DETRs learn to denoise it (DN-DETR, arXiv 2203.01305; DINO, arXiv 2203.03605).

    The noise is a hash of the box and the step. So no generator is touched, and a box has the same noise wherever it
    stands: in another order, on another rank or device, or in a run that was resumed.

    Args:
        boxes: (N, n, 4) of x1, y1, x2, y2, as shares of the image.
        labels: (N, n) class indices.
        groups: G, how often each box comes, each time with other noise.
        box_noise: λ, from 0 to 1. Each side moves by up to λ/2 of the box's width or height, evenly drawn.
        label_noise: Share of the labels in whose place there is one of all classes, evenly drawn.
        classes: K, their number.
        step: In another one the noise is another.

    Returns:
        (N, G, n, 4) centre x, centre y, width and height, at least :data:`LEAST` away from 0 and 1; and (N, G, n)
        labels.

    Example:
        >>> boxes, labels = torch.tensor([[[0.2, 0.2, 0.6, 0.4]]]), torch.tensor([[3]])
        >>> noisy_targets(boxes, labels, box_noise=0.0)
        (tensor([[[[0.4000, 0.3000, 0.4000, 0.2000]]]]), tensor([[[3]]]))
        >>> first, second = noisy_targets(boxes, labels, groups=2, box_noise=0.5)[0].unbind(1)
        >>> bool((first != second).all()), bool((first[..., 2] <= 0.6).all())
        (True, True)
    """
    draws = _draw(boxes, groups, 6, step).to(boxes.dtype)
    sizes = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2).unsqueeze(1)
    moved = (boxes.unsqueeze(1) + box_noise * (draws[..., :4] - 0.5) * sizes).clamp(0, 1)
    first, last = moved.chunk(2, -1)
    noisy = torch.cat([(first + last) / 2, last - first], -1).clamp(LEAST, 1 - LEAST)
    others = (draws[..., 5] * classes).long().clamp(max=classes - 1)
    return noisy, torch.where(draws[..., 4] < label_noise, others, labels.unsqueeze(1))


def _draw(boxes: Tensor, groups: int, draws: int, step: int) -> Tensor:
    """(N, n, 4) boxes -> (N, G, n, draws) numbers from 0 to below 1, which follow from each box and the step alone."""
    bits = (boxes.float() + 0.0).contiguous().view(torch.int32).long() & WORD  # + 0.0: -0 is 0
    state = torch.full_like(bits[..., 0], SEED)
    for side in bits.unbind(-1):
        state = _stir(state ^ side)
    state = _stir(state ^ (step & WORD))
    group = torch.arange(groups, device=boxes.device).view(-1, 1, 1)
    draw = torch.arange(draws, device=boxes.device)
    words = _stir(_stir(state[:, None, :, None] ^ group) ^ draw)
    return (words >> 8).float() / 2**24


def _stir(words: Tensor) -> Tensor:
    """Spreads each bit of 32 over all; products stay below 2⁶³, which no device wraps its own way."""
    for _ in range(2):
        words = ((words >> 16) ^ words) * FACTOR & WORD
    return (words >> 16) ^ words


def hide_other_groups(known: Tensor, groups: int) -> Tensor:
    """Which queries may not attend to which: each sees the known ones of its own group, and itself.

    Args:
        known: (N, n) of bool, the same in each group; the others are padding.
        groups: G; the queries of a group follow one another.

    Returns:
        (N, G·n, G·n) of bool.

    Example:
        >>> hide_other_groups(torch.tensor([[True, False]]), 2).int()
        tensor([[[0, 1, 1, 1],
                 [0, 0, 1, 1],
                 [1, 1, 0, 1],
                 [1, 1, 0, 0]]], dtype=torch.int32)
    """
    count = known.shape[1]
    group = torch.arange(groups, device=known.device).repeat_interleave(count)
    seen = (group[:, None] == group) & known.repeat(1, groups).unsqueeze(1)
    return ~(seen | torch.eye(groups * count, dtype=torch.bool, device=known.device))


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
