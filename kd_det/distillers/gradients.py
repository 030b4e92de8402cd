"""When the gradients of which terms are measured, and who is told."""
from __future__ import annotations

import logging
import math
from typing import Dict, Iterable, List, Sequence, Union

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor

from kd_det.configuration import ConfigurationError
from kd_det.context import Progress
from kd_det.distillers.balance import Balance
from kd_det.distillers.gradients import GradientNorms, gradient_norms
from kd_det.distillers.weights import Weight

PATIENCE = 50  # measurements without any to go by, after which a balance is said to have no weight


class DominanceWatch:
    """Warns, once, where a term drowns the task: by some measurements at the beginning of a run.

    Not by the very first: through a head that has learnt nothing yet hardly any gradient of the task passes. And a term
    that looks everywhere may pull several times as hard as the task, which looks at few places, and still help: the
    limit is far above 1. Later measurements are for the log alone.

    Args:
        name: Of the term.
        weight: Of the term, without the schedules that shape it.
        limit: How many times the task's gradient is too much.
        interval: Iterations between measurements, and before the first.
        measurements: How many decide.
        later: Iterations between those that follow.
    """

    def __init__(self, name: str, weight: float, limit: float = 20.0, interval: int = 50, measurements: int = 4,
                 later: int = 200) -> None:
        self.name, self.weight, self.limit = name, weight, limit
        self.measurements = self.left = measurements
        self.interval, self.later, self.works = interval, later, True
        self.sums: Union[Tensor, float] = 0.0  # (3,): of the term's norms, the task's, and the boxes

    def due(self, progress: Progress) -> bool:
        """Whether to measure in this step."""
        interval = self.interval if self.left > 0 else self.later
        return self.works and progress.iteration > 0 and progress.iteration % interval == 0

    def update(self, norms: GradientNorms, boxes: Tensor) -> None:
        """Takes in a measurement, see :meth:`Balance.update`; the last of the first ones decides."""
        self.left -= 1
        if self.left < 0:
            return
        self.sums = self.sums + torch.stack([*norms, boxes[0]])
        if self.left:
            return
        term, task, seen = self.sums.tolist()
        if task > 0 and seen > 0 and term == 0:
            print_log(f"model.distill.{self.name} teaches the student nothing: in none of {self.measurements} "
                      "measurements had it a gradient on the student's features. There may be nothing of what it "
                      'compares in the data, or it agrees with the teacher already.', 'current', logging.WARNING)
        term *= self.weight
        if math.inf > term > self.limit * task > 0:
            print_log(
                f"The gradient of '{self.name}' on the student's features is {term / task:.1f} times the task's: the "
                'student may learn to imitate at the expense of detecting. Published weights are made for their own '
                f"data and widths. Lower model.distill.{self.name}.weight, or let it follow the task: "
                "weight=dict(type='Balance', ratio=0.5).",
                'current', logging.WARNING)


class GradientMonitor:
    """Measures the gradients of the terms that are balanced, and now and then those of the others.

    Args:
        weights: The terms' weights by name.
    """

    def __init__(self, weights: Dict[str, Weight]) -> None:
        self.balances = {name: weight.balance for name, weight in weights.items() if weight.balance is not None}
        self.watches = {name: DominanceWatch(name, weight.full) for name, weight in weights.items()
                        if name not in self.balances}
        self.observers: Dict[str, Union[Balance, DominanceWatch]] = {**self.balances, **self.watches}

    def due(self, progress: Progress, names: Iterable[str]) -> List[str]:
        """Those of the terms that are to be measured in this step."""
        return [name for name in names if self.observers[name].due(progress)]

    def measure(self, task: Tensor, values: Dict[str, Tensor], features: Dict[str, Sequence[Tensor]],
                labels: Dict[str, Sequence[Tensor]]) -> Dict[str, Tensor]:
        """Measures terms and tells their balance or watch.

        Args:
            task: The student's own loss.
            values: The terms to measure, scalars without weights.
            features: For each term the student's features to look at.
            labels: For each term those of the boxes, image by image, as the term counts classes; -1 for other classes.

        Returns:
            The gradient of each term, without its weight, in units of the task's; 0 where the task has none.

        Raises:
            ConfigurationError: A term is balanced, but its gradients can not be measured.
        """
        try:
            norms = gradient_norms(task, values, features)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # compiled graphs, and checkpointing that re-enters, allow one backward pass only
            self._give_up(error, [name for name in values if name in self.balances])
            return {}
        boxes = torch.stack([_boxes_seen(labels[name]) for name in norms])
        all_reduce(boxes)
        for (name, measured), seen in zip(norms.items(), boxes):
            self.observers[name].update(measured, seen)
            if name in self.balances and self.balances[name].steps == PATIENCE:
                self._check_weight(name)
        return {name: torch.where(each.task > 0, each.term / each.task, 0) for name, each in norms.items()}

    def scale(self, name: str) -> Union[Tensor, float]:
        """What a term's weight is multiplied by: 1 unless it is balanced."""
        return self.balances[name].scale if name in self.balances else 1.0

    def state_dict(self) -> Dict[str, dict]:
        """What the balances have measured, by the terms' names."""
        return {name: balance.state_dict() for name, balance in self.balances.items()}

    def load_state_dict(self, state: Dict[str, dict]) -> None:
        """Goes on from what :meth:`state_dict` gave; a balance that it does not know starts anew."""
        for name, balance in self.balances.items():
            balance.load_state_dict(state.get(name, {}))

    def _check_weight(self, name: str) -> None:
        """Warns where a balance has found nothing to go by; asked once, for it waits for a GPU."""
        if self.balances[name].scale == 0:
            print_log(f'model.distill.{name} has taught the student nothing so far: its weight is 0, for in none of '
                      f'{PATIENCE} measurements did Balance find a gradient of both the term and the task on the '
                      "student's features. Where the data has no labels the task has none: give a number as weight, or "
                      'pseudo_labels.', 'current', logging.WARNING)

    def _give_up(self, error: RuntimeError, balanced: List[str]) -> None:
        if balanced:
            raise ConfigurationError(
                f"model.distill.{balanced[0]}.weight: Balance can not measure gradients in this model: {error}. Give a "
                'number, or do without with_cp=True and compilation.') from error
        for watch in self.watches.values():
            watch.works = False
        print_log(f"The terms' gradients can not be compared with the task's: {error}", 'current', logging.DEBUG)


def _boxes_seen(labels: Sequence[Tensor]) -> Tensor:
    """(2,): the number of boxes in a batch, and that of the images that have any."""
    numbers = torch.stack([(each >= 0).sum() for each in labels])
    return torch.stack([numbers.sum(), (numbers > 0).sum()]).float()
