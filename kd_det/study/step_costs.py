"""What a training step costs, part by part: seconds and peak memory, on the CPU and on GPUs."""
from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
from annotated_types import Len
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.runner import set_random_seed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from kd_det.checks.synthetic import USUAL_SIZES, Size, random_distiller, synthetic_batch, training_sizes
from kd_det.compat.console import TextTable
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Index, declared
from kd_det.config.options import resolve_distillation
from kd_det.context import DistillContext
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.learners import run_learners
from kd_det.distillers.supervision import read_supervision
from kd_det.losses import DistillTerm
from kd_det.losses.base import sum_parts
from kd_det.registry import build_detector, prepare_without_runner
from kd_det.teachers import read_model_config
from kd_det.teachers.bridge import SIZE_MISMATCH
from kd_det.teachers.guide import list_guides
from kd_det.teachers.teacher import FrozenDetector, Teacher

Device = str | torch.device
Call = Callable[[], object]
MEGABYTE = 2**20
STUDENT, DISTILLED, TEACHER, PLAIN_TEACHER = 'student step', 'distilled step', 'teacher part', 'plain teacher forward'
TERM = 'term '


class Cost(NamedTuple):
    """Of one part of a step: the median of its seconds, and its peak memory in bytes."""
    seconds: float
    memory: int


