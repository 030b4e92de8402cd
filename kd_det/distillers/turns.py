"""Policies that need no reward: the controls, one by the guides' own losses, and guides that take turns."""
from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from annotated_types import MinLen, Predicate
from mmdet.registry import TASK_UTILS
from torch import Tensor

from kd_det.config.arguments import ArgumentError, Count, Index, Positive, Share, Weight, declared, is_distinct, refuse
from kd_det.context import Progress
from kd_det.distillers.policies import ArmPolicy, Arms, Policy, PolicyStep, mean_over_ranks, one_hot
from kd_det.losses import DistillTerm
from kd_det.teachers.guide import Guide
from kd_det.teachers.teacher import FrozenDetector, Teacher


@TASK_UTILS.register_module()
class Fixed(Policy):
    """Gives each guide the same weight in all steps.

    Args:
        weights: One for each guide that terms learn from, in the order of ``model.teacher``.

    Raises:
        ArgumentError: An argument does not fit, or there are more or fewer guides.
    """

    @declared
    def __init__(self, weights: Annotated[abc.Sequence[Weight], MinLen(2)]) -> None:
        self.weights = tuple(weights)

    def connect(self, guides: abc.Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        super().connect(guides, terms)
        if len(self.weights) != len(self.arms):
            refuse('weights', self.weights, f'{len(self.arms)} numbers, one for each guide that terms learn from')

    def weigh(self, step: PolicyStep) -> abc.Sequence[float]:
        return self.weights


@TASK_UTILS.register_module()
class Uniform(ArmPolicy):
    """Gives each of n arms the weight 1/n, so that all together pull as hard as one that teaches alone.

    Args:
        arms: See :class:`ArmPolicy`.
    """

    def weigh(self, step: PolicyStep) -> abc.Sequence[float]:
        return [1 / len(self.arms)] * len(self.arms)


@TASK_UTILS.register_module()
class Random(ArmPolicy):
    """Draws one arm, all equally likely; the others do not run.

    Args:
        arms: See :class:`ArmPolicy`.
        per: ``'step'`` or ``'epoch'``: for how long.
    """

    @declared
    def __init__(self, arms: Arms = 'guides', per: Literal['step', 'epoch'] = 'step') -> None:
        super().__init__(arms)
        self.per = per

    def weigh(self, step: PolicyStep) -> abc.Sequence[float]:
        key = step.progress.iteration if self.per == 'step' else int(step.progress.epoch)
        return one_hot(int(self.draw(key) * len(self.arms)), len(self.arms))


@TASK_UTILS.register_module()
class Confidence(Policy):
    """Gives a guide the more of an image, the smaller its own loss is on what the image shows (CA-MKD).

    w_t = (1 − softmax_t(loss / temperature)) / (T − 1) of T guides, which sum to 1 (Zhang et al., arXiv 2201.00007). An
    image that nobody labelled has 1/T of each.

    It costs a forward of each guide a step, beside the one that its terms read. By ``'loss'``, the sum of the losses
    with which a frozen detector was trained, backbone and neck run once and the heads image by image. Losses of unlike
    detectors have unlike scales, and one whose loss is always the smaller has always the larger weight; by ``'boxes'``,
    the cross-entropy of :func:`~kd_det.teachers.judging.judge_boxes`, all are measured alike, and any guide that
    detects can be.

    Args:
        by: ``'loss'`` or ``'boxes'``.
        temperature: Divides the losses.

    Raises:
        ArgumentError: An argument does not fit, or a guide can not be judged so.
    """

    @declared
    def __init__(self, by: Literal['loss', 'boxes'] = 'loss', temperature: Positive = 1.0) -> None:
        self.by, self.temperature = by, temperature

    def connect(self, guides: abc.Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        super().connect(guides, terms)
        require_judges(guides, self.guide_indices, self.by)

    def weigh(self, step: PolicyStep) -> Tensor:
        losses = torch.stack([step.measure_losses(index) if self.by == 'loss' else step.judge_boxes(index).losses
                              for index in self.guide_indices])
        return (1 - (losses * step.labelled / self.temperature).softmax(0)) / (len(losses) - 1)


def require_judges(guides: abc.Sequence[Guide], indices: abc.Iterable[int], by: str) -> None:
    """Checks that guides can be judged on the ground truth.

    Raises:
        ArgumentError: One can not.
    """
    for index in indices:
        guide = guides[index]
        if not (isinstance(guide, (FrozenDetector, Teacher)) if by == 'loss' else guide.detects):
            raise ArgumentError('', f'model.teacher[{index}] is {guide.described}, which has no '
                                    f"{'loss on the ground truth' if by == 'loss' else 'boxes'} to be judged by. Give "
                                    "frozen detectors" + (", or by='boxes'." if guide.detects else '.'))


@TASK_UTILS.register_module()
class Sequence(ArmPolicy):
    """Lets one arm teach after another (MTPD: Cao et al., ICML 2023).

    The next has its turn after some epochs; or once the student stops gaining: when the mean value of the arm's terms
    over ``interval`` steps, or the student's score on a probe, has not improved by ``gain`` of its size for
    ``patience`` such intervals. The last arm stays. Weights are inherited once, before the first step, from
    ``model.teacher[0]``.

    Without an order, arms come in that of the cost of adapting to them, the nearest first: for ``trial`` steps all
    teach with 1/n of the weight, and what counts is the mean value of an arm's terms in the second half, when the
    adapters have settled a little. Terms have to measure all guides alike for that, as PKD's normalised features do.

    Args:
        order: Indices of the arms.
        epochs: For each arm.
        patience: Intervals without a gain.
        interval: Steps.
        gain: The least that counts as one.
        signal: What stops gaining: the values of the ``'terms'``, or the score on a ``'probe'``.
        trial: Steps that decide the order where none is given.
        arms: See :class:`ArmPolicy`.

    Raises:
        ArgumentError: An argument does not fit; or both or neither of ``epochs`` and ``patience`` are given.
    """
    state_names = 'stage', 'order', 'costs', 'total', 'steps', 'best', 'waited', 'done'

    @declared
    def __init__(self, order: Annotated[abc.Sequence[Index], MinLen(2), Predicate(is_distinct)] | None = None,
                 epochs: Positive | None = None, patience: Count | None = None, interval: Count = 100,
                 gain: Share = 0.01, signal: Literal['terms', 'probe'] = 'terms', trial: Count = 50,
                 arms: Arms = 'guides') -> None:
        super().__init__(arms)
        if (epochs is None) == (patience is None):
            raise ArgumentError('epochs', f'expected how long an arm teaches either in epochs or by patience, got '
                                          f"{'neither' if epochs is None else 'both'}.")
        self.order = None if order is None else [*order]
        self.epochs, self.patience, self.interval, self.gain = epochs, patience, interval, gain
        self.trial, self.needs_probe = trial, signal == 'probe' and patience is not None
        self.stage, self.waited, self.done, self.steps = 0, 0, 0, 0
        self.best: float | None = None
        self.total, self.costs = torch.zeros(()), torch.zeros(0)

    def connect(self, guides: abc.Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        super().connect(guides, terms)
        number = len(self.arms)
        if self.order is not None and sorted(self.order) != list(range(number)):
            refuse('order', self.order, f'the indices 0 to {number - 1}, each once')
        self.costs = torch.zeros(number)

    def weigh(self, step: PolicyStep) -> abc.Sequence[float]:
        number = len(self.arms)
        if self.order is None:
            return [1 / number] * number
        if self.epochs is not None:
            self._move(min(int(step.progress.epoch / self.epochs + 1e-9), number - 1))
        return one_hot(self.order[self.stage], number)

    def notice(self, progress: Progress, values: Mapping[str, Tensor]) -> None:
        if self.order is None:
            self._try(values)
        elif self.patience is not None and not self.needs_probe and self.stage < len(self.arms) - 1:
            taught = [values[name] for name in list(self.arms.values())[self.order[self.stage]] if name in values]
            value = mean_over_ranks(torch.stack(taught).sum()) if taught else torch.zeros(())
            self.total, self.steps = self.total.to(value.device) + value, self.steps + 1
            if self.steps == self.interval:
                self._judge(-self.total.item() / self.steps)
                self.total, self.steps = torch.zeros(()), 0

    def _try(self, values: Mapping[str, Tensor]) -> None:
        """Measures the cost of adapting to each arm, and at last finds the order."""
        self.done += 1
        if 2 * self.done > self.trial:
            nothing = torch.zeros(()).to(next(iter(values.values())))  # of a term whose schedule lets it wait
            found = torch.stack([torch.stack([values.get(name, nothing) for name in names]).sum()
                                 for names in self.arms.values()])
            self.costs = self.costs.to(found.device) + mean_over_ranks(found)
        if self.done >= self.trial:
            self.order = self.costs.argsort(stable=True).tolist()

    def is_due(self, progress: Progress) -> bool:
        return self.needs_probe and self.order is not None and progress.iteration % self.interval == 0

    def evaluate(self, score: float, progress: Progress) -> None:
        if self.stage < len(self.arms) - 1:
            self._judge(score)

    def _judge(self, score: float) -> None:
        """Moves on when a score has stopped to rise."""
        if self.best is None or score > self.best + self.gain * abs(self.best):
            self.best, self.waited = score, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            self._move(self.stage + 1)

    def _move(self, stage: int) -> None:
        if stage != self.stage:
            self.stage, self.best, self.waited = stage, None, 0


@TASK_UTILS.register_module()
class Route(Sequence):
    """Lets checkpoints of one teacher teach along its own training, from the early, easy one to the last.

    The next has its turn when the student's distance from the present one, the values of its terms, is on a plateau
    (route-constrained optimisation: Jin et al., ICCV 2019, arXiv 1904.09149). Its adapters begin as those of the
    checkpoint before ended, for both speak of features of one training.

    Args:
        patience: Intervals without a gain.
        interval: Steps.
        gain: The least share by which the distance has to fall to count as one.
        signal: See :class:`Sequence`.

    Raises:
        ArgumentError: An argument does not fit.
    """

    @declared
    def __init__(self, patience: Count = 2, interval: Count = 100, gain: Share = 0.02,
                 signal: Literal['terms', 'probe'] = 'terms') -> None:
        super().__init__(patience=patience, interval=interval, gain=gain, signal=signal)

    def connect(self, guides: abc.Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        self.order = list(range(len({term.teacher_index for term in terms.values()})))
        super().connect(guides, terms)

    def _move(self, stage: int) -> None:
        before = self.stage
        super()._move(stage)
        names = list(self.arms.values())
        for old, new in zip(names[before], names[stage]) if stage != before else ():
            states = [self.terms[name].state_dict() for name in (old, new)]
            if [(key, value.shape) for key, value in states[0].items()] == [(key, value.shape)
                                                                             for key, value in states[1].items()]:
                self.terms[new].load_state_dict(states[0])
