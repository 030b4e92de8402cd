"""Distances and angles between the images of a batch."""
from __future__ import annotations

import logging
from typing import Dict, Optional, Sequence, Tuple, Union

from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_det.adapters import pair_levels
from kd_det.context import Level
from kd_det.functional.relations import RELATED, angle_relation, distance_relation
from kd_det.losses.base import Parts
from kd_det.losses.batch_relation import BatchRelation


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
        pad_aware: See :class:`~kd_det.losses.batch_relation.BatchRelation`.

    Example:
        >>> dict(type='RKD', tap='neck', distance_weight=25.0, angle_weight=50.0)
    """

    def __init__(self, tap: Union[str, Dict[str, str]] = 'neck', levels: Optional[Union[int, Sequence[int]]] = None,
                 resize: bool = False, teacher: int = 0, distance_weight: float = 25.0, angle_weight: float = 50.0,
                 pad_aware: bool = True) -> None:
        super().__init__(pad_aware, tap=tap, levels=levels, resize=resize, teacher=teacher)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self._warned = False

    def connect(self, student: Dict[str, Tuple[Level, ...]], teacher: Dict[str, Tuple[Level, ...]]) -> None:
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
