"""The student's queries classify and locate as the teacher's do, in DETRs; and which query is compared with which."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from annotated_types import Len
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from torch import Tensor

from kd_det.config.arguments import Count, EitherSide, Index, Positive, Weight, declared, split_sides
from kd_det.context import DistillContext
from kd_det.functional.boxes import giou_imitation
from kd_det.functional.logits import soft_target_kl
from kd_det.functional.queries import corners, match_queries, query_cost
from kd_det.heads import HeadError, HeadRequest, QueryDecoder, QueryOutputs
from kd_det.heads.queries import BoxCost
from kd_det.losses.base import DistillTerm, Parts
from kd_det.losses.outputs import (
    GapExponent,
    Treatment,
    sigmoid_divergence,
    standardize_both,
    treat_teacher,
    weigh_by_confidence,
)


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

    def normalize(self, values: Tensor) -> Tensor:
        """The sum of (D, N, Q) values over layers, images and queries, by the number of boxes."""
        return values.sum() / self.divisor


class DecoderTerm(DistillTerm):
    """A term that compares what the decoders of two DETRs say. Their layers are paired from the last on.

    Args:
        head: ``'bbox_head'``; or a dict with the keys ``student`` and ``teacher``.
        part: What it reads of them, see :class:`~kd_det.heads.HeadRequest`.
        layers: Number of decoder layers; as many as both have by default.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.
    """

    def __init__(self, head: EitherSide, part: str, layers: int | None, teacher: int) -> None:
        super().__init__(teacher)
        self.student_head, self.teacher_head = (HeadRequest(name, part) for name in split_sides(head))
        self.layers = layers

    @property
    def student_heads(self) -> tuple[str, ...]:
        return (self.student_head, )

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.teacher_head, )

    def pair_layers(self, student: QueryOutputs, teacher: QueryOutputs) -> tuple[QueryOutputs, QueryOutputs]:
        """The layers of both that are compared, the last ones."""
        layers = min(len(student.logits), len(teacher.logits), self.layers or len(student.logits))
        return student.last(layers), teacher.last(layers)


def box_distances(student: QueryOutputs, teacher: QueryOutputs) -> tuple[Tensor, Tensor]:
    """How far the boxes of queries lie apart.

    Returns:
        (D, N, Q) the L1 distances of centre, width and height, as shares of the image; and 1 − GIoU.
    """
    l1 = (student.boxes - teacher.boxes).abs().sum(-1)
    return l1, giou_imitation(*(corners(each.boxes).flatten(0, 2) for each in (student, teacher))).view_as(l1)


class QueryTerm(DecoderTerm):
    """A term that compares the queries of two DETRs. Numbers of queries and of decoder layers may differ.

    A student's query that its own matcher assigned to a ground-truth box is compared with the teacher's query that this
    matcher would assign to the same box. The other queries of the student are compared with the teacher's surest ones
    without a box, paired one to one at the least cost of classes and boxes, as DETRDistill (arXiv 2211.10156) pairs all
    of them. Decoder layers are paired from the last on, and their values are summed, as in the task's own loss.

    Args:
        head: ``'bbox_head'``; or a dict with the keys ``student`` and ``teacher``.
        layers: Number of decoder layers; as many as both have by default.
        background: Number of the teacher's queries that count for the student's without a box, the surest; 0 for
            none. The matching's time on the host grows with it.
        costs: Weights of classes, L1 and GIoU in the cost, see :func:`~kd_det.functional.queries.query_cost`.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Raises:
        ValueError: An argument that does not fit.
    """

    @declared
    def __init__(self, head: EitherSide = 'bbox_head', layers: Count | None = None, background: Index = 100,
                 costs: Annotated[Sequence[Weight], Len(3, 3)] = (2.0, 5.0, 2.0), teacher: Index = 0) -> None:
        super().__init__(head, 'queries', layers, teacher)
        self.background, self.costs = background, (costs[0], costs[1], costs[2])

    @property
    def only_at_boxes(self) -> bool:  # type: ignore[override]
        return self.background == 0

    def pair_queries(self, context: DistillContext) -> QueryPairs:
        """Pairs the student's queries with the teacher's, once for all terms that pair alike.

        Raises:
            HeadError: The two heads tell other classes apart.
        """
        key = ('queries', self.teacher_index, self.student_head, self.teacher_head, self.layers, self.background,
               self.costs)
        return context.once(key, lambda: self._pair_queries(context))

    def _pair_queries(self, context: DistillContext) -> QueryPairs:
        student = cast(QueryOutputs, context.student_outputs[self.student_head])
        teacher = cast(QueryOutputs, context.teacher_outputs[self.teacher_index][self.teacher_head])
        require_same_classes(student, teacher)
        student, teacher = self.pair_layers(student, teacher)
        paired = self._match(student, teacher, context)
        found, scores = paired >= 0, teacher.scores()[-1]
        count = (scores - context.where_labelled(scores)).sum() + sum(map(len, context.boxes))
        has_box = cast(Tensor, student.assigned) >= 0
        return QueryPairs(student, teacher.select(paired.clamp(min=0)),
                          foreground=(found & has_box).float(), background=(found & ~has_box).float(),
                          divisor=reduce_mean(count).clamp(min=1))

    @torch.no_grad()
    def _match(self, student: QueryOutputs, teacher: QueryOutputs, context: DistillContext) -> Tensor:
        """(D, N, Q): the index of the teacher's query, -1 for none."""
        surest = teacher.scores().topk(min(self.background, teacher.logits.shape[2])).indices
        candidates = teacher.select(surest)
        logits = student.logits.flatten(0, 1), candidates.logits.flatten(0, 1)
        boxes = student.boxes.flatten(0, 1), candidates.boxes.flatten(0, 1)
        cost = query_cost(*logits, *boxes, activation=student.activation, weights=self.costs)
        counts = [len(image_boxes) for image_boxes in context.boxes] * len(student.logits)
        assigned, box_cost = cast(Tensor, student.assigned), _compute_box_cost(student, teacher, context)
        paired = match_queries(cost, surest.flatten(0, 1), box_cost.flatten(0, 1), counts, assigned.flatten(0, 1))
        return paired.view_as(assigned)


