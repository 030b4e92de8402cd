"""FSP: how features flow from one stage of the network to the next."""
from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.config.arguments import EitherSide, declared
from kd_det.context import DistillContext
from kd_det.functional.relations import flow_distance, flow_matrix
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts, add_parts


@MODELS.register_module()
class FSP(FeatureTerm):
    """Flow of solution procedure, "A gift from knowledge distillation" (Yim et al., CVPR 2017).

    ::

        L = Σ over pairs of consecutive levels of Σ_ij (G_ij(s) − G_ij(t))² / N          G_ij = Σ_hw F_i·F'_j / (H·W)

    with F (N, C, H, W) and F' (N, C', H', W') two consecutive levels of one network, the student's after their
    adapters, the larger max-pooled to the size of the smaller: G correlates their channels.

    In a config: ``dict(type='FSP', tap='backbone', levels=(1, 2, 3))``.

    Args:
        tap: See :class:`~kd_det.losses.base.FeatureTerm`; the paper's are stages of the backbone.
        normalizer: ``'batch'``, N, is the paper's; ``'mean'``, the number of entries, does not grow with the channels.
        pad_aware: Set padding to 0, which is no part of a flow. The paper's form counts it.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit; when connected, fewer than two levels.

    Example:
        >>> import torch
        >>> context = DistillContext.of_features([torch.zeros(1, 4, 8, 8), torch.zeros(1, 6, 4, 4)],
        ...                                      [torch.ones(1, 4, 8, 8), torch.ones(1, 6, 4, 4)])
        >>> term = FSP(tap='neck')
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)  # 4 × 6 correlations, 0 of the student and 1 of the teacher
        {'flow': tensor(24.)}
    """

    least_levels = 2

    @declared
    def __init__(self, tap: EitherSide = 'backbone', normalizer: Literal['batch', 'mean'] = 'batch',
                 pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(tap=tap, **kwargs)
        self.normalizer, self.pad_aware = normalizer, pad_aware

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        if len(self.pairs) < self.least_levels:
            raise ValueError(f"A flow needs at least two levels, but '{self.student_path}' gives {len(self.pairs)}.")

    def forward(self, context: DistillContext) -> Parts:
        levels = [self.read_level(context, position) for position in range(len(self.pairs))]
        inside = [level.valid[:, None] if self.pad_aware else 1 for level in levels]
        student = _flow_matrices([level.student * cells for level, cells in zip(levels, inside)])
        teacher = _flow_matrices([level.teacher * cells for level, cells in zip(levels, inside)])
        return add_parts(dict(flow=self._distance(*both)) for both in zip(student, teacher))

    def _distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        distance = flow_distance(student, teacher)
        return distance / student[0].numel() if self.normalizer == 'mean' else distance


def _flow_matrices(features: list[Tensor]) -> list[Tensor]:
    """The flow matrices between each feature and the next."""
    return [flow_matrix(feature, following) for feature, following in pairwise(features)]
