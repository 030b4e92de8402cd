"""How features flow from one stage of the network to the next."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import DistillContext
from kd_det.functional.relations import flow_distance, flow_matrix
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts

NORMALIZERS = ('batch', 'mean')


@MODELS.register_module()
class FSP(FeatureTerm):
    """A gift from knowledge distillation (Yim et al., CVPR 2017): Σ(G_s − G_t)² / N between flow matrices.

    G_ij = Σ_hw F_i·F'_j / (H·W) correlates the channels of two consecutive levels of one network, the larger max-pooled
    to the size of the smaller.

    Args:
        tap: See :class:`~kd_det.losses.base.FeatureTerm`; the paper's are stages of the backbone.
        normalizer: ``'batch'``, N, is the paper's; ``'mean'``, the number of entries, does not grow with the channels.
        pad_aware: Set padding to 0, which is no part of a flow. The paper's form counts it.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: Fewer than two levels, or an unknown normaliser.

    Example:
        >>> dict(type='FSP', tap='backbone', levels=(1, 2, 3))
    """

    def __init__(self, tap: str | dict[str, str] = 'backbone', normalizer: str = 'batch', pad_aware: bool = True,
                 **kwargs) -> None:
        super().__init__(tap=tap, **kwargs)
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer='{normalizer}': expected one of {', '.join(NORMALIZERS)}.")
        self.normalizer, self.pad_aware = normalizer, pad_aware

    least_levels = 2

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        if len(self.pairs) < self.least_levels:
            raise ValueError(f"A flow needs at least two levels, but '{self.student_path}' gives {len(self.pairs)}.")

    def forward(self, context: DistillContext) -> Parts:
        levels = [self._level(context, position) for position in range(len(self.pairs))]
        inside = [level.valid[:, None] if self.pad_aware else 1 for level in levels]
        student = _flows([level.student * cells for level, cells in zip(levels, inside)])
        teacher = _flows([level.teacher * cells for level, cells in zip(levels, inside)])
        return dict(flow=sum(map(self._distance, student, teacher)))

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        distance = flow_distance(student, teacher)
        return distance / student[0].numel() if self.normalizer == 'mean' else distance


def _flows(features: list[Tensor]) -> list[Tensor]:
    """The flow matrices between each feature and the next."""
    return [flow_matrix(feature, following) for feature, following in zip(features, features[1:])]
