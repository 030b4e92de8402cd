"""What a mask is, how its config is built, and how masks combine.

A mask is given a :class:`~kd_det.context.ComparedLevel`: the features of student and teacher on one level, its stride
and those of the whole tap, and as its ``context`` the step: boxes, labels, sizes of the images, outputs of the heads
that the mask asks for. It returns weights; the term that holds it multiplies and normalises.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import product
from math import prod
from operator import mul
from typing import Annotated, Any, NamedTuple

from annotated_types import MinLen
from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.config.arguments import at, check_value, declared, refuse
from kd_det.config.files import build_own
from kd_det.context import ComparedLevel


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
    """Says where, and how much, student and teacher are compared on one level. No gradient flows through a mask.

    A subclass implements :meth:`forward`, or that of :class:`CellMask`. It checks its arguments when it is built, and
    declares the heads that it reads: their outputs are then in the context, of the student's in ``student_outputs``, of
    the teacher's in ``teacher_outputs[level.teacher_index]``.
    """

    @property
    def student_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the mask itself reads in the student, see :func:`~kd_det.heads.find_head`."""
        return ()

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the mask itself reads in the teacher. They then run in the steps of its term."""
        return ()

    @property
    def needs_boxes(self) -> bool:
        """Whether the mask is made of ground-truth boxes, so that its 0 means nothing on an image that is not labelled.

        :class:`~kd_det.losses.imitation.DecoupledImitation`, for which 0 is background, then leaves such images out.
        """
        return False

    @property
    def only_at_boxes(self) -> bool:
        """Whether the mask is 0 everywhere on an image without boxes, as most are that are made of them."""
        return self.needs_boxes

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        """Returns the weightings whose sum is the mask."""
        raise NotImplementedError


class CellMask(Mask):
    """A mask over the cells; a subclass implements :meth:`cells`.

    Example:
        The cells near the teacher's strongest one:

        >>> import torch
        >>> from kd_det.context import ComparedLevel, DistillContext
        >>> class Strongest(CellMask):
        ...     def cells(self, level: ComparedLevel) -> torch.Tensor:
        ...         response = level.teacher.abs().mean(1) * level.valid
        ...         return (response == response.amax((1, 2), keepdim=True)).float()
        >>> teacher = torch.tensor([[[[0., 1.], [3., 2.]]]])
        >>> Strongest().cells(DistillContext.of_features(teacher, teacher).read_level())
        tensor([[[0., 0.],
                 [1., 0.]]])
    """

    def cells(self, level: ComparedLevel) -> Tensor:
        """Returns (N, H, W) of float32, at least 0 and finite, without gradient.

        Padding gets 0: the cells that are not in ``level.valid``. An image without boxes, a level of one cell and an
        image that is all padding are ordinary. What does not depend on the level is computed once a step, by
        ``level.context.once``.
        """
        raise NotImplementedError

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return (Weighting(cells=self.cells(level)), )


MaskConfig = Annotated[str | dict[str, Any] | Mask, 'the name or the dict of a mask']


def build_mask(config: MaskConfig, place: str = 'mask') -> Mask:
    """Builds a mask from its dict, or from its name alone if it needs no arguments.

    Args:
        config: The mask.
        place: What the argument is called that holds it.

    Raises:
        ArgumentError: There is no such mask, or it can not be built from its arguments.

    Example:
        >>> build_mask('BoxForeground').needs_boxes
        True
    """
    check_value(place, config, MaskConfig)
    if isinstance(config, Mask):
        return config
    with at(place):
        mask = build_own(MODELS, dict(type=config) if isinstance(config, str) else config)
        if not isinstance(mask, Mask):
            refuse('type', config, f'a mask, which {type(mask).__name__} is not')
    return mask


class _Combination(Mask):

    @declared
    def __init__(self, masks: Annotated[Sequence[MaskConfig], MinLen(1)]) -> None:
        super().__init__()
        self.masks = nn.ModuleList(build_mask(mask, f'masks[{index}]') for index, mask in enumerate(masks))

    @property
    def needs_boxes(self) -> bool:
        return any(mask.needs_boxes for mask in self.masks)


@MODELS.register_module()
class MaskProduct(_Combination):
    """Where all of several masks look: M = ∏ᵢ Mᵢ.

    Args:
        masks: Configs or names of masks.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> dict(type='MaskProduct', masks=['BoxForeground', dict(type='ChannelAttention', temperature=0.5)])
        {'type': 'MaskProduct', 'masks': ['BoxForeground', {'type': 'ChannelAttention', 'temperature': 0.5}]}
    """

    @property
    def only_at_boxes(self) -> bool:
        return any(mask.only_at_boxes for mask in self.masks)

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return tuple(Weighting(_multiply(each.cells for each in together),
                               _multiply(each.channels for each in together),
                               prod(each.factor for each in together))
                     for together in product(*(mask(level) for mask in self.masks)))


@MODELS.register_module()
class MaskSum(_Combination):
    """Where any of several masks looks: M = Σᵢ wᵢ·Mᵢ. Each summand is normalised by itself.

    Args:
        masks: Configs or names of masks.
        weights: wᵢ, the factor of each, whatever the normaliser of the imitation; 1 by default.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> mask = build_mask(dict(type='MaskSum', masks=['BoxForeground', 'BoxBackground'], weights=[1.0, 0.5]))
        >>> mask.weights
        (1.0, 0.5)
    """

    @declared
    def __init__(self, masks: Annotated[Sequence[MaskConfig], MinLen(1)],
                 weights: Sequence[float] | None = None) -> None:
        super().__init__(masks)
        self.weights = tuple(weights) if weights is not None else (1.0, ) * len(masks)
        if len(self.weights) != len(masks):
            refuse('weights', weights, f'one for each of the {len(masks)} masks')

    @property
    def only_at_boxes(self) -> bool:
        return all(mask.only_at_boxes for mask in self.masks)

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return tuple(each._replace(factor=weight * each.factor)
                     for mask, weight in zip(self.masks, self.weights) for each in mask(level))


def _multiply(factors: Iterable[Tensor | None]) -> Tensor | None:
    """The product of what is there; None where nothing is."""
    present = [factor for factor in factors if factor is not None]
    return reduce(mul, present) if present else None
