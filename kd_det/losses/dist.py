"""Correlations within each image and across the images of a batch."""
from __future__ import annotations

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.functional.relations import dist_loss
from kd_det.losses.base import Parts
from kd_det.losses.batch_relation import BatchRelation


@MODELS.register_module()
class DIST(BatchRelation):
    """Distillation from a stronger teacher (Huang et al., NeurIPS 2022, arXiv 2205.10536), on pooled features.

    The paper correlates class probabilities; here each channel, pooled over the image, takes the place of a class:
    1 − Pearson within each image and, for each channel, across the images of the batch, times T².

    Args:
        temperature: Of the softmax over the channels.
        inter: Weight of the correlation over the channels of an image.
        intra: Weight of the correlation over the images; 0 in a batch of one.
        **kwargs: See :class:`~kd_det.losses.batch_relation.BatchRelation`.

    Example:
        >>> dict(type='DIST', tap='neck', temperature=1.0, inter=1.0, intra=1.0)
    """

    def __init__(self, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.temperature, self.inter, self.intra = temperature, inter, intra

    def relate(self, student: Tensor, teacher: Tensor) -> Parts:
        return dict(correlation=dist_loss(student, teacher, self.temperature, self.inter, self.intra))
