"""The student's RoI head classifies its regions as the teacher's does."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import DistillContext
from kd_det.functional.logits import combine_decoupled, decoupled_kl, soft_target_kl, weighted_cross_entropy
from kd_det.heads import RoIOutputs
from kd_det.losses.base import Parts
from kd_det.losses.outputs import RoITerm

FORMS = ('plain', 'decoupled', 'coupled', 'weighted')


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
        if form not in FORMS:
            raise ValueError(f"form='{form}': expected one of {', '.join(FORMS)}.")
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
