"""FreeKD: the frequencies of features, where prompts look that were learnt on the teacher beforehand."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.config.arguments import Count, Positive, declared, refuse
from kd_det.context import ComparedLevel
from kd_det.functional.structure import frequency_imitation, prompted_feature
from kd_det.losses.base import FeatureTerm, InputSpecs, Parts
from kd_det.taps import is_within_encoder

SCALES = 3  # of the wavelet transform


@MODELS.register_module()
class FreeKD(FeatureTerm):
    """Semantic frequency prompts (Zhang et al., CVPR 2024, arXiv 2311.12079).

    ::

        L = Σ_level Σ_scale mean |M·H(s) − M·H(t)|      M = σ(prompt · Σ_bands H(t)), of each prompt

    with s, t (N, C, H, W), s after its adapter, and H the upper bands of three scales of the Haar wavelet transform:
    how features differ between neighbouring cells, and not what all of them have.

    **Two phases.** The prompts are learnt before training, on the frozen teacher: of its features are left only those
    frequencies that the prompts' masks let through, and the teacher's own loss on the ground truth, plus how alike the
    masks are (Dice), is brought down by the prompts alone. :class:`~kd_det.training.hooks.DistillHook` does so by
    itself, with batches of the training data, and keeps what it found in the work dir and in checkpoints. The teacher
    must be a frozen detector, and the tap a module whose levels its heads read, such as ``'neck'``. Without that phase,
    as in a look into one step, the prompts are as drawn.

    In a config: ``dict(type='FreeKD', tap='neck')``.

    Args:
        prompts: T, how many there are for each scale of each level.
        iterations: Steps by which they are learnt.
        rate: Learning rate, by Adam.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.context import DistillContext
        >>> teacher = torch.rand(1, 4, 8, 8)
        >>> context = DistillContext.of_features(teacher + 1, teacher)  # the same but for the lowest frequency
        >>> term = FreeKD()
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> round(term(context)['frequencies'].item(), 4)
        0.0
    """

    learns_beforehand = True
    prompted: Tensor

    @declared
    def __init__(self, prompts: Count = 6, iterations: Count = 2000, rate: Positive = 0.01, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if is_within_encoder(self.teacher_path):
            refuse('tap', self.teacher_path, "a module whose maps the teacher's heads read, such as 'neck'",
                   'What an encoder puts out are tokens.')
        self.number, self.iterations, self.rate = prompts, iterations, rate

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        super().connect(student, teacher)
        # Buffers: no optimizer of the student's training changes them, and checkpoints hold them.
        for position, pair in enumerate(self.pairs):
            drawn = 0.01 * torch.randn(1 + SCALES, self.number, pair.teacher_spec.channels)
            self.register_buffer(f'prompts_{position}', drawn)
        self.register_buffer('prompted', torch.tensor(False))

    @property
    def prompts(self) -> list[Tensor]:
        """(4, T, C) of each compared level, see :func:`~kd_det.functional.structure.prompted_feature`."""
        return [self.get_buffer(f'prompts_{position}') for position in range(len(self.pairs))]

    def prompt(self, levels: Sequence[Tensor], prompts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What prompts leave of the teacher's features, by which they are learnt.

        Args:
            levels: Of the teacher's tap, (N, C, H, W) each.
            prompts: As :attr:`prompts`.

        Returns:
            The levels, those that are not compared as they were; and the mean over the compared ones of how alike the
            prompts' masks are, to be brought down with the teacher's loss.
        """
        prompted, alike = list(levels), []
        for pair, each in zip(self.pairs, prompts):
            left, similarity = prompted_feature(levels[pair.teacher_level].float(), each)
            prompted[pair.teacher_level] = left.to(levels[pair.teacher_level].dtype)
            alike.append(similarity)
        return prompted, torch.stack(alike).mean()

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        return dict(frequencies=frequency_imitation(level.student, level.teacher, self.prompts[position], level.valid))
