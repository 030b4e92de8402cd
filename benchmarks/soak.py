"""Trainings and benchmarks that are killed at moments of chance, resumed, and compared with uninterrupted ones.

    python -m benchmarks.soak --out docs/results/soak.json

A distillation with EMA, a balanced weight, a teacher's cache, a best and one last checkpoint trains on generated shapes
once to its end. Then again, but SIGKILL comes after a time that is drawn evenly over what the first run took, resumed
each time until it is done; and again, until there were as many moments as asked for. So does a benchmark of two
methods.
What they leave must be that of the uninterrupted run: weights, averages, adapters, optimizer and schedules bit by bit,
logged losses and metrics, and the names of the files. The exit status is 1 where it is not.

Each run is forked from this process, which has imported all, and gets a session of its own; those that the benchmark
starts are new processes of their own.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

import kd_det
from kd_det.config.files import load_config, set_data_root
from kd_det.datasets import generate_shapes
from kd_det.study.runs import describe_environment
from kd_det.training.pictures import read_scalars

PARTS = ('state_dict', 'ema_state_dict', 'distill', 'optimizer', 'param_schedulers')
STUDENT, TEACHER = 'kd_det::demo/baseline_retinanet_r18.py', 'kd_det::demo/teacher_retinanet_r50.py'


def make_student(data: Path, epochs: int) -> Config:
    """The demo's student on generated data: EMA, a log line each step, one last and one best checkpoint, workers."""
    config = load_config(STUDENT)
    set_data_root(config, str(data))
    config.custom_hooks = [dict(type='EMAHook', momentum=0.1)]
    config.default_hooks.logger.interval = 1
    config.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best='coco/bbox_mAP', rule='greater')
    config.train_cfg.update(max_epochs=epochs, val_interval=1)
    config.train_dataloader.update(num_workers=1, persistent_workers=False)
    config.val_dataloader.update(num_workers=0, persistent_workers=False)
    config.log_level = 'ERROR'
    return config


def run(function: Callable[[], object], log: Path, seconds: float | None = None) -> bool:
    """Runs a function in a process of its own, killed after so many seconds; tells whether it came to its end."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open('a', encoding='utf-8') as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            function()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if found:
            break
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        raise SystemExit(f'A run ended by itself: see the end of {log}.')
    return True


def differ(first, second, place: str = '') -> str:
    """Where two results differ; empty where they do not."""
    if type(first) is not type(second):
        return place
    if isinstance(first, torch.Tensor):
        return '' if torch.equal(first, second) else place
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return f'{place}: {sorted(map(str, first.keys() ^ second.keys()))}'
        return next(filter(None, (differ(first[key], second[key], f'{place}.{key}') for key in first)), '')
    if isinstance(first, (list, tuple)):
        return place if len(first) != len(second) else next(
            filter(None, (differ(*pair, f'{place}[{index}]') for index, pair in enumerate(zip(first, second)))), '')
    return '' if first == second or first != first and second != second else place


def read_training(folder: Path) -> dict:
    """What a training has left behind, without what depends on the clock."""
    weights = {file.name: {part: saved[part] for part in PARTS if part in saved}
               for file in folder.glob('*.pth') for saved in [torch.load(file, weights_only=True)]}
    logged = read_scalars(sorted(folder.glob('*/vis_data/scalars.json')))
    return dict(files=sorted(file.name for file in folder.iterdir() if file.is_file()), weights=weights,
                logged={name: values for name, values in logged.items()
                        if 'time' not in name and 'memory' not in name})


def read_benchmark(folder: Path) -> dict:
    """The numbers of a benchmark, and the weights of its runs."""
    results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    kept = ('variant', 'seed', 'status', 'identity', 'start', 'order', 'metrics', 'checkpoint')
    return dict(runs=[{name: each[name] for name in kept} for each in results['runs']], summary=results['summary'],
                weights=[read_training(folder / each['folder'])['weights'] for each in results['runs']])


def soak(name: str, function: Callable[[Path, bool], object], read: Callable[[Path], dict], moments: int,
         draw: random.Random, root: Path) -> dict:
    """Kills and resumes runs of a function until there were so many moments; what came of it, as JSON can hold it."""
    log, start = root / f'{name}.log', time.monotonic()
    run(lambda: function(root / f'{name}_straight', False), log)
    duration = time.monotonic() - start
    expected = read(root / f'{name}_straight')
    killed, rows = 0, []
    while killed < moments:
        folder, seconds = root / f'{name}_{len(rows)}', []
        while killed < moments:
            seconds.append(draw.uniform(0, duration))
            if run(lambda folder=folder: function(folder, True), log, seconds[-1]):
                seconds.pop()
                break
            killed += 1
        else:
            run(lambda folder=folder: function(folder, True), log)
        rows.append(dict(killed_after_s=[round(each, 2) for each in seconds],
                         differs=differ(expected, read(folder), name)))
        print(f'{name} {len(rows)}: {rows[-1]}', flush=True)
    return dict(straight_s=round(duration, 2), moments=killed, runs=len(rows),
                equal=sum(not row['differs'] for row in rows), rows=rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--moments', type=int, default=24, help='of the training (24)')
    parser.add_argument('--benchmark-moments', type=int, default=6, help='of the benchmark (6)')
    parser.add_argument('--seed', type=int, default=0, help='of the moments (0)')
    parser.add_argument('--out', type=Path, help='write the record to this file, as JSON')
    options = parser.parse_args()
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=True)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        generate_shapes(root / 'data', 16, 8, 64)
        student, teacher = make_student(root / 'data', epochs=3), load_config(TEACHER)
        weights = root / 'teacher.pth'
        torch.save(dict(state_dict=MODELS.build(teacher.model).state_dict()), weights)
        unchecked = {'default_hooks.distill.preflight': None}

        def distill(work_dir: Path, resume: bool) -> None:
            cache = {'model.teacher.cache': dict(dir=str(work_dir) + '_cache')}
            kd_det.distill(student, TEACHER, weights, 'fgd', balance=0.5, work_dir=work_dir, seed=0, resume=resume,
                           options={**unchecked, **cache, 'model.distill.fgd.weight.interval': 2})

        def benchmark(work_dir: Path, resume: bool) -> None:
            kd_det.benchmark(student=make_student(root / 'data', epochs=1), teacher=TEACHER, threads=1,
                             teacher_checkpoints=[str(weights)], methods='none,fgd', seeds=1, work_dir=work_dir,
                             options=unchecked)

        record = dict(seed=options.seed, **describe_environment(1),
                      training=soak('training', distill, read_training, options.moments, draw, root),
                      benchmark=soak('benchmark', benchmark, read_benchmark, options.benchmark_moments, draw, root))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')
    parts = [record[name] for name in ('training', 'benchmark')]
    print(f"{sum(part['moments'] for part in parts)} moments; {sum(part['equal'] for part in parts)} of "
          f"{sum(part['runs'] for part in parts)} runs ended as the uninterrupted one.")
    return 0 if all(part['equal'] == part['runs'] for part in parts) else 1


if __name__ == '__main__':
    raise SystemExit(main())
