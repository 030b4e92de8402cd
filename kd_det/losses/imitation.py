"""Foreground and background imitated apart, each with its own weight and normaliser."""
from __future__ import annotations

from typing import Union

import torch
from mmdet.registry import MODELS

from kd_det.context import ComparedLevel
from kd_det.functional.features import decoupled_imitation
from kd_det.losses.base import FeatureTerm, Parts
from kd_det.losses.synchronization import rank_share
from kd_det.masks import build_mask
from kd_det.masks.base import CellMask


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

    def __init__(self, mask: Union[str, dict, CellMask] = 'LevelForeground', foreground_weight: float = 3.0,
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
