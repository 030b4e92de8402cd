"""The two stacks of convolutions in a dense head, its towers: a student's are read, a teacher's entered midway."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from kd_det.functional.gradients import scale_gradient
from kd_det.heads.dense import DenseOutputs
from kd_det.heads.readers import read_dense
from kd_det.heads.request import HeadError
from kd_det.taps import Call, Features, record_calls

TOWERS = ('cls_convs', 'reg_convs')


class TowerFeatures(NamedTuple):
    """The features within the towers of a head, depth by depth, each a tuple of levels (N, C, H, W).

    Depth 0 is what the first convolution is given, the last depth what the layers that predict are given.

    Attributes:
        classes: Of the tower for classes.
        boxes: Of the tower for boxes.
    """
    classes: tuple[Features, ...]
    boxes: tuple[Features, ...]

    def weigh(self, shares: Tensor) -> TowerFeatures:
        """The same with the gradient of each image times its share, (N,)."""
        return TowerFeatures(*(tuple(tuple(scale_gradient(level, shares) for level in levels) for levels in tower)
                               for tower in self))

    def before(self, remaining: int) -> tuple[Features, Features]:
        """The levels of both towers that have so many convolutions still before them."""
        return self.classes[-1 - remaining], self.boxes[-1 - remaining]


class TowerWidths(NamedTuple):
    """The channels of the features within the towers of a head, depth by depth, as in :class:`TowerFeatures`.

    Attributes:
        classes: Of the tower for classes.
        boxes: Of the tower for boxes.
    """
    classes: tuple[int, ...]
    boxes: tuple[int, ...]

    def before(self, remaining: int) -> tuple[int, int]:
        """The channels of both towers' features that have so many convolutions still before them.

        Raises:
            HeadError: A tower has fewer.
        """
        depth = min(map(len, self)) - 1
        if remaining > depth:
            raise HeadError(f'remaining={remaining} convolutions: the depth of a tower is {depth}.')
        return self.classes[-1 - remaining], self.boxes[-1 - remaining]


def tower_widths(head: Any) -> TowerWidths:
    """The channels within the towers of a head, as its layers have them: those of one that was pruned differ."""

    def measure(tower: Iterable[nn.Module]) -> tuple[int, ...]:
        convolutions = [[each for each in layer.modules() if 'weight' in each._parameters
                         and isinstance(getattr(each, 'out_channels', None), int)] for layer in tower]
        first = convolutions[0][0].in_channels if convolutions else head.in_channels
        return (first, *(each[-1].out_channels for each in convolutions))

    return TowerWidths(*(measure(getattr(head, name)) for name in TOWERS))


class TeacherTowers(NamedTuple):
    """The towers of a teacher's head, to be run from a depth on.

    Attributes:
        head: The head; its weights are frozen, so that a gradient reaches the features alone.
        classes: The classes whose predictions count, by label; all by default.
    """
    head: nn.Module
    classes: tuple[int, ...] | None = None

    def restrict(self, classes: Sequence[int]) -> TeacherTowers:
        """The same for predictions of some classes alone, in this order."""
        return self._replace(classes=tuple(classes))

    def resume(self, classes: Features, boxes: Features, remaining: int) -> DenseOutputs:
        """Runs the head from the last convolutions of its towers on.

        All that comes after them runs: the layers that predict, scales, and units.

        Args:
            classes: Features for the tower of classes, on every level of the head, in its order.
            boxes: The same for the tower of boxes.
            remaining: How many convolutions of each tower they pass.
        """
        dtype = next(self.head.parameters()).dtype
        with ExitStack() as stack:
            for name, levels in zip(TOWERS, (classes, boxes)):
                stack.enter_context(_enter_tower(self.head, name, [level.to(dtype) for level in levels], remaining))
            outputs = read_dense(self.head, self.head(classes))
        return outputs if self.classes is None else outputs.restrict(self.classes)


@contextmanager
def record_towers(head: nn.Module) -> Iterator[list[list[list[Call]]]]:
    """Records what passes the towers of a head while the block runs.

    Yields:
        The calls of each convolution of each tower, one per level, for :func:`read_towers`.
    """
    with ExitStack() as stack:
        yield [[stack.enter_context(record_calls(layer, 'forward')) for layer in getattr(head, name)]
               for name in TOWERS]


def read_towers(calls: Sequence[Sequence[Sequence[Call]]]) -> TowerFeatures:
    """Reads the features from one step's calls, see :func:`record_towers`."""
    return TowerFeatures(*map(_read_tower, calls))


def _read_tower(convolutions: Sequence[Sequence[Call]]) -> tuple[Features, ...]:
    """The features of one tower, depth by depth, from the calls of each convolution, one per level."""
    inputs = tuple(next(iter(call.arguments.values())) for call in convolutions[0]) if convolutions else ()
    return (inputs, *(tuple(call.returned for call in calls) for calls in convolutions))


class _TowerInput(nn.Module):
    """Stands in a tower for the convolutions that are left out: at each call it returns the next of its levels."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        super().__init__()
        self.levels = iter(levels)

    def forward(self, _: Tensor) -> Tensor:
        return next(self.levels)


@contextmanager
def _enter_tower(head: nn.Module, name: str, levels: Sequence[Tensor], remaining: int) -> Iterator[None]:
    """Lets a tower of a head run from its last convolutions on, from those features, while the block runs."""
    layers = getattr(head, name)
    setattr(head, name, nn.ModuleList([_TowerInput(levels), *layers[len(layers) - remaining:]]))
    try:
        yield
    finally:
        setattr(head, name, layers)