@dataclass(frozen=True)
class StepCosts:
    """The costs of a step.

    Attributes:
        parts: By name: the student's whole step, the distilled one of all learners, what runs of the guides, the plain
            forward of those that are frozen detectors in evaluation mode up to the neck, if there are any, and each
            term's forward and backward as far as what it reads of its learner.
        differences: Seconds that the distilled step takes longer than the student's, round by round.
        batch_size: Images in the batch.
        size: Their height and width, in pixels.
        teacher_weights: Bytes of the guides' weights.
        setting: What else it was measured with: config, options, device, threads, versions.
    """
    parts: dict[str, Cost]
    differences: list[float]
    batch_size: int = 1
    size: Size = (0, 0)
    teacher_weights: int = 0
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def distilling(self) -> float:
        """What distilling costs, the median of the differences."""
        return median(self.differences)

    @property
    def ratio(self) -> float | None:
        """The same in plain forwards of the teacher; None without a frozen detector."""
        return None if PLAIN_TEACHER not in self.parts else self.distilling / self.parts[PLAIN_TEACHER].seconds

    @property
    def middle_half(self) -> tuple[float, float] | None:
        """The ratios between which half of the rounds lie: a step varies by more than the terms take."""
        if PLAIN_TEACHER not in self.parts:
            return None
        low, high = np.quantile(self.differences, (0.25, 0.75)) / self.parts[PLAIN_TEACHER].seconds
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Returns all that was measured, and on what, as JSON can hold it."""
        return dict(self.setting, batch_size=self.batch_size, size=list(self.size),
                    parts={name: cost._asdict() for name, cost in self.parts.items()}, distilling=self.distilling,
                    ratio=self.ratio, middle_half=self.middle_half, teacher_weights=self.teacher_weights)

    def tabulate(self) -> TextTable:
        """Makes a table of the parts, and of what distilling costs in plain forwards of the teacher."""
        plain, student = self.parts.get(PLAIN_TEACHER), self.parts[STUDENT].memory
        more, ratio = (self.parts[DISTILLED].memory - student) / MEGABYTE, ''
        if self.ratio is not None and self.middle_half is not None:
            low, high = self.middle_half
            ratio = (f', {self.ratio:.2f} plain forwards of the teacher ({low:.2f} to {high:.2f} in the middle half of '
                     'the rounds)')
        rows = [(name, f'{cost.seconds * 1e3:.1f} ms', f'{cost.seconds / plain.seconds:.2f}' if plain else '',
                 f'{self.batch_size / cost.seconds:.2f}' if name in (STUDENT, DISTILLED) else '',
                 f'{cost.memory / MEGABYTE:.1f} MiB') for name, cost in self.parts.items()]
        return TextTable(
            f'A training step, {self.batch_size} × {self.size[0]} × {self.size[1]} pixels',
            ('Part', 'Time', 'Plain teacher forwards', 'Images / s', 'Peak memory'), rows,
            f'Distilling costs {self.distilling * 1e3:.1f} ms{ratio}, and {more:.1f} MiB at the peak beside '
            f'{self.teacher_weights / MEGABYTE:.1f} MiB of its weights')

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def measure_step_costs(config: str | Path | Config, *, batch_size: Count = 2,
                       size: Annotated[Sequence[Count], Len(2, 2)] | None = None, boxes: Index = 10,
                       repeats: Count = 5, threads: Count | None = None, device: str | None = None,
                       data_root: str | None = None, options: dict[str, Any] | None = None) -> StepCosts:
    """Measures what a distilled step costs beside the student's own, with random weights on random images.

    A policy chooses in each step among guides and terms; the parts are those of all, the step is one of the first.

    Args:
        config: Of a distillation: a file, ``'package::folder/file.py'`` or a config. Neither its data nor its
            checkpoints are read.
        batch_size: Images in the batch.
        size: Their height and width; by default the largest that the training pipeline makes of 480 × 640 pixels.
        boxes: Objects in each image.
        repeats: Rounds, of which the medians count.
        threads: PyTorch's threads on the CPU; its own choice by default.
        device: ``'cpu'``, ``'cuda'``, …; a GPU by default where there is one.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key.

    Raises:
        ConfigurationError: The config is no distillation, or a step fails on images of that size.
    """
    device = find_device('--device', device)
    loaded = resolve_distillation(config, data_root, options)
    if threads:
        torch.set_num_threads(threads)
    prepare_without_runner(loaded, seed=0)
    distiller = random_distiller(loaded, device)
    size = tuple(size or max(training_sizes(loaded, USUAL_SIZES[:1]), key=prod))
    batch = synthetic_batch(distiller.student, batch_size, size, boxes)
    try:
        costs = measure_step(distiller, batch, loaded.optim_wrapper, repeats)
    except RuntimeError as error:
        if not SIZE_MISMATCH.search(str(error)):
            raise
        raise ConfigurationError(
            f'A step fails on images of {size[0]} × {size[1]} pixels: {error}. Where the levels of the '
            "student's pyramid do not fit each other at that size, set data_preprocessor.pad_size_divisor=32 in its "
            'config, or its largest stride; another size is tried with --size H W (--debug shows where).') from error
    frozen = [teacher for _, teacher in find_frozen(distiller)]
    weights = sum(tensor.nbytes for guide in frozen for tensor in (*guide.model.parameters(), *guide.model.buffers()))
    others = [guide for guide in distiller.teachers or () if guide not in frozen]
    weights += sum(4 * guide.num_parameters for _, guide in list_guides(others))
    setting = dict(config=str(config.filename if isinstance(config, Config) else config), options=options or {},
                   boxes=boxes, repeats=repeats, device=device, threads=torch.get_num_threads(),
                   processor=platform.machine(), torch=torch.__version__,
                   engines=[asdict(guide.engine) for guide in frozen])
    return replace(costs, batch_size=batch_size, size=size, teacher_weights=weights, setting=setting)


def find_device(place: str, name: str | None = None) -> str:
    """The name of a device that is there.

    Args:
        place: The option, for the message.
        name: ``'cpu'``, ``'cuda'``, ``'cuda:1'``, …; a GPU by default where there is one.

    Raises:
        ConfigurationError: PyTorch knows no such device, or there is none.
    """
    name = get_device() if name is None else name
    try:
        torch.empty(1, device=torch.device(name)).cpu()  # whoever only names a device may be told of it much later
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        there = ', '.join(['cpu', *(f'cuda:{index}' for index in range(count))])
        reason = str(error).strip().split('\n')[0].split('. ')[0].rstrip('.')
        reason = '' if reason.startswith(('Expected one of', 'Invalid device')) else f' ({reason})'
        raise ConfigurationError(f"{place}: expected a device that is there: {there}, got '{name}'{reason}.") from None
    return name


def measure_seconds(call: Call, device: Device = 'cpu', repeats: int = 5, warmup: int = 2) -> float:
    """Measures the median time of a call.

    On a GPU it is the time between two events on the current stream: what the host prepares ahead does not count, what
    it makes the device wait for does.

    Args:
        call: Takes nothing; what it returns is let go of within the measured time.
        device: Where it computes.
        repeats: Number of measured calls.
        warmup: Number of calls before them.
    """
    time_once = _time_on_gpu if torch.device(device).type == 'cuda' else _time_on_cpu
    for _ in range(warmup):
        call()
    return median(time_once(call) for _ in range(repeats))


def measure_peak_memory(call: Call, device: Device = 'cpu') -> int:
    """Measures the most bytes that tensors made by a call took at once.

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
        return _measure_peak_on_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _time_on_cpu(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _time_on_gpu(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _measure_peak_on_cpu(call: Call) -> int:
    """Reads it from the profiler's record of each allocation and each release."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it reports on itself, to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def measure_step(distiller: DetectionDistiller, batch: dict, optimizer: dict, repeats: int = 5) -> StepCosts:
    """Measures the steps of student and distiller, and the parts of the latter, in turns.

    Args:
        distiller: The distiller, in training mode. Its weights stay as they are.
        batch: As a data loader gives it.
        optimizer: The config's ``optim_wrapper``.
        repeats: Number of rounds, after one that is not counted.
    """
    calls = dict(_training_steps(distiller, batch, optimizer), **dict(list_parts(distiller, batch)))
    parts, rounds = _measure_calls(calls, next(distiller.parameters()).device, repeats)
    return StepCosts(parts, [each[DISTILLED] - each[STUDENT] for each in rounds])


def measure_parts(distiller: DetectionDistiller, batch: dict, repeats: int = 5) -> dict[str, Cost]:
    """As :func:`measure_step`, of the parts alone; the steps take most of its time."""
    return _measure_calls(dict(list_parts(distiller, batch)), next(distiller.parameters()).device, repeats)[0]


def _measure_calls(calls: dict[str, Call], device: Device,
                   repeats: int) -> tuple[dict[str, Cost], list[dict[str, float]]]:
    """Measures each call, and its seconds round by round, so that a slow moment of the machine meets them all."""
    rounds: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        rounds.append({})
        for name, call in calls.items():
            set_random_seed(0)  # the same samples in all rounds
            rounds[-1][name] = measure_seconds(call, device, repeats=1, warmup=0)
    rounds = rounds[1:]
    return {name: Cost(median(each[name] for each in rounds), measure_peak_memory(call, device))
            for name, call in calls.items()}, rounds


def _training_steps(distiller: DetectionDistiller, batch: dict, optimizer: dict) -> Iterator[tuple[str, Call]]:
    for name, model in {STUDENT: distiller.student, DISTILLED: distiller}.items():
        wrapper = build_optim_wrapper(model, optimizer)
        for group in wrapper.param_groups:
            group['lr'] = 0.0
        yield name, lambda model=model, wrapper=wrapper: model.train_step(dict(batch), wrapper)


def list_parts(distiller: DetectionDistiller, batch: dict) -> Iterator[tuple[str, Call]]:
    """Lists by name what a step runs of the guides, plain forwards of teachers, and each term's forward and backward.

    Args:
        distiller: The distiller, in training mode.
        batch: As a data loader gives it; the student sees it once, before the first part is listed.
    """
    data = distiller.data_preprocessor(batch, True)
    images, samples = data['inputs'], data['data_samples']
    observations = distiller.observe_learners(images, samples, distiller.terms)[0]
    _, steps = run_learners(distiller.learners, images, read_supervision(samples))
    shapes = observations[0].context.image_shapes
    yield TEACHER, lambda: distiller.observe_teachers(distiller.terms, images, shapes, steps)
    plain = [(build_detector(read_model_config(config['config'])).to(images.device).eval(),
              teacher.bridge(images, shapes))
             for config, teacher in find_frozen(distiller)]
    if plain:
        yield PLAIN_TEACHER, torch.no_grad()(lambda: [model.extract_feat(given) for model, given in plain])
    for learner, (_, context, _) in zip(distiller.learners, observations):
        # Leaves: a level may be made of another, by weights that a step between would have moved on.
        context = replace(context, student={path: tuple(level.detach().requires_grad_() for level in levels)
                                            for path, levels in context.student.items()})
        for name, term in learner.terms.items():
            yield TERM + name, partial(differentiate, term, context)


def find_frozen(distiller: DetectionDistiller) -> list[tuple[dict[str, Any], Teacher]]:
    """Those of its guides that are frozen detectors, once they are started, each with what the config says of it."""
    started = zip(distiller.guides, distiller.teacher_configs, distiller.teachers or ())
    return [(config, cast(Teacher, teacher)) for guide, config, teacher in started if isinstance(guide, FrozenDetector)]


def differentiate(term: DistillTerm, context: DistillContext) -> tuple[Tensor, list[Tensor | None]]:
    """Computes one term, and its gradients by the features of the student that it reads, or else outputs of heads.

    Returns:
        The sum of its parts, and the gradients by what it reads and by its own parameters; None for what it leaves out.
    """
    read = [context.student[path] for path in term.student_taps]
    read = read or [outputs for head, outputs in context.student_outputs.items() if head in term.student_heads]
    value = sum_parts(term(replace(context, valid_cells={})))  # nothing that another call has computed
    learning = [*_find_learning(read), *term.parameters()]
    return value.detach(), list(torch.autograd.grad(value, learning, allow_unused=True, retain_graph=True))


def _find_learning(outputs: object) -> Iterator[Tensor]:
    """Yields the tensors within that a gradient can reach."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield outputs
    elif isinstance(outputs, (tuple, list, dict)):
        for each in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _find_learning(each)
    elif is_dataclass(outputs):
        for each in fields(outputs):
            yield from _find_learning(getattr(outputs, each.name))
