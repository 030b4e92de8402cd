"""What a call costs: its seconds, and the memory that it takes at its peak. On the CPU and on GPUs."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from kd_det.context import DistillContext, Progress
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.schedules import Schedule
from kd_det.losses import DistillTerm
from kd_det.losses.base import sum_parts
from kd_det.registry import build_detector
from kd_det.teachers import read_model_config
from kd_det.teachers.loading import remove_pretrained

Device = str | torch.device
Call = Callable[[], object]


def seconds(call: Call, device: Device = 'cpu', repeats: int = 5, warmup: int = 2) -> float:
    """The median time of a call.

    On a GPU it is the time between two events on the current stream: what the host prepares ahead does not count, what
    it makes the device wait for does.

    Args:
        call: Takes nothing; what it returns is let go of within the measured time.
        device: Where it computes.
        repeats: Number of measured calls.
        warmup: Number of calls before them.
    """
    time_once = _seconds_on_gpu if torch.device(device).type == 'cuda' else _seconds_on_cpu
    for _ in range(warmup):
        call()
    return median(time_once(call) for _ in range(repeats))


def peak_memory(call: Call, device: Device = 'cpu') -> int:
    """The most bytes that tensors made by a call took at once.

    It counts what PyTorch's allocator hands out, temporaries within operators and tensors saved for the backward pass
    included, and what ``call`` returns; neither scratch space of libraries (oneDNN, cuBLAS) nor unused parts of pools.
    The number is exact and the same each time, unlike the size of the process.

    Args:
        call: Takes nothing. It runs once; call it before if its first run does more than the later ones. It should let
            go of no tensor that was there before, such as gradients of an earlier step: on a GPU that would be
            subtracted.
        device: Where it computes.
    """
    if torch.device(device).type != 'cuda':
        return _peak_on_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _seconds_on_cpu(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _seconds_on_gpu(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_on_cpu(call: Call) -> int:
    """From the profiler's record of each allocation and each release."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it reports on itself, to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


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
    parts: dict[str, Cost]
    differences: list[float]

    @property
    def distilling(self) -> float:
        """What distilling costs, the median of the differences."""
        return median(self.differences)

    @property
    def ratio(self) -> float:
        """The same in plain forwards of the teacher."""
        return self.distilling / self.parts[PLAIN_TEACHER].seconds

    @property
    def middle_half(self) -> tuple[float, float]:
        """The ratios between which half of the rounds lie: a step varies by more than the terms take."""
        low, high = np.quantile(self.differences, (0.25, 0.75)) / self.parts[PLAIN_TEACHER].seconds
        return float(low), float(high)


def random_distiller(config: Config, device: Device = 'cpu') -> DetectionDistiller:
    """The distiller of a config, with random weights, which take as long, and every term at its full weight."""
    teachers = [config.model.teacher] if isinstance(config.model.teacher, dict) else config.model.teacher
    for teacher in teachers:
        teacher.update(checkpoint=None, random_teacher=True, cache=None)
    config.model.student = remove_pretrained(config.model.student)
    distiller = build_detector(config.model).to(device).train()
    distiller.student.init_weights()  # some parts are whatever the memory held before
    distiller.schedules = {name: Schedule(weight.full) for name, weight in distiller.schedules.items()}
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


def measure_parts(distiller: DetectionDistiller, batch: dict, repeats: int = 5) -> dict[str, Cost]:
    """As :func:`measure_step`, of the parts alone; the steps take most of its time."""
    return _measured(dict(_parts(distiller, batch)), next(distiller.parameters()).device, repeats)[0]


def _measured(calls: dict[str, Call], device: Device, repeats: int) -> tuple[dict[str, Cost], list[dict[str, float]]]:
    """The cost of each call, and its seconds round by round, so that a slow moment of the machine meets them all."""
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, call in calls.items():
            set_random_seed(0)  # the same samples in all rounds
            rounds[-1][name] = seconds(call, device, repeats=1, warmup=0)
    rounds = rounds[1:]
    return {name: Cost(median(each[name] for each in rounds), peak_memory(call, device))
            for name, call in calls.items()}, rounds


def _steps(distiller: DetectionDistiller, batch: dict, optimizer: dict) -> Iterator[tuple[str, Call]]:
    for name, model in {STUDENT: distiller.student, DISTILLED: distiller}.items():
        wrapper = build_optim_wrapper(model, optimizer)
        for group in wrapper.param_groups:
            group['lr'] = 0.0
        yield name, _training_step(model, batch, wrapper)


def _parts(distiller: DetectionDistiller, batch: dict) -> Iterator[tuple[str, Call]]:
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
        value = sum_parts(term(replace(context, valid_cells={})))  # nothing that another call has computed
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
