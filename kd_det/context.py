"""What every distillation term may read in one step, and nothing else."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kd_det.functional.masks import valid_cells
from kd_det.heads import StudentOutputs, TeacherOutputs
from kd_det.heads.dense import Stride
from kd_det.taps import Features

Result = TypeVar('Result')


class LevelSpec(NamedTuple):
    """The form of one feature level: its number of channels and its stride in pixels, a float where it is not whole."""
    channels: int
    stride: Stride


class Progress(NamedTuple):
    """Where the training stands: steps done, and epochs done (with the fraction of the current one)."""
    iteration: int = 0
    epoch: float = 0.0


@dataclass
class DistillContext:
    """One step as the terms see it. It is made anew each step and nothing keeps it.

    Attributes:
        student: Tapped features by module path; each a tuple of (N, C, H, W), finest level as the module orders them.
        teachers: The same of each teacher, without gradient.
        student_levels: Channels and stride of each level in ``student``.
        teacher_levels: The same for ``teachers``.
        boxes: Ground truth, a teacher's pseudo-labels among it, one (n, 4) of x1, y1, x2, y2 per image, in pixels of
            the padded batch; n may be 0.
        labels: Ground truth, one (n,) of class indices per image, as the heads' outputs count them; -1 for a class that
            the teacher does not know.
        labelled: Whether it is known what an image shows, so that cells without a box are background; None for all.
        batch_shape: Height and width of the padded batch, in pixels.
        image_shapes: Height and width of each image within it.
        progress: Iterations and epochs done.
        student_outputs: What the student's heads put out, of the heads that terms ask for, by name.
        teacher_outputs: The same of each teacher, without gradient.
    """
    student: dict[str, Features]
    teachers: list[dict[str, Features]]
    student_levels: dict[str, tuple[LevelSpec, ...]]
    teacher_levels: list[dict[str, tuple[LevelSpec, ...]]]
    boxes: list[Tensor]
    labels: list[Tensor]
    batch_shape: tuple[int, int]
    image_shapes: list[tuple[int, int]]
    progress: Progress = Progress()  # noqa: RUF009  a frozen one
    labelled: tuple[bool, ...] | None = None
    student_outputs: StudentOutputs = field(default_factory=dict)
    teacher_outputs: list[TeacherOutputs] = field(default_factory=list)
    _computed: dict[Hashable, object] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        return self.boxes[0].device

    def valid(self, feature_shape: Sequence[int]) -> Tensor:
        """The cells that hold a part of an image and not only padding.

        Args:
            feature_shape: Height and width of the level, in cells.

        Returns:
            (N, H, W) of bool.
        """
        shape = tuple(feature_shape)
        return self.once(('valid', shape), lambda: valid_cells(self.image_shapes, self.batch_shape, shape, self.device))

    @property
    def fully_labelled(self) -> bool:
        """Whether it is known of every image what it shows."""
        return self.labelled is None or all(self.labelled)

    def where_labelled(self, values: Tensor) -> Tensor:
        """The values, (N, …), with 0 for unlabelled images."""
        if self.fully_labelled:
            return values
        return values * values.new_tensor(self.labelled).view(-1, *[1] * (values.dim() - 1))

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Computes once in this step what several levels or terms need.

        Args:
            key: Tells this result from all others; the same for all that share it.
            compute: Makes it.
        """
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]


@dataclass
class ComparedLevel:
    """One level of one tap in one step: what a mask and a distance look at.

    Attributes:
        student: (N, C, H, W), after the adapter.
        teacher: (N, C, H, W), without gradient.
        stride: Of the level, in pixels.
        index: Of the level among the student's.
        context: The step.
        teacher_index: Which of the teachers it is.
    """
    student: Tensor
    teacher: Tensor
    stride: Stride
    index: int
    context: DistillContext
    teacher_index: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the level, in cells."""
        return tuple(self.teacher.shape[-2:])

    @property
    def valid(self) -> Tensor:
        """(N, H, W) of bool: the cells that hold a part of an image."""
        return self.context.valid(self.shape)


class LevelPair(NamedTuple):
    """A student level and the teacher level it learns from; the indices count within each module's own output."""
    student_level: int
    teacher_level: int
    student_spec: LevelSpec
    teacher_spec: LevelSpec


class LevelError(ValueError):
    """Levels that can not be paired."""


def pair_levels(student: Sequence[LevelSpec], teacher: Sequence[LevelSpec], levels: int | Sequence[int] | None = None,
                resize: bool = False) -> list[LevelPair]:
    """Pairs levels by stride.

    Args:
        student: The student's levels.
        teacher: The teacher's levels.
        levels: Indices into ``student``; or a number, which is that many from the first on, or all where there are
            fewer; all by default.
        resize: Pair a level that has no partner of its stride with the nearest one, for a term that resizes it.

    Raises:
        LevelError: An index out of range, a number below 1, or a level without a partner.
    """
    if isinstance(levels, int) and levels < 1:
        raise LevelError(f'levels={levels}: as a number it is how many to compare, at least 1. For the level of this '
                         f'index: levels=({levels},).')
    indices = range(len(student))[:levels] if levels is None or isinstance(levels, int) else levels
    beyond = [index for index in indices if not -len(student) <= index < len(student)]
    if beyond:
        raise LevelError(f'levels={tuple(indices)}: the tap has {len(student)} levels, of strides '
                         f'{[level.stride for level in student]}; there is no level {beyond[0]}.')
    pairs = []
    for index in indices:
        index %= len(student)
        stride = student[index].stride
        nearest = min(range(len(teacher)), key=lambda other: abs(teacher[other].stride - stride))
        if teacher[nearest].stride != stride and not resize:
            raise LevelError(f'The student level {index} of stride {stride} has no partner: the teacher has the '
                             f'strides {[level.stride for level in teacher]}. Choose the levels to compare (levels=…) '
                             'or allow resize=True, which compares with the nearest one.')
        pairs.append(LevelPair(index, nearest, student[index], teacher[nearest]))
    return pairs
