"""RKD and DIST: how the images of a batch relate to each other."""
from __future__ import annotations

import logging
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_det.config.arguments import EitherSide, Index, Positive, Weight, declared
from kd_det.context import ComparedLevel, LevelPair
from kd_det.functional.features import sum_cells
from kd_det.functional.relations import RELATED, angle_relation, dist_loss, distance_relation
from kd_det.losses.base import FeatureTerm, Levels, Parts


class BatchRelation(FeatureTerm):
    """A term between the images of a batch, each pooled to one vector; a subclass implements :meth:`relate`.

    The batch is that of one process: with one image on each there is nothing to relate.

    Args:
        pad_aware: Pool the cells of the images alone, not the padding.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.
    """

    @declared
    def __init__(self, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        cells = level.valid.float() if self.pad_aware else torch.ones_like(level.valid, dtype=torch.float32)
        share = cells / cells.sum((1, 2), keepdim=True).clamp(min=1)
        student, teacher = (sum_cells(feature, share) for feature in (level.student, level.teacher))
        return self.relate(student, teacher)

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        """Compares the student's (N, C) with the teacher's (N, C'); returns the parts by name, scalars."""
        raise NotImplementedError


@MODELS.register_module()
class DIST(BatchRelation):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536), on pooled features.

    ::

        p = softmax_c(mean_hw F / T)
        L = Σ_level T²·(inter·mean_n(1 − r(p_s, p_t over c)) + intra·mean_c(1 − r(p_s, p_t over n)))

    with F (N, C, H, W), the student's after its adapter, r Pearson's correlation. The paper correlates class
    probabilities; here each channel, pooled over the image, takes the place of a class.

    In a config: ``dict(type='DIST', tap='neck', temperature=1.0, inter=1.0, intra=1.0)``.

    Args:
        temperature: T of the softmax over the channels.
        inter: Weight of the correlation over the channels of an image.
        intra: Weight of the correlation over the images; that part is 0 in a batch of one.
        **kwargs: See :class:`~kd_det.losses.batch_relations.BatchRelation`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> teacher = torch.rand(2, 4, 8, 8)
        >>> context = DistillContext.of_features(teacher.clone(), teacher)
        >>> term = DIST()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)
        {'correlation': tensor(0.)}
    """

    @declared
    def __init__(self, temperature: Positive = 1.0, inter: Weight = 1.0, intra: Weight = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature, self.inter, self.intra = temperature, inter, intra

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        return dict(correlation=dist_loss(student, teacher, self.temperature, self.inter, self.intra))


@MODELS.register_module()
class RKD(BatchRelation):
    """Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068), on features pooled over the image.

    ::

        L = Σ_level w_d·SmoothL1(d_ij(s), d_ij(t)) + w_a·SmoothL1(cos∠_ijk(s), cos∠_ijk(t))

    with s, t (N, C) and (N, C') pooled features, d their pairwise distances in units of the mean, ∠ the angles at each
    image. Student and teacher need no common width, hence no adapter. Two images have one distance and no angle: with
    fewer than three in a process both parts are 0, which a warning says.

    In a config: ``dict(type='RKD', tap='neck', distance_weight=25.0, angle_weight=50.0)``.

    Args:
        tap, levels, resize, teacher, normalize: See :class:`~kd_det.losses.base.FeatureTerm`.
        distance_weight: w_d, weight of the distances.
        angle_weight: w_a, weight of the angles.
        pad_aware: See :class:`~kd_det.losses.batch_relations.BatchRelation`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> student, teacher = torch.rand(3, 4, 8, 8), torch.rand(3, 16, 8, 8)  # of other widths, without an adapter
        >>> context = DistillContext.of_features(student, teacher)
        >>> term = RKD()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> {name: bool(value > 0) for name, value in term(context).items()}
        {'distance': True, 'angle': True}
    """

    @declared
    def __init__(self, tap: EitherSide = 'neck', levels: Levels | None = None, resize: bool = False, teacher: Index = 0,
                 distance_weight: Weight = 25.0, angle_weight: Weight = 50.0, pad_aware: bool = True,
                 normalize: bool = False) -> None:
        super().__init__(pad_aware, tap=tap, levels=levels, resize=resize, teacher=teacher, normalize=normalize)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self._warned = False

    def make_adapter(self, pair: LevelPair) -> nn.Module:
        return nn.Identity()

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        if len(student) < RELATED and not self._warned:
            self._warned = True
            print_log(f'RKD compares {RELATED} images or more, and here are {len(student)}: it teaches nothing in '
                      'such batches. Raise train_dataloader.batch_size, or leave the method out.', 'current',
                      logging.WARNING)
        return dict(distance=self.distance_weight * distance_relation(student, teacher),
                    angle=self.angle_weight * angle_relation(student, teacher))
