"""The student's dense head classifies every prior as the teacher's does."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.functional.logits import soft_target_kl
from kd_det.losses.base import Parts
from kd_det.losses.outputs import ComparedOutputs, DenseTerm, sigmoid_divergence

WEIGHTINGS = ('all', 'richness')


@MODELS.register_module()
class DenseClassification(DenseTerm):
    """Class distillation of dense heads.

    Heads with sigmoid classes: T²·Σ_classes BCE(s, σ(t))·|σ(t) − σ(s)|^β (BCKD, Yang et al., arXiv 2308.14286; β = 1),
    of s / T and t / T; with β = 0 less the teacher's entropy, which makes it T²·KL, class by class. Heads with softmax
    classes: T²·KL(t ‖ s). The class logits of a head that predicts objectness (YOLOX, YOLOv3) mean nothing where there
    is no object: they weigh with the teacher's objectness, which is distilled as a part of its own.

    Args:
        beta: Exponent of the gap, see :func:`~kd_det.losses.outputs.sigmoid_divergence`; softmax heads have none.
        temperature: T.
        weighting: ``'all'`` priors alike, or by the ``'richness'`` of their cell, the teacher's largest probability
            there (FRS, Du et al., arXiv 2111.00674).
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An unknown weighting.

    Example:
        >>> dict(type='DenseClassification', head='bbox_head', beta=1.0)
    """

    def __init__(self, beta: float = 1.0, temperature: float = 1.0, weighting: str = 'all', **kwargs) -> None:
        super().__init__(**kwargs)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting='{weighting}': expected one of {', '.join(WEIGHTINGS)}.")
        self.beta, self.temperature, self.weighting = beta, temperature, weighting

    def compare(self, level: ComparedOutputs) -> Parts:
        weight = level.richness() if self.weighting == 'richness' else level.valid
        parts, class_weight = {}, weight
        if level.teacher.objectness is not None:
            student, teacher = (each.unsqueeze(-1) for each in level.both('objectness'))
            parts['objectness'] = (weight * self._sigmoid_divergence(student, teacher)).sum()
            class_weight = weight * teacher.squeeze(-1).sigmoid()
        student, teacher = level.both('logits')
        if level.student.activation == 'sigmoid':
            divergence = self._sigmoid_divergence(student, teacher)
        else:
            divergence = soft_target_kl(student, teacher, self.temperature, reduction='none')
        return dict(parts, classes=(class_weight * divergence).sum())

    def _sigmoid_divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        softened = (each / self.temperature for each in (student, teacher))
        return self.temperature**2 * sigmoid_divergence(*softened, self.beta)
