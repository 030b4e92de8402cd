"""The student's queries place their boxes as the teacher's do."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.context import DistillContext
from kd_det.functional.boxes import giou_imitation
from kd_det.functional.queries import corners
from kd_det.losses.base import Parts
from kd_det.losses.queries import QueryTerm


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
