"""Attention-guided and non-local distillation, the whole method as one term."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import nn

from kd_det.context import ComparedLevel, LevelSpec
from kd_det.functional.features import fkd_loss
from kd_det.functional.masks import spatial_attention
from kd_det.losses.adapters import NonLocal
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

    The student imitates the features where both detectors attend, their means over cells and over channels, and the
    relations between cells that a non-local block reads on each side. All parts are L2 norms of the whole batch, not
    their squares. Every comparison has an adapter, of equal widths too; the block of the teacher's side also trains.

    Args:
        temperature: Of the spatial attention (two-stage 0.5, one-stage 0.1).
        feature_weight: Weight of the attended features (7e-5, 4.2e-4).
        pooling_weight: Weight of each of the two means (4e-3, 2.4e-2).
        relation_weight: Weight of the relations (7e-5, 4.2e-4).
        adapter: See :class:`~kd_det.losses.base.FeatureTerm`.
        pad_aware: Set padding to 0 on both sides, before and after each block. The paper's form compares it too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Example:
        >>> dict(type='FKD', temperature=0.5, feature_weight=7e-5, pooling_weight=4e-3, relation_weight=7e-5)
    """

    def __init__(self, temperature: float = 0.5, feature_weight: float = 7e-5, pooling_weight: float = 4e-3,
                 relation_weight: float = 7e-5, adapter: str = 'conv1x1', pad_aware: bool = True, **kwargs) -> None:
        super().__init__(adapter=adapter, **kwargs)
        self.weights = dict(
            feature_weight=feature_weight, pooling_weight=pooling_weight, relation_weight=relation_weight)
        self.temperature, self.pad_aware = temperature, pad_aware

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        self.blocks = nn.ModuleList(_Adapters(pair.student_spec, pair.teacher_spec) for pair in self.pairs)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        blocks, valid = self.blocks[position], level.valid if self.pad_aware else None
        inside = 1 if valid is None else valid[:, None]
        student = level.raw_student * inside  # all but the imitation read it before its adapter
        teacher = level.teacher * inside
        attention = sum(spatial_attention(side.detach(), self.temperature, valid) for side in (student, teacher)) / 2
        return fkd_loss(
            level.student, teacher, attention, **self.weights,
            student_channels=blocks.channels(student.mean((2, 3))),
            student_cells=blocks.cells(student.mean(1, keepdim=True)) * inside,
            student_relation=blocks.student_relation(student) * inside,
            teacher_relation=blocks.teacher_relation(teacher) * inside)
