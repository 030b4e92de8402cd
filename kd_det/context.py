"""What the terms and masks may read in one step: the whole step, and one level of it.

A term is given a :class:`DistillContext`; a mask and a distance are given a :class:`ComparedLevel`, which leads to the
context of its step.
"""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import log
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from kd_det.functional.boxes import constant
from kd_det.functional.gradients import scale_gradient
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

    N is the number of images, K that of classes. Features, boxes and outputs are on one device, in the precision of the
    model; terms run outside of autocast, and compute in float32.

    What several terms, masks or levels need is computed once a step, by :meth:`once`. ``dataclasses.replace`` makes a
    context that has computed nothing yet, for what it would be computed from may have changed; the valid cells alone
    are handed on, each kept with all that it depends on.

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
        valid_cells: What :meth:`valid` has computed, by shape, shapes of the images and of the batch, and device.
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
    valid_cells: dict[Hashable, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _computed: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def of_features(
        cls,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        stride: Stride | Sequence[Stride] = 8,
        boxes: Sequence[Tensor] | None = None,
        labels: Sequence[Tensor] | None = None,
        image_shapes: Sequence[tuple[int, int]] | None = None,
        batch_shape: tuple[int, int] | None = None,
        tap: str = 'neck',
        **others: Any,
    ) -> DistillContext:
        """The step of one tap of a student and of one teacher, from plain tensors: for examples, tests and notebooks.

        Args:
            student: (N, C, H, W), or one for each level, the finest first.
            teacher: (N, C', H, W), or one for each level.
            stride: Of the finest level, in pixels, each next level having twice that; or one for each level.
            boxes: One (n, 4) of x1, y1, x2, y2 in pixels per image; no boxes by default.
            labels: One (n,) of class indices per image; 0 by default.
            image_shapes: Height and width of each image in pixels; ``batch_shape`` by default, which is no padding.
            batch_shape: Height and width of the padded batch in pixels; what the first level covers by default.
            tap: The name of the tap.
            **others: Other attributes, such as ``labelled`` or ``teacher_outputs``.

        Example:
            >>> import torch
            >>> context = DistillContext.of_features(torch.zeros(2, 16, 8, 12), torch.zeros(2, 32, 8, 12), stride=8,
            ...                                      image_shapes=[(64, 96), (32, 40)])
            >>> context.batch_shape, [len(boxes) for boxes in context.boxes]
            ((64, 96), [0, 0])
            >>> context.valid((8, 12)).sum((1, 2))
            tensor([96, 20])
        """
        students, teachers = ((each, ) if isinstance(each, Tensor) else tuple(each) for each in (student, teacher))
        strides = [stride * 2**index for index in range(len(students))] if isinstance(stride, (int, float)) else stride
        images, _, height, width = students[0].shape
        batch_shape = batch_shape or (round(height * strides[0]), round(width * strides[0]))
        boxes = [students[0].new_zeros(0, 4)] * images if boxes is None else list(boxes)
        labels = [each.new_zeros(len(each), dtype=torch.long) for each in boxes] if labels is None else list(labels)
        student_specs, teacher_specs = (tuple(LevelSpec(level.shape[1], each) for level, each in zip(levels, strides))
                                        for levels in (students, teachers))
        return cls(
            student={tap: students}, teachers=[{tap: teachers}], student_levels={tap: student_specs},
            teacher_levels=[{tap: teacher_specs}], boxes=boxes, labels=labels, batch_shape=batch_shape,
            image_shapes=[batch_shape] * images if image_shapes is None else list(image_shapes), **others)

    @property
    def device(self) -> torch.device:
        return self.boxes[0].device

    def valid(self, feature_shape: Sequence[int]) -> Tensor:
        """The cells that hold a part of an image and not only padding; computed once for each shape.

        Args:
            feature_shape: Height and width of the level, in cells.

        Returns:
            (N, H, W) of bool.
        """
        height, width = feature_shape
        key = (height, width), self.batch_shape, tuple(self.image_shapes), self.device
        if key not in self.valid_cells:
            self.valid_cells[key] = valid_cells(self.image_shapes, self.batch_shape, (height, width), self.device)
        return self.valid_cells[key]

    def has_padding(self, feature_shape: Sequence[int]) -> bool:
        """Whether a cell of some image is not :meth:`valid`; a host knows without asking a GPU."""
        return any((cells - 1) * pixels >= side * cells for image_shape in self.image_shapes
                   for cells, pixels, side in zip(feature_shape, self.batch_shape, image_shape))

    @property
    def fully_labelled(self) -> bool:
        """Whether it is known of every image what it shows: whether all cells without a box are background."""
        return self.labelled is None or all(self.labelled)

    def where_labelled(self, values: Tensor) -> Tensor:
        """The values, (N, …), with 0 for unlabelled images."""
        if self.fully_labelled:
            return values
        return values * constant(self.labelled, values).view(-1, *[1] * (values.dim() - 1))

    def weigh_images(self, shares: Tensor) -> DistillContext:
        """The same step, in which what terms read of the student has each image's gradient times its share.

        Values are what they were. The adapters of a term learn from all images alike.

        Args:
            shares: (N,); 0 for an image from which the student is to learn nothing.
        """
        features = {path: tuple(scale_gradient(level, shares) for level in levels)
                    for path, levels in self.student.items()}
        return replace(self, student=features,
                       student_outputs={name: each.weigh(shares) for name, each in self.student_outputs.items()})

    def once(self, key: Hashable, compute: Callable[[], Result]) -> Result:
        """Computes once in this step what several levels, masks or terms need.

        Args:
            key: Tells this result from all others: a word of its own, and every argument that it depends on beside the
                context, such as the level's shape, the teacher's index, the name of a head.
            compute: Makes it; called the first time alone. What it returns is shared: nobody writes into it.

        Example:
            >>> import torch
            >>> context = DistillContext.of_features(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
            >>> context.once(('box counts', ), lambda: [len(boxes) for boxes in context.boxes])
            [0, 0]
        """
        if key not in self._computed:
            self._computed[key] = compute()
        return cast(Result, self._computed[key])

    def read_level(self, index: int = 0, tap: str | None = None, teacher_index: int = 0) -> ComparedLevel:
        """A level as both detectors have it, without an adapter: what a mask is given where the widths are equal.

        Args:
            index: Of the level among the student's.
            tap: The student's and the teacher's; the first by default.
            teacher_index: Which of the teachers.
        """
        tap = next(iter(self.student)) if tap is None else tap
        student, teacher = self.student[tap][index], self.teachers[teacher_index][tap][index]
        strides = tuple(spec.stride for spec in self.student_levels[tap])
        return ComparedLevel(student, teacher, student, index, strides, self, teacher_index)


@dataclass
class ComparedLevel:
    """One level of one tap in one step: what a mask and a distance look at.

    Attributes:
        student: (N, C, H, W), after the adapter: as wide as the teacher's. A mask detaches it.
        teacher: (N, C, H, W), without gradient; resized to the student's cells where the term does that.
        raw_student: (N, C', H, W), before the adapter: as wide as the student is.
        index: Of the level among the student's, as its module orders them; mostly the finest first.
        strides: Of all levels of the student's tap, in pixels, in the same order, whichever of them are compared.
        context: The step: boxes, image shapes, outputs of heads, and what others have computed.
        teacher_index: Which of the teachers it is.

    Example:
        >>> import torch
        >>> level = DistillContext.of_features(torch.ones(2, 3, 4, 6), torch.ones(2, 3, 4, 6), 16).read_level()
        >>> level.shape, level.stride, level.valid.shape
        ((4, 6), 16, torch.Size([2, 4, 6]))
    """
    student: Tensor
    teacher: Tensor
    raw_student: Tensor
    index: int
    strides: tuple[Stride, ...]
    context: DistillContext
    teacher_index: int = 0

    @property
    def stride(self) -> Stride:
        """Of the level, in pixels; a float where it is not whole."""
        return self.strides[self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the level, in cells."""
        height, width = self.teacher.shape[-2:]
        return height, width

    @property
    def valid(self) -> Tensor:
        """(N, H, W) of bool: the cells that hold a part of an image; the others are padding."""
        return self.context.valid(self.shape)

    @property
    def inside(self) -> Tensor | None:
        """:attr:`valid`, but None where all cells are: for functions that take that, and do less then."""
        return self.valid if self.context.has_padding(self.shape) else None


class LevelPair(NamedTuple):
    """A student level and the teacher level it learns from; the indices count within each module's own output."""
    student_level: int
    teacher_level: int
    student_spec: LevelSpec
    teacher_spec: LevelSpec


class LevelError(ValueError):
    """Levels that can not be paired."""


def find_partner(strides: Sequence[Stride], index: int, others: Sequence[Stride]) -> int:
    """The level whose stride is nearest by ratio to that of a level of another pyramid; of two as near the finer.

    Of several of one stride, as backbones with dilated stages have, the first belongs to the first, and so on.

    Args:
        strides: Of the one pyramid.
        index: Of the level, in these.
        others: Of the other pyramid.

    Example:
        >>> find_partner([4, 8, 16, 16], 3, [4, 8, 16, 16]), find_partner([8, 16, 16], 2, [8, 16])
        (3, 1)
    """
    nearest = min(others, key=lambda other: (abs(log(other / strides[index])), other))
    alike = [place for place, other in enumerate(others) if other == nearest]
    return alike[min(strides[:index].count(strides[index]), len(alike) - 1)]


def pair_levels(student: Sequence[LevelSpec], teacher: Sequence[LevelSpec], levels: int | Sequence[int] | None = None,
                resize: bool = False) -> list[LevelPair]:
    """Pairs levels by stride.

    Args:
        student: The student's levels.
        teacher: The teacher's levels.
        levels: Indices into ``student``; or a number, which is that many from the first on, or all where there are
            fewer; all by default.
        resize: Pair a level that has no partner of its stride with the nearest by ratio, for a term that resizes it.

    Raises:
        LevelError: An index out of range or of a level that another names, a number below 1, or a level without a
            partner.
    """
    if isinstance(levels, int) and levels < 1:
        raise LevelError(f'levels={levels}: as a number it is how many to compare, at least 1. For the level of this '
                         f'index: levels=({levels},).')
    indices = range(len(student))[:levels] if levels is None or isinstance(levels, int) else levels
    beyond = [index for index in indices if not -len(student) <= index < len(student)]
    if beyond:
        raise LevelError(f'levels={tuple(indices)}: the tap has {len(student)} levels, of strides '
                         f'{[level.stride for level in student]}; there is no level {beyond[0]}.')
    chosen = [index % len(student) for index in indices]
    if len(set(chosen)) < len(chosen):
        raise LevelError(f'levels={tuple(indices)}: of the {len(student)} levels of the tap, these are {chosen}. Name '
                         'each level once.')
    pairs = []
    for index in chosen:
        stride = student[index].stride
        nearest = find_partner([level.stride for level in student], index, [level.stride for level in teacher])
        if teacher[nearest].stride != stride and not resize:
            raise LevelError(f'The student level {index} of stride {stride} has no partner: the teacher has the '
                             f'strides {[level.stride for level in teacher]}. Choose the levels to compare (levels=…) '
                             'or allow resize=True, which compares with the nearest one.')
        pairs.append(LevelPair(index, nearest, student[index], teacher[nearest]))
    return pairs
