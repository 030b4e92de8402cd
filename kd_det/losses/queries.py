"""What the terms that compare the queries of DETRs share: which query is compared with which."""
from __future__ import annotations

from dataclasses import replace
from typing import Dict, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from mmdet.utils import reduce_mean
from torch import Tensor

from kd_det.context import DistillContext
from kd_det.functional.queries import match_queries, query_cost
from kd_det.heads import QUERIES_OF, HeadError, QueryOutputs
from kd_det.losses.base import DistillTerm


class QueryPairs(NamedTuple):
    """The student's queries, each beside one of the teacher's, for D decoder layers, N images and Q queries.

    Attributes:
        student: The student's, of these layers.
        teacher: The teacher's in the order of the student's, without gradient; where a query has none, any.
        foreground: (D, N, Q), 1 where the two are for the same ground-truth box.
        background: (D, N, Q), 1 where the two are for none.
        divisor: Number of ground-truth boxes, and of unlabelled images the sum of the teacher's scores, as mean over
            ranks, at least 1; scalar.
    """
    student: QueryOutputs
    teacher: QueryOutputs
    foreground: Tensor
    background: Tensor
    divisor: Tensor

    def normalized(self, values: Tensor) -> Tensor:
        """The sum of (D, N, Q) values over layers, images and queries, by the number of boxes."""
        return values.sum() / self.divisor


class QueryTerm(DistillTerm):
    """A term that compares the queries of two DETRs. Numbers of queries and of decoder layers may differ.

    A student's query that its own matcher assigned to a ground-truth box is compared with the teacher's query that this
    matcher would assign to the same box. The other queries of the student are compared with the teacher's surest ones
    without a box, paired one to one at the least cost of classes and boxes, as DETRDistill (arXiv 2211.10156) pairs all
    of them. Decoder layers are paired from the last on, and their values are summed, as in the task's own loss.

    Args:
        head: ``'bbox_head'``; or a dict with the keys ``student`` and ``teacher``.
        layers: Number of decoder layers; as many as both have by default.
        background: Number of the teacher's queries that count for the student's without a box, the surest; 0 for none.
            The matching's time on the host grows with it.
        costs: Weights of classes, L1 and GIoU in the cost, see :func:`~kd_det.functional.queries.query_cost`.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Raises:
        ValueError: Fewer than one layer, or a negative number of queries.
    """

    def __init__(self, head: Union[str, Dict[str, str]] = 'bbox_head', layers: Optional[int] = None,
                 background: int = 100, costs: Tuple[float, float, float] = (2.0, 5.0, 2.0), teacher: int = 0) -> None:
        super().__init__(teacher)
        if layers is not None and layers < 1:
            raise ValueError(f'layers={layers}: expected the number of decoder layers, 1 or more.')
        if background < 0:
            raise ValueError(f'background={background}: expected a number of queries, 0 or more.')
        heads = dict(student=head, teacher=head) if isinstance(head, str) else head
        self.student_head, self.teacher_head = (heads[side] + QUERIES_OF for side in ('student', 'teacher'))
        self.layers, self.background, self.costs = layers, background, tuple(costs)

    @property
    def student_heads(self) -> Tuple[str, ...]:
        return (self.student_head, )

    @property
    def teacher_heads(self) -> Tuple[str, ...]:
        return (self.teacher_head, )

    def pairs(self, context: DistillContext) -> QueryPairs:
        """The student's queries with the teacher's, matched once for all terms that pair alike.

        Raises:
            HeadError: The two heads tell other classes apart.
        """
        key = ('queries', self.teacher, self.student_head, self.teacher_head, self.layers, self.background, self.costs)
        return context.once(key, lambda: self._pairs(context))

    def _pairs(self, context: DistillContext) -> QueryPairs:
        student = context.student_outputs[self.student_head]
        teacher = context.teacher_outputs[self.teacher][self.teacher_head]
        _require_same_classes(student, teacher)
        layers = min(len(student.logits), len(teacher.logits), self.layers or len(student.logits))
        student, teacher = student.last(layers), teacher.last(layers)
        paired = self._match(student, teacher, context)
        found, scores = paired >= 0, teacher.scores()[-1]
        count = (scores - context.where_labelled(scores)).sum() + sum(map(len, context.boxes))
        return QueryPairs(student, _ordered(teacher, paired.clamp(min=0)),
                          foreground=(found & (student.assigned >= 0)).float(),
                          background=(found & (student.assigned < 0)).float(),
                          divisor=reduce_mean(count).clamp(min=1))

    @torch.no_grad()
    def _match(self, student: QueryOutputs, teacher: QueryOutputs, context: DistillContext) -> Tensor:
        """(D, N, Q): the index of the teacher's query, -1 for none."""
        surest = teacher.scores().topk(min(self.background, teacher.logits.shape[2])).indices
        candidates = _ordered(teacher, surest)
        compared = student.logits, candidates.logits, student.boxes, candidates.boxes
        cost = query_cost(*(each.flatten(0, 1) for each in compared), student.activation, self.costs)
        counts = [len(boxes) for boxes in context.boxes] * len(student.logits)
        assigned, box_cost = student.assigned, _box_cost(student, teacher, context)
        paired = match_queries(cost, surest.flatten(0, 1), box_cost.flatten(0, 1), counts, assigned.flatten(0, 1))
        return paired.view_as(assigned)


def _ordered(outputs: QueryOutputs, indices: Tensor) -> QueryOutputs:
    """The queries of these indices, (D, N, chosen), in this order."""

    def chosen(values: Tensor) -> Tensor:
        return values.gather(2, indices.unsqueeze(-1).expand(*indices.shape, values.shape[-1]))

    return replace(outputs, logits=chosen(outputs.logits), boxes=chosen(outputs.boxes))


def _box_cost(student: QueryOutputs, teacher: QueryOutputs, context: DistillContext) -> Tensor:
    """(D, N, M, n): the student's matcher's costs of assigning the teacher's queries to the n boxes of an image.

    Boxes of a class that the teacher does not know are left to nobody.
    """
    most, costs = max(map(len, context.boxes)), []
    for image, (boxes, labels) in enumerate(zip(context.boxes, context.labels)):
        logits, predicted = (each[:, image].flatten(0, 1) for each in (teacher.logits, teacher.boxes))
        cost = logits.new_zeros(len(logits), 0)
        if len(boxes):
            cost = student.box_cost(logits, predicted, boxes, labels.clamp(min=0), context.image_shapes[image])
        cost = cost.masked_fill(labels < 0, torch.inf).unflatten(0, (len(teacher.logits), -1))
        costs.append(F.pad(cost, (0, most - len(boxes))))
    return torch.stack(costs, 1)


def _require_same_classes(student: QueryOutputs, teacher: QueryOutputs) -> None:
    told = [f'{each.num_classes} classes apart by {each.activation}' for each in (student, teacher)]
    if told[0] != told[1]:
        raise HeadError(f'The student tells {told[0]}, the teacher {told[1]}: queries are compared class by class. '
                        'Give a teacher of the same classes and kind, or distil features alone.')
