"""The demo: distillation at work on generated data, from nothing to a table and pictures."""
from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kd_det.compat.console import PlainConsole
from kd_det.config import ConfigurationError
from kd_det.config.files import is_distillation, load_config, set_data_root
from kd_det.datasets import generate_shapes
from kd_det.study.demo_report import draw_pictures, results_table, summarize, write_results
from kd_det.study.runs import Run, identify_run, load_finished_run, train

TEACHER_CONFIG = 'kd_det::demo/teacher_faster_rcnn_r101.py'
PLAIN_CONFIG = 'kd_det::demo/baseline_faster_rcnn_r18.py'


def run_demo(options: Namespace) -> None:
    """Does what the options of ``kd-det demo`` say."""
    console = PlainConsole(file=sys.stdout)  # the real one, not what it is redirected to below
    options.out.mkdir(parents=True, exist_ok=True)
    # MMEngine logs much: that goes to a file, a line for each epoch to the console.
    with open(options.out / 'log.txt', 'a', encoding='utf-8') as log, redirect_stdout(log), redirect_stderr(log):
        _demo(options, console)


def _demo(options: Namespace, console: Console) -> None:
    columns = (TextColumn('{task.description}', markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        data = _generate(options, progress)
        config = _config(TEACHER_CONFIG, 'teacher', options, options.teacher_epochs)
        teacher = _train_once('teacher', config, data, progress)
        plain, distilled = [], []
        for seed in range(options.seeds):
            name = f'plain student, seed {seed}'
            config = _config(PLAIN_CONFIG, f'plain_{seed}', options, options.epochs, seed)
            plain.append(_train_once(name, config, data, progress))
            name = f'distilled student, seed {seed}'
            config = _config(options.config, f'distilled_{seed}', options, options.epochs, seed)
            if not is_distillation(config):
                raise ConfigurationError(f'--config {options.config} is no distillation: its model is not a '
                                         'DetectionDistiller.')
            config.model.teacher = dict(config=TEACHER_CONFIG, checkpoint=teacher.checkpoint)
            distilled.append(_train_once(name, config, [data, teacher.identity], progress))
    runs = dict(teacher=[teacher], plain=plain, distilled=distilled)
    summary = summarize(runs)
    console.print(results_table(runs, summary))
    plain_config = _config(PLAIN_CONFIG, 'plain', options)
    configs = dict(teacher=_config(TEACHER_CONFIG, 'teacher', options), plain=plain_config, distilled=plain_config)
    saved = [write_results(options.out, runs, summary, data), *draw_pictures(options.out, runs, configs)]
    console.print(f"Saved {', '.join(map(str, saved))}.", highlight=False)


def _generate(options: Namespace, progress: Progress) -> dict:
    """Writes the data unless it is there; returns what decides it."""
    data = dict(train_images=options.images, val_images=options.val_images, size=options.size)
    task = progress.add_task('data', total=None)
    written = generate_shapes(options.out / 'data', **data,
                              progress=lambda done, total: progress.update(task, completed=done, total=total))
    progress.remove_task(task)
    progress.console.print(f'data: {options.images} + {options.val_images} images of {options.size} x {options.size} '
                           f"pixels in {options.out / 'data'}{'' if written else ', kept from before'}",
                           highlight=False)
    return data


def _config(name: str, folder: str, options: Namespace, epochs: int | None = None, seed: int = 0) -> Config:
    """A config of the demo, on the generated data."""
    config = load_config(name)
    set_data_root(config, str(options.out / 'data'))
    config.work_dir = str(options.out / 'runs' / folder)
    config.randomness = dict(seed=seed)
    if epochs is not None:
        config.train_cfg.max_epochs = epochs
        for scheduler in config.param_scheduler:
            if 'T_max' in scheduler:
                scheduler.T_max = epochs
    return config


def _train_once(name: str, config: Config, inputs: Any, progress: Progress) -> Run:
    """Trains and evaluates, unless the same run was finished before."""
    identity = identify_run(config, inputs)
    kept = load_finished_run(Path(config.work_dir), identity)
    if kept is not None:
        progress.console.print(f"{name}: kept from before, mAP {100 * kept.metrics['bbox_mAP']:.1f}")
        return kept
    task = progress.add_task(name, total=None)
    run = train(name, config, identity, log=lambda text: progress.console.print(text, highlight=False),
                after_step=lambda runner: progress.update(task, advance=1, total=runner.max_iters))
    progress.remove_task(task)
    return run
