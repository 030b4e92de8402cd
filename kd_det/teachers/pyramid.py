"""The levels of a pyramid that are read: mmdet's FPN without those finer or coarser, which nobody then computes."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, Sequence, Tuple, Union

from mmdet.models.necks import FPN
from torch import Tensor, nn

from kd_det.taps import Levels, TapError

LevelsRead = Dict[str, Sequence[bool]]  # by path of a tap; for each of its levels, whether anything reads it


class UnreadLevel:
    """Stands for a level that was not computed. Whatever is asked of it but its size is an error that says so.

    Args:
        path: Of the tap.
        index: Of the level.
    """
    nbytes = 0

    def __init__(self, path: str, index: int) -> None:
        self._name = f"level {index} of the teacher's '{path}'"

    def __getattr__(self, name: str):
        raise TapError(f'No term declares that it reads {self._name}, so it is not computed: list its index in the '
                       "term's levels_read.")


@contextmanager
def cut_pyramid(neck: nn.Module, read: Sequence[bool]) -> Iterator[range]:
    """Lets a neck compute no level finer or coarser than those that are read, for the forwards in the block.

    An FPN that starts at a finer stage of the backbone or at a coarser one is an FPN, and so is one that puts out fewer
    extra levels: its levels are the same. All from the finest that is read to the last stage of the backbone are
    computed, and the extra ones up to the coarsest that is read. Any other neck, one derived from FPN included, is left
    whole.

    Args:
        neck: The neck.
        read: For each of its levels, whether it is read.

    Yields:
        The indices of the levels that it puts out.
    """
    if type(neck) is not FPN or not any(read):
        yield range(len(read))
        return
    inputs = len(neck.lateral_convs)
    first = min(list(read).index(True), inputs - 1)
    last = max(inputs, len(read) - list(read)[::-1].index(True))
    whole = dict(start_level=neck.start_level, num_outs=neck.num_outs, lateral_convs=neck.lateral_convs,
                 fpn_convs=neck.fpn_convs)
    cut = dict(start_level=neck.start_level + first, num_outs=last - first, lateral_convs=neck.lateral_convs[first:],
               fpn_convs=neck.fpn_convs[first:])
    try:
        _set(neck, cut)
        yield range(first, last)
    finally:
        _set(neck, whole)


def placed(path: str, levels: Levels, read: Sequence[bool]) -> Tuple[Union[Tensor, UnreadLevel], ...]:
    """The levels that were read, each at its own index.

    Args:
        path: Of the tap.
        levels: Those that were read, in order.
        read: For each of the tap's levels, whether it was.
    """
    following = iter(levels)
    return tuple(next(following) if each else UnreadLevel(path, index) for index, each in enumerate(read))


def _set(module: nn.Module, attributes: Dict[str, object]) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)
