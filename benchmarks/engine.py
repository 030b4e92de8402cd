"""Time of a teacher's backbone and neck under each of its engine's options, beside mmdet's own forward.

    python -m benchmarks.engine --out engine.json
    python -m benchmarks.engine --engines default levels frozen --levels 1 2 3 4

Weights and images are random. All forms take turns, round by round, so that what else the machine does weighs on all of
them; ratios are taken within a round. The first call of an engine, which folds, reorders or compiles, is told apart.
How much is left to gain is told by what one good layer does in a second.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import kd_det  # noqa: F401  registers what configs name, and serves mmcv's operators
from kd_det.config.files import load_config
from kd_det.study.step_costs import measure_seconds
from kd_det.teachers import Teacher
from kd_det.teachers.loading import remove_pretrained

PLAIN, LEVELS = 'plain', 'levels'  # mmdet's own forward; the default engine where not all levels are read
ENGINES = dict(
    nothing=dict(fuse=False, channels_last=False),
    fuse=dict(channels_last=False),
    default=dict(),
    levels=dict(),
    compiled=dict(compile=True),
    frozen=dict(compile=dict(options=dict(freezing=True))),
    bfloat16=dict(precision='bfloat16'),
    compiled_bfloat16=dict(compile=True, precision='bfloat16'),
)
LOSSLESS = 1e-4  # relative


def build(options: argparse.Namespace) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """By name, what computes the levels of the neck: mmdet's plain forward, and teachers of the same weights."""
    MMLogger.get_instance('benchmark', log_level='ERROR')  # else every weight's initialisation is reported
    config = remove_pretrained(load_config(options.teacher).model)
    torch.manual_seed(0)
    model = MODELS.build(config).eval()
    model.to(options.device)
    images = torch.randn(options.batch, 3, *options.size).to(options.device)
    forms = {PLAIN: torch.no_grad()(lambda: model.extract_feat(images))}
    shapes = [tuple(options.size)] * options.batch
    read = dict(neck=[index in options.levels for index in range(len(forms[PLAIN]()))])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f'{folder}/teacher.pth'
        torch.save(dict(state_dict=model.state_dict()), checkpoint)
        for name in options.engines:
            teacher = Teacher(config, checkpoint, taps=['neck'], student_preprocessor=model.data_preprocessor,
                              **ENGINES[name]).to_like(images)
            observe = partial(teacher.observe, images, shapes, levels=read if name == LEVELS else {})
            forms[name] = lambda observe=observe: observe()[0]['neck']
    return forms


def deviation(levels: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """The largest relative error of a level, in the Euclidean norm, among those that were computed."""
    pairs = [(level.float(), other) for level, other in zip(levels, plain) if isinstance(level, Tensor)]
    return max(float((level - other).norm() / other.norm()) for level, other in pairs)


def measure(forms: dict[str, Callable[[], Sequence[Tensor]]], repeats: int, device: str = 'cpu',
            lossless: float = LOSSLESS) -> list[dict]:
    """One row for each form, from that many rounds.

    Raises:
        RuntimeError: An engine that should change rounding alone changes more than ``lossless``.
    """
    plain, rows = forms[PLAIN](), []
    for name, form in forms.items():
        first = measure_seconds(form, device, repeats=1, warmup=0)
        rows.append(dict(engine=name, options=ENGINES.get(name), first_s=first, deviation=deviation(form(), plain)))
        if ENGINES.get(name, {}).get('precision') is None and rows[-1]['deviation'] > lossless:
            raise RuntimeError(f"Engine '{name}': features deviate by {rows[-1]['deviation']:.1e} from the plain ones.")
    rounds = [{name: measure_seconds(form, device, repeats=1, warmup=0) for name, form in forms.items()}
              for _ in range(repeats)]
    for row in rows:
        times = [each[row['engine']] for each in rounds]
        row.update(median_s=median(times), fastest_s=min(times), seconds=times,
                   faster=median(each[PLAIN] / each[row['engine']] for each in rounds),
                   faster_fastest=min(each[PLAIN] for each in rounds) / min(times))
    return rows


def bound(form: Callable[[], object]) -> dict:
    """What the arithmetic would take if all layers were as fast as a good one: 3×3, 256 channels, at stride 4."""
    with FlopCounterMode(display=False) as counter:
        form()
    layer = nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    images = torch.randn(2, 256, 80, 80).to(memory_format=torch.channels_last)
    run = torch.no_grad()(lambda: layer(images))
    with FlopCounterMode(display=False) as one:
        run()
    operations, rate = counter.get_total_flops() / 1e9, one.get_total_flops() / 1e9 / measure_seconds(run, repeats=25)
    return dict(operations=operations, rate=rate, s=operations / rate)


def table_of(rows: Sequence[dict], ideal: dict) -> Table:
    table = Table(title='Backbone and neck of the teacher',
                  caption=f"{ideal['operations']:.0f} GFLOP: {1e3 * ideal['s']:.0f} ms at the "
                  f"{ideal['rate']:.0f} GFLOP/s of one good layer")
    for heading in ('engine', 'first call', 'median', 'fastest', 'faster, median', 'faster, fastest', 'deviation'):
        table.add_column(heading, justify='left' if heading == 'engine' else 'right')
    for row in rows:
        table.add_row(row['engine'], f"{row['first_s']:.1f} s", f"{1e3 * row['median_s']:.0f} ms",
                      f"{1e3 * row['fastest_s']:.0f} ms", f"{row['faster']:.2f} ×", f"{row['faster_fastest']:.2f} ×",
                      f"{row['deviation']:.0e}")
    return table


def processor() -> str | None:
    """Its name, where the system tells it."""
    information = Path('/proc/cpuinfo')
    lines = information.read_text(encoding='utf-8').splitlines() if information.is_file() else []
    return next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--teacher', default='mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py', help='a config')
    parser.add_argument('--engines', nargs='+', choices=ENGINES, default=list(ENGINES))
    parser.add_argument('--levels', nargs='+', type=int, default=[1, 2, 3, 4], help='read by the form of this name')
    parser.add_argument('--size', nargs=2, type=int, default=[320, 320], help='height and width of the images')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=12)
    parser.set_defaults(device='cpu')  # for a GPU there is benchmarks/gpu.py
    parser.add_argument('--out', type=Path, help='write the numbers to this file, as JSON')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register_all_modules(init_default_scope=True)

    forms = build(options)
    rows, ideal = measure(forms, options.rounds), bound(forms[PLAIN])
    Console().print(table_of(rows, ideal))
    if options.out:
        command = ' '.join(['python -m benchmarks.engine', *sys.argv[1:]])
        settings = {name: value for name, value in vars(options).items() if name != 'out'}
        machine = dict(processor=processor(), cores=os.cpu_count(), system=platform.platform())
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        record = dict(command=command, settings=settings, versions=versions, machine=machine, bound=ideal, rows=rows)
        options.out.write_text(json.dumps(record, indent=2) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
