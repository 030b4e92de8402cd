"""The student's dense head classifies every prior as the teacher's does."""
from __future__ import annotations

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.functional.boxes import distribution_kl, giou_imitation
from kd_det.functional.logits import soft_target_kl
from kd_det.functional.masks import valuable_region
from kd_det.heads import HeadError, HeadRequest
from kd_det.losses.base import Parts
from kd_det.losses.outputs import ComparedOutputs, DenseTerm, sigmoid_divergence

CLASSIFICATION_WEIGHTINGS = ('all', 'richness')


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
        if weighting not in CLASSIFICATION_WEIGHTINGS:
            raise ValueError(f"weighting='{weighting}': expected one of {', '.join(CLASSIFICATION_WEIGHTINGS)}.")
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


REGRESSION_FORMS = ('giou', 'distribution', 'bounded')
REDUCTIONS = ('mean', 'sum')
REGRESSION_WEIGHTINGS = ('confidence', 'gap', 'positives', 'valuable')


@MODELS.register_module()
class DenseRegression(DenseTerm):
    """Box distillation of dense heads.

    Forms:

    - ``'giou'``: 1 − GIoU of the decoded boxes, for heads of any box encoding. A box of the teacher without area
      teaches nothing.
    - ``'distribution'``: T²·KL of the distributions over the distance to each side, for GFL and its kin (localisation
      distillation, LD, Zheng et al., arXiv 2102.12252).
    - ``'bounded'``: ‖s − y‖² of positive priors, each alike, where it is not better than the teacher's ‖t − y‖² by the
      margin, else 0 (Chen et al., NeurIPS 2017); for heads with anchors and deltas, in the units of
      :class:`~kd_det.heads.DenseOutputs`.

    Weightings of the priors, for the other two forms:

    - ``'confidence'``: the teacher's score.
    - ``'gap'``: the largest difference of a class probability between the two (BCKD, arXiv 2308.14286).
    - ``'positives'``: the student's own score on the priors that its assigner gave to a box, 0 on others (LD's main
      region).
    - ``'valuable'``: the overlap with a box, on the other priors around boxes (LD's valuable localisation region), see
      :func:`~kd_det.functional.masks.valuable_region`.

    Args:
        form: See above.
        weighting: See above.
        temperature: T of the distributions.
        reduction: ``'mean'`` over their bins and sides, for which LD's published weight is, or ``'sum'``.
        margin: Of the bounded form.
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An unknown form, weighting or reduction.

    Example:
        >>> dict(type='DenseRegression', form='giou', weighting='gap', weight=4.0)
    """

    def __init__(self, form: str = 'giou', weighting: str = 'confidence', temperature: float = 10.0,
                 reduction: str = 'mean', margin: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        for name, value, known in (('form', form, REGRESSION_FORMS), ('weighting', weighting, REGRESSION_WEIGHTINGS),
                                   ('reduction', reduction, REDUCTIONS)):
            if value not in known:
                raise ValueError(f"{name}='{value}': expected one of {', '.join(known)}.")
        self.form, self.weighting, self.temperature, self.reduction = form, weighting, temperature, reduction
        self.margin = margin

    @property
    def student_heads(self) -> tuple[str, ...]:
        assigns = self.form == 'bounded' or self.weighting in ('positives', 'valuable')
        positives = (HeadRequest(self.student_head, 'positives'), ) if assigns else ()
        return (*super().student_heads, *positives, *self._distributions_of(self.student_head))

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (*super().teacher_heads, *self._distributions_of(self.teacher_head))

    def _distributions_of(self, head: str) -> tuple[str, ...]:
        return (HeadRequest(head, 'distributions'), ) if self.form == 'distribution' else ()

    def compare(self, level: ComparedOutputs) -> Parts:
        if self.form == 'bounded':
            return dict(bounded=level.bounded_errors(self.margin).sum())
        weight = level.valid * self._weight(level)
        if self.form == 'distribution':
            student, teacher = (each.flatten(0, 1) for each in _distributions(level))
            distance = distribution_kl(student, teacher, self.temperature, self.reduction)
        else:
            student, teacher = (each.flatten(0, 1) for each in level.both('boxes'))
            # A box that overflowed or has no area teaches nothing. Masking its distance would leave NaN in gradients.
            usable = teacher.isfinite().all(1) & (teacher[:, 2:] > teacher[:, :2]).all(1)
            distance = giou_imitation(student, torch.where(usable[:, None], teacher, student.detach())) * usable
        return {self.form: (weight.flatten() * distance).sum()}

    def _weight(self, level: ComparedOutputs) -> Tensor:
        """(N, H·W·A), without gradient."""
        if self.weighting == 'confidence':
            return level.teacher.scores(level.teacher_level)
        if self.weighting == 'gap':
            student, teacher = (each.detach() for each in (level.student.probabilities(level.student_level),
                                                           level.teacher.probabilities(level.teacher_level)))
            return (teacher - student).abs().amax(-1)
        positives = level.student.positives(level.student_level)
        if self.weighting == 'valuable':
            return _valuable(level) * ~positives
        return level.student.scores(level.student_level).detach() * positives


def _valuable(level: ComparedOutputs) -> Tensor:
    priors = level.student.priors  # a box's threshold is one for all levels
    regions = level.context.once(('valuable', level.student.strides, priors[0].shape),
                                 lambda: valuable_region(priors, level.context.boxes))
    return regions.split([len(each) for each in priors], 1)[level.student_level]


def _distributions(level: ComparedOutputs) -> tuple[Tensor, Tensor]:
    student, teacher = level.both('distributions')
    if student.shape != teacher.shape:
        raise HeadError(f'The student distributes distances over {student.shape[-1]} bins, the teacher over '
                        f"{teacher.shape[-1]} (reg_max + 1). Use form='giou'.")
    return student, teacher
