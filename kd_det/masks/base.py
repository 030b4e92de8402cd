"""What all masks share."""
from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, Union

from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.context import ComparedLevel
from kd_det.scopes import build_own

MaskConfig = Union[str, dict, 'Mask']


class Weighting(NamedTuple):
    """Weights of the cells, times weights of the channels. Kept apart, so that no (N, C, H, W) of weights is ever made.

    Attributes:
        cells: (N, H, W), or None for every cell of the images.
        channels: (N, C), or None for every channel.
        factor: Weight of the whole. Not within the cells, for a normaliser that counts them would take it away again.
    """
    cells: Optional[Tensor] = None
    channels: Optional[Tensor] = None
    factor: float = 1.0


class Mask(nn.Module):
    """Says where, and how much, student and teacher are compared on one level. No gradient flows through a mask."""

    @property
    def student_heads(self) -> Tuple[str, ...]:
        """Heads whose outputs the mask itself reads in the student, see :func:`~kd_det.heads.find_head`."""
        return ()

    @property
    def teacher_heads(self) -> Tuple[str, ...]:
        """Heads whose outputs the mask itself reads in the teacher."""
        return ()

    @property
    def needs_boxes(self) -> bool:
        """Whether 0 means nothing on an image whose boxes are not known."""
        return False

    def forward(self, level: ComparedLevel) -> Tuple[Weighting, ...]:
        """Returns the weightings whose sum is the mask."""
        raise NotImplementedError


class CellMask(Mask):
    """A mask over the cells; a subclass implements :meth:`cells`."""

    def cells(self, level: ComparedLevel) -> Tensor:
        """Returns (N, H, W); padding cells get 0."""
        raise NotImplementedError

    def forward(self, level: ComparedLevel) -> Tuple[Weighting, ...]:
        return (Weighting(cells=self.cells(level)), )


def build_mask(config: MaskConfig) -> Mask:
    """Builds a mask from its dict, or from its name alone if it needs no arguments."""
    if isinstance(config, nn.Module):
        return config
    return build_own(MODELS, dict(type=config) if isinstance(config, str) else config)
