"""Masks in which each ground-truth box belongs to one level of the pyramid, by its size."""
from __future__ import annotations

from typing import List, Optional, Tuple

from mmdet.registry import MODELS, TASK_UTILS
from torch import Tensor

from kd_det.adapters.levels import LevelError
from kd_det.context import ComparedLevel
from kd_det.functional.masks import assign_levels, level_foreground, near_anchor_foreground
from kd_det.masks.base import CellMask
from kd_det.scopes import HOME


class PyramidMask(CellMask):
    """A mask of boxes that are spread over the levels, counted from the finest: floor(log2(√area / finest_scale)).

    Args:
        finest_scale: Boxes up to twice this size, in pixels, belong to the finest level.
        num_levels: Number of levels of the pyramid, the last of which gets all larger boxes; that of the longest tap to
            which the compared level can belong by default.
    """

    def __init__(self, finest_scale: float = 56, num_levels: Optional[int] = None) -> None:
        super().__init__()
        self.finest_scale, self.num_levels = finest_scale, num_levels

    @property
    def needs_boxes(self) -> bool:
        return True

    def box_levels(self, level: ComparedLevel) -> Tuple[List[Tensor], int]:
        """The level that each box belongs to, one (n,) per image, and which this is; both counted from the finest.

        Raises:
            LevelError: The cells of the level are not square.
        """
        if any(abs(cells - side / level.stride) > 1.5 for cells, side in zip(level.shape, level.context.batch_shape)):
            raise LevelError(f"The level of {level.shape[0]} × {level.shape[1]} cells of a batch of "
                             f"{' × '.join(map(str, level.context.batch_shape))} pixels does not have square cells of "
                             f'{level.stride} pixels, which {type(self).__name__} reads by. Take another mask, such as '
                             'BoxForeground.')
        taps = level.context.student_levels.values()  # some, as YOLOv3's neck, begin with the coarsest level
        strides = max((sorted(each.stride for each in levels) for levels in taps if len(levels) > level.index
                       and levels[level.index].stride == level.stride), key=len)
        box_levels = assign_levels(level.context.boxes, self.num_levels or len(strides), self.finest_scale)
        return box_levels, strides.index(level.stride)


@MODELS.register_module()
class LevelForeground(PyramidMask):
    __doc__ = ('The cells that boxes cover, each box on its own level alone (DeFeat, arXiv 2103.14475).\n'
               + PyramidMask.__doc__.partition('\n')[2])

    def cells(self, level: ComparedLevel) -> Tensor:
        box_levels, index = self.box_levels(level)
        return level_foreground(level.context.boxes, box_levels, level.stride, level.shape, index)


@MODELS.register_module()
class NearAnchorForeground(PyramidMask):
    """The cells with an anchor that overlaps a box of this level nearly best (FGFI, arXiv 1906.03609).

    Args:
        anchors: Settings of mmdet's ``AnchorGenerator``, such as those of the student's head; sizes are in units of
            the stride. Their ``strides`` do not count: each level has its own.
        phi: Share of a box's best IoU on the level that an anchor must exceed.
        pad_aware: Leave padding cells out. In the paper's form their anchors count too.
        **kwargs: See :class:`PyramidMask`.

    Example:
        >>> dict(type='NearAnchorForeground', anchors=dict(scales=[8], ratios=[0.5, 1.0, 2.0]))
    """

    def __init__(self, anchors: dict = dict(scales=[8], ratios=[0.5, 1.0, 2.0]), phi: float = 0.5,
                 pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        # Anchors grow with the stride: those of stride 1, times the stride, are the level's.
        self.anchors = TASK_UTILS.build({'type': f'{HOME}.AnchorGenerator', **anchors, 'strides': [1]})
        self.phi, self.pad_aware = phi, pad_aware

    def cells(self, level: ComparedLevel) -> Tensor:
        box_levels, index = self.box_levels(level)
        priors = level.stride * self.anchors.single_level_grid_priors(level.shape, 0, device=level.context.device)
        foreground = near_anchor_foreground(level.context.boxes, box_levels, index, priors, level.shape, self.phi)
        return foreground * level.valid if self.pad_aware else foreground
