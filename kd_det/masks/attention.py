"""Masks from the features themselves."""
from __future__ import annotations

from collections.abc import Callable

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.functional.masks import channel_attention, spatial_attention
from kd_det.masks.base import CellMask, Mask, Weighting

ATTENTION_SOURCES = ('teacher', 'student', 'both')


class _Attention(Mask):
    """Where, or on what, a detector's features respond strongly.

    Args:
        temperature: Of the softmax; smaller is more selective.
        source: Whose features: ``'teacher'`` (FGD), ``'student'``, or ``'both'``, the mean of the two attentions (FKD).
        pad_aware: Leave padding cells out. The papers' form looks at them too.

    Raises:
        ValueError: An unknown source.
    """

    def __init__(self, temperature: float = 0.5, source: str = 'teacher', pad_aware: bool = True) -> None:
        super().__init__()
        if source not in ATTENTION_SOURCES:
            raise ValueError(f"source='{source}': expected one of {', '.join(ATTENTION_SOURCES)}.")
        self.temperature, self.source, self.pad_aware = temperature, source, pad_aware

    def attention(self, level: ComparedLevel, attend: Callable[..., Tensor]) -> Tensor:
        """The attention of the source by one of the functions of :mod:`kd_det.functional.masks`."""
        features = dict(teacher=[level.teacher], student=[level.student.detach()],
                        both=[level.teacher, level.student.detach()])[self.source]
        valid = level.valid if self.pad_aware else None
        return sum(attend(feature, self.temperature, valid) for feature in features) / len(features)


@MODELS.register_module()
class SpatialAttention(_Attention, CellMask):
    __doc__ = 'The cells that respond: H·W·softmax of the mean absolute value over channels.\n' + _Attention.__doc__

    def cells(self, level: ComparedLevel) -> Tensor:
        return self.attention(level, spatial_attention)


@MODELS.register_module()
class ChannelAttention(_Attention):
    __doc__ = 'The channels that respond: C·softmax of the mean absolute value over cells.\n' + _Attention.__doc__

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return (Weighting(channels=self.attention(level, channel_attention)), )
