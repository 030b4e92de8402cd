"""Masked feature imitation: the base of most methods."""
from __future__ import annotations

from typing import Optional

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.functional.features import masked_imitation
from kd_det.losses.base import FeatureTerm, Parts
from kd_det.losses.synchronization import rank_share
from kd_det.masks import build_mask
from kd_det.masks.base import MaskConfig, Weighting

MASK_NORMALIZERS = ('mask', 'twice_mask', 'twice_elements')


@MODELS.register_module()
class FeatureImitation(FeatureTerm):
    """The student's features approach the teacher's, where a mask says so: Σ M·d(s, t) over a normaliser.

    Args:
        mask: Config or name of a mask; every cell of the images by default.
        distance: ``'mse'``, ``'l1'``, ``'smooth_l1'`` or ``'cosine'``.
        normalizer: What the sum is divided by, see :func:`~kd_det.functional.features.masked_imitation`; each summand
            of a :class:`~kd_det.masks.MaskSum` by its own. What counts the mask counts it on all ranks.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Example:
        >>> dict(type='FeatureImitation', mask=dict(type='MaskProduct', masks=['BoxForeground', 'SpatialAttention']))
    """

    def __init__(self, mask: Optional[MaskConfig] = None, distance: str = 'mse', normalizer: str = 'batch',
                 **kwargs) -> None:
        super().__init__(**kwargs)
        self.mask = None if mask is None else build_mask(mask)
        self.distance, self.normalizer = distance, normalizer

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        weightings = (Weighting(), ) if self.mask is None else self.mask(level)
        return dict(imitation=sum(self._imitation(level, weighting) for weighting in weightings))

    def _imitation(self, level: ComparedLevel, weighting: Weighting) -> Tensor:
        cells = level.valid.float() if weighting.cells is None else weighting.cells
        value = masked_imitation(
            level.student, level.teacher, cells, weighting.channels, self.distance, self.normalizer)
        share = rank_share(cells) if self.normalizer in MASK_NORMALIZERS else 1
        return weighting.factor * share * value
