"""The two stacks of convolutions in a dense head, its towers: a student's are read, a teacher's entered midway."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from kd_det.functional.gradients import scale_gradient
from kd_det.functional.masks import valid_cells
from kd_det.functional.moments import block_moments
from kd_det.heads.dense import DenseOutputs
from kd_det.heads.readers import find_reader, read_dense
from kd_det.heads.request import HeadError, Remaining
from kd_det.taps import Call, Features, record_calls

Layers = Sequence[nn.Module]


class TowerFeatures(NamedTuple):
    """The features within the towers of a head at one depth, before the activation that ends a convolution's layer.

    Attributes:
        classes: Of the tower for classes, (N, C, H, W) level by level.
        boxes: Of the tower for boxes.
        activations: Of both towers, what makes of such a feature what the next layer is given; None where that is the
            feature itself: at the beginning of a tower, or where its layers have none.
    """
    classes: Features
    boxes: Features
    activations: tuple[nn.Module | None, nn.Module | None] = (None, None)

    def weigh(self, shares: Tensor) -> TowerFeatures:
        """The same with the gradient of each image times its share, (N,)."""
        classes, boxes = (tuple(scale_gradient(level, shares) for level in levels)
                          for levels in (self.classes, self.boxes))
        return self._replace(classes=classes, boxes=boxes)

    def activated(self) -> tuple[Features, Features]:
        """What the next layers of both towers are given."""
        classes, boxes = (_activate(levels, activation)
                          for levels, activation in zip((self.classes, self.boxes), self.activations))
        return classes, boxes


class TowerMoments(NamedTuple):
    """How the features of :class:`TowerFeatures` are spread in each image, padding left out, without gradient.

    Attributes:
        classes: Of the tower for classes, (N, 2·C, 1, 1) level by level: the means of the channels, then their
            variances. A map of one cell, so that a cache keeps it as it keeps others.
        boxes: Of the tower for boxes.
    """
    classes: Features
    boxes: Features


class TowerWidths(NamedTuple):
    """The channels of the features within the towers of a head, depth by depth; the first is what a tower is given.

    Attributes:
        classes: Of the tower for classes.
        boxes: Of the tower for boxes.
    """
    classes: tuple[int, ...]
    boxes: tuple[int, ...]

    def before(self, remaining: Remaining) -> tuple[int, int]:
        """The channels of both towers' features that have so many convolutions still before them.

        Raises:
            HeadError: A tower has fewer.
        """
        classes, boxes = (widths[-1 - count_remaining(remaining, len(widths) - 1)] for widths in self)
        return classes, boxes


def count_remaining(remaining: Remaining, convolutions: int) -> int:
    """How many of a tower's convolutions that is.

    Raises:
        HeadError: It has fewer, or none at all.

    Example:
        >>> count_remaining('half', 4), count_remaining(1, 4)
        (2, 1)
    """
    count = convolutions // 2 if remaining == 'half' else remaining
    if not convolutions or count > convolutions:
        raise HeadError(f'remaining={remaining} convolutions: the depth of a tower is {convolutions}.')
    return count


def tower_widths(head: Any) -> TowerWidths:
    """The channels within the towers of a head, as its layers have them: those of one that was pruned differ.

    Raises:
        HeadError: Levels that have towers of their own have them of different widths.
    """

    def measure(layers: Layers) -> tuple[int, ...]:
        convolutions = list(map(_find_convolutions, layers))
        first = convolutions[0][0].in_channels if convolutions else head.in_channels
        return (first, *(each[-1].out_channels for each in convolutions))

    def measure_copies(name: str) -> tuple[int, ...]:
        widths, *others = {measure(layers) for layers in _find_copies(head, name)}
        if others:
            raise HeadError(f"The towers '{name}' of a {type(head).__name__} have other widths on each level: "
                            f'{sorted([widths, *others])}.')
        return widths

    return TowerWidths(*map(measure_copies, find_reader(type(head)).towers))


def _find_convolutions(layer: nn.Module) -> list[nn.Module]:
    """Those of a layer, without what is part of one, as a deformable convolution's of its offsets is."""
    found = {name: each for name, each in layer.named_modules()
             if 'weight' in each._parameters and isinstance(getattr(each, 'out_channels', None), int)}
    return [each for name, each in found.items()
            if not any(name != other and name.startswith(f'{other}.' if other else '') for other in found)]


def _find_copies(head: Any, name: str) -> list[Layers]:
    """The layers of a tower: of one that all levels share, or of one for each level."""
    tower = getattr(head, name)
    return list(tower) if find_reader(type(head)).has_tower_of_each_level else [tower]


# ---------------------------------------------------------------------------------------------------- a student's, read


class _Reading(NamedTuple):
    """The calls of one layer of a tower, or of its activation, one for each level that passes it.

    Attributes:
        calls: They.
        of_arguments: Whether the features are what it was given; else what it returned.
        activation: Which comes next.
    """
    calls: list[Call]
    of_arguments: bool
    activation: nn.Module | None = None

    def levels(self) -> Features:
        return tuple(next(iter(call.arguments.values())) if self.of_arguments else call.returned
                     for call in self.calls)


Readings = list[list[_Reading]]  # of both towers, and of each of their copies


@contextmanager
def record_towers(head: nn.Module, remaining: Remaining) -> Iterator[Readings]:
    """Records what passes the towers of a head at one depth while the block runs.

    The features are those before an activation: where that writes in place it does not within the block, which changes
    no value.

    Args:
        head: The head.
        remaining: How many convolutions of each tower come after.

    Yields:
        What :func:`read_towers` reads.

    Raises:
        HeadError: A tower has fewer convolutions.
    """
    with ExitStack() as stack:
        yield [[stack.enter_context(_record_depth(layers, remaining)) for layers in _find_copies(head, name)]
               for name in find_reader(type(head)).towers]


