"""The student's queries are classified as the teacher's are."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.context import DistillContext
from kd_det.functional.logits import soft_target_kl
from kd_det.losses.base import Parts
from kd_det.losses.outputs import sigmoid_divergence
from kd_det.losses.queries import QueryTerm


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
