"""What a GPU makes of the costs: sections of benchmarks/gpu.py.

Each is a generator of checks. With ``--dry`` these run on the CPU, on detectors of a few channels and images of some 64
pixels; their numbers mean nothing then.
"""
from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from mmengine.runner import set_random_seed
from torch import Tensor

from benchmarks import engine as engines
from benchmarks import losses as loss_benchmark
from benchmarks.gpu import Check, Found, Setting, target
from benchmarks.gpu_checks import PAIRS, SAME, compose, tf32
from kd_det.checks.synthetic import random_distiller, synthetic_batch
from kd_det.registry import prepare_without_runner
from kd_det.study.step_costs import (
    DISTILLED,
    MEGABYTE,
    STUDENT,
    measure_peak_memory,
    measure_seconds,
    measure_step_costs,
)
from kd_det.teachers.guide import LearnerStep

# -------------------------------------------------------------------------------------------------------- what it costs


def losses(setting: Setting) -> Iterator[Check]:
    """The loss arithmetic beside its plain form, see benchmarks/losses.py: equal, and how much faster."""
    options = Namespace(device=setting.device, image=setting.choose((800, 1344), (64, 96)), batch=2,
                        channels=setting.choose(256, 8), repeats=setting.choose(10, 1),
                        boxes=setting.choose((10, 500), (3, )))

    def measure(case: loss_benchmark.Case) -> Found:
        row = loss_benchmark.measure(case, options)
        faster, share = row['plain_s'] / row['ours_s'], row['ours_mb'] / max(row['plain_mb'], 1e-9)
        text = f"{1e3 * row['plain_s']:.2f} → {1e3 * row['ours_s']:.2f} ms, {faster:.1f} ×; {share:.0%} of the memory"
        return Found(text + (target(faster >= 5, '5 ×') if case.name == 'FGD' else ''), dict(row, faster=faster))

    with tf32(False):
        for boxes, case in loss_benchmark.list_cases(options):
            yield Check(case.name + (f', {boxes} boxes' if isinstance(boxes, int) else ''), partial(measure, case))


def engine(setting: Setting) -> Iterator[Check]:
    """A teacher's backbone and neck under each option of its engine, see benchmarks/engine.py."""
    groups = {'float32': (False, ['nothing', 'fuse', 'default'], engines.LOSSLESS),
              'TF32': (True, ['nothing', 'default', 'bfloat16'], 1e-2),
              'compiled': (True, ['compiled', 'compiled_bfloat16'], 1e-2)}

    def measure(allowed: bool, names: list[str], lossless: float) -> Found:
        options = Namespace(
            teacher=setting.choose('mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', PAIRS['Faster R-CNN'][1]),
            engines=names, batch=2, size=setting.choose((800, 1344), (64, 64)), levels=[], device=setting.device)
        with tf32(allowed):
            rows = engines.measure(engines.build(options), setting.choose(10, 1), setting.device, lossless)
        text = '; '.join(f"{row['engine']} {1e3 * row['median_s']:.1f} ms, {row['faster']:.2f} ×, "
                         f"{row['deviation']:.0e} off" for row in rows)
        best = max((row['faster'] for row in rows if 'bfloat16' in row['engine']), default=None)
        return Found(text + ('' if best is None else target(best >= 2.5, '2.5 × in bfloat16')), dict(rows=rows))

    for name, group in groups.items():
        if name != 'compiled' or not setting.dry:  # it needs a compiler, and its time
            yield Check(name, partial(measure, *group))


