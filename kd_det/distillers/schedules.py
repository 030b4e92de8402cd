"""The schedule of a weight: a number, a number that follows the training, or one that follows the task's gradient.

A config writes it as the ``weight`` of a term. A schedule shapes what it holds, which is a number or another schedule:
``dict(type='Warmup', epochs=1, value=dict(type='Balance', ratio=0.5))`` is the product of both.
"""
from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Lt
from mmdet.registry import TASK_UTILS
from torch import Tensor

from kd_det.config.arguments import ArgumentError, Count, Index, Weight, at, check_value, declared, refuse
from kd_det.config.composition import DEFAULT_RATIO
from kd_det.config.files import build_own
from kd_det.context import Progress
from kd_det.distillers.gradients import GradientNorms


class Schedule:
    """A constant weight, and the base of the schedules that change it.

    Args:
        value: The weight, or another schedule that this one shapes.

    Raises:
        ArgumentError: An argument does not fit.
    """

    @declared
    def __init__(self, value: ScheduleConfig) -> None:
        if isinstance(value, dict):
            with at('value'):
                value = build_schedule(value)
        self.value = value

    def __call__(self, progress: Progress) -> float:
        """The weight at this point of the training."""
        return self.value(progress) if isinstance(self.value, Schedule) else float(self.value)

    @property
    def is_zero(self) -> bool:
        """Whether the weight is 0 throughout."""
        return self.full == 0

    @property
    def is_constant(self) -> bool:
        """Whether the weight never changes."""
        return type(self) is Schedule

    @property
    def full(self) -> float:
        """The number within, which the schedules shape."""
        return self.value.full if isinstance(self.value, Schedule) else float(self.value)

    @property
    def balance(self) -> Balance | None:
        """The :class:`~kd_det.distillers.schedules.Balance` within, if there is one: the weight is then a ratio."""
        return self.value.balance if isinstance(self.value, Schedule) else None


ScheduleConfig = Annotated[Weight | dict[str, Any] | Schedule,
                           "a number of at least 0, or a schedule such as dict(type='Warmup', value=1.0, epochs=1)"]


TOLERANCE = 1e-9  # of points in time: in epochs 0.3 - 0.1 is less than 0.2


class Ramp(Schedule):
    """A weight that moves between two points of the training, counted in epochs or in iterations.

    Args:
        value: The full weight, or another schedule.
        epochs: Length of the change in epochs (1.5 is one and a half); either this or ``iterations``.
        iterations: Length of the change in iterations.
        begin: When it starts, in the same unit.

    Raises:
        ArgumentError: An argument does not fit, or both or neither of ``epochs`` and ``iterations`` are given.
    """

    @declared
    def __init__(self, value: ScheduleConfig, epochs: Weight | None = None, iterations: Index | None = None,
                 begin: Weight = 0) -> None:
        super().__init__(value)
        length = iterations if epochs is None else epochs
        if length is None or None not in (epochs, iterations):
            raise ArgumentError('epochs', f"expected the length of the {type(self).__name__} either in epochs or in "
                                          'iterations, got ' + ('neither.' if length is None else 'both.'))
        self.by_epoch = epochs is not None
        self.begin, self.length = begin, length

    def share_done(self, progress: Progress) -> float:
        """How much of the change is done, 0 to 1."""
        passed = (progress.epoch if self.by_epoch else progress.iteration) - self.begin
        if passed >= self.length - TOLERANCE:
            return float(passed >= -TOLERANCE)
        return max(passed / self.length, 0.0)


@TASK_UTILS.register_module()
class Warmup(Ramp):
    """Grows linearly from ``start`` times its value to its value.

    Args:
        value, epochs, iterations, begin: See :class:`Ramp`.
        start: Share of the value at the beginning.
    """

    @declared
    def __init__(self, value: ScheduleConfig, epochs: Weight | None = None, iterations: Index | None = None,
                 begin: Weight = 0, start: Weight = 0.0) -> None:
        super().__init__(value, epochs, iterations, begin)
        self.start = start

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) * (self.start + (1 - self.start) * self.share_done(progress))


@TASK_UTILS.register_module()
class SigmoidWarmup(Ramp):
    """Grows as exp(−5·(1 − x)²), x from 0 to 1, to its value (Laine and Aila, arXiv 1610.02242; ONE, FFL).

    Arguments as of :class:`Ramp`.
    """

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) * math.exp(-5 * (1 - self.share_done(progress))**2)


@TASK_UTILS.register_module()
class Decay(Ramp):
    """Falls linearly from its value to ``end`` times its value.

    Args:
        value, epochs, iterations, begin: See :class:`Ramp`.
        end: Share of the value at the end.
    """

    @declared
    def __init__(self, value: ScheduleConfig, epochs: Weight | None = None, iterations: Index | None = None,
                 begin: Weight = 0, end: Weight = 0.0) -> None:
        super().__init__(value, epochs, iterations, begin)
        self.end = end

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) * (1 - (1 - self.end) * self.share_done(progress))


