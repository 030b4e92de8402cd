"""The student's cells relate to the whole image as the teacher's do."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import nn

from kd_det.adapters import GlobalContext
from kd_det.context import ComparedLevel
from kd_det.functional.features import relation_distance
from kd_det.losses.base import FeatureTerm, Forms, Parts


class ContextTerm(FeatureTerm):
    """A term with a global context block for each side of each level. Both blocks train, as in FGD's released code."""

    def connect(self, student: Forms, teacher: Forms) -> None:
        super().connect(student, teacher)
        channels = [pair.teacher.channels for pair in self.pairs]
        self.student_context = nn.ModuleList(map(GlobalContext, channels))
        self.teacher_context = nn.ModuleList(map(GlobalContext, channels))


@MODELS.register_module()
class GlobalRelation(ContextTerm):
    """FGD's relation part (arXiv 2111.11837): Σ(context(s) − context(t))² over N, with a learnt block on each side.

    Args:
        pad_aware: Leave padding cells out. The paper's form looks at them too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.
    """

    def __init__(self, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.valid if self.pad_aware else None
        return dict(relation=relation_distance(self.student_context[position](level.student, valid),
                                               self.teacher_context[position](level.teacher, valid), valid))
