"""Watches the terms in training: whose gradients are measured when, which drown the task, which teach nothing.

A measurement is a comparison of gradients on the student's features (:mod:`kd_det.distillers.gradients`); a balanced
weight (:class:`~kd_det.distillers.schedules.Balance`) follows it, and for any other :class:`DominanceCheck` warns.
:class:`IdleTermCheck` needs no measurement: it looks once at the graph of each term. :class:`ReadRecord` notes whether
what the terms read is finite, and :func:`explain_losses` says of losses that are not where that came from.
"""
from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from torch import Tensor, nn

from kd_det.config.files import ConfigurationError
from kd_det.context import DistillContext, Progress
from kd_det.distillers.gradients import GradientNorms, SharedPass, gradient_norms, reaches_parameters
from kd_det.distillers.schedules import Balance, Schedule
from kd_det.heads import HeadRequest, QueryDecoder, find_head
from kd_det.losses import DistillTerm
from kd_det.losses.base import FeatureTerm, sum_parts
from kd_det.taps import find_module

if TYPE_CHECKING:
    from kd_det.distillers.detection_distiller import Observation
    from kd_det.distillers.learners import Learner

OF_TERM = ('Correct its arguments: a temperature, a normaliser or a weight near 0 divides by 0; kd-det inspect CONFIG '
           'shows each part.')
NOTED = 32  # steps of which it is kept whether what was read is finite
PATIENCE = 50  # measurements without any to go by, after which a balance is said to have no weight