def _compute_box_cost(student: QueryOutputs, teacher: QueryOutputs, context: DistillContext) -> Tensor:
    """(D, N, M, n): the student's matcher's costs of assigning the teacher's queries to the n boxes of an image.

    Boxes of a class that the teacher does not know are left to nobody.
    """
    layers, _, queries = teacher.logits.shape[:3]
    most, costs, compute = max(map(len, context.boxes)), [], cast(BoxCost, student.box_cost)
    for image, (boxes, labels) in enumerate(zip(context.boxes, context.labels)):
        logits, predicted = (each[:, image].flatten(0, 1) for each in (teacher.logits, teacher.boxes))
        cost = logits.new_zeros(len(logits), 0)
        if len(boxes):
            cost = compute(logits, predicted, boxes, labels.clamp(min=0), context.image_shapes[image])
        cost = cost.masked_fill(labels < 0, torch.inf)
        costs.append(F.pad(cost.view(layers, queries, len(boxes)), (0, most - len(boxes))))
    return torch.stack(costs, 1)


def require_same_classes(student: QueryOutputs | QueryDecoder, teacher: QueryOutputs | QueryDecoder) -> None:
    """Checks that two heads can be compared class by class.

    Raises:
        HeadError: They tell other classes apart, or by another activation.
    """
    classes = [f'{each.num_classes} classes apart by {each.activation}' for each in (student, teacher)]
    if classes[0] != classes[1]:
        raise HeadError(f'The student tells {classes[0]}, the teacher {classes[1]}: queries are compared class by '
                        'class. Give a teacher of the same classes and kind, or distil features alone.')


