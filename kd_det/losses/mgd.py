"""The student completes the teacher's feature from a part of its own."""
from __future__ import annotations

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.context import ComparedLevel
from kd_det.functional.features import masked_imitation
from kd_det.losses.adapters import GenerationBlock
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts


@MODELS.register_module()
class MGD(FeatureTerm):
    """Masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529): Σ(G(keep·s) − t)² / N.

    Random cells of the student's feature are dropped; a small block G, trained with it, generates the teacher's whole
    feature from the rest. The cells are drawn from PyTorch's generator.

    Args:
        ratio: Share of the cells that is dropped (one-stage 0.65, two-stage 0.45).
        normalizer: ``'batch'``, N, is the paper's, and its weights fit it; ``'mean'``, N·C·H·W, does not grow with the
            image.
        pad_aware: Leave padding cells out. The paper's form counts them.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: A ratio that is not in [0, 1).

    Example:
        >>> dict(type='MGD', tap='neck', ratio=0.65, weight=2e-5)
    """

    def __init__(self, ratio: float = 0.65, normalizer: str = 'batch', pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        if not 0 <= ratio < 1:
            raise ValueError(f'ratio={ratio}: expected the share of the cells to drop, at least 0 and less than 1.')
        self.ratio, self.normalizer, self.pad_aware = ratio, normalizer, pad_aware

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        self.generation = nn.ModuleList(GenerationBlock(pair.teacher_spec.channels) for pair in self.pairs)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        kept = level.student * self.kept_cells(level.student)
        valid = level.valid.float() if self.pad_aware else None
        if valid is not None:
            kept = kept * valid[:, None]
        generated = self.generation[position](kept)
        return dict(generation=masked_imitation(generated, level.teacher, valid, normalizer=self.normalizer))

    def kept_cells(self, feature: Tensor) -> Tensor:
        """Draws (N, 1, H, W) for a feature (N, C, H, W): 1 in the cells that stay, 0 in those that are dropped."""
        draws = torch.rand(len(feature), 1, *feature.shape[2:], device=feature.device)
        return (draws >= self.ratio).to(feature.dtype)
