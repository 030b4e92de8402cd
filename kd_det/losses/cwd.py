"""CWD: each channel of a feature as a distribution over the image."""
from __future__ import annotations

from typing import Any

from mmdet.registry import MODELS

from kd_det.config.arguments import Positive, declared
from kd_det.context import ComparedLevel
from kd_det.functional.features import channel_wise_kl
from kd_det.losses.base import FeatureTerm, Parts


@MODELS.register_module()
class CWD(FeatureTerm):
    """Channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256).

    ::

        L = Σ_level T²·Σ_nc KL(softmax_hw(t/T) ‖ softmax_hw(s/T)) / (N·C)

    with s, t (N, C, H, W), s after its adapter. What a channel finds counts more than how strongly it responds.

    In a config: ``dict(type='CWD', tap='neck', temperature=1.0, weight=10.0)``.

    Args:
        temperature: T; smaller looks at fewer cells.
        pad_aware: Leave padding cells out. The paper's form counts them.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        >>> term = CWD(temperature=1.0)
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)  # the same in all cells, on either side
        {'channel_kl': tensor(0.)}
    """

    @declared
    def __init__(self, temperature: Positive = 1.0, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature, self.pad_aware = temperature, pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.inside if self.pad_aware else None
        return dict(channel_kl=channel_wise_kl(level.student, level.teacher, self.temperature, valid))