@MODELS.register_module()
class QueryClassification(QueryTerm):
    """Class distillation of DETRs, query by query (after DETRDistill, Chang et al., ICCV 2023, arXiv 2211.10156).

    ::

        L = (w_fg·Σ_foreground d(s, t) + w_bg·Σ_background d(s, t)) / N_boxes
        d = Σ_classes BCE(s, σ(t))·|σ(t) − σ(s)|^β                                              sigmoid classes
        d = T²·KL(softmax(t/T) ‖ softmax(s/T))                                                  softmax classes

    with s, t (D, N, Q, K) class logits of D decoder layers, N images and Q pairs of queries. Sigmoid classes have the
    heads of Conditional DETR, DAB-DETR, Deformable DETR and DINO: their form (BCKD, arXiv 2308.14286) fades where the
    two agree, as on most of the background. DETR's are softmax classes.

    In a config: ``dict(type='QueryClassification', beta=1.0, background=100)``.

    Args:
        beta: β, exponent of the gap; 0 for the plain cross-entropy, see
            :func:`~kd_det.losses.outputs.sigmoid_divergence`.
        temperature: T of softmax heads.
        foreground_weight: w_fg of the queries with a ground-truth box.
        background_weight: w_bg of the others that are paired.
        treatment: ``'none'``, ``'cwtm'`` or ``'dkpp'``, see :class:`~kd_det.losses.DenseClassification`, query by query
            of those that are paired.
        standardize: Logits of both sides have mean 0 and deviation 1 over the classes of each query, see
            :class:`~kd_det.losses.DenseClassification`. Queries are paired by what they were before.
        **kwargs: See :class:`~kd_det.losses.queries.QueryTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> boxes, assigned = torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]]), torch.tensor([[[-1]]])  # a query without a box
        >>> student = QueryOutputs(torch.zeros(1, 1, 1, 3), boxes, 'sigmoid', assigned)
        >>> teacher = QueryOutputs(torch.full((1, 1, 1, 3), 9.0), boxes, 'sigmoid')
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), student_outputs={'bbox_head.queries': student},
        ...     teacher_outputs=[{'bbox_head.queries': teacher}])
        >>> term = QueryClassification(beta=1.0)
        >>> {name: round(value.item(), 2) for name, value in term(context).items()}
        {'foreground': 0.0, 'background': 1.04}
    """

    @declared
    def __init__(self, beta: GapExponent = 1.0, temperature: Positive = 1.0, foreground_weight: Weight = 1.0,
                 background_weight: Weight = 1.0, treatment: Treatment = 'none', standardize: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta, self.temperature, self.treatment, self.standardize = beta, temperature, treatment, standardize
        self.foreground_weight, self.background_weight = foreground_weight, background_weight

    def forward(self, context: DistillContext) -> Parts:
        pairs = self.pair_queries(context)
        teacher = treat_teacher(self.treatment, pairs.teacher.logits)
        logits = standardize_both(self.standardize, pairs.student.logits, teacher)
        if pairs.student.activation == 'sigmoid':
            divergence = sigmoid_divergence(*logits, self.beta)
        else:
            divergence = soft_target_kl(*logits, self.temperature, reduction='none')
        divergence = divergence * weigh_by_confidence(self.treatment, teacher, pairs.student.activation,
                                                      pairs.foreground + pairs.background)
        return dict(foreground=self.foreground_weight * pairs.normalize(divergence * pairs.foreground),
                    background=self.background_weight * pairs.normalize(divergence * pairs.background))


@MODELS.register_module()
class QueryRegression(QueryTerm):
    """Box distillation of DETRs, query by query (after DETRDistill, Chang et al., ICCV 2023, arXiv 2211.10156).

    ::

        L = Σ_pairs max_c σ(t)·(w_l1·‖box_s − box_t‖₁ + w_giou·(1 − GIoU(box_s, box_t))) / N_boxes

    with boxes (D, N, Q, 4) of D decoder layers, N images and Q pairs of queries, and t the teacher's class logits: a
    box that the teacher does not believe in teaches nothing.

    In a config: ``dict(type='QueryRegression', l1_weight=5.0, giou_weight=2.0)``.

    Args:
        l1_weight: w_l1 of the L1 distance of centre, width and height, as shares of the image.
        giou_weight: w_giou.
        **kwargs: See :class:`~kd_det.losses.queries.QueryTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> logits, assigned = torch.zeros(1, 1, 1, 3), torch.tensor([[[-1]]])  # one query, without a box
        >>> student = QueryOutputs(logits, torch.tensor([[[[0.5, 0.5, 0.2, 0.2]]]]), 'sigmoid', assigned)
        >>> teacher = QueryOutputs(logits, torch.tensor([[[[0.7, 0.5, 0.2, 0.2]]]]), 'sigmoid')
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), student_outputs={'bbox_head.queries': student},
        ...     teacher_outputs=[{'bbox_head.queries': teacher}])
        >>> term = QueryRegression(l1_weight=5.0, giou_weight=2.0)
        >>> {name: round(value.item(), 2) for name, value in term(context).items()}  # side by side; a score of 0.5
        {'l1': 0.5, 'giou': 1.0}
    """

    @declared
    def __init__(self, l1_weight: Weight = 5.0, giou_weight: Weight = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.l1_weight, self.giou_weight = l1_weight, giou_weight

    def forward(self, context: DistillContext) -> Parts:
        pairs = self.pair_queries(context)
        weight = pairs.teacher.scores() * (pairs.foreground + pairs.background)
        l1, giou = box_distances(pairs.student, pairs.teacher)
        return dict(l1=self.l1_weight * pairs.normalize(weight * l1),
                    giou=self.giou_weight * pairs.normalize(weight * giou))
