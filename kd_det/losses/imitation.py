"""Imitation of features where masks look, of their attentions, and of foreground and background apart.

FitNets, FGFI, FRS, PFI and PGD are :class:`FeatureImitation` with one mask, distance and normaliser or another.
"""
from __future__ import annotations

from typing import Any

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.config.arguments import Positive, Weight, declared, refuse
from kd_det.context import ComparedLevel
from kd_det.functional.features import Distance, Normalizer, decoupled_imitation, masked_imitation
from kd_det.functional.focal_global import attention_distance
from kd_det.losses.base import FeatureTerm, Parts, add_parts, rank_share
from kd_det.masks import build_mask
from kd_det.masks.base import CellMask, Mask, MaskConfig, Weighting

MASK_NORMALIZERS = ('mask', 'twice_mask', 'twice_elements')


@MODELS.register_module()
class FeatureImitation(FeatureTerm):
    """The student's features approach the teacher's where a mask says so, as in FitNets (arXiv 1412.6550) everywhere.

    ::

        L = Σ_level Σ M·d(s, t) / normalizer

    with s, t (N, C, H, W), s after its adapter, M the mask over cells and channels, d summed over the channels.

    In a config: ``dict(type='FeatureImitation', mask=dict(type='MaskProduct', masks=['BoxForeground',
    'SpatialAttention']))``.

    Args:
        mask: M: config or name of a mask; every cell of the images by default.
        distance: d: ``'mse'``, ``'l1'``, ``'smooth_l1'``, or ``'cosine'``, which does not see the scale of features.
        normalizer: What the sum is divided by, see :func:`~kd_det.functional.features.masked_imitation`: published
            weights fit the normaliser of their method. Each summand of a :class:`~kd_det.masks.MaskSum` is divided by
            its own. What counts the mask counts it on all ranks.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> boxes = [torch.tensor([[8.0, 8.0, 24.0, 32.0]])]
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), 8, boxes)
        >>> term = FeatureImitation(mask='BoxForeground', distance='mse', normalizer='batch')
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)  # the box covers 3 × 4 cells, each of four channels
        {'imitation': tensor(48.)}
    """
    mask: Mask | None

    @declared
    def __init__(self, mask: MaskConfig | None = None, distance: Distance = 'mse',
                 normalizer: Normalizer = 'batch', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask = None if mask is None else build_mask(mask)
        self.distance, self.normalizer = distance, normalizer

    @property
    def only_at_boxes(self) -> bool:  # type: ignore[override]
        return self.mask is not None and self.mask.only_at_boxes

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        weightings = (Weighting(), ) if self.mask is None else self.mask(level)
        return add_parts(dict(imitation=self._imitate(level, weighting)) for weighting in weightings)

    def _imitate(self, level: ComparedLevel, weighting: Weighting) -> Tensor:
        cells = level.valid.float() if weighting.cells is None else weighting.cells
        value = masked_imitation(
            level.student, level.teacher, cells, weighting.channels, self.distance, self.normalizer)
        share = rank_share(cells) if self.normalizer in MASK_NORMALIZERS else 1
        return weighting.factor * share * value


@MODELS.register_module()
class AttentionImitation(FeatureTerm):
    """The student attends to the cells and channels that the teacher attends to, a part of FGD (arXiv 2111.11837).

    ::

        L = Σ_level (Σ|A_sp(s) − A_sp(t)| + Σ|A_ch(s) − A_ch(t)|) / N
        A_sp = H·W·softmax_hw(mean_c |F| / T)    A_ch = C·softmax_c(mean_hw |F| / T)

    with s, t (N, C, H, W), s after its adapter.

    Args:
        temperature: T; smaller is more selective (0.5; FCOS 0.8).
        pad_aware: Leave padding cells out. The paper's form looks at them too.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> teacher = torch.rand(1, 4, 8, 8)
        >>> context = DistillContext.of_features(-teacher, teacher)  # the attention is that of absolute values
        >>> term = AttentionImitation(temperature=0.5)
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)
        {'attention': tensor(0.)}
    """

    @declared
    def __init__(self, temperature: Positive = 0.5, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.temperature, self.pad_aware = temperature, pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        valid = level.inside if self.pad_aware else None
        return dict(attention=attention_distance(level.student, level.teacher, self.temperature, valid))


@MODELS.register_module()
class DecoupledImitation(FeatureTerm):
    """The neck's part of DeFeat (Guo et al., CVPR 2021, arXiv 2103.14475): foreground and background teach apart.

    ::

        L = mean over levels of w_fg·Σ M·(s − t)² / (2·C·ΣM) + w_bg·Σ (1 − M)·(s − t)² / (2·C·Σ(1 − M))

    with s, t (N, C, H, W), s after its adapter, M (N, H, W). The background teaches as well, but it must not outweigh
    the foreground by the number of its cells.

    In a config: ``dict(type='DecoupledImitation', mask='LevelForeground', foreground_weight=3.0,
    background_weight=12.0)``.

    Args:
        mask: M, the foreground in [0, 1]: config or name of a mask over the cells. What it weighs more is foreground
            alone.
        foreground_weight: w_fg.
        background_weight: w_bg.
        pad_aware: Padding belongs to neither. In the paper's form it is background.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit, such as a mask that is not one over the cells.

    Example:
        >>> from kd_det.context import DistillContext
        >>> boxes = [torch.tensor([[8.0, 8.0, 24.0, 24.0]])]
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8), 8, boxes)
        >>> term = DecoupledImitation(foreground_weight=3.0, background_weight=12.0)
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)  # half of each weight, however many cells
        {'foreground': tensor(1.5000), 'background': tensor(6.)}
    """
    mask: CellMask

    @declared
    def __init__(self, mask: MaskConfig = 'LevelForeground', foreground_weight: Weight = 3.0,
                 background_weight: Weight = 12.0, pad_aware: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        built = build_mask(mask)
        if not isinstance(built, CellMask):
            refuse('mask', mask, 'a mask over the cells, such as LevelForeground',
                   f'{type(built).__name__} has other parts too.')
        self.mask, self.pad_aware = built, pad_aware
        self.part_weights = dict(foreground=foreground_weight, background=background_weight)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        foreground = self.mask.cells(level)
        valid = level.valid if self.pad_aware else torch.ones_like(level.valid)
        if self.mask.needs_boxes:  # of an unlabelled image nobody knows the background
            valid = level.context.where_labelled(valid)
        values = decoupled_imitation(level.student, level.teacher, foreground, valid)
        shares = (rank_share(cells * valid) for cells in (foreground, (1 - foreground).clamp(min=0)))
        return {name: weight / len(self.pairs) * share * value
                for (name, weight), share, value in zip(self.part_weights.items(), shares, values)}
