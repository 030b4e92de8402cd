"""The student's RoI head and RPN classify and regress as the teacher's do: KD, DKD, and bounded regression."""
from __future__ import annotations

from typing import Any, Literal

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.config.arguments import ArgumentError, EitherSide, Positive, Weight, declared
from kd_det.context import DistillContext
from kd_det.functional.boxes import bounded_regression
from kd_det.functional.dense import sum_differences, sum_quality_bce, sum_soft_target_kl
from kd_det.functional.logits import combine_decoupled, decoupled_kl, soft_target_kl, weighted_cross_entropy
from kd_det.heads import HeadRequest, RoIOutputs
from kd_det.losses.base import Parts
from kd_det.losses.outputs import (
    ComparedOutputs,
    DenseNormalizer,
    DenseTerm,
    Margin,
    RoITerm,
    Treatment,
    standardize_both,
    treat_teacher,
    weigh_by_confidence,
)

ClassificationForm = Literal['plain', 'decoupled', 'coupled', 'weighted']


@MODELS.register_module()
class RoIClassification(RoITerm):
    """Class distillation of two-stage detectors: both RoI heads classify the regions that the student sampled.

    ::

        L = (w_fg·Σ_foreground d(s, t) + w_bg·Σ_background d(s, t)) / number of regions

    with s, t (R, K + 1) logits of R regions. The teacher's RoI head, its RoI extractor included, looks at these regions
    in its own features. With w_fg = w_bg and ``normalizer='regions'`` this is the mean over all regions. Forms of d:

    - ``'plain'``: T²·KL(softmax(t/T) ‖ softmax(s/T)) (Hinton et al., arXiv 1503.02531).
    - ``'decoupled'``: T²·(α·KL(target against the rest) + β·KL(among the others)) (DKD, Zhao et al., CVPR 2022, arXiv
      2203.08679; its authors take α = 1, β = 0.25, T = 1 for detectors). A background region's target is the
      background.
    - ``'coupled'``: the same with the part among the others times 1 − p_t, of which α = β = 1 is the plain form.
    - ``'weighted'``: −T²·Σ_c w_c·p_t·log p_s, with w = ``background_class_weight`` of the background and 1 of the
      others (Chen et al., NeurIPS 2017). Where the two heads agree it is the teacher's entropy, not 0.

    In a config: ``dict(type='RoIClassification', form='decoupled', alpha=1.0, beta=0.25, temperature=1.0)``.

    Args:
        form: See above.
        temperature: T; larger compares more of what the teacher thinks of the wrong classes.
        alpha: α of the decoupled and coupled form.
        beta: β of the decoupled and coupled form.
        foreground_weight: w_fg of the regions with a ground-truth box.
        background_weight: w_bg of the others. DeFeat (arXiv 2103.14475) weighs the two apart, with
            ``normalizer='own'``.
        background_class_weight: Of the background class in the weighted form.
        treatment: ``'none'``, ``'cwtm'`` or ``'dkpp'``, see :class:`~kd_det.losses.DenseClassification`, region by
            region; the background is one of the classes. ``'dkpp'`` is for the plain form: the others look at one
            class of the teacher's, of the ground truth or the background, which would change places, too.
        standardize: Logits of both sides have mean 0 and deviation 1 over the classes of each region, the background
            among them, before T, in every form; see :class:`~kd_det.losses.DenseClassification`.
        **kwargs: See :class:`~kd_det.losses.outputs.RoITerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.heads import Regions
        >>> regions = Regions(  # one, of the second of three classes
        ...     rois=torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]]), labels=torch.tensor([1]), targets=torch.zeros(1, 4),
        ...     stds=torch.ones(1, 4), stages=torch.tensor([0]))
        >>> student = RoIOutputs(regions, logits=torch.zeros(1, 4), deltas=torch.zeros(1, 3, 4))
        >>> teacher = RoIOutputs(regions, logits=torch.tensor([[0.0, 3.0, 0.0, 0.0]]), deltas=torch.zeros(1, 3, 4))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2),
        ...     student_outputs=dict(roi_head=student), teacher_outputs=[dict(roi_head=(teacher, ))])
        >>> term = RoIClassification(form='plain', temperature=2.0)
        >>> {name: round(value.item(), 3) for name, value in term(context).items()}
        {'foreground': 1.089, 'background': 0.0}
    """

    @declared
    def __init__(self, form: ClassificationForm = 'plain', temperature: Positive = 1.0, alpha: Weight = 1.0,
                 beta: Weight = 0.25, foreground_weight: Weight = 1.0, background_weight: Weight = 1.0,
                 background_class_weight: Weight = 1.5, treatment: Treatment = 'none', standardize: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if treatment == 'dkpp' and form != 'plain':
            raise ArgumentError('treatment', f"'dkpp' goes with form='plain', got form='{form}': that looks at one "
                                             "class of the teacher's, which would change places with others.")
        self.treatment, self.standardize = treatment, standardize
        self.form, self.temperature, self.alpha, self.beta = form, temperature, alpha, beta
        self.foreground_weight, self.background_weight = foreground_weight, background_weight
        self.background_class_weight = background_class_weight

    def forward(self, context: DistillContext) -> Parts:
        student, teacher = self.read_outputs(context)
        is_foreground = student.regions.labels < student.num_classes
        teacher = teacher._replace(logits=treat_teacher(self.treatment, teacher.logits))
        logits = standardize_both(self.standardize, student.logits, teacher.logits)
        divergence = self._divergence(*(side._replace(logits=each) for side, each in zip((student, teacher), logits)))
        divergence = divergence * weigh_by_confidence(self.treatment, teacher.logits, 'softmax',
                                                      torch.ones_like(divergence))
        foreground, background = self.normalize(divergence, (is_foreground, ~is_foreground))
        return dict(foreground=self.foreground_weight * foreground, background=self.background_weight * background)

    def _divergence(self, student: RoIOutputs, teacher: RoIOutputs) -> Tensor:
        """(R,), one value per region."""
        if self.form == 'plain':
            return soft_target_kl(student.logits, teacher.logits, self.temperature, reduction='none')
        if self.form == 'weighted':
            return weighted_cross_entropy(student.logits, teacher.logits, self.background_class_weight,
                                          temperature=self.temperature)
        parts = decoupled_kl(student.logits, teacher.logits, student.regions.labels, self.temperature)
        return combine_decoupled(*parts, self.alpha, self.beta, self.form)


@MODELS.register_module()
class RoIRegression(RoITerm):
    """Box distillation of two-stage detectors, on the student's foreground regions (Chen et al., NeurIPS 2017).

    ::

        L = Σ_foreground d(s, t) / number of regions

    with s, t (R, 4) the regressions of each region's class (or the only ones of a class-agnostic head; the two
    detectors may differ in that), y those to its ground-truth box, all in the units of the student's coder. Forms of d:

    - ``'bounded'``: ‖s − y‖² where ‖s − y‖² + m > ‖t − y‖², else 0.
    - ``'l1'``, ``'mse'``: |s − t| and (s − t)², summed over the four values.

    In a config: ``dict(type='RoIRegression', form='bounded', margin=0.0, weight=0.5)``.

    Args:
        form: See above.
        margin: m of the bounded form, a squared error: a student better by less still learns.
        **kwargs: See :class:`~kd_det.losses.outputs.RoITerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.heads import Regions
        >>> regions = Regions(  # one, of the second of three classes
        ...     rois=torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]]), labels=torch.tensor([1]), targets=torch.zeros(1, 4),
        ...     stds=torch.ones(1, 4), stages=torch.tensor([0]))
        >>> student = RoIOutputs(regions, logits=torch.zeros(1, 4), deltas=torch.ones(1, 3, 4))
        >>> teacher = RoIOutputs(regions, logits=torch.zeros(1, 4), deltas=torch.zeros(1, 3, 4))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2),
        ...     student_outputs=dict(roi_head=student), teacher_outputs=[dict(roi_head=(teacher, ))])
        >>> term = RoIRegression(form='bounded')
        >>> term(context)  # the teacher's box is right, the student's is off by 1 in four values
        {'regression': tensor(4.)}
    """

    only_at_boxes = True

    @declared
    def __init__(self, form: Literal['bounded', 'l1', 'mse'] = 'bounded', margin: Margin = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form, self.margin = form, margin

    def forward(self, context: DistillContext) -> Parts:
        outputs = self.read_outputs(context)
        regions, classes = outputs[0].regions, outputs[0].num_classes
        student, teacher = (each.labelled_deltas() / regions.stds for each in outputs)
        if self.form == 'bounded':
            errors = bounded_regression(student, teacher, regions.targets / regions.stds, self.margin)
        else:
            errors = ((student - teacher).abs() if self.form == 'l1' else (student - teacher).square()).sum(1)
        (value, ) = self.normalize(errors, (regions.labels < classes, ))
        return dict(regression=value)


@MODELS.register_module()
class RPNImitation(DenseTerm):
    """Objectness and box distillation of RPNs with the same anchors (after Chen et al., NeurIPS 2017).

    ::

        L = (w_obj·Σ_priors (BCE(s, σ(t)) − BCE(t, σ(t))) + w_reg·Σ_priors d(r_s, r_t)) / normalizer

    with s, t (N, H·W·A, 1) logits of objectness, of which the BCE counts from the teacher's own entropy: that leaves
    the gradient and makes it 0 where the two agree; softmax heads take KL(t ‖ s). Forms of d, of the regressions r
    (N, H·W·A, 4):

    - ``'l1'``: σ(t)·|r_s − r_t| summed over the four regressions.
    - ``'bounded'``: ‖r_s − y‖² where ‖r_s − y‖² + m > ‖r_t − y‖², else 0, on the anchors that the student sampled as
      positive; with ``normalizer='positives'`` its mean.

    In a config: ``dict(type='RPNImitation', form='bounded', regression_weight=0.5)``.

    Args:
        form: See above.
        margin: m of the bounded form, a squared error: a student better by less still learns.
        objectness_weight: w_obj.
        regression_weight: w_reg; with 0 heads of other encodings or priors can be compared.
        head: See :class:`~kd_det.losses.outputs.DenseTerm`.
        normalizer: See :class:`~kd_det.losses.outputs.DenseTerm`; the teacher's confidence by default, because the
            sampler of an RPN may leave positive anchors out.
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.heads import DenseOutputs
        >>> logits, regressions = torch.zeros(1, 4, 1), torch.zeros(1, 4, 4)  # of four cells
        >>> student = DenseOutputs.of_boxes(logits, regressions, (2, 2))
        >>> teacher = DenseOutputs.of_boxes(logits, regressions + 1, (2, 2))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2),
        ...     student_outputs=dict(rpn_head=student), teacher_outputs=[dict(rpn_head=teacher)])
        >>> term = RPNImitation(form='l1', normalizer='none')
        >>> term(context)  # the teacher is sure by half of each cell
        {'objectness': tensor(0.), 'regression': tensor(8.)}
    """

    @declared
    def __init__(self, form: Literal['l1', 'bounded'] = 'l1', margin: Margin = 0.0, objectness_weight: Weight = 1.0,
                 regression_weight: Weight = 1.0, head: EitherSide = 'rpn_head',
                 normalizer: DenseNormalizer = 'confidence', **kwargs: Any) -> None:
        super().__init__(head=head, normalizer=normalizer, **kwargs)
        self.form, self.margin = form, margin
        self.objectness_weight, self.regression_weight = objectness_weight, regression_weight

    @property
    def compares_regressions(self) -> bool:  # type: ignore[override]
        return self.regression_weight != 0

    @property
    def reads_targets(self) -> bool:  # type: ignore[override]
        return self.form == 'bounded' and self.compares_regressions

    @property
    def student_heads(self) -> tuple[str, ...]:
        positives = (HeadRequest(self.student_head, 'positives'), ) if self.reads_targets else ()
        return (*super().student_heads, *positives)

    def compare(self, level: ComparedOutputs) -> Parts:
        if level.student.activation == 'sigmoid':
            divergence = sum_quality_bce(*level.both('logits'), level.valid, beta=0)
        else:
            divergence = sum_soft_target_kl(*level.both('logits'), level.valid)
        return dict(objectness=self.objectness_weight * divergence,
                    regression=self.regression_weight * self._compare_regressions(level))

    def _compare_regressions(self, level: ComparedOutputs) -> Tensor:
        if not self.compares_regressions:
            return level.valid.new_zeros(())
        if self.form == 'bounded':
            return level.bounded_error(self.margin)
        return sum_differences(*level.both('regressions'), level.confidence())
