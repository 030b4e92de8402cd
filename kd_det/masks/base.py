"""What all masks share."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import product
from operator import mul
from typing import NamedTuple, Union

from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.context import ComparedLevel
from kd_det.registry import build_own

MaskConfig = Union[str, dict, 'Mask']


class Weighting(NamedTuple):
    """Weights of the cells, times weights of the channels. Kept apart, so that no (N, C, H, W) of weights is ever made.

    Attributes:
        cells: (N, H, W), or None for every cell of the images.
        channels: (N, C), or None for every channel.
        factor: Weight of the whole. Not within the cells, for a normaliser that counts them would take it away again.
    """
    cells: Tensor | None = None
    channels: Tensor | None = None
    factor: float = 1.0


class Mask(nn.Module):
    """Says where, and how much, student and teacher are compared on one level. No gradient flows through a mask."""

    @property
    def student_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the mask itself reads in the student, see :func:`~kd_det.heads.find_head`."""
        return ()

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the mask itself reads in the teacher."""
        return ()

    @property
    def needs_boxes(self) -> bool:
        """Whether 0 means nothing on an image whose boxes are not known."""
        return False

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        """Returns the weightings whose sum is the mask."""
        raise NotImplementedError


class CellMask(Mask):
    """A mask over the cells; a subclass implements :meth:`cells`."""

    def cells(self, level: ComparedLevel) -> Tensor:
        """Returns (N, H, W); padding cells get 0."""
        raise NotImplementedError

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return (Weighting(cells=self.cells(level)), )


def build_mask(config: MaskConfig) -> Mask:
    """Builds a mask from its dict, or from its name alone if it needs no arguments."""
    if isinstance(config, nn.Module):
        return config
    return build_own(MODELS, dict(type=config) if isinstance(config, str) else config)


class _Combination(Mask):

    def __init__(self, masks: Sequence[MaskConfig]) -> None:
        super().__init__()
        if not masks:
            raise ValueError(f'{type(self).__name__} needs at least one mask.')
        self.masks = nn.ModuleList(build_mask(mask) for mask in masks)


@MODELS.register_module()
class MaskProduct(_Combination):
    """Where all of several masks look.

    Args:
        masks: Configs or names of masks.

    Example:
        >>> dict(type='MaskProduct', masks=['BoxForeground', dict(type='ChannelAttention', temperature=0.5)])
    """

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return tuple(Weighting(_product(each.cells for each in together), _product(each.channels for each in together),
                               _product(each.factor for each in together))
                     for together in product(*(mask(level) for mask in self.masks)))


@MODELS.register_module()
class MaskSum(_Combination):
    """Where any of several masks looks.

    Args:
        masks: Configs or names of masks.
        weights: Factor of each, whatever the normaliser of the imitation; 1 by default.

    Raises:
        ValueError: Not as many weights as masks.

    Example:
        >>> dict(type='MaskSum', masks=['BoxForeground', 'BoxBackground'], weights=[1.0, 0.5])
    """

    def __init__(self, masks: Sequence[MaskConfig], weights: Sequence[float] | None = None) -> None:
        super().__init__(masks)
        self.weights = tuple(weights) if weights is not None else (1.0, ) * len(masks)
        if len(self.weights) != len(masks):
            raise ValueError(f'MaskSum has {len(masks)} masks but {len(self.weights)} weights.')

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return tuple(each._replace(factor=weight * each.factor)
                     for mask, weight in zip(self.masks, self.weights) for each in mask(level))


def _product(factors: Iterable[Tensor | float | None]) -> Tensor | float | None:
    """The product of what is there; None where nothing is."""
    present = [factor for factor in factors if factor is not None]
    return reduce(mul, present) if present else None
