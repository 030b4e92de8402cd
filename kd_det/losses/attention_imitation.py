"""The student attends where the teacher attends."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.context import ComparedLevel
from kd_det.functional.features import attention_distance
from kd_det.losses.base import FeatureTerm, Parts


@MODELS.register_module()
class AttentionImitation(FeatureTerm):
    """FGD's attention part (arXiv 2111.11837): Σ|A_s − A_t| of the spatial and of the channel attention, each over N.

    Args:
        temperature: Of both softmaxes.
        pad_aware: Leave padding cells out. The paper's form looks at them too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.
    """

    def __init__(self, temperature: float = 0.5, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.temperature, self.pad_aware = temperature, pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.valid if self.pad_aware else None
        return dict(attention=attention_distance(level.student, level.teacher, self.temperature, valid))