@TASK_UTILS.register_module()
class Start(Ramp):
    """Is 0 for that long, then its value; arguments as of :class:`Ramp`."""

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) if self.share_done(progress) == 1 else 0.0


@TASK_UTILS.register_module()
class Stop(Ramp):
    """Keeps its value for that long, then 0: the term, and a teacher that no other needs, no longer run.

    Arguments are as of :class:`Ramp`.
    """

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) if self.share_done(progress) < 1 else 0.0


def build_schedule(config: ScheduleConfig) -> Schedule:
    """Builds a schedule from a number or a dict such as ``dict(type='Warmup', value=1.0, epochs=1)``.

    Raises:
        ArgumentError: It is neither, there is no such schedule, or an argument does not fit.
    """
    check_value('', config, ScheduleConfig)
    if isinstance(config, Schedule):
        return config
    if not isinstance(config, dict):
        return Schedule(config)
    schedule = build_own(TASK_UTILS, config)
    if not isinstance(schedule, Schedule):
        refuse('type', config['type'], 'a schedule: Warmup, Decay, Start, Stop or Balance')
    return schedule


ROUNDING = 1e-8  # share of the task's gradient below which a term's is rounding, and no direction to follow
SINGLES = 3  # measurements of one image with boxes, before there is a weight; of several at once one will do
MEASUREMENTS = 5  # before a measurement can be called far from the others
SPREADS = 3.0  # times their mean distance from their mean; as far as one is followed
NEAR = math.log(2)  # as far as one is always followed
SETTLED = math.log(1.1)  # as far as a measurement may move the mean where that has settled


class MovingMeans(NamedTuple):
    """What a :class:`Balance` has measured. A checkpoint keeps it by the names of these fields.

    Each mean is (2,): the decayed sum of the values, and that of ones, by which it is divided, so that its start at 0
    biases nothing.

    Attributes:
        averages: Of log(task's / term's), of batches with boxes.
        spread: Of the distance of such a measurement from the mean before it.
        boxes: Of the number of boxes in such a batch.
        empty: Of log(task's / term's), of batches without boxes.
        counts: (2,), of the measurements with boxes, and of the images with boxes that they saw.
    """
    averages: Tensor
    spread: Tensor
    boxes: Tensor
    empty: Tensor
    counts: Tensor


