"""FGD: features apart for foreground and background, attentions, and how cells relate to the whole image."""
from __future__ import annotations

from typing import Any, cast

from mmdet.registry import MODELS
from torch import nn

from kd_det.config.arguments import Positive, Weight, declared
from kd_det.context import ComparedLevel
from kd_det.functional.focal_global import fgd_loss_of_sums, fgd_sums, relation_distance
from kd_det.losses.adapters import GlobalContext
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts
from kd_det.masks.boxes import BoxBackground, BoxForeground, BoxMapping


class GlobalContextTerm(FeatureTerm):
    """A term with a global context block for each side of each level. Both blocks train, as in FGD's released code."""

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        channels = [pair.teacher_spec.channels for pair in self.pairs]
        self.student_context = nn.ModuleList(map(GlobalContext, channels))
        self.teacher_context = nn.ModuleList(map(GlobalContext, channels))

    def blocks(self, position: int) -> tuple[GlobalContext, GlobalContext]:
        """The student's and the teacher's block of a level."""
        return (cast(GlobalContext, self.student_context[position]),
                cast(GlobalContext, self.teacher_context[position]))


@MODELS.register_module()
class GlobalRelation(GlobalContextTerm):
    """The student's cells relate to the whole image as the teacher's do: FGD's relation part (arXiv 2111.11837).

    ::

        L = Σ_level Σ (G_s(s) − G_t(t))² / N          G(x) = x + mlp(Σ_hw softmax_hw(conv1x1(x))·x)

    with s, t (N, C, H, W), s after its adapter, G a learnt global context block on each side.

    Args:
        pad_aware: Leave padding cells out. The paper's form looks at them too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        >>> term = GlobalRelation()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)['relation'].item()  # the blocks begin as the identity
        256.0
    """

    @declared
    def __init__(self, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.inside if self.pad_aware else None
        relate_student, relate_teacher = self.blocks(position)
        return dict(relation=relation_distance(relate_student(level.student, valid),
                                               relate_teacher(level.teacher, valid), valid))


@MODELS.register_module()
class FGD(GlobalContextTerm):
    """Focal and Global Knowledge Distillation for Detectors (Yang et al., CVPR 2022, arXiv 2111.11837).

    ::

        L = Σ_level Σ (α·M_fg + β·M_bg)·A_sp(t)·A_ch(t)·(s − t)² / N
                  + γ·(Σ|A_sp(s) − A_sp(t)| + Σ|A_ch(s) − A_ch(t)|) / N
                  + λ·Σ (G_s(s) − G_t(t))² / N
        A_sp = H·W·softmax_hw(mean_c |F| / T)      A_ch = C·softmax_c(mean_hw |F| / T)
        G(x) = x + mlp(Σ_hw softmax_hw(conv1x1(x))·x)

    with s, t (N, C, H, W), s after its adapter; M_fg (N, H, W) the largest 1/area of the boxes on a cell, M_bg
    1 / the number of the image's other cells; G a learnt global context block on each side. It equals the sum of two
    :class:`~kd_det.losses.FeatureImitation`, an :class:`~kd_det.losses.AttentionImitation` and a
    :class:`~kd_det.losses.GlobalRelation`, and is computed in few passes over the features: the formula in code is
    :func:`~kd_det.functional.focal_global.fgd_loss`, and beside it stands the form used here.

    The sums grow with channels and image: the defaults are the paper's for RetinaNet and GFL on COCO at 256 channels.

    In a config: ``dict(type='FGD', tap='neck', levels=(0, 1, 2, 3), alpha=5e-5, beta=2.5e-5, gamma=5e-5,
    lambda_=5e-7)``.

    Args:
        temperature: T of both attentions (0.5; FCOS 0.8).
        alpha: α, weight of the foreground (two-stage 5e-5, one-stage 1e-3, anchor-free 1.6e-3).
        beta: β, weight of the background (2.5e-5, 5e-4, 8e-4).
        gamma: γ, weight of the attention (5e-5, 5e-4, 8e-4).
        lambda_: λ, weight of the relation (5e-7, 5e-6, 8e-6).
        box_mapping: ``'batch'`` maps boxes to cells by the padded batch and gives padding no weight anywhere.
            ``'image'`` is what the released code does, for parity only, see :class:`~kd_det.masks.BoxForeground`.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> boxes = [torch.tensor([[8.0, 8.0, 32.0, 32.0]])]
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), 8, boxes)
        >>> term = FGD(alpha=1.0, beta=1.0, gamma=1.0, lambda_=1.0)
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> {name: round(value.item(), 4) for name, value in term(context).items()}
        {'foreground': 4.0, 'background': 4.0, 'attention': 0.0, 'relation': 256.0}
    """

    @declared
    def __init__(self, temperature: Positive = 0.5, alpha: Weight = 1e-3, beta: Weight = 5e-4, gamma: Weight = 5e-4,
                 lambda_: Weight = 5e-6, box_mapping: BoxMapping = 'batch', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.part_weights = dict(alpha=alpha, beta=beta, gamma=gamma, lambda_=lambda_)
        self.temperature, self.pad_aware = temperature, box_mapping == 'batch'
        self.foreground = BoxForeground('inverse_area', box_mapping)
        self.background = BoxBackground(box_mapping)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.inside if self.pad_aware else None
        student, teacher = self.blocks(position)
        sums = fgd_sums(level.student, level.teacher, student.attention_weight(), teacher.attention_weight(),
                        self.temperature, valid)
        shift = student.transform(sums.student_pooled) - teacher.transform(sums.teacher_pooled)
        return fgd_loss_of_sums(sums, shift, self.foreground.cells(level), self.background.cells(level),
                                **self.part_weights, valid=valid)