def read_towers(readings: Readings) -> TowerFeatures:
    """Reads the features from one forward of a head, see :func:`record_towers`."""
    classes, boxes = (tuple(level for copy in tower for level in copy.levels()) for tower in readings)
    return TowerFeatures(classes, boxes, (readings[0][0].activation, readings[1][0].activation))


@contextmanager
def _record_depth(layers: Layers, remaining: Remaining) -> Iterator[_Reading]:
    passed, activation = len(layers) - count_remaining(remaining, len(layers)), _find_activation(layers, remaining)
    if activation is not None:
        with _out_of_place(activation), record_calls(activation, 'forward') as calls:
            yield _Reading(calls, True, activation)
    else:
        with record_calls(layers[max(passed - 1, 0)], 'forward') as calls:
            yield _Reading(calls, of_arguments=passed == 0)


def _find_activation(layers: Layers, remaining: Remaining) -> nn.Module | None:
    """The activation that ends the last layer before so many; None at the beginning, or where it ends otherwise."""
    passed = len(layers) - count_remaining(remaining, len(layers))
    modules = list(layers[passed - 1].modules()) if passed else []
    last = next((each for each in reversed(modules) if isinstance(each, ConvModule)), None)
    return last.activate if last is not None and last.with_activation and last.order[-1] == 'act' else None


@contextmanager
def _out_of_place(activation: nn.Module) -> Iterator[None]:
    """An activation leaves what it is given as it is while the block runs."""
    in_place = getattr(activation, 'inplace', False)
    if in_place:
        activation.inplace = False
    try:
        yield
    finally:
        if in_place:
            activation.inplace = True


def _activate(levels: Features, activation: nn.Module | None) -> Features:
    if activation is None:
        return levels
    with _out_of_place(activation):
        return tuple(map(activation, levels))


# ------------------------------------------------------------------------------------------------- a teacher's, entered


def measure_moments(towers: TowerFeatures, samples: Sequence[Any]) -> TowerMoments:
    """Measures how a teacher's features are spread in each image.

    Args:
        towers: The features, of the batch as the teacher is given it.
        samples: mmdet's data samples with the shapes of images and batch; without any, nothing is padding.
    """

    def measure(levels: Features) -> Features:
        found = []
        for level in levels:
            cells = level.shape[-2:]
            valid = (valid_cells([sample.img_shape for sample in samples], samples[0].batch_input_shape, cells,
                                 level.device)
                     if samples else torch.ones(len(level), *cells, dtype=torch.bool, device=level.device))
            found.append(block_moments(level.float(), valid).flatten(1)[..., None, None])
        return tuple(found)

    return TowerMoments(measure(towers.classes), measure(towers.boxes))


class TeacherTowers(NamedTuple):
    """The towers of a teacher's head, to be run from a depth on.

    Attributes:
        head: The head; its weights are frozen, so that a gradient reaches the features alone.
        remaining: How many convolutions of each tower are run.
        moments: How the teacher's own features are spread there.
        classes: The classes whose predictions count, by label; all by default.
    """
    head: nn.Module
    remaining: Remaining
    moments: TowerMoments
    classes: tuple[int, ...] | None = None

    def restrict(self, classes: Sequence[int]) -> TeacherTowers:
        """The same for predictions of some classes alone, in this order."""
        return self._replace(classes=tuple(classes))

    def activate(self, classes: Features, boxes: Features) -> tuple[Features, Features]:
        """Passes features for both towers through the teacher's activations at that depth, where it has them."""
        of_classes, of_boxes = (_find_activation(_find_copies(self.head, name)[0], self.remaining)
                                for name in find_reader(type(self.head)).towers)
        return TowerFeatures(classes, boxes, (of_classes, of_boxes)).activated()

    def resume(self, classes: Features, boxes: Features) -> DenseOutputs:
        """Runs the head from the last convolutions of its towers on.

        All that comes after them runs: the layers that predict, scales, and units.

        Args:
            classes: Features for the tower of classes, on every level of the head, in its order.
            boxes: The same for the tower of boxes.
        """
        dtype = next(self.head.parameters()).dtype
        with ExitStack() as stack:
            for name, levels in zip(find_reader(type(self.head)).towers, (classes, boxes)):
                stack.enter_context(
                    _enter_tower(self.head, name, [level.to(dtype) for level in levels], self.remaining))
            outputs = read_dense(self.head, self.head(classes))
        return outputs if self.classes is None else outputs.restrict(self.classes)


class _TowerInput(nn.Module):
    """Stands in a tower for the convolutions that are left out: at each call it returns the next of its levels."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        super().__init__()
        self.levels = iter(levels)

    def forward(self, _: Tensor) -> Tensor:
        return next(self.levels)


@contextmanager
def _enter_tower(head: nn.Module, name: str, levels: Sequence[Tensor], remaining: Remaining) -> Iterator[None]:
    """Lets a tower of a head run from its last convolutions on, from those features, while the block runs."""
    tower = getattr(head, name)
    copies = _find_copies(head, name)
    shares = [levels] if len(copies) == 1 else [[level] for level in levels]
    entered = [nn.Sequential(_TowerInput(share), *layers[len(layers) - count_remaining(remaining, len(layers)):])
               for layers, share in zip(copies, shares)]
    setattr(head, name, nn.ModuleList(entered) if find_reader(type(head)).has_tower_of_each_level else entered[0])
    try:
        yield
    finally:
        setattr(head, name, tower)