def stream(setting: Setting) -> Iterator[Check]:
    """A distilled step whose teacher runs on a stream of its own, beside the student's forward, and one as it is."""

    def measure(precision: str) -> Found:
        config = compose(setting, 'Faster R-CNN', 'fgd')
        config.model.teacher.precision = precision
        prepare_without_runner(config, seed=0)
        distiller = random_distiller(config, setting.device)
        batch = synthetic_batch(distiller.student, 2, setting.choose((800, 1344), (64, 64)), boxes=10)
        data = distiller.data_preprocessor(batch, True)
        images, samples = data['inputs'], data['data_samples']
        own = None if setting.dry else torch.cuda.Stream()
        as_it_is, shapes = distiller.observe_teachers, [each.img_shape[:2] for each in samples]
        alone = [LearnerStep(distiller.student, (), {}, {})]  # FGD reads no head, and so nothing of the student's

        def step(ahead: bool) -> Tensor:
            set_random_seed(0)  # the same samples in all steps
            distiller.zero_grad(set_to_none=False)  # so that the peak is counted from what is there before
            distiller.observe_teachers = as_it_is
            if ahead:
                with beside(own):
                    observed = as_it_is(tuple(distiller.terms), images, shapes, alone)
                distiller.observe_teachers = lambda *given: joined(own, observed)
            total = distiller.parse_losses(distiller.loss(images, samples))[0]
            total.backward()
            return total.detach()

        values = [float(step(ahead)) for ahead in (False, True, False, True)]
        calls = [partial(step, ahead) for ahead in (False, True)]
        rounds = [[measure_seconds(call, setting.device, 1, warmup=0) for call in calls]
                  for _ in range(setting.choose(10, 1))]
        seconds = [median(each) for each in zip(*rounds)]
        peaks = [measure_peak_memory(call, setting.device) for call in calls]
        ratio = median(apart / one for one, apart in rounds)
        off = max(abs(value - values[0]) for value in values) / abs(values[0])
        text = (f'one stream {1e3 * seconds[0]:.1f} ms, its own {1e3 * seconds[1]:.1f} ms ({ratio:.3f} of it); peak '
                f'{peaks[0] / MEGABYTE:.0f} and {peaks[1] / MEGABYTE:.0f} MiB')
        return Found(text, dict(seconds=seconds, peaks=peaks, ratio=ratio, losses=values),
                     '' if off < SAME else f'the loss differs by {off:.0e}')

    for precision in setting.choose(('float32', 'bfloat16'), ('bfloat16', )):
        yield Check(f'teacher in {precision}', partial(measure, precision))


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Runs the block on a stream, after what the current one has been given so far."""
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


def joined(stream: torch.cuda.Stream | None, value: Any) -> Any:
    """Lets the current stream wait for another, which has computed a value."""
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    return value


def steps(setting: Setting) -> Iterator[Check]:
    """What a distilled step costs, part by part, as ``kd-det benchmark-step`` measures it."""
    cases = {'R101 → R18, FGD': ('Faster R-CNN', 2, (800, 1344)), 'YOLOX-L → S, FGD': ('YOLOX', 8, (640, 640))}

    def measure(kind: str, images: int, size: tuple[int, int], precision: str) -> Found:
        costs = measure_step_costs(
            compose(setting, kind, 'fgd'), batch_size=setting.choose(images, 2), size=setting.choose(size, (64, 64)),
            repeats=setting.choose(5, 1), device=setting.device, options={'model.teacher.precision': precision})
        whole = costs.parts[DISTILLED].seconds
        peaks = [costs.parts[name].memory / MEGABYTE for name in (STUDENT, DISTILLED)]
        shares = ', '.join(f'{name} {cost.seconds / whole:.0%}' for name, cost in costs.parts.items()
                           if name != DISTILLED)
        return Found(f'{1e3 * whole:.1f} ms: {shares}; distilling {costs.ratio:.2f} plain teacher forwards'
                     f"{target(costs.ratio <= 0.5, '0.5')}; peak {peaks[1]:.0f} MiB, {peaks[1] - peaks[0]:.0f} of it "
                     f'by distilling', costs.to_dict())

    for name, case in cases.items():
        for precision in setting.choose(('float32', 'bfloat16'), ('bfloat16', )):
            yield Check(f'{name}, teacher in {precision}', partial(measure, *case, precision))
