"""Masks from the ground-truth boxes."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.functional.masks import box_foreground, normalized_background
from kd_det.masks.base import CellMask

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
