"""Masks of masks."""
from __future__ import annotations

from functools import reduce
from itertools import product
from operator import mul
from typing import Iterable, Optional, Sequence, Tuple, Union

from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.context import ComparedLevel
from kd_det.masks.base import Mask, MaskConfig, Weighting, build_mask


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

    def forward(self, level: ComparedLevel) -> Tuple[Weighting, ...]:
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

    def __init__(self, masks: Sequence[MaskConfig], weights: Optional[Sequence[float]] = None) -> None:
        super().__init__(masks)
        self.weights = tuple(weights) if weights is not None else (1.0, ) * len(masks)
        if len(self.weights) != len(masks):
            raise ValueError(f'MaskSum has {len(masks)} masks but {len(self.weights)} weights.')

    def forward(self, level: ComparedLevel) -> Tuple[Weighting, ...]:
        return tuple(each._replace(factor=weight * each.factor)
                     for mask, weight in zip(self.masks, self.weights) for each in mask(level))


def _product(factors: Iterable[Union[Tensor, float, None]]) -> Union[Tensor, float, None]:
    """The product of what is there; None where nothing is."""
    present = [factor for factor in factors if factor is not None]
    return reduce(mul, present) if present else None
