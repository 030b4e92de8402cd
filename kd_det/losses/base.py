"""Normalisers that count the whole batch of data-parallel training."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from kd_det.context import ComparedLevel, DistillContext, LevelError, LevelSpec, pair_levels
from kd_det.heads.towers import TowerWidths
from kd_det.losses.adapters import build_adapter
from kd_det.masks.base import Mask


def rank_share(mask: Tensor) -> Tensor:
    """ΣM of this rank over its mean across ranks; 1 in a single process.

    Data-parallel training averages the ranks. Losses over their own rank's ΣM, each times its share, average to what
    one process finds over the ΣM of the whole batch, however unevenly the boxes are spread. Every rank must call this.

    Args:
        mask: (N, H, W), or any other shape.

    Returns:
        Scalar, 0 where no rank has any.
    """
    total = mask.sum()
    return total / reduce_mean(total).clamp(min=torch.finfo(total.dtype).tiny)


Parts = dict[str, Tensor]  # of a term's value, by name; scalars
InputSpecs = dict[str, tuple[LevelSpec, ...] | TowerWidths]


def sum_parts(value: Tensor | Parts) -> Tensor:
    """The value of a term as one scalar."""
    return sum(value.values()) if isinstance(value, dict) else value


class DistillTerm(nn.Module):
    """One comparison of student and teacher.

    A term declares what it reads (:attr:`student_taps`, :attr:`student_heads`, and the teacher's), makes its adapters
    once the form of the taps is known (:meth:`connect`), and turns each step's
    :class:`~kd_det.context.DistillContext` into named parts. It does not know its weight: the distiller multiplies, and
    runs the terms in float32.

    Args:
        teacher: Which teacher to learn from, where there are several.

    Attributes:
        least_levels: How many levels a tap must have for the term to say anything.
    """

    least_levels = 1

    def __init__(self, teacher: int = 0) -> None:
        super().__init__()
        self.teacher_index = teacher

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Module paths that the term reads in the student."""
        return ()

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Module paths that the term reads in its teacher."""
        return ()

    @property
    def student_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the term reads in the student, see :func:`~kd_det.heads.find_head`."""
        return ()

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the term reads in its teacher. They run for the steps in which the term has a weight."""
        return ()

    @property
    def teacher_levels_read(self) -> dict[str, tuple[int, ...]]:
        """Indices of the levels that a connected term reads of a path of :attr:`teacher_taps`, where these are not all.
        The others need not be computed.
        """
        return {}

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        """Makes what depends on the form of what the term reads. Called once, before the optimizer is made.

        Args:
            student: Levels of each of :attr:`student_taps`; widths of those :attr:`student_heads` that are towers.
            teacher: The same of the teacher.
        """

    def forward(self, context: DistillContext) -> Tensor | Parts:
        """Returns the term's value, or its parts by name; scalars."""
        raise NotImplementedError


class FeatureTerm(DistillTerm):
    """A term that compares features level by level; a subclass implements :meth:`compare`.

    It reads the heads that its masks read.

    Args:
        tap: What to read: ``'neck'``, ``'backbone'`` or any module path within them; or a dict with the keys
            ``student`` and ``teacher`` where the paths differ.
        levels: Indices of the student's levels to compare; or a number: the first so many, all where it has fewer; all
            by default. Each is paired with the teacher level of the same stride.
        adapter: Student channels -> teacher channels, see :func:`~kd_det.losses.adapters.build_adapter`.
        resize: Interpolate the teacher's level where it differs in stride or size.
        teacher: See :class:`DistillTerm`.
    """

    def __init__(self, tap: str | dict[str, str] = 'neck',
                 levels: int | Sequence[int] | None = None, adapter: str = 'auto', resize: bool = False,
                 teacher: int = 0) -> None:
        super().__init__(teacher)
        paths = dict(student=tap, teacher=tap) if isinstance(tap, str) else tap
        self.student_path, self.teacher_path = paths['student'], paths['teacher']
        self.levels, self.adapter, self.resize = levels, adapter, resize

    @property
    def student_taps(self) -> tuple[str, ...]:
        return (self.student_path, )

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        return (self.teacher_path, )

    @property
    def student_heads(self) -> tuple[str, ...]:
        return tuple(head for module in self.modules() if isinstance(module, Mask) for head in module.student_heads)

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return tuple(head for module in self.modules() if isinstance(module, Mask) for head in module.teacher_heads)

    @property
    def teacher_levels_read(self) -> dict[str, tuple[int, ...]]:
        return {self.teacher_path: tuple(pair.teacher_level for pair in self.pairs)}

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        self.pairs = pair_levels(student[self.student_path], teacher[self.teacher_path], self.levels, self.resize)
        self.adapters = nn.ModuleList(
            build_adapter(self.adapter, pair.student_spec.channels, pair.teacher_spec.channels) for pair in self.pairs)

    def forward(self, context: DistillContext) -> Parts:
        parts: Parts = defaultdict(float)
        for position, pair in enumerate(self.pairs):
            for name, value in self.compare(self._level(context, position), position).items():
                parts[name] = parts[name] + value
        return dict(parts)

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        """Compares one level.

        Args:
            level: Student (after its adapter) and teacher.
            position: Of the level among the compared ones, which is the index of the term's own modules for it.

        Returns:
            The parts by name, scalars; they are summed over the levels.
        """
        raise NotImplementedError

    def _level(self, context: DistillContext, position: int) -> ComparedLevel:
        pair = self.pairs[position]
        student = self.adapters[position](context.student[self.student_path][pair.student_level].float())
        teacher = context.teachers[self.teacher_index][self.teacher_path][pair.teacher_level].float()
        if student.shape[-2:] != teacher.shape[-2:]:
            if not self.resize:
                raise LevelError(f"Level {pair.student_level} of '{self.student_path}': the student's "
                                 f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)} cover the same "
                                 'image with other cells. Where they differ by one, as detectors that round up and '
                                 "down do, set data_preprocessor.pad_size_divisor of the student's config to the "
                                 'largest stride; else allow resize=True of the term.')
            teacher = F.interpolate(teacher, student.shape[-2:], mode='bilinear', align_corners=False)
        return ComparedLevel(student, teacher, pair.student_spec.stride, pair.student_level, context, self.teacher_index)


def find_read_levels(terms: Iterable[DistillTerm], specs: dict[str, Sequence[LevelSpec]]) -> dict[str, tuple[bool, ...]]:
    """Which levels of a teacher's taps are read by any of its terms.

    Args:
        terms: Connected ones, all of the same teacher.
        specs: Of the levels of each tap of that teacher.

    Returns:
        Path -> for each level whether it is read, of the paths of which some level is not.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    for term in terms:
        for path in term.teacher_taps:
            indices[path].update(term.teacher_levels_read.get(path, range(len(specs[path]))))
    read = {path: tuple(index in indices[path] for index in range(len(specs[path]))) for path in indices}
    return {path: each for path, each in read.items() if not all(each)}
