"""The student's cells relate to the whole image as the teacher's do."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import nn

from kd_det.context import ComparedLevel
from kd_det.functional.focal_global import fgd_loss_of_sums, fgd_sums, relation_distance
from kd_det.losses.adapters import GlobalContext
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts
from kd_det.masks import BoxBackground, BoxForeground
from kd_det.masks.boxes import BOX_MAPPINGS


class ContextTerm(FeatureTerm):
    """A term with a global context block for each side of each level. Both blocks train, as in FGD's released code."""

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        channels = [pair.teacher_spec.channels for pair in self.pairs]
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


@MODELS.register_module()
class FGD(ContextTerm):
    """Focal and Global Knowledge Distillation for Detectors (Yang et al., CVPR 2022, arXiv 2111.11837).

    Foreground and background are imitated apart, where the teacher's spatial and channel attention look; the student
    imitates these attentions, and how each cell relates to the whole image. It equals the sum of two
    :class:`~kd_det.losses.FeatureImitation`, an :class:`~kd_det.losses.AttentionImitation` and a
    :class:`~kd_det.losses.GlobalRelation`, and computes what they share once.

    The sums grow with channels and image: the defaults are the paper's for RetinaNet and GFL on COCO at 256 channels.

    Args:
        temperature: Of both attentions (0.5; FCOS 0.8).
        alpha: Weight of the foreground (two-stage 5e-5, one-stage 1e-3, anchor-free 1.6e-3).
        beta: Weight of the background (2.5e-5, 5e-4, 8e-4).
        gamma: Weight of the attention (5e-5, 5e-4, 8e-4).
        lambda_: Weight of the relation (5e-7, 5e-6, 8e-6).
        box_mapping: ``'batch'`` maps boxes to cells by the padded batch and gives padding no weight anywhere.
            ``'image'`` is what the released code does, for parity only, see :class:`~kd_det.masks.BoxForeground`.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Example:
        >>> dict(type='FGD', tap='neck', levels=(0, 1, 2, 3), alpha=5e-5, beta=2.5e-5, gamma=5e-5, lambda_=5e-7)
    """

    def __init__(self, temperature: float = 0.5, alpha: float = 1e-3, beta: float = 5e-4, gamma: float = 5e-4,
                 lambda_: float = 5e-6, box_mapping: str = 'batch', **kwargs) -> None:
        super().__init__(**kwargs)
        self.weights = dict(alpha=alpha, beta=beta, gamma=gamma, lambda_=lambda_)
        self.temperature, self.pad_aware = temperature, box_mapping == BOX_MAPPINGS[0]
        self.foreground = BoxForeground('inverse_area', box_mapping)
        self.background = BoxBackground(box_mapping)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.valid if self.pad_aware else None
        student, teacher = self.student_context[position], self.teacher_context[position]
        sums = fgd_sums(level.student, level.teacher, student.attention_weight(), teacher.attention_weight(),
                        self.temperature, valid)
        shift = student.addition(sums.student_pooled) - teacher.addition(sums.teacher_pooled)
        return fgd_loss_of_sums(sums, shift, self.foreground.cells(level), self.background.cells(level), **self.weights,
                         valid=valid)
