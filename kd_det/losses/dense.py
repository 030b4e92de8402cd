"""The student's dense head classifies and locates prior by prior as the teacher's does: KD, BCKD, LD, FRS."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from torch import Tensor

from kd_det.config.arguments import Positive, Share, declared
from kd_det.functional.blocks import is_on_host
from kd_det.functional.dense import sum_distribution_kl, sum_giou_imitation, sum_quality_bce, sum_soft_target_kl
from kd_det.functional.logits import confidence_weights, largest_gap, largest_probability
from kd_det.functional.masks import valuable_region, valuable_region_of_grids
from kd_det.heads import HeadError, HeadRequest
from kd_det.heads.readers import DenseForm
from kd_det.losses.base import InputSpecs, Parts
from kd_det.losses.outputs import (
    ComparedOutputs,
    DenseTerm,
    GapExponent,
    Margin,
    Treatment,
    choose_transform,
    treat_teacher,
)

ClassificationWeighting = Literal['all', 'richness']
RegressionForm = Literal['giou', 'distribution', 'bounded']
RegressionWeighting = Literal['confidence', 'probability', 'gap', 'positives', 'valuable']


@MODELS.register_module()
class DenseClassification(DenseTerm):
    """Class distillation of dense heads (BCKD, Yang et al., ICCV 2023, arXiv 2308.14286, with β = 1).

    ::

        L = Σ_priors w·T²·Σ_classes BCE(s/T, σ(t/T))·|σ(t/T) − σ(s/T)|^β / normalizer          sigmoid classes
        L = Σ_priors w·T²·KL(softmax(t/T) ‖ softmax(s/T)) / normalizer                          softmax classes

    with s, t (N, H·W·A, K) class logits. With β = 0 the BCE counts from the teacher's entropy, which makes it T²·KL,
    class by class (arXiv 1503.02531). The class logits of a head that predicts objectness (YOLOX, YOLOv3) mean nothing
    where there is no object: they weigh with the teacher's objectness, which is distilled as a part of its own.

    In a config: ``dict(type='DenseClassification', head='bbox_head', beta=1.0)``.

    Args:
        beta: β, exponent of the gap, see :func:`~kd_det.functional.dense.sum_quality_bce`: with 1 most of
            the many easy priors do not count; softmax heads have none.
        temperature: T; larger compares more of what the teacher thinks of the wrong classes.
        weighting: w: ``'all'`` priors alike, or by the ``'richness'`` of their cell, the teacher's largest probability
            there (FRS, Du et al., arXiv 2111.00674). Both 0 on padding.
        least_richness: Priors of cells less rich than this do not count; with 0.05 most of an image is not looked at,
            which on a CPU saves most of the time. Normalisers stay as they are.
        treatment: Of what the teacher says of the classes (Born-Again, Furlanello et al., ICML 2018): ``'none'``.
            ``'cwtm'``, confidence weighted by the teacher's maximum: w times the teacher's largest class probability m,
            over the mean of m, weighted by w, of all priors of the batch on all ranks; of a softmax the background is
            among the classes. The paper weighs hard labels so, a plain student's; here it is the distillation itself,
            and the task's loss is as it was. ``'dkpp'``, dark knowledge with permuted predictions: the probabilities
            beside the largest change places at random, prior by prior; for three classes or more. Objectness has one
            class, and stays.
        standardize: Logits of both sides have mean 0 and deviation 1 over the classes of each prior before T (logit
            standardisation, Sun et al., CVPR 2024, arXiv 2403.01427; for classifiers T = 2 and 9 times the weight).
            Then a prior tells which classes it finds likelier than others and no more whether it finds any likely: of
            sigmoid heads take it with ``weighting='richness'``, or the background outweighs all. For three classes or
            more; objectness has one, and stays.
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> from kd_det.heads import DenseOutputs
        >>> boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0], [8.0, 0.0, 16.0, 8.0]]])  # of two cells
        >>> positives = torch.tensor([[True, False]])
        >>> student = DenseOutputs.of_boxes(torch.zeros(1, 2, 3), boxes, (1, 2), positives=positives)
        >>> teacher = DenseOutputs.of_boxes(torch.full((1, 2, 3), 9.0), boxes, (1, 2))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2),
        ...     student_outputs=dict(bbox_head=student), teacher_outputs=[dict(bbox_head=teacher)])
        >>> term = DenseClassification(beta=1.0, normalizer='positives')
        >>> round(term(context)['classes'].item(), 2)  # 6 classes of log 2, times a gap of 0.5, over one positive
        2.08
    """

    kinds = ('classes', )

    @declared
    def __init__(self, beta: GapExponent = 1.0, temperature: Positive = 1.0,
                 weighting: ClassificationWeighting = 'all', treatment: Treatment = 'none', standardize: bool = False,
                 least_richness: Share = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta, self.temperature, self.weighting, self.treatment = beta, temperature, weighting, treatment
        self.standardize, self.least_richness = standardize, least_richness

    def compare_levels(self, levels: Sequence[ComparedOutputs]) -> Iterable[Parts]:
        weights = [self._weigh(level) for level in levels]
        class_weights = [weight if level.teacher.objectness is None else weight * level.both('objectness')[1].sigmoid()
                         for level, weight in zip(levels, weights)]
        if self.treatment == 'cwtm':  # over the priors of all levels
            surest = torch.cat([largest_probability(level.both('logits')[1], level.teacher.activation)
                                for level in levels], 1)
            joined = torch.cat(class_weights, 1)
            joined = joined * confidence_weights(surest, joined, reduce_mean)
            class_weights = list(joined.split([weight.shape[1] for weight in weights], 1))
        return map(self._compare, levels, weights, class_weights)

    def _weigh(self, level: ComparedOutputs) -> Tensor:
        if self.weighting == 'all' and not self.least_richness:
            return level.valid
        richness = level.richness()
        weight = richness if self.weighting == 'richness' else level.valid
        return weight * (richness >= self.least_richness) if self.least_richness else weight

    def _compare(self, level: ComparedOutputs, weight: Tensor, class_weight: Tensor) -> Parts:
        parts = {}
        if level.teacher.objectness is not None:
            student, teacher = (each.unsqueeze(-1) for each in level.both('objectness'))
            parts['objectness'] = sum_quality_bce(student, teacher, weight, self.beta, self.temperature)
        student, teacher = level.both('logits')
        teacher = treat_teacher(self.treatment, teacher)
        transform = choose_transform(self.standardize, teacher.shape[-1])
        if level.student.activation == 'sigmoid':
            classes = sum_quality_bce(student, teacher, class_weight, self.beta, self.temperature, transform)
        else:
            classes = sum_soft_target_kl(student, teacher, class_weight, self.temperature, transform)
        return dict(parts, classes=classes)


@MODELS.register_module()
class DenseRegression(DenseTerm):
    """Box distillation of dense heads (LD, Zheng et al., CVPR 2022, arXiv 2102.12252, and others).

    ::

        L = Σ_priors w·d / normalizer

    with w, d (N, H·W·A). Forms of d:

    - ``'giou'``: 1 − GIoU(box_s, box_t) of the decoded boxes, for heads of any box encoding. A box of the teacher
      without area teaches nothing.
    - ``'distribution'``: T²·KL(softmax(t/T) ‖ softmax(s/T)) of the distributions over the distance to each side, for
      GFL and its kin (LD).
    - ``'bounded'``: ‖s − y‖² of positive priors, each alike, where ‖s − y‖² + m > ‖t − y‖², else 0 (Chen et al.,
      NeurIPS 2017); for heads with anchors and deltas, in the units of :class:`~kd_det.heads.DenseOutputs`.

    Weightings w of the priors, for the other two forms:

    - ``'confidence'``: the teacher's score.
    - ``'probability'``: the teacher's largest class probability, without the centerness that is a factor of the score;
      0 on priors that the student's assigner left out, near a box but not near enough (CrossKD, arXiv 2306.11369);
      ``normalizer='confidence'`` does not count those either.
    - ``'gap'``: the largest difference of a class probability between the two (BCKD, arXiv 2308.14286).
    - ``'positives'``: the student's own score on the priors that its assigner gave to a box, 0 on others (LD's main
      region).
    - ``'valuable'``: the overlap with a box, on the other priors around boxes (LD's valuable localisation region), see
      :func:`~kd_det.functional.masks.valuable_region`.

    In a config: ``dict(type='DenseRegression', form='giou', weighting='gap', weight=4.0)``.

    Args:
        form: See above.
        weighting: See above.
        temperature: T of the distributions (LD 10, CrossKD 1).
        reduction: ``'mean'`` over their bins and sides, for which LD's published weight is, or ``'sum'``.
        margin: m of the bounded form, a squared error: a student better by less still learns.
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> from kd_det.heads import DenseOutputs
        >>> logits, boxes = torch.zeros(1, 1, 3), torch.tensor([[[0.0, 0.0, 8.0, 8.0]]])  # of a single cell
        >>> student = DenseOutputs.of_boxes(logits, boxes + torch.tensor([8.0, 0.0, 8.0, 0.0]), (1, 1))
        >>> teacher = DenseOutputs.of_boxes(logits, boxes, (1, 1))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 1, 1), torch.zeros(1, 4, 1, 1),
        ...     student_outputs=dict(bbox_head=student), teacher_outputs=[dict(bbox_head=teacher)])
        >>> term = DenseRegression(form='giou', weighting='confidence', normalizer='none')
        >>> term(context)  # boxes side by side have a GIoU of 0; the teacher's score is 0.5
        {'giou': tensor(0.5000)}
    """

    @declared
    def __init__(self, form: RegressionForm = 'giou', weighting: RegressionWeighting = 'confidence',
                 temperature: Positive = 10.0, reduction: Literal['mean', 'sum'] = 'mean', margin: Margin = 0.0,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form, self.weighting, self.temperature, self.reduction = form, weighting, temperature, reduction
        self.margin = margin

    @property
    def only_at_boxes(self) -> bool:  # type: ignore[override]
        return self.form == 'bounded' or self.weighting in ('positives', 'valuable')

    @property
    def compares_regressions(self) -> bool:  # type: ignore[override]
        return self.form != 'giou'

    @property
    def reads_targets(self) -> bool:  # type: ignore[override]
        return self.form == 'bounded'

    @property
    def student_heads(self) -> tuple[str, ...]:
        positives = (HeadRequest(self.student_head, 'positives'), ) if self.only_at_boxes else ()
        return (*super().student_heads, *positives, *self._distributions_of(self.student_head))

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (*super().teacher_heads, *self._distributions_of(self.teacher_head))

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        compared = 'distributions' if self.form == 'distribution' else 'boxes'
        if self.normalizer == 'none' and (self.form == 'bounded' or self.weighting in ('positives', 'valuable')):
            return (compared, )  # the student's own outputs weigh
        return (compared, 'classes')

    def _distributions_of(self, head: str) -> tuple[str, ...]:
        return (HeadRequest(head, 'distributions'), ) if self.form == 'distribution' else ()

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        own, taught = student.get(self.student_head), teacher.get(self.teacher_head)
        if self.form == 'distribution' and isinstance(own, DenseForm) and isinstance(taught, DenseForm):
            _require_same_bins(own.bins, taught.bins)

    def compare(self, level: ComparedOutputs) -> Parts:
        if self.form == 'bounded':
            return dict(bounded=level.bounded_error(self.margin))
        weight = level.valid * self._weigh(level)
        if self.form == 'distribution':
            distance = sum_distribution_kl(*_read_distributions(level), weight, self.temperature, self.reduction)
        else:
            distance = sum_giou_imitation(*level.both('boxes'), weight)
        return {self.form: distance}

    def _count(self, level: ComparedOutputs) -> Tensor:
        if self.normalizer == 'confidence' and self.weighting == 'probability':  # what has no weight does not count
            return _leave_ignored_out(level, level.confidence()).sum()
        return super()._count(level)

    def _weigh(self, level: ComparedOutputs) -> Tensor:
        """(N, H·W·A), without gradient."""
        if self.weighting == 'confidence':
            return level.teacher.scores(level.teacher_level)
        if self.weighting == 'probability':
            return _leave_ignored_out(level, level.teacher.largest_probabilities(level.teacher_level))
        if self.weighting == 'gap':
            sides = (level.student, level.student_level), (level.teacher, level.teacher_level)
            objectness = (None if each.objectness is None else each.objectness[index] for each, index in sides)
            return largest_gap(*level.both('logits'), level.student.activation, *objectness)
        positives = level.student.positives(level.student_level)
        if self.weighting == 'valuable':
            return _find_valuable(level) * ~positives
        return level.student.scores(level.student_level) * positives


def _leave_ignored_out(level: ComparedOutputs, values: Tensor) -> Tensor:
    """(N, H·W·A) values, 0 on priors that the student's assigner left out."""
    ignored = level.student.ignored
    return values if ignored is None else values * ~ignored[level.student_level]


def _find_valuable(level: ComparedOutputs) -> Tensor:
    """(N, H·W·A), see :func:`~kd_det.functional.masks.valuable_region`."""
    priors, boxes = level.student.priors, level.context.boxes  # a box's threshold is one for all levels
    regions = level.context.once(
        ('valuable', level.student.strides, priors[0].shape),
        lambda: (valuable_region_of_grids(priors, level.student.shapes, boxes) if is_on_host(boxes[0]) else
                 valuable_region(priors, boxes)))
    return torch.split(regions, [len(each) for each in priors], 1)[level.student_level]


def _read_distributions(level: ComparedOutputs) -> tuple[Tensor, Tensor]:
    student, teacher = level.both('distributions')
    _require_same_bins(student.shape[-1], teacher.shape[-1])
    return student, teacher


def _require_same_bins(student: int, teacher: int) -> None:
    if student != teacher:
        raise HeadError(f'The student distributes distances over {student} bins, the teacher over {teacher} '
                        "(reg_max + 1). Use form='giou'.")
