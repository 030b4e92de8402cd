"""What the terms that compare the queries of DETRs share: which query is compared with which."""
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from torch import Tensor

from kd_det.context import DistillContext
from kd_det.functional.boxes import giou_imitation
from kd_det.functional.logits import soft_target_kl
from kd_det.functional.queries import corners, match_queries, query_cost
from kd_det.heads import HeadError, HeadRequest, QueryOutputs
from kd_det.losses.base import DistillTerm, Parts
from kd_det.losses.outputs import sigmoid_divergence


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

    def __init__(self, head: str | dict[str, str] = 'bbox_head', layers: int | None = None,
                 background: int = 100, costs: tuple[float, float, float] = (2.0, 5.0, 2.0), teacher: int = 0) -> None:
        super().__init__(teacher)
        if layers is not None and layers < 1:
            raise ValueError(f'layers={layers}: expected the number of decoder layers, 1 or more.')
        if background < 0:
            raise ValueError(f'background={background}: expected a number of queries, 0 or more.')
        heads = dict(student=head, teacher=head) if isinstance(head, str) else head
        self.student_head, self.teacher_head = (HeadRequest(heads[side], 'queries') for side in ('student', 'teacher'))
        self.layers, self.background, self.costs = layers, background, tuple(costs)

    @property
    def student_heads(self) -> tuple[str, ...]:
        return (self.student_head, )

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.teacher_head, )

    def pairs(self, context: DistillContext) -> QueryPairs:
        """The student's queries with the teacher's, matched once for all terms that pair alike.

        Raises:
            HeadError: The two heads tell other classes apart.
        """
        key = ('queries', self.teacher_index, self.student_head, self.teacher_head, self.layers, self.background, self.costs)
        return context.once(key, lambda: self._pairs(context))

    def _pairs(self, context: DistillContext) -> QueryPairs:
        student = context.student_outputs[self.student_head]
        teacher = context.teacher_outputs[self.teacher_index][self.teacher_head]
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


@MODELS.register_module()
class QueryClassification(QueryTerm):
    """Class distillation of DETRs, query by query (after DETRDistill, Chang et al., arXiv 2211.10156).

    Heads with sigmoid classes (Conditional DETR, DAB-DETR, Deformable DETR, DINO): Σ_classes
    BCE(s, σ(t))·|σ(t) − σ(s)|^β (BCKD, arXiv 2308.14286), which fades where the two agree, as on most of the
    background. Heads with softmax classes (DETR): T²·KL(t ‖ s).

    Args:
        beta: Exponent of the gap; 0 for the plain cross-entropy, see :func:`~kd_det.losses.outputs.sigmoid_divergence`.
        temperature: T of softmax heads.
        foreground_weight: Of the queries with a ground-truth box.
        background_weight: Of the others that are paired.
        **kwargs: See :class:`~kd_det.losses.queries.QueryTerm`.

    Example:
        >>> dict(type='QueryClassification', beta=1.0, background=100)
    """

    def __init__(self, beta: float = 1.0, temperature: float = 1.0, foreground_weight: float = 1.0,
                 background_weight: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.beta, self.temperature = beta, temperature
        self.foreground_weight, self.background_weight = foreground_weight, background_weight

    def forward(self, context: DistillContext) -> Parts:
        pairs = self.pairs(context)
        student, teacher = pairs.student.logits, pairs.teacher.logits
        if pairs.student.activation == 'sigmoid':
            divergence = sigmoid_divergence(student, teacher, self.beta)
        else:
            divergence = soft_target_kl(student, teacher, self.temperature, reduction='none')
        return dict(foreground=self.foreground_weight * pairs.normalized(divergence * pairs.foreground),
                    background=self.background_weight * pairs.normalized(divergence * pairs.background))


@MODELS.register_module()
class QueryRegression(QueryTerm):
    """Box distillation of DETRs, query by query (after DETRDistill, Chang et al., arXiv 2211.10156).

    Σ w·(l1·‖s − t‖₁ + giou·(1 − GIoU(s, t))) of the boxes, with w the teacher's score: a box that the teacher does not
    believe in teaches nothing.

    Args:
        l1_weight: Of the L1 distance of centre, width and height, as shares of the image.
        giou_weight: Of 1 − GIoU.
        **kwargs: See :class:`~kd_det.losses.queries.QueryTerm`.

    Example:
        >>> dict(type='QueryRegression', l1_weight=5.0, giou_weight=2.0)
    """

    def __init__(self, l1_weight: float = 5.0, giou_weight: float = 2.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.l1_weight, self.giou_weight = l1_weight, giou_weight

    def forward(self, context: DistillContext) -> Parts:
        pairs = self.pairs(context)
        weight = pairs.teacher.scores() * (pairs.foreground + pairs.background)
        student, teacher = pairs.student.boxes, pairs.teacher.boxes
        l1 = (student - teacher).abs().sum(-1)
        giou = giou_imitation(*(corners(boxes).flatten(0, 2) for boxes in (student, teacher))).view_as(weight)
        return dict(l1=self.l1_weight * pairs.normalized(weight * l1),
                    giou=self.giou_weight * pairs.normalized(weight * giou))
