"""Masks from the ground-truth boxes: on all levels, or on the level of each box's size alone."""
from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from mmdet.registry import MODELS, TASK_UTILS
from torch import Tensor

from kd_det.config.arguments import ArgumentError, Count, Positive, at, declared, refuse
from kd_det.config.files import build_own
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

BoxMapping = Literal['batch', 'image']


@MODELS.register_module()
class BoxForeground(CellMask):
    """The cells that ground-truth boxes cover (FGD, arXiv 2111.11837): 1, or the largest 1/area of the boxes on a cell.

    A box covers the cells from ⌊x1⌋ to ⌈x2⌉ inclusive, in units of cells, see
    :func:`~kd_det.functional.masks.box_foreground`.

    Args:
        weighting: ``'binary'`` for 1, or ``'inverse_area'`` for 1/area, counted in cells.
        box_mapping: ``'batch'`` maps pixels to cells by the padded batch, which the feature covers. ``'image'`` is the
            mapping of FGD's released code, by each image's own size, for parity only: it stretches boxes on padded
            batches.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> feature, boxes = torch.zeros(1, 1, 3, 4), [torch.tensor([[8., 0., 15., 7.]])]
        >>> BoxForeground().cells(DistillContext.of_features(feature, feature, 8, boxes).read_level())
        tensor([[[0., 1., 1., 0.],
                 [0., 1., 1., 0.],
                 [0., 0., 0., 0.]]])
    """

    @declared
    def __init__(self, weighting: Literal['binary', 'inverse_area'] = 'binary',
                 box_mapping: BoxMapping = 'batch') -> None:
        super().__init__()
        self.weighting, self.box_mapping = weighting, box_mapping

    @property
    def needs_boxes(self) -> bool:
        return True

    def cells(self, level: ComparedLevel) -> Tensor:
        # Painted once a level: what covers a cell has an area, so the weights tell the binary mask as well.
        painted = level.context.once(('boxes', level.shape, self.box_mapping), lambda: self._paint(level))
        return painted if self.weighting == 'inverse_area' else (painted > 0).float()

    def _paint(self, level: ComparedLevel) -> Tensor:
        boxes, batch_shape = level.context.boxes, level.context.batch_shape
        if self.box_mapping == 'image':
            return box_foreground(boxes, batch_shape, level.shape, 'inverse_area', level.context.image_shapes)
        painted, inside = box_foreground(boxes, batch_shape, level.shape, 'inverse_area'), level.inside
        # The last cell that a box covers may begin where its image ends.
        return painted if inside is None else painted * inside


@MODELS.register_module()
class BoxBackground(BoxForeground):
    """The cells that no ground-truth box covers, each 1 / their number in the image (FGD, arXiv 2111.11837).

    An unlabelled image has no background that anybody knows, so its cells get 0.

    Args:
        box_mapping: See :class:`BoxForeground`. With ``'image'`` padding counts as background, as in the released code.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> feature, boxes = torch.zeros(1, 1, 2, 3), [torch.tensor([[8., 0., 15., 15.]])]
        >>> BoxBackground().cells(DistillContext.of_features(feature, feature, 8, boxes).read_level())
        tensor([[[0.5000, 0.0000, 0.0000],
                 [0.5000, 0.0000, 0.0000]]])
    """

    @declared
    def __init__(self, box_mapping: BoxMapping = 'batch') -> None:
        super().__init__('binary', box_mapping)

    @property
    def only_at_boxes(self) -> bool:
        return False

    def cells(self, level: ComparedLevel) -> Tensor:
        valid = level.inside if self.box_mapping == 'batch' else None
        return level.context.where_labelled(normalized_background(super().cells(level), valid))


class PyramidMask(CellMask):
    """A mask of boxes that are spread over the levels, counted from the finest: ⌊log2(√area / finest_scale)⌋.

    A subclass implements :meth:`cells` by :meth:`assign_boxes`.

    Args:
        finest_scale: Boxes up to twice this size, in pixels, belong to the finest level.
        num_levels: Number of levels of the pyramid, the last of which gets all larger boxes; that of the student's tap
            by default, whichever of its levels are compared.

    Raises:
        ValueError: An argument that does not fit.
    """

    @declared
    def __init__(self, finest_scale: Positive = 56, num_levels: Count | None = None) -> None:
        super().__init__()
        self.finest_scale, self.num_levels = finest_scale, num_levels

    @property
    def needs_boxes(self) -> bool:
        return True

    def assign_boxes(self, level: ComparedLevel) -> tuple[list[Tensor], int]:
        """The level that each box belongs to, one (n,) per image, and which this is; both counted from the finest.

        Raises:
            LevelError: The cells of the level are not square, or another one has its stride.
        """
        if any(abs(cells - side / level.stride) > 1.5 for cells, side in zip(level.shape, level.context.batch_shape)):
            raise LevelError(f"The level of {level.shape[0]} × {level.shape[1]} cells of a batch of "
                             f"{' × '.join(map(str, level.context.batch_shape))} pixels does not have square cells of "
                             f'{level.stride} pixels, which {type(self).__name__} reads by. Take another mask, such as '
                             'BoxForeground.')
        if level.strides.count(level.stride) > 1:
            raise LevelError(f'{level.strides.count(level.stride)} levels of the tap have the stride {level.stride}: '
                             f'to which of them a box belongs {type(self).__name__} can not tell. Take another mask, '
                             'such as BoxForeground.')
        strides = sorted(level.strides)  # some taps, as YOLOv3's neck, begin with the coarsest level
        box_levels = assign_levels(level.context.boxes, self.num_levels or len(strides), self.finest_scale)
        return box_levels, strides.index(level.stride)


