"""The student's RoI head classifies its regions as the teacher's does."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import DistillContext
from kd_det.functional.boxes import bounded_regression
from kd_det.functional.logits import combine_decoupled, decoupled_kl, soft_target_kl, weighted_cross_entropy
from kd_det.heads import HeadRequest, RoIOutputs
from kd_det.losses.base import Parts
from kd_det.losses.outputs import ComparedOutputs, DenseTerm, RoITerm, sigmoid_divergence

CLASSIFICATION_FORMS = ('plain', 'decoupled', 'coupled', 'weighted')


@MODELS.register_module()
class RoIClassification(RoITerm):
    """Class distillation of two-stage detectors: both RoI heads classify the regions that the student sampled.

    The teacher's RoI head, its RoI extractor included, looks at these regions in its own features. With foreground and
    background weighted alike and ``normalizer='regions'`` this is the mean over all regions. Forms:

    - ``'plain'``: T²·KL(t ‖ s) of the softened classes (Hinton et al., arXiv 1503.02531).
    - ``'decoupled'``: α·target + β·non-target class divergence (DKD, Zhao et al., arXiv 2203.08679; its authors take
      α = 1, β = 0.25, T = 1 for detectors). A background region's target is the background.
    - ``'coupled'``: the same with the non-target part times 1 − p_t, of which α = β = 1 is the plain form.
    - ``'weighted'``: cross-entropy to the teacher's classes, the background class weighing 1.5 (Chen et al., NeurIPS
      2017). Where the two heads agree it is the teacher's entropy, not 0.

    Args:
        form: See above.
        temperature: T.
        alpha: Of the decoupled and coupled form.
        beta: Of the decoupled and coupled form.
        foreground_weight: Of the regions with a ground-truth box.
        background_weight: Of the others. DeFeat (arXiv 2103.14475) weighs the two apart, with ``normalizer='own'``.
        background_class_weight: Of the background class in the weighted form.
        **kwargs: See :class:`~kd_det.losses.outputs.RoITerm`.

    Raises:
        ValueError: An unknown form.

    Example:
        >>> dict(type='RoIClassification', form='decoupled', alpha=1.0, beta=0.25, temperature=1.0)
    """

    def __init__(self, form: str = 'plain', temperature: float = 1.0, alpha: float = 1.0, beta: float = 0.25,
                 foreground_weight: float = 1.0, background_weight: float = 1.0, background_class_weight: float = 1.5,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        if form not in CLASSIFICATION_FORMS:
            raise ValueError(f"form='{form}': expected one of {', '.join(CLASSIFICATION_FORMS)}.")
        self.form, self.temperature, self.alpha, self.beta = form, temperature, alpha, beta
        self.weights = foreground_weight, background_weight
        self.background_class_weight = background_class_weight

    def forward(self, context: DistillContext) -> Parts:
        student, teacher = self.outputs(context)
        foreground = student.regions.labels < student.num_classes
        values = self.normalized(self._divergence(student, teacher), (foreground, ~foreground))
        return {name: weight * value for name, weight, value in zip(('foreground', 'background'), self.weights, values)}

    def _divergence(self, student: RoIOutputs, teacher: RoIOutputs) -> Tensor:
        """(R,), one value per region."""
        if self.form == 'plain':
            return soft_target_kl(student.logits, teacher.logits, self.temperature, reduction='none')
        if self.form == 'weighted':
            return weighted_cross_entropy(student.logits, teacher.logits, self.background_class_weight,
                                          temperature=self.temperature)
        parts = decoupled_kl(student.logits, teacher.logits, student.regions.labels, self.temperature)
        return combine_decoupled(*parts, self.alpha, self.beta, self.form)


REGRESSION_FORMS = ('bounded', 'l1', 'mse')


@MODELS.register_module()
class RoIRegression(RoITerm):
    """Box distillation of two-stage detectors, on the foreground regions that the student sampled.

    Regressions of the region's class (or the only ones of a class-agnostic head; the two detectors may differ in that)
    are compared in the units of the student's coder. Forms:

    - ``'bounded'``: ‖s − y‖² where it is not better than the teacher's ‖t − y‖² by the margin, else 0 (Chen et al.,
      NeurIPS 2017).
    - ``'l1'``, ``'mse'``: |s − t| and (s − t)², summed over the four values.

    Args:
        form: See above.
        margin: Of the bounded form.
        **kwargs: See :class:`~kd_det.losses.outputs.RoITerm`.

    Raises:
        ValueError: An unknown form.

    Example:
        >>> dict(type='RoIRegression', form='bounded', margin=0.0, weight=0.5)
    """

    def __init__(self, form: str = 'bounded', margin: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if form not in REGRESSION_FORMS:
            raise ValueError(f"form='{form}': expected one of {', '.join(REGRESSION_FORMS)}.")
        self.form, self.margin = form, margin

    def forward(self, context: DistillContext) -> Parts:
        outputs = self.outputs(context)
        regions, classes = outputs[0].regions, outputs[0].num_classes
        student, teacher = (each.labelled_deltas() / regions.stds for each in outputs)
        if self.form == 'bounded':
            errors = bounded_regression(student, teacher, regions.targets / regions.stds, self.margin)
        else:
            errors = ((student - teacher).abs() if self.form == 'l1' else (student - teacher).square()).sum(1)
        (value, ) = self.normalized(errors, (regions.labels < classes, ))
        return dict(regression=value)


RPN_FORMS = ('l1', 'bounded')


@MODELS.register_module()
class RPNImitation(DenseTerm):
    """Objectness and box distillation of region proposal networks with the same anchors.

    Objectness: BCE(s, σ(t)), less the teacher's own entropy, which leaves the gradient and makes it 0 where the two
    agree; or KL(t ‖ s) of softmax heads. Forms of the box part:

    - ``'l1'``: |s − t| summed over the four regressions, weighted by the teacher's objectness.
    - ``'bounded'``: ‖s − y‖² where it is not better than the teacher's ‖t − y‖² by the margin, else 0 (Chen et al.,
      NeurIPS 2017), on the anchors that the student sampled as positive; with ``normalizer='positives'`` its mean.

    Args:
        form: See above.
        margin: Of the bounded form.
        objectness_weight: Factor of the objectness part.
        regression_weight: Factor of the box part.
        normalizer: See :class:`~kd_det.losses.outputs.DenseTerm`; the teacher's confidence by default, because the
            sampler of an RPN may leave positive anchors out.
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An unknown form.

    Example:
        >>> dict(type='RPNImitation', form='bounded', regression_weight=0.5)
    """

    def __init__(self, form: str = 'l1', margin: float = 0.0, objectness_weight: float = 1.0,
                 regression_weight: float = 1.0, head: str = 'rpn_head', normalizer: str = 'confidence',
                 **kwargs) -> None:
        super().__init__(head=head, normalizer=normalizer, **kwargs)
        if form not in RPN_FORMS:
            raise ValueError(f"form='{form}': expected one of {', '.join(RPN_FORMS)}.")
        self.form, self.margin = form, margin
        self.objectness_weight, self.regression_weight = objectness_weight, regression_weight

    @property
    def student_heads(self) -> tuple[str, ...]:
        positives = (HeadRequest(self.student_head, 'positives'), ) if self.form == 'bounded' else ()
        return (*super().student_heads, *positives)

    def compare(self, level: ComparedOutputs) -> Parts:
        student, teacher = level.both('logits')
        if level.student.activation == 'sigmoid':
            divergence = sigmoid_divergence(student, teacher, beta=0)
        else:
            divergence = soft_target_kl(student, teacher, reduction='none')
        return dict(objectness=self.objectness_weight * (level.valid * divergence).sum(),
                    regression=self.regression_weight * self._regression(level).sum())

    def _regression(self, level: ComparedOutputs) -> Tensor:
        """(N, H·W·A)."""
        if self.form == 'bounded':
            return level.bounded_errors(self.margin)
        student, teacher = level.both('regressions')
        return level.teacher.scores(level.teacher_level) * level.valid * (student - teacher).abs().sum(-1)
