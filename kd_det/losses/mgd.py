"""MGD: the student completes the teacher's feature from a part of its own."""
from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.config.arguments import declared
from kd_det.context import ComparedLevel
from kd_det.functional.features import masked_imitation
from kd_det.losses.adapters import GenerationBlock
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts


@MODELS.register_module()
class MGD(FeatureTerm):
    """Masked generative distillation (Yang et al., ECCV 2022, arXiv 2205.01529).

    ::

        L = Σ_level Σ (G(keep·s) − t)² / N          G: conv3×3 – ReLU – conv3×3

    with s, t (N, C, H, W), s after its adapter, keep (N, 1, H, W) 0 in a share of the cells, drawn anew in each step
    from PyTorch's generator, else 1. The block G trains with the student and generates the teacher's whole feature from
    the rest.

    In a config: ``dict(type='MGD', tap='neck', ratio=0.65, weight=2e-5)``.

    Args:
        ratio: Share of the cells that is dropped (one-stage 0.65, two-stage 0.45).
        normalizer: ``'batch'``, N, is the paper's, and its weights fit it; ``'cells'``, N·H·W, and ``'mean'``, N·C·H·W,
            do not grow with the image.
        pad_aware: Leave padding cells out. The paper's form counts them.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        >>> term = MGD(ratio=0.65)
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)['generation'] > 0
        tensor(True)
    """

    @declared
    def __init__(self, ratio: Annotated[float, Ge(0), Lt(1)] = 0.65,
                 normalizer: Literal['batch', 'cells', 'mean'] = 'batch', pad_aware: bool = True,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio, self.normalizer, self.pad_aware = ratio, normalizer, pad_aware

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        self.generation = nn.ModuleList(GenerationBlock(pair.teacher_spec.channels) for pair in self.pairs)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        kept = level.student * self.draw_kept_cells(level.student)
        inside = level.inside if self.pad_aware else None
        valid = None if inside is None else inside.float()
        if valid is not None:
            kept = kept * valid[:, None]
        generated = self.generation[position](kept)
        return dict(generation=masked_imitation(generated, level.teacher, valid, normalizer=self.normalizer))

    def draw_kept_cells(self, feature: Tensor) -> Tensor:
        """Draws (N, 1, H, W) for a feature (N, C, H, W): 1 in the cells that stay, 0 in those that are dropped."""
        draws = torch.rand(len(feature), 1, *feature.shape[2:], device=feature.device)
        return (draws >= self.ratio).to(feature.dtype)
