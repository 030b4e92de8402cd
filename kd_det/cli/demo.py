"""``kd-det demo``: distillation at work on generated data, from nothing to a table and pictures."""
from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Dict, List

from mmengine.config import Config
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kd_det import __version__
from kd_det.cli.demo_report import draw_pictures, results_table, summarize
from kd_det.cli.demo_run import Run, finished_run, train_run
from kd_det.configuration import load_config, set_data_root
from kd_det.datasets import generate_shapes

TEACHER_CONFIG = 'kd_det::demo/teacher_faster_rcnn_r101.py'
PLAIN_CONFIG = 'kd_det::demo/baseline_faster_rcnn_r18.py'
DISTILLED_CONFIG = 'kd_det::demo/fgd_faster_rcnn_r101_r18.py'


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--out', type=Path, default=Path('demo'), metavar='DIR',
                        help='folder of data, runs, results and pictures (demo)')
    parser.add_argument('--seeds', type=_positive, default=1, metavar='N',
                        help='train both students N times, from seeds 0 to N - 1, with one teacher (1)')
    parser.add_argument('--epochs', type=_positive, metavar='N', help="epochs of the students (their config's)")
    parser.add_argument('--teacher-epochs', type=_positive, metavar='N', help="epochs of the teacher (its config's)")
    parser.add_argument('--images', type=_positive, default=240, metavar='N', help='training images (240)')
    parser.add_argument('--val-images', type=_positive, default=80, metavar='N', help='validation images (80)')
    parser.add_argument('--size', type=_positive, default=128, metavar='PIXELS', help='height and width of the images (128)')
    parser.add_argument('--config', default=DISTILLED_CONFIG, metavar='CONFIG',
                        help=f'how the distilled student learns ({DISTILLED_CONFIG})')


def run(options: Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    # The trainings log much: that goes to a file, and one line an epoch to the console.
    with open(options.out / 'log.txt', 'a', encoding='utf-8') as log, redirect_stdout(log), redirect_stderr(log):
        _demo(options, console)
    return 0


def _demo(options: Namespace, console: Console) -> None:
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        data = _generate(options, progress)
        teacher = _train_once('teacher', _config(TEACHER_CONFIG, options, options.teacher_epochs), data, progress)
        plain, distilled = [], []
        for seed in range(options.seeds):
            config = _config(PLAIN_CONFIG, options, options.epochs, seed)
            plain.append(_train_once(f'plain_seed{seed}', config, data, progress))
            config = _config(options.config, options, options.epochs, seed)
            config.model.teacher.update(config=TEACHER_CONFIG, checkpoint=str(teacher.checkpoint))
            distilled.append(_train_once(f'distilled_seed{seed}', config, [data, teacher.identity], progress))
            if plain[-1].start != distilled[-1].start:
                raise RuntimeError(f'The two students of seed {seed} did not start from the same weights, so they can not be '
                                   f'compared. Does {options.config} start its student otherwise?')
    runs = dict(teacher=[teacher], plain=plain, distilled=distilled)
    console.print(results_table(runs))
    summary = summarize(runs)
    console.print(summary['text'])
    pictures = draw_pictures(options.out, runs, dict(teacher=TEACHER_CONFIG, plain=PLAIN_CONFIG, distilled=PLAIN_CONFIG))
    _write_results(options.out / 'results.json', runs, summary, data)
    console.print(f"Saved {', '.join(str(path) for path in [options.out / 'results.json', *pictures])}")
