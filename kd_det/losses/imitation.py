"""Masked feature imitation: the base of most methods."""
from __future__ import annotations

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.functional.features import decoupled_imitation, masked_imitation
from kd_det.functional.focal_global import attention_distance
from kd_det.losses.base import FeatureTerm, Parts, rank_share
from kd_det.masks import build_mask
from kd_det.masks.base import CellMask, MaskConfig, Weighting

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

    def __init__(self, mask: MaskConfig | None = None, distance: str = 'mse', normalizer: str = 'batch',
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


@MODELS.register_module()
class AttentionImitation(FeatureTerm):
    """FGD's attention part (arXiv 2111.11837): Σ|A_s − A_t| of the spatial and of the channel attention, each over N.

    Args:
        temperature: Of both softmaxes.
        pad_aware: Leave padding cells out. The paper's form looks at them too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.
    """

    def __init__(self, temperature: float = 0.5, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.temperature, self.pad_aware = temperature, pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.valid if self.pad_aware else None
        return dict(attention=attention_distance(level.student, level.teacher, self.temperature, valid))


@MODELS.register_module()
class DecoupledImitation(FeatureTerm):
    """The neck's part of DeFeat (Guo et al., CVPR 2021, arXiv 2103.14475): Σ M·(s − t)² / (2·C·ΣM), mean over levels.

    The background, 1 − mask, teaches as well, but it must not outweigh the foreground by the number of its cells.

    Args:
        mask: Foreground in [0, 1]: config or name of a mask over the cells. What it weighs more is foreground alone.
        foreground_weight: Weight of the foreground.
        background_weight: Weight of the background.
        pad_aware: Padding belongs to neither. In the paper's form it is background.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: A mask that is not one over the cells.

    Example:
        >>> dict(type='DecoupledImitation', mask='LevelForeground', foreground_weight=3.0, background_weight=12.0)
    """

    def __init__(self, mask: str | dict | CellMask = 'LevelForeground', foreground_weight: float = 3.0,
                 background_weight: float = 12.0, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.mask = build_mask(mask)
        if not isinstance(self.mask, CellMask):
            raise ValueError(f'mask={mask!r}: expected a mask over the cells, such as LevelForeground; '
                             f'{type(self.mask).__name__} has other parts too.')
        self.weights = dict(foreground=foreground_weight, background=background_weight)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        foreground = self.mask.cells(level)
        valid = level.valid if self.pad_aware else torch.ones_like(level.valid)
        if self.mask.needs_boxes:  # of an unlabelled image nobody knows the background
            valid = level.context.where_labelled(valid)
        values = decoupled_imitation(level.student, level.teacher, foreground, valid)
        shares = (rank_share(cells * valid) for cells in (foreground, (1 - foreground).clamp(min=0)))
        return {name: weight / len(self.pairs) * share * value
                for (name, weight), share, value in zip(self.weights.items(), shares, values)}
