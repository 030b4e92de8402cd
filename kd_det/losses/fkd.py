"""FKD: attention-guided and non-local distillation, the whole method as one term."""
from __future__ import annotations

from typing import Any, cast

from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.config.arguments import Positive, Weight, declared
from kd_det.context import ComparedLevel, LevelSpec
from kd_det.functional.features import fkd_loss
from kd_det.functional.masks import spatial_attention
from kd_det.losses.adapters import ChannelAdapter, NonLocal
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts

RELATION_STRIDE = 64  # pixels: the cells to which the released code pools keys and values, but at least 4 × 4 into one
RELATION_POOL = 4


class _Adapters(nn.Module):
    """What FKD trains on one level, beside the 1×1 convolution of the feature."""

    def __init__(self, student: LevelSpec, teacher: LevelSpec) -> None:
        super().__init__()
        pool = max(int(RELATION_STRIDE // student.stride), RELATION_POOL)
        self.channels = nn.Linear(student.channels, teacher.channels)
        self.cells = nn.Conv2d(1, 1, 3, padding=1)
        self.student_relation = nn.Sequential(NonLocal(student.channels, pool),
                                              nn.Conv2d(student.channels, teacher.channels, 1))
        self.teacher_relation = NonLocal(teacher.channels, pool)


@MODELS.register_module()
class FKD(FeatureTerm):
    """Feature-based knowledge distillation (Zhang & Ma, ICLR 2021, openreview uKhGRvM8QNH).

    ::

        L = Σ_level α·‖√A·(a(s) − t)‖ + β·(‖linear(mean_hw s) − mean_hw t‖ + ‖conv3×3(mean_c s) − mean_c t‖)
                  + γ·‖conv1×1(R_s(s)) − R_t(t)‖
        A = (A_sp(s) + A_sp(t)) / 2                A_sp = H·W·softmax_hw(mean_c |F| / T)
        R(x) = x + BN(conv1×1(query(x)·Σ key(x)·value(x)))

    with s, t (N, C, H, W), a a 1×1 convolution; here, unlike elsewhere, s is the feature before any adapter. The norms
    are those of the whole batch, not their squares. Every comparison has an adapter, of equal widths too; the block R_t
    of the teacher's side also trains.

    In a config: ``dict(type='FKD', temperature=0.5, feature_weight=7e-5, pooling_weight=4e-3, relation_weight=7e-5)``.

    Args:
        temperature: T of the spatial attention (two-stage 0.5, one-stage 0.1).
        feature_weight: α, weight of the attended features (7e-5, 4.2e-4).
        pooling_weight: β, weight of each of the two means (4e-3, 2.4e-2).
        relation_weight: γ, weight of the relations (7e-5, 4.2e-4).
        adapter: See :class:`~kd_det.losses.base.FeatureTerm`.
        pad_aware: Set padding to 0 on both sides, before and after each block. The paper's form compares it too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        >>> term = FKD(feature_weight=1.0, pooling_weight=1.0, relation_weight=1.0, adapter='none')
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> parts = term(context)
        >>> list(parts), parts['imitation'].item()  # of 256 differences of 1
        (['imitation', 'channel', 'spatial', 'relation'], 16.0)
    """

    independent_of_batch_size = False  # norms of the whole batch grow with the root of its size

    @declared
    def __init__(self, temperature: Positive = 0.5, feature_weight: Weight = 7e-5, pooling_weight: Weight = 4e-3,
                 relation_weight: Weight = 7e-5, adapter: ChannelAdapter = 'conv1x1', pad_aware: bool = True,
                 **kwargs: Any) -> None:
        super().__init__(adapter=adapter, **kwargs)
        self.part_weights = dict(
            feature_weight=feature_weight, pooling_weight=pooling_weight, relation_weight=relation_weight)
        self.temperature, self.pad_aware = temperature, pad_aware

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        self.blocks = nn.ModuleList(_Adapters(pair.student_spec, pair.teacher_spec) for pair in self.pairs)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        blocks, valid = cast(_Adapters, self.blocks[position]), level.inside if self.pad_aware else None
        inside: Tensor | int = 1 if valid is None else valid[:, None]
        raw, = self.normalized(level.context, level.raw_student)  # all but the imitation read it before its adapter
        student = raw * inside
        teacher = level.teacher * inside
        of_student, of_teacher = (spatial_attention(side.detach(), self.temperature, valid)
                                  for side in (student, teacher))
        return fkd_loss(
            level.student, teacher, (of_student + of_teacher) / 2, **self.part_weights,
            student_channels=blocks.channels(student.mean((2, 3))),
            student_cells=blocks.cells(student.mean(1, keepdim=True)) * inside,
            student_relation=blocks.student_relation(student) * inside,
            teacher_relation=blocks.teacher_relation(teacher) * inside)
