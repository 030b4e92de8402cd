"""The demo: distillation at work on generated data, from nothing to a table and pictures."""
from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kd_det.compat.console import PlainConsole
from kd_det.compat.writing import locked_folder, refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Name, declared
from kd_det.config.files import is_distillation, load_config, set_data_root
from kd_det.config.options import set_epochs, set_seed
from kd_det.datasets import generate_shapes
from kd_det.study.demo_report import PICTURES, RESULTS_FILE, draw_pictures, summarize, tabulate_runs, write_results
from kd_det.study.identity import identify_run
from kd_det.study.runs import Run, load_finished_run, train

TEACHER_CONFIG = 'kd_det::demo/teacher_faster_rcnn_r101.py'
PLAIN_CONFIG = 'kd_det::demo/baseline_faster_rcnn_r18.py'


@declared
@dataclass(frozen=True)
class DemoSettings:
    """What the demo generates and trains.

    Attributes:
        out: Folder of data, trainings, results and pictures.
        config: How the distilled student learns.
        seeds: How often both students are trained, from seeds 0 on, under one teacher.
        epochs: Of the students; their config's by default.
        teacher_epochs: Of the teacher; its config's by default.
        images: Number of training images.
        val_images: Number of validation images.
        size: Height and width of the images, in pixels.
        force: Replace files in that folder that are not the demo's.
    """
    out: Path
    config: Name
    seeds: Count = 1
    epochs: Count | None = None
    teacher_epochs: Count | None = None
    images: Count = 240
    val_images: Count = 80
    size: Count = 128
    force: bool = False


def run_demo(settings: DemoSettings) -> None:
    """Generates data, trains a teacher and two students, with and without distillation, and compares them.

    Raises:
        ConfigurationError: The config is none of a distillation.
        WritingError: The folder has files of somebody else's under the names of the demo's, or another demo runs there.
    """
    if not is_distillation(load_config(settings.config)):  # told before a teacher is trained
        raise ConfigurationError(f'--config {settings.config} is no distillation: its model is not a '
                                 'DetectionDistiller.')
    console = PlainConsole(file=sys.stdout)  # the real one, not what it is redirected to below
    advice = 'Give another folder with --out, or replace it with --force.'
    for name, mark in ((RESULTS_FILE, b'"gain"'), *((name, b'Matplotlib') for name in PICTURES)):
        refuse_to_replace(settings.out / name, lambda content, mark=mark: mark in content, "one of a demo's files",
                          settings.force, advice)
    # MMEngine logs much: that goes to a file, a line for each epoch to the console.
    with locked_folder(settings.out), open(settings.out / 'log.txt', 'a', encoding='utf-8') as log, \
            redirect_stdout(log), redirect_stderr(log):
        _train_and_compare(settings, console)


def _train_and_compare(settings: DemoSettings, console: Console) -> None:
    columns = (TextColumn('{task.description}', markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        data = _generate(settings, progress)
        config = _load_config(TEACHER_CONFIG, 'teacher', settings, settings.teacher_epochs)
        teacher = _train_once('teacher', config, data, progress)
        plain, distilled = [], []
        for seed in range(settings.seeds):
            name = f'plain student, seed {seed}'
            config = _load_config(PLAIN_CONFIG, f'plain_{seed}', settings, settings.epochs, seed)
            plain.append(_train_once(name, config, data, progress))
            name = f'distilled student, seed {seed}'
            config = _load_config(settings.config, f'distilled_{seed}', settings, settings.epochs, seed)
            config.model.teacher = dict(config=TEACHER_CONFIG, checkpoint=teacher.checkpoint)
            distilled.append(_train_once(name, config, [data, teacher.identity], progress))
    runs = dict(teacher=[teacher], plain=plain, distilled=distilled)
    summary = summarize(runs)
    console.print(tabulate_runs(runs, summary))
    plain_config = _load_config(PLAIN_CONFIG, 'plain', settings)
    teacher_config = _load_config(TEACHER_CONFIG, 'teacher', settings)
    configs = dict(teacher=teacher_config, plain=plain_config, distilled=plain_config)
    saved = [write_results(settings.out, runs, summary, data), *draw_pictures(settings.out, runs, configs)]
    console.print(f"Saved {', '.join(map(str, saved))}.", highlight=False)


def _generate(settings: DemoSettings, progress: Progress) -> dict:
    """Writes the data unless it is there; returns what decides it."""
    data = dict(train_images=settings.images, val_images=settings.val_images, size=settings.size)
    task = progress.add_task('data', total=None)
    written = generate_shapes(settings.out / 'data', **data,
                              progress=lambda done, total: progress.update(task, completed=done, total=total))
    progress.remove_task(task)
    kept = '' if written else ', kept from before'
    progress.console.print(f'data: {settings.images} + {settings.val_images} images of {settings.size} x '
                           f"{settings.size} pixels in {settings.out / 'data'}{kept}", highlight=False)
    return data


def _load_config(name: str, folder: str, settings: DemoSettings, epochs: int | None = None, seed: int = 0) -> Config:
    """Loads a config of the demo, on the generated data."""
    config = load_config(name)
    set_data_root(config, str(settings.out / 'data'))
    config.work_dir = str(settings.out / 'runs' / folder)
    set_seed(config, seed)
    if epochs is not None:
        set_epochs(config, epochs)
    return config


def _train_once(name: str, config: Config, inputs: Any, progress: Progress) -> Run:
    """Trains and evaluates, unless the same run was finished before."""
    identity = identify_run(config, inputs)
    kept = load_finished_run(Path(config.work_dir), identity,
                             lambda reason: progress.console.print(f'{reason} The run is done again.'))
    if kept is not None:
        progress.console.print(f"{name}: kept from before, mAP {100 * kept.metrics['bbox_mAP']:.1f}")
        return kept
    task = progress.add_task(name, total=None)
    run = train(name, config, identity, log=lambda text: progress.console.print(text, highlight=False),
                after_step=lambda runner: progress.update(task, advance=1, total=runner.max_iters))
    progress.remove_task(task)
    return run