class GradientMonitor:
    """Measures the gradients of the terms that are balanced, and now and then those of the others.

    Args:
        schedules: Those of the terms' weights, by the terms' names.
    """

    def __init__(self, schedules: dict[str, Schedule]) -> None:
        self.balances = {name: each.balance for name, each in schedules.items() if each.balance is not None}
        self.dominance_checks = {name: DominanceCheck(name, each.full) for name, each in schedules.items()
                                 if name not in self.balances}
        self.observers: dict[str, Balance | DominanceCheck] = {**self.balances, **self.dominance_checks}

    def find_due(self, progress: Progress, names: Iterable[str]) -> list[str]:
        """Finds those of the terms that are to be measured in this step."""
        return [name for name in names if self.observers[name].is_due(progress)]

    def measure(self, task: Tensor, values: dict[str, Tensor], features: dict[str, Sequence[Tensor]],
                labels: dict[str, Sequence[Tensor]], shared: SharedPass | None = None) -> dict[str, Tensor]:
        """Measures terms, and tells their balances and checks.

        Args:
            task: The student's own loss.
            values: The terms to measure, scalars without weights.
            features: For each term the student's features to look at.
            labels: For each term those of the boxes, image by image, as the term counts classes; -1 for other classes.
            shared: See :func:`~kd_det.distillers.gradients.gradient_norms`.

        Returns:
            The gradient of each term, without its weight, in units of the task's; 0 where the task has none.

        Raises:
            ConfigurationError: A term is balanced, but its gradients can not be measured.
        """
        try:
            norms = gradient_norms(task, values, features, shared)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:  # compiled graphs, and checkpointing that re-enters, allow one backward pass only
            self._give_up(error, [name for name in values if name in self.balances])
            return {}
        boxes = torch.stack([_count_boxes(labels[name]) for name in norms])
        all_reduce(boxes)
        for (name, measured), seen in zip(norms.items(), boxes):
            self.observers[name].update(measured, seen)
            if name in self.balances and self.balances[name].steps == PATIENCE:
                self._check_weight(name)
        return {name: torch.where(each.task > 0, each.term / each.task, 0) for name, each in norms.items()}

    def scale(self, name: str) -> Tensor | float:
        """What a term's weight is multiplied by: 1 unless it is balanced."""
        return self.balances[name].scale if name in self.balances else 1.0

    def state_dict(self) -> dict[str, dict]:
        """What balances and checks have measured, by the terms' names."""
        return {name: observer.state_dict() for name, observer in self.observers.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Goes on from what :meth:`state_dict` gave; a balance or a check that it does not know starts anew."""
        for name, observer in self.observers.items():
            known = state.get(name, {})
            is_of_check = 'remaining' in known
            observer.load_state_dict(known if is_of_check == isinstance(observer, DominanceCheck) else {})

    def _check_weight(self, name: str) -> None:
        """Warns where a balance has found nothing to go by; asked once, for it waits for a GPU."""
        if self.balances[name].scale == 0:
            print_log(f'model.distill.{name} has taught the student nothing so far: its weight is 0, for in none of '
                      f'{PATIENCE} measurements did Balance find a gradient of both the term and the task on the '
                      "student's features. Where the data has no labels the task has none: give a number as weight, or "
                      'pseudo_labels.', 'current', logging.WARNING)

    def _give_up(self, error: RuntimeError, balanced: list[str]) -> None:
        if balanced:
            raise ConfigurationError(
                f"model.distill.{balanced[0]}.weight: Balance can not measure gradients in this model: {error}. Give a "
                'number, or do without with_cp=True and compilation.') from error
        for check in self.dominance_checks.values():
            check.is_possible = False
        print_log(f"The terms' gradients can not be compared with the task's: {error}", 'current', logging.DEBUG)


class DominanceCheck:
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
        self.measurements = self.remaining = measurements
        self.interval, self.later = interval, later
        self.is_possible = True  # unless the model's gradients can not be measured
        self.sums: Tensor | float = 0.0  # (3,): of the term's norms, the task's, and the boxes

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return dict(remaining=torch.tensor(self.remaining), sums=torch.as_tensor(self.sums).cpu())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what :meth:`state_dict` gave; that of earlier versions held nothing."""
        self.remaining = int(state.get('remaining', self.measurements))
        self.sums = state.get('sums', 0.0)

    def is_due(self, progress: Progress) -> bool:
        """Whether to measure in this step."""
        interval = self.interval if self.remaining > 0 else self.later
        return self.is_possible and progress.iteration > 0 and progress.iteration % interval == 0

    def update(self, norms: GradientNorms, boxes: Tensor) -> None:
        """Takes in a measurement, see :meth:`Balance.update`; the last of the first ones decides."""
        self.remaining -= 1
        if self.remaining < 0:
            return
        measured = torch.stack([*norms, boxes[0]])
        self.sums = measured + torch.as_tensor(self.sums, device=measured.device)
        if self.remaining:
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


class IdleTermCheck:
    """Warns of each term that can teach nothing, in the term's first step; and ends the run where that is all of them.

    A term of a user's own may be a constant where there are no boxes. So a batch without any proves nothing, unless
    many come in a row.

    Args:
        names: Of the terms.
        patience: How many batches without boxes.

    Attributes:
        idle: The terms that can teach nothing, and why.
    """

    def __init__(self, names: Iterable[str], patience: int = 50) -> None:
        self.remaining = dict.fromkeys(names, patience)
        self.idle: dict[str, str] = {}

    def check(self, learner: Learner, observation: Observation) -> None:
        """Judges the terms of a step that it has not judged yet.

        Raises:
            ConfigurationError: No term can teach anything, and there are no pseudo-labels to learn from.
        """
        new = {name: value for name, value in observation.values.items() if name in self.remaining}
        if not new:
            return
        idle = find_idle_terms(learner, observation._replace(values=new))
        for name in new:
            if name in idle and self.remaining[name] > 0 and not any(map(len, observation.context.boxes)):
                self.remaining[name] -= 1
                continue
            del self.remaining[name]
            if name in idle:
                self.idle[name] = idle[name]
                print_log(f'model.distill.{name} teaches the student nothing: none of its weights gets a gradient from '
                          f'it. {idle[name]}', 'current', logging.WARNING)
            else:
                _report_frozen_levels(learner.terms[name], name, observation)
        if not self.remaining and len(self.idle) == len(learner.terms) and learner.pseudo_labels is None:
            causes = ' '.join(f'model.distill.{name}: {cause}' for name, cause in self.idle.items())
            raise ConfigurationError('No weight of the student gets a gradient from any term: it would train as '
                                     f'without a teacher. {causes}')


def find_idle_terms(learner: Learner, observation: Observation) -> dict[str, str]:
    """Finds those of the terms that were run that can teach the student nothing.

    Args:
        learner: Whose terms they are.
        observation: One step of it, with a gradient.

    Returns:
        For each such term what it reads, the likely cause, and what to do.
    """
    return {name: _find_cause(learner, observation, name) for name, value in observation.values.items()
            if not reaches_parameters(sum_parts(value), apart=list(learner.terms[name].parameters()))}


def _find_cause(learner: Learner, observation: Observation, name: str) -> str:
    """Says what a term reads, and what cuts its gradient there."""
    student, term = learner.student, learner.terms[name]
    paths = term.student_taps or tuple(dict.fromkeys(HeadRequest.parse(head).head for head in term.student_heads))
    modules = [find_module(student, path) for path in term.student_taps]
    modules += [] if modules else [find_head(student, head) for head in term.student_heads]
    read = f"It reads {' and '.join(map(repr, paths))}"
    flows = any(level.requires_grad for level in learner.gradient_features(name, observation.context))
    if not flows and not any(map(_learns, modules)):
        learning = [part for part, module in student.named_children() if _learns(module)]
        return (f'{read}, where nothing learns: the weights there are frozen (requires_grad=False, as frozen_stages '
                f"sets it). Unfreeze them, or read a part that learns: {', '.join(learning) or 'here there is none'}.")
    if flows and term.student_taps:
        return (f'{read}, which has a gradient, but the value of the term does not depend on it: {type(term).__name__} '
                'detaches it, or computes it under torch.no_grad().')
    return (f'{read}, which learns, but what it puts out has no gradient: it is detached, or computed under '
            'torch.no_grad(), as within a block with activation checkpointing (with_cp=True). Read the output of the '
            'whole block or stage, or do without what cuts the gradient.')


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _report_frozen_levels(term: DistillTerm, name: str, observation: Observation) -> None:
    """Reports single levels that teach nothing, as those of a backbone's first, frozen stages."""
    if not isinstance(term, FeatureTerm):
        return
    levels = [pair.student_level for pair in term.pairs]
    learning = [level for level in levels if observation.context.student[term.student_path][level].requires_grad]
    if len(learning) < len(levels):
        frozen = ', '.join(str(level) for level in levels if level not in learning)
        print_log(f"model.distill.{name}: level {frozen} of '{term.student_path}' is frozen, so that nothing is learnt "
                  f'there. levels={tuple(learning)} leaves it out.', 'current', logging.INFO)


def require_finite_weights(weights: Mapping[str, float], task_weight: float, progress: Progress) -> None:
    """Checks what schedules make of the weights in a step.

    Args:
        weights: Of the terms, by name.
        task_weight: Of the student's own losses.
        progress: The step.

    Raises:
        ConfigurationError: A weight is not finite.
    """
    for place, weight in {'task_weight': task_weight,
                          **{f'distill.{name}.weight': weight for name, weight in weights.items()}}.items():
        if not math.isfinite(weight):
            raise ConfigurationError(f'model.{place}: expected a finite number in every step, got {weight} in '
                                     f'iteration {progress.iteration + 1} (epoch {int(progress.epoch) + 1}). Correct '
                                     'its schedule.')


class Read(NamedTuple):
    """A tensor that the terms may read in a step: whose it is, what, and of which level."""
    owner: str
    what: str
    level: int


def list_reads(context: DistillContext) -> Iterator[tuple[Read, Tensor]]:
    """The tapped features, the logits of heads and the memories of decoders, those of the teachers first."""
    for index, (features, outputs) in enumerate(zip(context.teachers, context.teacher_outputs)):
        owner = f'teacher[{index}]' if len(context.teachers) > 1 else 'teacher'
        yield from _list_own_reads(owner, features, outputs)
    yield from _list_own_reads('student', context.student, context.student_outputs)


def _list_own_reads(owner: str, features: dict, outputs: dict) -> Iterator[tuple[Read, Tensor]]:
    for path, levels in features.items():
        for index, level in enumerate(levels):
            if isinstance(level, Tensor):  # or no term reads it
                yield Read(owner, f"feature at '{path}'", index), level
    for head, output in outputs.items():
        for stage in output if isinstance(output, tuple) and not hasattr(output, 'logits') else (output, ):
            logits = getattr(stage, 'logits', ())
            for index, level in enumerate((logits, ) if isinstance(logits, Tensor) else logits):
                if not level.is_meta:  # or no term reads them
                    yield Read(owner, f"logits of '{head}'", index), level
        if isinstance(output, QueryDecoder):
            yield Read(owner, f"memory of '{head}'", 0), output.memory


class ReadRecord:
    """Notes in each step whether what the terms read is finite, and waits for no device until it is asked."""

    def __init__(self) -> None:
        self._noted: deque[tuple[int, tuple[Read, ...], Tensor]] = deque(maxlen=NOTED)

    def note(self, iteration: int, reads: Iterable[tuple[Read, Tensor]]) -> None:
        """Notes what was read in a step. A sum is finite where all are, and takes one pass and no memory."""
        listed = list(reads)
        if listed:
            sums = torch.stack([value.detach().sum(dtype=torch.float32) for _, value in listed])
            self._noted.append((iteration, tuple(read for read, _ in listed), sums))

    def find(self) -> dict[int, list[Read]]:
        """What was not finite in each iteration since this was asked last; waits for the device."""
        found: dict[int, list[Read]] = {}
        alike: dict[tuple[Read, ...], dict[int, Tensor]] = {}  # steps that read the same wait for the device once
        for iteration, reads, sums in self._noted:
            alike.setdefault(reads, {})[iteration] = sums
        for reads, steps in alike.items():
            for iteration, finite in zip(steps, torch.stack(list(steps.values())).isfinite().tolist()):
                found.setdefault(iteration, []).extend(read for read, is_finite in zip(reads, finite) if not is_finite)
        self._noted.clear()
        return dict(sorted(found.items()))


def describe_reads(reads: Iterable[Read]) -> str:
    """Describes some of what is read: «the teacher's feature at 'neck' (level 0, 1)»."""
    levels: dict[tuple[str, str], list[str]] = {}
    for owner, what, level in reads:
        levels.setdefault((owner, what), []).append(str(level))
    return ' and '.join(f"the {owner}'s {what} (level {', '.join(dict.fromkeys(of))})"
                        for (owner, what), of in levels.items())


def explain_losses(values: Mapping[str, float], terms: Collection[str], reads: Sequence[Read],
                   when: str) -> tuple[str, str] | None:
    """Explains losses of a step that are not finite.

    Args:
        values: All that was logged of the step, by name.
        terms: The names of the terms.
        reads: What of that which the terms read was not finite.
        when: The step, such as ``'in iteration 3 (epoch 1)'``.

    Returns:
        What is not finite; and whose fault it is: ``'teacher'``, ``'student'``, or the ``'term'`` alone. None where
        all losses are finite, and so is what was read of the teachers.
    """
    broken = [name for name, value in values.items() if 'loss' in name and name != 'loss' and not math.isfinite(value)]
    if not broken and not math.isfinite(values.get('loss', 0)):
        broken = ['loss']  # a sum of numbers that are
    names = [name for name in terms if f'loss_{name}' in broken]
    own = [name for name in broken if name.removeprefix('loss_') not in names]
    of_terms = [_describe_term(name, values, terms) for name in names]
    losses = ' and '.join([*of_terms, *([f"the student's own {', '.join(own)}"] if own else [])])
    teachers = [read for read in reads if read.owner != 'student']
    students = [read for read in reads if read.owner == 'student']
    if teachers:
        return (f'{_capitalize(describe_reads(teachers))} is not finite {when}'
                + (f', and so is {losses}.' if losses else '.'), 'teacher')
    if not broken:
        return None
    if students:
        return f'{_capitalize(losses)} is not finite {when}, and so is {describe_reads(students)}.', 'student'
    if own:
        return f'{_capitalize(losses)} is not finite {when}.', 'student'
    return (f'{_capitalize(losses)} is not finite {when}, though the features of student and teacher that it reads '
            'are: it is the term alone.', 'term')


def _describe_term(name: str, values: Mapping[str, float], terms: Collection[str]) -> str:
    """A term by its place in the config, with its parts that are not finite, or with its weight where that is not."""
    logged, others = f'distill/{name}_', [f'distill/{other}_' for other in terms if other.startswith(f'{name}_')]
    parts = {key.removeprefix(logged): value for key, value in values.items()
             if key.startswith(logged) and not any(map(key.startswith, others)) and not math.isfinite(value)}
    if not math.isfinite(values.get(f'{logged}weight', 0)):
        return f"model.distill.{name} (its weight is {parts['weight']})"
    parts.pop('gradient', None)
    detail = ', '.join(f"part '{part}' {value}" for part, value in parts.items())
    return f'model.distill.{name} ({detail or values[f"loss_{name}"]})'


def _capitalize(text: str) -> str:
    return text if text.startswith('model.') else text[0].upper() + text[1:]


def _count_boxes(labels: Sequence[Tensor]) -> Tensor:
    """Counts the boxes in a batch, and the images that have any: (2,)."""
    numbers = torch.stack([(each >= 0).sum() for each in labels])
    return torch.stack([numbers.sum(), (numbers > 0).sum()]).float()
