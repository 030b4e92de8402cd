"""Which student level is compared with which teacher level: the one of the same stride, never of the same index."""
from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Union

from kd_det.context import Level


class LevelPair(NamedTuple):
    """A student level and the teacher level it learns from; the indices count within each module's own output."""
    student_index: int
    teacher_index: int
    student: Level
    teacher: Level


class LevelError(ValueError):
    """Levels that can not be paired."""


def pair_levels(student: Sequence[Level], teacher: Sequence[Level], levels: Optional[Union[int, Sequence[int]]] = None,
                resize: bool = False) -> List[LevelPair]:
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
