"""A weight that keeps a term's gradient in proportion to the task's."""
from __future__ import annotations

from typing import Dict, Optional

import torch
from mmdet.registry import TASK_UTILS
from torch import Tensor

from kd_det.context import Progress
from kd_det.distillers.gradients import GradientNorms
from kd_det.distillers.weights import Weight, WeightConfig

DEFAULT_RATIO = 0.5
ROUNDING = 1e-8  # share of the task's gradient below which a term's is rounding, and no direction to follow


@TASK_UTILS.register_module()
class Balance(Weight):
    """Keeps the norm of the term's gradient on the student's features at ``ratio`` times that of the task's gradient.

    The features are those that the term taps, or the neck's for a term that reads heads alone. The term's weight is
    ratio · task's norm / term's norm, as moving geometric mean of the measurements: while a head is new both norms
    change by orders of magnitude, and an arithmetic mean would long remember the largest. It is 0 until one measurement
    has found both gradients, and the term's more than rounding beside the task's.

    Args:
        ratio: Share of the task's gradient, or a schedule of it.
        interval: Iterations between measurements; the first is made in the first step of the term.
        momentum: Share of the mean that a measurement keeps; the bias of its start at 0 is corrected.

    Raises:
        ValueError: An argument is out of its range, or the ratio is balanced itself.

    Example:
        >>> dict(type='Balance', ratio=0.5)
        >>> dict(type='Warmup', epochs=1, value=dict(type='Balance', ratio=0.5))
    """

    def __init__(self, ratio: WeightConfig = DEFAULT_RATIO, interval: int = 10, momentum: float = 0.8) -> None:
        super().__init__(ratio)
        if super().balance is not None:
            raise ValueError('Balance: its ratio is a Balance too. Give a number, or a schedule of numbers.')
        if self.full < 0 or interval < 1 or not 0 <= momentum < 1:
            raise ValueError(f'Balance: ratio={ratio}, interval={interval}, momentum={momentum}: expected a ratio of '
                             'at least 0, an interval of at least 1, and a momentum in [0, 1).')
        self.interval, self.momentum = interval, momentum
        self.averages: Optional[Tensor] = None  # (2,): of log(task's / term's), and of 1, which it is to be divided by

    @property
    def balance(self) -> Balance:
        return self

    def due(self, progress: Progress) -> bool:
        """Whether to measure in this step."""
        return self.averages is None or progress.iteration % self.interval == 0

    def update(self, norms: GradientNorms) -> None:
        """Takes in a measurement; one that is not finite, or where a gradient vanishes or is noise, changes nothing."""
        both = torch.stack(norms)
        before = torch.zeros_like(both) if self.averages is None else self.averages.to(both.device)
        measured = torch.stack([torch.log(norms.task / norms.term), torch.ones_like(norms.task)])
        counts = torch.isfinite(both).all() & (norms.task > 0) & (norms.term > ROUNDING * norms.task)
        self.averages = torch.where(counts, self.momentum * before + (1 - self.momentum) * measured, before)

    @property
    def scale(self) -> Tensor:
        """The weight that makes the two norms equal, a scalar."""
        logarithm, weight = torch.zeros(2) if self.averages is None else self.averages
        return torch.where(weight > 0, torch.exp(logarithm / weight), torch.zeros_like(weight))

    def state_dict(self) -> Dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {} if self.averages is None else dict(averages=self.averages.cpu())

    def load_state_dict(self, state: Dict[str, Tensor]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        self.averages = state.get('averages')
