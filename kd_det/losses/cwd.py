"""Each channel of a feature as a distribution over the image."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.context import ComparedLevel
from kd_det.functional.features import channel_wise_kl
from kd_det.losses.base import FeatureTerm, Parts


@MODELS.register_module()
class CWD(FeatureTerm):
    """Channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256): T²·KL between softmaxes over the cells.

    Args:
        temperature: Of the softmax; smaller looks at fewer cells.
        pad_aware: Leave padding cells out. The paper's form counts them.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Example:
        >>> dict(type='CWD', tap='neck', temperature=1.0, weight=10.0)
    """

    def __init__(self, temperature: float = 1.0, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.temperature, self.pad_aware = temperature, pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.valid if self.pad_aware else None
        return dict(channel_kl=channel_wise_kl(level.student, level.teacher, self.temperature, valid))
