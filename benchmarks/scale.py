"""Time and memory of a distilled step against batch size, image size, boxes and ranks, on the CPU.

The pair is the demo's: a slim Faster R-CNN R101 teaches an R18 with FGD. Each process computes with one thread.

Usage: python -m benchmarks.scale measure --json FILE    points that the file holds are kept
       python -m benchmarks.scale plot --json FILE --images FOLDER
"""
from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from mmengine.model import MMDistributedDataParallel
from torch import nn

from benchmarks.steps import build_distiller, make_batch, training_step
from kd_det.study.step_costs import measure_peak_memory, measure_seconds

BASE = dict(batch=2, size=192, boxes=10, ranks=1)
SERIES = dict(batch=(1, 2, 4, 8), size=(128, 192, 256, 320), boxes=(1, 10, 100, 500), ranks=(1, 2))
LABELS = dict(batch='images in a batch', size='height and width, pixels', boxes='boxes on an image',
              ranks='ranks (gloo), each with its own batch')
PARTS = dict(distilled='#0072b2', student='#009e73', teacher='#d55e00')


def measure_point(distiller: nn.Module, classes: int, repeats: int, batch: int, size: int, boxes: int, ranks: int,
                  rank: int = 0) -> dict[str, float]:
    """Median seconds and peak bytes of the student's own step, the distilled one, and the teacher's part."""
    images, samples = make_batch((size, size), batch, boxes, classes, seed=rank)
    steps = {}
    for name, module in dict(student=distiller.student, distilled=distiller).items():
        model = MMDistributedDataParallel(module) if ranks > 1 else module
        parameters = [each for each in module.parameters() if each.requires_grad]
        steps[name] = training_step(lambda *data, model=model: model(*data, mode='loss'), distiller.parse_losses,
                                    parameters, images, samples)
    steps['teacher'] = lambda: distiller.teacher.observe(images, [(size, size)] * batch)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():  # in turns, so that a machine that changes changes all
            times[name].append(measure_seconds(step, repeats=1, warmup=0))
    point = dict(batch=batch, size=size, boxes=boxes, ranks=ranks)
    point.update({name: median(each[1:]) for name, each in times.items()})
    for name, step in steps.items():
        distiller.zero_grad()  # what was there before would be subtracted
        point[f'{name}_bytes'] = measure_peak_memory(step)
    return point


def measure(file: Path, repeats: int) -> None:
    """Measures all points of :data:`SERIES` that the file lacks; in each all quantities but one are as in the base."""
    points = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else []
    torch.set_num_threads(1)
    distiller, classes = build_distiller('demo')
    for asked in ({**BASE, name: value} for name, values in SERIES.items() for value in values):
        if any(asked.items() <= point.items() for point in points):
            continue
        if asked['ranks'] == 1:
            points.append(measure_point(distiller, classes, repeats, **asked))
        else:
            points.append(_measure_on_ranks(asked, repeats))
        file.write_text(json.dumps(points, indent=1) + '\n', encoding='utf-8')
        print(json.dumps(points[-1]), flush=True)


def _measure_on_ranks(asked: dict, repeats: int) -> dict:
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT='29531')
    context = multiprocessing.get_context('spawn')
    results = context.SimpleQueue()
    processes = [context.Process(target=_run_rank, args=(rank, asked, repeats, results))
                 for rank in range(asked['ranks'])]
    for process in processes:
        process.start()
    measured = results.get()
    for process in processes:
        process.join()
    return measured


def _run_rank(rank: int, asked: dict, repeats: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', rank=rank, world_size=asked['ranks'])
    measured = measure_point(*build_distiller('demo'), repeats, **asked, rank=rank)
    if rank == 0:
        results.put(measured)
    dist.destroy_process_group()


def plot(points: list[dict], folder: Path) -> None:
    """One picture: time above memory, a column for each quantity."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, len(SERIES), figsize=(4 * len(SERIES), 6), squeeze=False)
    for name, (above, below) in zip(SERIES, axes.T):
        fixed = {key: value for key, value in BASE.items() if key != name}
        series = sorted((point for point in points if fixed.items() <= point.items()), key=lambda point: point[name])
        values = [point[name] for point in series]
        for part, colour in PARTS.items():
            above.plot(values, [point[part] for point in series], 'o-', color=colour, label=part)
            below.plot(values, [point[f'{part}_bytes'] / 1e6 for point in series], 'o-', color=colour)
        above.set(ylim=(0, None))
        below.set(ylim=(0, None), xlabel=LABELS[name])
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.set_xscale('log' if name == 'boxes' else 'linear')
            axis.set_xticks(values, [str(value) for value in values])
            axis.minorticks_off()
    axes[0, 0].set_ylabel('seconds a step')
    axes[1, 0].set_ylabel('peak MB of tensors')
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(folder / 'scale.png', dpi=110)


def main(options: Namespace) -> None:
    if options.action == 'plot':
        plot(json.loads(options.json.read_text(encoding='utf-8')), options.images)
    else:
        measure(options.json, options.repeats)


if __name__ == '__main__':
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('action', choices=('measure', 'plot'))
    parser.add_argument('--json', type=Path, required=True)
    parser.add_argument('--images', type=Path, default=Path('docs/images'))
    parser.add_argument('--repeats', type=int, default=3)
    main(parser.parse_args())