@MODELS.register_module()
class LevelForeground(PyramidMask):
    """The cells that boxes cover, each box on its own level alone (DeFeat, arXiv 2103.14475): 1 there, else 0.

    A box belongs to the level ⌊log2(√area / finest_scale)⌋, counted from the finest, and covers there the cells from
    ⌊x1⌋ up to, not including, ⌊x2⌋, see :func:`~kd_det.functional.masks.level_foreground`.

    Args:
        finest_scale: See :class:`PyramidMask`.
        num_levels: See :class:`PyramidMask`.

    Raises:
        LevelError: In a step: the cells of a level are not square.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> levels = [torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 8, 8)]
        >>> boxes = [torch.tensor([[0., 0., 15., 15.], [0., 0., 127., 127.]])]
        >>> context = DistillContext.of_features(levels, levels, 8, boxes)
        >>> [LevelForeground().cells(context.read_level(index)).sum() for index in range(2)]
        [tensor(1.), tensor(49.)]
    """

    def cells(self, level: ComparedLevel) -> Tensor:
        box_levels, index = self.assign_boxes(level)
        return level_foreground(level.context.boxes, box_levels, level.stride, level.shape, index) * level.valid


@MODELS.register_module()
class NearAnchorForeground(PyramidMask):
    """The cells with an anchor that overlaps a box of this level nearly best (FGFI, arXiv 1906.03609).

    1 where an anchor's IoU with a box of this level is above φ times the box's best, else 0, see
    :func:`~kd_det.functional.masks.near_anchor_foreground`.

    Args:
        anchors: Settings of mmdet's ``AnchorGenerator``, such as those of the student's head; sizes are in units of
            the stride. Their ``strides`` do not count: each level has its own. Scale 8 and three ratios by default.
        phi: φ, the share of a box's best IoU on the level that an anchor must exceed.
        pad_aware: Leave padding cells out. In the paper's form their anchors count too.
        **kwargs: See :class:`PyramidMask`.

    Raises:
        ValueError: An argument that does not fit.
        LevelError: In a step: the cells of a level are not square.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> feature, boxes = torch.zeros(1, 1, 16, 16), [torch.tensor([[32., 32., 96., 96.]])]
        >>> mask = NearAnchorForeground(anchors=dict(scales=[8], ratios=[1.0]), phi=0.9)
        >>> mask.cells(DistillContext.of_features(feature, feature, 8, boxes).read_level()).nonzero()
        tensor([[0, 8, 8]])
    """

    @declared
    def __init__(self, anchors: dict[str, Any] | None = None, phi: Annotated[float, Ge(0), Lt(1)] = 0.5,
                 pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        anchors = dict(scales=[8], ratios=[0.5, 1.0, 2.0]) if anchors is None else anchors
        # Anchors grow with the stride: those of stride 1, times the stride, are the level's.
        with at('anchors'):
            try:
                self.anchors = build_own(TASK_UTILS, {'type': f'{HOME}.AnchorGenerator', **anchors, 'strides': [1]})
            except ArgumentError:
                raise
            except (AssertionError, TypeError, ValueError) as error:  # of mmdet, about what lacks or does not agree
                refuse('', anchors, 'settings of an AnchorGenerator', f'{error}.')
        corners = self.anchors.base_anchors[0]
        if not len(corners) or not (corners.isfinite().all() and (corners[:, 2:] > corners[:, :2]).all()):
            refuse('anchors', anchors, 'scales and ratios above 0, at least one of each')
        self.phi, self.pad_aware = phi, pad_aware

    def cells(self, level: ComparedLevel) -> Tensor:
        box_levels, index = self.assign_boxes(level)
        priors = level.stride * self.anchors.single_level_grid_priors(level.shape, 0, device=level.context.device)
        foreground = near_anchor_foreground(level.context.boxes, box_levels, index, priors, level.shape, self.phi)
        return foreground * level.valid if self.pad_aware else foreground
