"""Masks from the features themselves: the cells and the channels that respond strongly."""
from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.config.arguments import Positive, declared
from kd_det.context import ComparedLevel
from kd_det.functional.masks import channel_attention, spatial_attention
from kd_det.masks.base import CellMask, Mask, Weighting


class _Attention(Mask):

    @declared
    def __init__(self, temperature: Positive = 0.5, source: Literal['teacher', 'student', 'both'] = 'teacher',
                 pad_aware: bool = True) -> None:
        super().__init__()
        self.temperature, self.source, self.pad_aware = temperature, source, pad_aware

    def attend(self, level: ComparedLevel, attention: Callable[[Tensor, float, Tensor | None], Tensor]) -> Tensor:
        """The attention of the source by one of the functions of :mod:`kd_det.functional.masks`, without gradient."""
        features = dict(teacher=[level.teacher], student=[level.student.detach()],
                        both=[level.teacher, level.student.detach()])[self.source]
        valid = level.inside if self.pad_aware else None
        attentions = [attention(feature, self.temperature, valid) for feature in features]
        return sum(attentions[1:], attentions[0]) / len(attentions)


@MODELS.register_module()
class SpatialAttention(_Attention, CellMask):
    """The cells that respond (FGD, arXiv 2111.11837): H·W·softmax over the cells of mean_c |F| / T.

    Args:
        temperature: T; smaller is more selective.
        source: Whose feature F is: ``'teacher'`` (FGD), ``'student'``, or ``'both'``, the mean of the two attentions
            (FKD, openreview uKhGRvM8QNH). The student's is that after the adapter.
        pad_aware: Leave padding cells out; H·W is then the number of the others. The papers' form looks at them too.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> feature = torch.tensor([[[[0., 0.], [0., 1.]]]])
        >>> SpatialAttention(temperature=0.5).cells(DistillContext.of_features(feature, feature).read_level())
        tensor([[[0.3850, 0.3850],
                 [0.3850, 2.8449]]])
    """

    def cells(self, level: ComparedLevel) -> Tensor:
        return self.attend(level, spatial_attention)


@MODELS.register_module()
class ChannelAttention(_Attention):
    """The channels that respond (FGD, arXiv 2111.11837): C·softmax over the channels of mean_hw |F| / T.

    Args:
        temperature: T; smaller is more selective.
        source: Whose feature F is: ``'teacher'`` (FGD), ``'student'``, or ``'both'``, the mean of the two attentions
            (FKD, openreview uKhGRvM8QNH). The student's is that after the adapter.
        pad_aware: Take the mean over the cells of the image alone. The papers' form takes it over padding too.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> feature = torch.tensor([[[[0., 0.]], [[1., 1.]]]])
        >>> (weighting, ) = ChannelAttention()(DistillContext.of_features(feature, feature).read_level())
        >>> weighting.channels
        tensor([[0.2384, 1.7616]])
    """

    def forward(self, level: ComparedLevel) -> tuple[Weighting, ...]:
        return (Weighting(channels=self.attend(level, channel_attention)), )
