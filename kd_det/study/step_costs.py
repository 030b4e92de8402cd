"""What a distilled training step costs beside the student's own, part by part."""
from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from statistics import median
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import set_random_seed
from torch import Tensor, nn

from kd_det.context import DistillContext, Progress
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.weighting import total
from kd_det.distillers.weights import Weight
from kd_det.losses import DistillTerm
from kd_det.measuring import Device, peak_memory, seconds
from kd_det.scopes import build_detector
from kd_det.teachers import read_model_config
from kd_det.teachers.loading import without_pretrained

STUDENT, DISTILLED, TEACHER, PLAIN_TEACHER = 'student step', 'distilled step', 'teacher part', 'plain teacher forward'
TERM = 'term '

Call = Callable[[], object]


class Cost(NamedTuple):
    """Of one part of a step: the median of its seconds, and its peak memory in bytes."""
    seconds: float
    memory: int


class StepCosts(NamedTuple):
    """The costs of a step.

    Attributes:
        parts: By name: the student's whole step, the distilled one, what runs of the teachers, their plain forward in
            evaluation mode up to the neck, and each term's forward and backward as far as what it reads of the student.
        differences: Seconds that the distilled step takes longer than the student's, round by round.
    """
    parts: Dict[str, Cost]
    differences: List[float]

    @property
    def distilling(self) -> float:
        """What distilling costs, the median of the differences."""
        return median(self.differences)

    @property
    def ratio(self) -> float:
        """The same in plain forwards of the teacher."""
        return self.distilling / self.parts[PLAIN_TEACHER].seconds

    @property
    def middle_half(self) -> Tuple[float, float]:
        """The ratios between which half of the rounds lie: a step varies by more than the terms take."""
        low, high = np.quantile(self.differences, (0.25, 0.75)) / self.parts[PLAIN_TEACHER].seconds
        return float(low), float(high)


def random_distiller(config: Config, device: Device = 'cpu') -> DetectionDistiller:
    """The distiller of a config, with random weights, which take as long, and every term at its full weight."""
    teachers = [config.model.teacher] if isinstance(config.model.teacher, dict) else config.model.teacher
    for teacher in teachers:
        teacher.update(checkpoint=None, random_teacher=True, cache=None)
    config.model.student = without_pretrained(config.model.student)
    distiller = build_detector(config.model).to(device).train()
    distiller.student.init_weights()  # some parts are whatever the memory held before
    distiller.weights = {name: Weight(weight.full) for name, weight in distiller.weights.items()}
    distiller.progress = Progress(iteration=1)  # no gradients are compared in this step,
    for balance in distiller.monitor.balances.values():
        balance.start = 1  # but the first time that it is made
    return distiller


def measure_step(distiller: DetectionDistiller, batch: dict, optimizer: dict, repeats: int = 5) -> StepCosts:
    """Measures the steps of student and distiller, and the parts of the latter, in turns.

    Args:
        distiller: The distiller, in training mode. Its weights stay as they are.
        batch: As a data loader gives it.
        optimizer: The config's ``optim_wrapper``.
        repeats: Number of rounds, after one that is not counted.
    """
    calls = dict(_steps(distiller, batch, optimizer), **dict(_parts(distiller, batch)))
    parts, rounds = _measured(calls, next(distiller.parameters()).device, repeats)
    return StepCosts(parts, [each[DISTILLED] - each[STUDENT] for each in rounds])


def measure_parts(distiller: DetectionDistiller, batch: dict, repeats: int = 5) -> Dict[str, Cost]:
    """As :func:`measure_step`, of the parts alone; the steps take most of its time."""
    return _measured(dict(_parts(distiller, batch)), next(distiller.parameters()).device, repeats)[0]


def _measured(calls: Dict[str, Call], device: Device, repeats: int) -> Tuple[Dict[str, Cost], List[Dict[str, float]]]:
    """The cost of each call, and its seconds round by round, so that a slow moment of the machine meets them all."""
    rounds: List[Dict[str, float]] = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, call in calls.items():
            set_random_seed(0)  # the same samples in all rounds
            rounds[-1][name] = seconds(call, device, repeats=1, warmup=0)
    rounds = rounds[1:]
    return {name: Cost(median(each[name] for each in rounds), peak_memory(call, device))
            for name, call in calls.items()}, rounds


def _steps(distiller: DetectionDistiller, batch: dict, optimizer: dict) -> Iterator[Tuple[str, Call]]:
    for name, model in {STUDENT: distiller.student, DISTILLED: distiller}.items():
        wrapper = build_optim_wrapper(model, optimizer)
        for group in wrapper.param_groups:
            group['lr'] = 0.0
        yield name, _training_step(model, batch, wrapper)


def _parts(distiller: DetectionDistiller, batch: dict) -> Iterator[Tuple[str, Call]]:
    data = distiller.data_preprocessor(batch, True)
    images, samples = data['inputs'], data['data_samples']
    observation = distiller.observe(images, samples, distiller.terms)
    context = observation.context
    yield TEACHER, lambda: list(
        distiller.observe_teachers(distiller.terms, images, context.image_shapes, context.student_outputs))
    plain = [(build_detector(read_model_config(config['config'])).to(images.device).eval(),
              teacher.bridge(images, context.image_shapes))
             for config, teacher in zip(distiller.teacher_configs, distiller.teachers)]
    yield PLAIN_TEACHER, torch.no_grad()(lambda: [model.extract_feat(given) for model, given in plain])
    for name, term in distiller.terms.items():
        yield TERM + name, _forward_and_backward(term, context)


def _forward_and_backward(term: DistillTerm, context: DistillContext) -> Call:
    """Of one term, backward as far as the features that it reads, or else the outputs of heads."""
    read = [context.student[path] for path in term.student_taps]
    read = read or [outputs for head, outputs in context.student_outputs.items() if head in term.student_heads]
    learning = [*_learning(read), *term.parameters()]

    def call() -> None:
        value = total(term(replace(context, _computed={})))  # nothing that another call has computed
        torch.autograd.grad(value, learning, allow_unused=True, retain_graph=True)

    return call


def _training_step(model: nn.Module, batch: dict, wrapper: OptimWrapper) -> Call:
    return lambda: model.train_step(dict(batch), wrapper)


def _learning(outputs: object) -> Iterator[Tensor]:
    """The tensors within that a gradient can reach."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield outputs
    elif isinstance(outputs, (tuple, list, dict)):
        for each in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _learning(each)
    elif is_dataclass(outputs):
        for field in fields(outputs):
            yield from _learning(getattr(outputs, field.name))
