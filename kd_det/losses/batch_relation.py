"""What the terms share that compare how the images of a batch relate to each other."""
from __future__ import annotations

import torch
from torch import Tensor

from kd_det.context import ComparedLevel
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
