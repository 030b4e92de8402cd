"""SSIM: the structure of local windows of the features."""
from __future__ import annotations

from typing import Any

from mmdet.registry import MODELS

from kd_det.config.arguments import declared
from kd_det.context import ComparedLevel
from kd_det.functional.structure import structural_distance
from kd_det.losses.base import FeatureTerm, Parts


@MODELS.register_module()
class SSIM(FeatureTerm):
    """Structural similarity of the features (de Rijk et al., NeurIPS 2022, arXiv 2211.13133).

    ::

        L = Σ_level mean over images, channels and cells of 1 − SSIM(s, t)
        SSIM = (2·μ_s·μ_t + c₁)/(μ_s² + μ_t² + c₁) · (2·σ_st + c₂)/(σ_s² + σ_t² + c₂)

    with s, t (N, C, H, W), s after its adapter, and mean μ, variance σ² and covariance σ_st of a Gaussian window of
    11 × 11 cells (deviation 1.5) around each cell; c₁ = 0.01², c₂ = 0.03² of values that are 0 to 1 in the teacher's
    channel of an image. Mean, contrast and pattern of each neighbourhood are compared, relative to how strong they are
    there. What is done about negative values: :func:`~kd_det.functional.structure.structural_distance`.

    In a config: ``dict(type='SSIM', tap='neck')``.

    Args:
        pad_aware: Leave padding cells out, of windows too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> teacher = torch.arange(256.0).view(1, 4, 8, 8)
        >>> context = DistillContext.of_features(teacher, teacher)
        >>> term = SSIM()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)
        {'structure': tensor(0.)}
    """

    @declared
    def __init__(self, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.inside if self.pad_aware else None
        return dict(structure=structural_distance(level.student, level.teacher, valid))
