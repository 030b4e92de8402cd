"""The student's region proposal network imitates the teacher's."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.functional.logits import soft_target_kl
from kd_det.losses.base import Parts
from kd_det.losses.outputs import ComparedOutputs, DenseTerm, sigmoid_divergence


@MODELS.register_module()
class RPNImitation(DenseTerm):
    """Objectness and box distillation of region proposal networks with the same anchors.

    Objectness: BCE(s, σ(t)), less the teacher's own entropy, which leaves the gradient and makes it 0 where the two
    agree; or KL(t ‖ s) of softmax heads. Boxes: |s − t| summed over the four regressions, weighted by the teacher's
    objectness.

    Args:
        objectness_weight: Factor of the objectness part.
        regression_weight: Factor of the box part.
        normalizer: See :class:`~kd_det.losses.outputs.DenseTerm`; the teacher's confidence by default, because the
            sampler of an RPN may leave positive anchors out.
        **kwargs: See :class:`~kd_det.losses.outputs.DenseTerm`.

    Example:
        >>> dict(type='RPNImitation', regression_weight=0.5)
    """

    def __init__(self, objectness_weight: float = 1.0, regression_weight: float = 1.0, head: str = 'rpn_head',
                 normalizer: str = 'confidence', **kwargs) -> None:
        super().__init__(head=head, normalizer=normalizer, **kwargs)
        self.objectness_weight, self.regression_weight = objectness_weight, regression_weight

    def compare(self, level: ComparedOutputs) -> Parts:
        student, teacher = level.both('logits')
        if level.student.activation == 'sigmoid':
            divergence = sigmoid_divergence(student, teacher, beta=0)
        else:
            divergence = soft_target_kl(student, teacher, reduction='none')
        moved, target = level.both('regressions')
        confidence = level.teacher.scores(level.teacher_level) * level.valid
        return dict(objectness=self.objectness_weight * (level.valid * divergence).sum(),
                    regression=self.regression_weight * (confidence * (moved - target).abs().sum(-1)).sum())
