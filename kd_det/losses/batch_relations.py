"""What the terms share that compare how the images of a batch relate to each other."""
from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_det.context import ComparedLevel, LevelSpec, pair_levels
from kd_det.functional.relations import RELATED, angle_relation, dist_loss, distance_relation
from kd_det.losses.base import FeatureTerm, Parts


class BatchRelation(FeatureTerm):
    """A term between the images of a batch, each pooled to one vector; a subclass implements :meth:`relate`.

    The batch is that of one process: with one image on each there is nothing to relate.

    Args:
        pad_aware: Pool the cells of the images alone, not the padding.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.
    """

    def __init__(self, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        cells = level.valid.float() if self.pad_aware else torch.ones_like(level.valid, dtype=torch.float32)
        share = cells / cells.sum((1, 2), keepdim=True).clamp(min=1)
        student, teacher = (torch.einsum('nchw,nhw->nc', feature, share) for feature in (level.student, level.teacher))
        return self.relate(student, teacher)

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        """Compares the student's (N, C) with the teacher's (N, C'); returns the parts by name, scalars."""
        raise NotImplementedError


@MODELS.register_module()
class DIST(BatchRelation):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536), on pooled features.

    The paper correlates class probabilities; here each channel, pooled over the image, takes the place of a class:
    1 − Pearson within each image and, for each channel, across the images of the batch, times T².

    Args:
        temperature: Of the softmax over the channels.
        inter: Weight of the correlation over the channels of an image.
        intra: Weight of the correlation over the images; 0 in a batch of one.
        **kwargs: See :class:`~kd_det.losses.batch_relations.BatchRelation`.

    Example:
        >>> dict(type='DIST', tap='neck', temperature=1.0, inter=1.0, intra=1.0)
    """

    def __init__(self, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.temperature, self.inter, self.intra = temperature, inter, intra

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        return dict(correlation=dist_loss(student, teacher, self.temperature, self.inter, self.intra))


@MODELS.register_module()
class RKD(BatchRelation):
    """Relational knowledge distillation (Park et al., CVPR 2019, arXiv 1904.05068), on features pooled over the image.

    Smooth L1 between the pairwise distances, in units of their mean, and between the cosines of the angles at each
    image. Student and teacher need no common width, hence no adapter. Two images have one distance and no angle: with
    fewer than three in a process both parts are 0, which a warning says.

    Args:
        tap, levels, resize, teacher: See :class:`~kd_det.losses.base.FeatureTerm`.
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles.
        pad_aware: See :class:`~kd_det.losses.batch_relations.BatchRelation`.

    Example:
        >>> dict(type='RKD', tap='neck', distance_weight=25.0, angle_weight=50.0)
    """

    def __init__(self, tap: str | dict[str, str] = 'neck', levels: int | Sequence[int] | None = None,
                 resize: bool = False, teacher: int = 0, distance_weight: float = 25.0, angle_weight: float = 50.0,
                 pad_aware: bool = True) -> None:
        super().__init__(pad_aware, tap=tap, levels=levels, resize=resize, teacher=teacher)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self._warned = False

    def connect(self, student: dict[str, tuple[LevelSpec, ...]], teacher: dict[str, tuple[LevelSpec, ...]]) -> None:
        self.pairs = pair_levels(student[self.student_path], teacher[self.teacher_path], self.levels, self.resize)
        self.adapters = nn.ModuleList(nn.Identity() for _ in self.pairs)

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        if len(student) < RELATED and not self._warned:
            self._warned = True
            print_log(f'RKD compares {RELATED} images or more, and here are {len(student)}: it teaches nothing in '
                      'such batches. Raise train_dataloader.batch_size, or leave the method out.', 'current',
                      logging.WARNING)
        return dict(distance=self.distance_weight * distance_relation(student, teacher),
                    angle=self.angle_weight * angle_relation(student, teacher))