@TASK_UTILS.register_module()
class Balance(Schedule):
    """Keeps the norm of the term's gradient on the student's features at ``ratio`` times that of the task's gradient.

    The features are those that the term taps, or the neck's for a term that reads heads alone. The term's weight is
    ratio · task's norm / term's norm, as moving geometric mean of the measurements: while a head is new both norms
    change by orders of magnitude, and an arithmetic mean would long remember the largest.

    A measurement changes the mean as far as it represents the data:

    - It counts by the boxes that it saw: fully with as many as such a batch has on average, or more, and not at all
      without boxes, where the task's gradient is another one, and many a term's. Boxes of the term's view, over all
      ranks; crowds and boxes of classes that the teacher does not know are none.
    - It counts only where it finds both gradients, the term's more than rounding beside the task's.
    - The weight is 0 until a batch that counts had boxes on two images, or three such batches on one.
    - From the sixth on none is taken to be farther from the mean than three times the mean distance so far, or a factor
      of 2 where that is more.
    - Where the first ``start`` measurements saw no boxes, those without boxes count, until there are some.

    Args:
        ratio: Share of the task's gradient, or a schedule of it.
        interval: Iterations between measurements.
        momentum: Share of the mean that a measurement keeps; the bias of its start at 0 is corrected.
        start: How many measurements are made before that, one in every step from the first of the term.
        longest: Iterations between measurements at most. After each that moves the mean by less than a tenth the
            interval doubles, as long as it is no longer than this; one that moves it by more brings ``interval`` back,
            one that does not count changes nothing. By default the interval stays.

    Raises:
        ArgumentError: An argument does not fit, ``longest`` is shorter than ``interval``, or the ratio is balanced
            itself.

    Example:
        >>> schedule = build_schedule(dict(type='Warmup', epochs=1, value=dict(type='Balance', ratio=0.5)))
        >>> schedule.balance.full
        0.5
    """

    @declared
    def __init__(self, ratio: ScheduleConfig = DEFAULT_RATIO, interval: Count = 10,
                 momentum: Annotated[float, Ge(0), Lt(1)] = 0.8, start: Count = 50,
                 longest: Count | None = None) -> None:
        with at('ratio'):
            super().__init__(build_schedule(ratio))
        if super().balance is not None:
            refuse('ratio', ratio, 'a number, or a schedule of numbers that is no Balance itself')
        if longest is not None and longest < interval:
            refuse('longest', longest, f'an integer of at least interval={interval}')
        self.interval, self.momentum, self.start = interval, momentum, start
        self.longest = interval if longest is None else longest
        self.spacing = interval  # of measurements at present
        # How far the last one moved the mean, on its way to the host, and what tells that it is there.
        self._moved: tuple[Tensor, torch.cuda.Event | None] | None = None
        self.steps = 0  # measurements; on the host, where the decision falls whether to measure
        self.means: MovingMeans | None = None

    @property
    def balance(self) -> Balance:
        return self

    @property
    def has_started(self) -> bool:
        """Whether the measurements in every step are done."""
        return self.steps >= self.start

    def is_due(self, progress: Progress) -> bool:
        """Whether to measure in this step."""
        if not self.has_started:
            return True
        if progress.iteration % self.interval:
            return False
        self._adjust_spacing()
        return progress.iteration % self.spacing == 0

    def _adjust_spacing(self) -> None:
        """Takes in how far the last measurement moved the mean: a GPU was asked then, and has told since."""
        if self._moved is None:
            return
        (moved, told), self._moved = self._moved, None
        if told is not None:
            told.synchronize()
        if moved < SETTLED and 2 * self.spacing <= self.longest:
            self.spacing *= 2
        elif moved >= SETTLED:
            self.spacing = self.interval

    def update(self, norms: GradientNorms, boxes: Tensor | None = None) -> None:
        """Takes in a measurement; one that is not finite, or where a gradient vanishes or is noise, changes nothing.

        Args:
            norms: The gradients.
            boxes: (2,), the number of boxes in the batch and that of the images that have any; None where it is known
                that the batch represents the data.
        """
        both = torch.stack(norms)
        self.steps += 1
        means = self._get_means(both.device)
        number, images = both.new_tensor([1, 2]) if boxes is None else boxes.to(both)
        counts = torch.isfinite(both).all() & (norms.task > 0) & (norms.term > ROUNDING * norms.task)
        ratio = torch.where(counts, torch.log(norms.task / norms.term), 0)
        full = (counts & (number > 0)).to(both)
        mean_boxes = _update_mean(means.boxes, number, self.momentum**full)
        share = full * (number / _read_mean(mean_boxes).clamp(min=1)).clamp(max=1)  # of a whole measurement

        mean, known = _read_mean(means.averages), means.averages[1] > 0
        distance = torch.where(known, ratio - mean, 0)
        limit = (SPREADS * _read_mean(means.spread)).clamp(min=NEAR)
        bounded = torch.where(means.counts[0] < MEASUREMENTS, ratio, mean + distance.clamp(-limit, limit))
        self.means = MovingMeans(
            averages=_update_mean(means.averages, bounded, self.momentum**share),
            spread=_update_mean(means.spread, distance.abs(), self.momentum**(share * known)),
            boxes=mean_boxes,
            empty=_update_mean(means.empty, ratio, self.momentum**(counts.to(both) - full)),
            counts=means.counts + full * torch.stack([torch.ones_like(images), images]))
        if self.has_started and self.longest > self.interval:
            moved = torch.where(known & (full > 0), (_read_mean(self.means.averages) - mean).abs(), math.nan)
            told = torch.cuda.Event() if moved.is_cuda else None
            self._moved = moved.to('cpu', non_blocking=True), told
            if told is not None:
                told.record()

    @property
    def scale(self) -> Tensor:
        """The weight that makes the two norms equal, a scalar."""
        means = self._get_means()
        measurements, images = means.counts
        enough = (images > measurements) | (measurements >= (1 if self.has_started else SINGLES))
        instead = means.empty if self.has_started else torch.zeros_like(means.empty)
        mean = torch.where(images > 0, means.averages * enough, instead)
        return torch.where(mean[1] > 0, torch.exp(_read_mean(mean)), 0)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        if self.means is None:
            return {}
        self._adjust_spacing()
        return dict({name: mean.cpu() for name, mean in self.means._asdict().items()}, steps=torch.tensor(self.steps),
                    spacing=torch.tensor(self.spacing))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what :meth:`state_dict` gave; that of earlier versions held the averages alone."""
        state = dict(state)
        self.steps = int(state.pop('steps', self.start if state else 0))
        self.spacing, self._moved = int(state.pop('spacing', self.interval)), None
        self.means = None
        if state:
            seen_enough = self._get_means()._replace(counts=torch.tensor([0.0, 1.0]))
            self.means = seen_enough._replace(**state)

    def _get_means(self, device: torch.device | None = None) -> MovingMeans:
        if self.means is None:
            return MovingMeans(*(torch.zeros(2, device=device) for _ in MovingMeans._fields))
        return self.means if device is None else MovingMeans(*(mean.to(device) for mean in self.means))


def _read_mean(mean: Tensor) -> Tensor:
    """The value of a mean; 0 where nothing was taken in."""
    return mean[0] / torch.where(mean[1] > 0, mean[1], 1)


def _update_mean(mean: Tensor, value: Tensor, kept: Tensor) -> Tensor:
    """A mean that keeps that share of itself, and takes in a value as the rest."""
    return kept * mean + (1 - kept) * torch.stack([value, torch.ones_like(value)])
