"""What a distilled step costs with the teacher's outputs read from disk.

Usage: python -m benchmarks.teacher_cache [--pair coco] [--size 320 320] [--batch 2] [--threads 2] [--json FILE]
"""
from __future__ import annotations

import json
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.steps import add_batch_options, build_distiller, make_batch, training_step
from kd_det.study.step_costs import measure_seconds
from kd_det.teachers import Teacher


def measure(pair: str, size: tuple, batch: int, boxes: int, repeats: int) -> dict:
    """Seconds of the student's own step, and of the distilled one without a cache and reading from one.

    Medians of steps that take turns, so that a machine that changes changes all of them.
    """
    distiller, classes = build_distiller(pair)
    images, samples = make_batch(size, batch, boxes, classes)
    results = dict(pair=pair, size=list(size), batch=batch, boxes=boxes, threads=torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        teachers = dict(distilled=distiller.teachers)
        for dtype in ('float16', 'float32'):
            cache = dict(dir=f'{folder}/{dtype}', dtype=dtype, max_gb=10)
            cached = Teacher(**dict(distiller.teacher_configs[0], cache=cache), taps=distiller.teacher.taps.paths,
                             student_preprocessor=distiller.data_preprocessor)
            teachers[f'cached_{dtype}'] = [cached]

        def step_with(name: str) -> Callable[[], None]:
            module = distiller.student if name == 'student' else distiller
            parameters = [each for each in module.parameters() if each.requires_grad]
            step = training_step(module.loss, distiller.parse_losses, parameters, images, samples)

            def call() -> None:
                distiller.teachers = teachers.get(name, distiller.teachers)
                step()

            return call

        steps = {name: step_with(name) for name in ('student', *teachers)}
        for name, each in teachers.items():
            steps[f'teacher_{name}'] = lambda teacher=each[0]: teacher.observe(images, [size] * batch)
        times = {name: [] for name in steps}
        for _ in range(repeats + 1):
            for name, step in steps.items():
                times[name].append(measure_seconds(step, repeats=1, warmup=0))
        results.update({name: median(each[1:]) for name, each in times.items()})  # without the first, which stores
        ratios = {name: [each / own for each, own in zip(times[name], times['student'])][1:] for name in teachers}
        results['ratios'] = {name: median(each) for name, each in ratios.items()}
        for name, (teacher, ) in teachers.items():
            if teacher.cache is not None:
                results[f'megabytes_an_image_{name}'] = teacher.cache.store.size / batch / 1e6
    return results


if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pair', choices=('demo', 'coco'), default='coco')
    add_batch_options(parser)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--json', type=Path, help='append the results to the list in this file')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = measure(options.pair, tuple(options.size), options.batch, options.boxes, options.repeats)
    print(json.dumps(results, indent=2))
    if options.json:
        before = json.loads(options.json.read_text(encoding='utf-8')) if options.json.is_file() else []
        options.json.write_text(json.dumps([*before, results], indent=2) + '\n', encoding='utf-8')
