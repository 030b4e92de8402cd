"""A weight: a number, or a number that follows the training."""
from __future__ import annotations

from math import isfinite
from typing import Optional, Union

from mmdet.registry import TASK_UTILS

from kd_det.context import Progress
from kd_det.scopes import HOME, build_own, find_class

WeightConfig = Union[float, int, dict, 'Weight']


class Weight:
    """A constant weight, and the base of those that change.

    Args:
        value: The weight, or another schedule that this one shapes.

    Raises:
        ValueError: The weight is not finite.
    """

    def __init__(self, value: WeightConfig) -> None:
        if isinstance(value, (float, int)) and not isfinite(value):
            raise ValueError(f'{type(self).__name__}: {value} is no weight: expected a finite number, or a schedule.')
        self.value = value if isinstance(value, (float, int)) else build_weight(value)

    def __call__(self, progress: Progress) -> float:
        """The weight at this point of the training."""
        return float(self.value) if isinstance(self.value, (float, int)) else self.value(progress)

    @property
    def is_zero(self) -> bool:
        """Whether the weight is 0 throughout."""
        return self.full == 0

    @property
    def is_constant(self) -> bool:
        """Whether the weight never changes."""
        return type(self) is Weight

    @property
    def full(self) -> float:
        """The number within, which the schedules shape."""
        return float(self.value) if isinstance(self.value, (float, int)) else self.value.full

    @property
    def balance(self) -> Optional[Weight]:
        """The :class:`~kd_det.distillers.balance.Balance` within, if there is one: the weight is then a ratio."""
        return None if isinstance(self.value, (float, int)) else self.value.balance


class _Ramp(Weight):
    """A weight that moves between two points of the training, counted in epochs or in iterations.

    Args:
        value: The full weight, or another schedule.
        epochs: Length of the change in epochs (1.5 is one and a half), or
        iterations: its length in iterations.
        begin: When it starts, in the same unit.

    Raises:
        ValueError: Both or neither of ``epochs`` and ``iterations`` given.
    """

    def __init__(self, value: WeightConfig, epochs: Optional[float] = None, iterations: Optional[int] = None,
                 begin: float = 0) -> None:
        super().__init__(value)
        if (epochs is None) == (iterations is None):
            raise ValueError(f'{type(self).__name__}: give its length either in epochs or in iterations.')
        self.by_epoch = epochs is not None
        self.begin, self.length = begin, epochs if self.by_epoch else iterations

    def done(self, progress: Progress) -> float:
        """The share of the change that is done, 0 to 1."""
        passed = (progress.epoch if self.by_epoch else progress.iteration) - self.begin
        if self.length <= 0:
            return float(passed >= 0)
        return min(max(passed / self.length, 0.0), 1.0)


@TASK_UTILS.register_module()
class Warmup(_Ramp):
    __doc__ = 'Grows linearly from ``start`` times its value to its value.\n' + _Ramp.__doc__

    def __init__(self, value: WeightConfig, epochs: Optional[float] = None, iterations: Optional[int] = None,
                 begin: float = 0, start: float = 0.0) -> None:
        super().__init__(value, epochs, iterations, begin)
        self.start = start

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) * (self.start + (1 - self.start) * self.done(progress))


@TASK_UTILS.register_module()
class Decay(_Ramp):
    __doc__ = 'Falls linearly from its value to ``end`` times its value.\n' + _Ramp.__doc__

    def __init__(self, value: WeightConfig, epochs: Optional[float] = None, iterations: Optional[int] = None,
                 begin: float = 0, end: float = 0.0) -> None:
        super().__init__(value, epochs, iterations, begin)
        self.end = end

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) * (1 - (1 - self.end) * self.done(progress))


@TASK_UTILS.register_module()
class Start(_Ramp):
    __doc__ = 'Is 0 for that long, then its value.\n' + _Ramp.__doc__

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) if self.done(progress) == 1 else 0.0


@TASK_UTILS.register_module()
class Stop(_Ramp):
    __doc__ = 'Keeps its value for that long, then 0: the term, and a teacher that no other needs, no longer run.\n' \
        + _Ramp.__doc__

    def __call__(self, progress: Progress) -> float:
        return super().__call__(progress) if self.done(progress) < 1 else 0.0


def build_weight(config: WeightConfig) -> Weight:
    """Builds a weight from a number or a dict such as ``dict(type='Warmup', value=1.0, epochs=1)``."""
    if isinstance(config, Weight):
        return config
    if isinstance(config, (float, int)):
        return Weight(config)
    if isinstance(config, dict) and 'type' in config:
        if find_class(TASK_UTILS, config, HOME) is None:
            raise ValueError(f"weight: there is no schedule '{config['type']}': expected one of Warmup, Decay, "
                             'Start, Stop and Balance.')
        return build_own(TASK_UTILS, config)
    raise ValueError(f"weight={config!r}: expected a number or a schedule such as dict(type='Warmup', value=1.0, "
                     'epochs=1).')
