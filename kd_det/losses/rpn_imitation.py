"""The student's region proposal network imitates the teacher's."""
from __future__ import annotations

from typing import Tuple

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.functional.logits import soft_target_kl
from kd_det.heads import POSITIVES_OF
from kd_det.losses.base import Parts
from kd_det.losses.outputs import ComparedOutputs, DenseTerm, sigmoid_divergence

FORMS = ('l1', 'bounded')


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
        if form not in FORMS:
            raise ValueError(f"form='{form}': expected one of {', '.join(FORMS)}.")
        self.form, self.margin = form, margin
        self.objectness_weight, self.regression_weight = objectness_weight, regression_weight

    @property
    def student_heads(self) -> Tuple[str, ...]:
        positives = (self.student_head + POSITIVES_OF, ) if self.form == 'bounded' else ()
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
