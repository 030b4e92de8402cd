"""PKD: the correlation of features, which their scale and offset do not change."""
from __future__ import annotations

from typing import Any

from mmdet.registry import MODELS

from kd_det.config.arguments import declared
from kd_det.context import ComparedLevel
from kd_det.functional.features import pearson_distance
from kd_det.losses.base import FeatureTerm, Parts


@MODELS.register_module()
class PKD(FeatureTerm):
    """Pearson correlation of the features (Cao et al., NeurIPS 2022, arXiv 2207.02039).

    ::

        L = Σ_level ½·mean (ŝ − t̂)² = Σ_level 1 − r       x̂ = (x − mean_nhw x) / (std_nhw x + 1e-6)

    with s, t (N, C, H, W), s after its adapter. Each channel is standardised over the batch and its cells before it is
    compared, which makes detectors of unlike kinds comparable. A level of a single cell in a batch of one has no
    deviation and counts as 0.

    In a config: ``dict(type='PKD', tap='neck', levels=4, weight=6.0)``.

    Args:
        pad_aware: Leave padding cells out. The paper's form counts them.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> teacher = torch.arange(256.0).view(1, 4, 8, 8)
        >>> context = DistillContext.of_features(3 * teacher + 5, teacher)
        >>> term = PKD()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> round(term(context)['pearson'].item(), 4)  # scale and offset do not matter
        0.0
    """

    independent_of_batch_size = False  # the deviations are unbiased: of n cells, the value has a factor (n − 1) / n

    @declared
    def __init__(self, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        return dict(pearson=pearson_distance(level.student, level.teacher, level.inside if self.pad_aware else None))
