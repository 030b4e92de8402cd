"""Masks from the ground-truth boxes."""
from __future__ import annotations

from mmdet.registry import MODELS, TASK_UTILS
from torch import Tensor

from kd_det.context import ComparedLevel, LevelError
from kd_det.functional.masks import (
    assign_levels,
    box_foreground,
    level_foreground,
    near_anchor_foreground,
    normalized_background,
)
from kd_det.masks.base import CellMask
from kd_det.registry import HOME

BOX_MAPPINGS = ('batch', 'image')
WEIGHTINGS = ('binary', 'inverse_area')


@MODELS.register_module()
class BoxForeground(CellMask):
    """The cells that ground-truth boxes cover, see :func:`~kd_det.functional.masks.box_foreground`.

    Args:
        weighting: ``'binary'``, or ``'inverse_area'``: at each cell the largest 1/area over the boxes on it (FGD).
        box_mapping: ``'batch'`` maps pixels to cells by the padded batch, which the feature covers. ``'image'`` is the
            mapping of FGD's released code, by each image's own size, for parity only: it stretches boxes on padded
            batches.

    Raises:
        ValueError: An unknown weighting or mapping.
    """

    def __init__(self, weighting: str = 'binary', box_mapping: str = 'batch') -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting='{weighting}': expected one of {', '.join(WEIGHTINGS)}.")
        if box_mapping not in BOX_MAPPINGS:
            raise ValueError(f"box_mapping='{box_mapping}': expected one of {', '.join(BOX_MAPPINGS)}.")
        self.weighting, self.box_mapping = weighting, box_mapping

    @property
    def needs_boxes(self) -> bool:
        return True

    def cells(self, level: ComparedLevel) -> Tensor:
        context, shape = level.context, level.shape
        image_shapes = context.image_shapes if self.box_mapping == 'image' else None
        # Painted once a level: what covers a cell has an area, so the weights tell the binary mask as well.
        painted = context.once(('boxes', shape, self.box_mapping), lambda: box_foreground(
            context.boxes, context.batch_shape, shape, 'inverse_area', image_shapes))
        return painted if self.weighting == 'inverse_area' else (painted > 0).to(painted.dtype)


@MODELS.register_module()
class BoxBackground(BoxForeground):
    """The cells of the image that no ground-truth box covers, each weighing 1 / their number in the image (FGD).

    An unlabelled image has no background that anybody knows.

    Args:
        box_mapping: See :class:`BoxForeground`. With ``'image'`` padding counts as background, as in the released code.
    """

    def __init__(self, box_mapping: str = 'batch') -> None:
        super().__init__('binary', box_mapping)

    def cells(self, level: ComparedLevel) -> Tensor:
        valid = level.valid if self.box_mapping == 'batch' else None
        return level.context.where_labelled(normalized_background(super().cells(level), valid))


class PyramidMask(CellMask):
    """A mask of boxes that are spread over the levels, counted from the finest: floor(log2(√area / finest_scale)).

    Args:
        finest_scale: Boxes up to twice this size, in pixels, belong to the finest level.
        num_levels: Number of levels of the pyramid, the last of which gets all larger boxes; that of the student's tap
            by default.
    """

    def __init__(self, finest_scale: float = 56, num_levels: int | None = None) -> None:
        super().__init__()
        self.finest_scale, self.num_levels = finest_scale, num_levels

    @property
    def needs_boxes(self) -> bool:
        return True

    def box_levels(self, level: ComparedLevel) -> tuple[list[Tensor], int]:
        """The level that each box belongs to, one (n,) per image, and which this is; both counted from the finest.

        Raises:
            LevelError: The cells of the level are not square.
        """
        if any(abs(cells - side / level.stride) > 1.5 for cells, side in zip(level.shape, level.context.batch_shape)):
            raise LevelError(f"The level of {level.shape[0]} × {level.shape[1]} cells of a batch of "
                             f"{' × '.join(map(str, level.context.batch_shape))} pixels does not have square cells of "
                             f'{level.stride} pixels, which {type(self).__name__} reads by. Take another mask, such as '
                             'BoxForeground.')
        strides = sorted(level.strides)  # some taps, as YOLOv3's neck, begin with the coarsest level
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
