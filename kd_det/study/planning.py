"""What fits into a budget of time: how long each training takes, and which seeds are trained.

How long, finished runs tell; without any a trial of a few steps does, in the folder ``trials``, which is removed.
"""
from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from math import ceil
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mmdet.registry import DATASETS
from mmengine.config import Config

from kd_det.compat.console import TextTable
from kd_det.config import ConfigurationError
from kd_det.config.files import list_leaf_datasets
from kd_det.config.options import set_epochs
from kd_det.registry import get_scope, within_scope
from kd_det.study.runs import RESULT_FILE, Run, check_run, read_json
from kd_det.study.scheduling import Failure, Job, JobPool

TRIALS = 'trials'
TRIAL_STEPS = 10  # of training, and of validation
STARTUP = 8.0  # seconds until a process trains: its imports, and the reading of the config


class Estimate(NamedTuple):
    """How long a training takes.

    Attributes:
        seconds: About so long, its process's start among them.
        source: What tells.
    """
    seconds: float
    source: str

    def stretch(self, factor: float) -> Estimate:
        """That of a training so many times as long."""
        return self._replace(seconds=factor * self.seconds)


@dataclass(frozen=True)
class Plan:
    """Which seeds are trained.

    Attributes:
        budget: In seconds.
        estimates: Teacher or method, with its data set where there are several, -> how long one training takes.
        before: Seconds for what comes before the first seed: trials that were made, and teachers to be trained.
        needed: Seed -> seconds that its trainings take, those that have finished left out.
        left: Seed -> how many these are.
    """
    budget: float
    estimates: Mapping[str, Estimate]
    before: float
    needed: Mapping[int, float]
    left: Mapping[int, int]

    @property
    def total(self) -> float:
        """Seconds that all seeds would take."""
        return self.before + sum(self.needed.values())

    @property
    def fitting(self) -> list[int]:
        """The seeds that fit, in order, each with all its trainings; one for which nothing is to be trained fits."""
        fitting, total = [], self.before
        for seed, seconds in self.needed.items():
            if total + seconds <= self.budget or not seconds:
                fitting.append(seed)
                total += seconds
        return fitting

    def tabulate(self) -> list[TextTable]:
        """Makes the tables: how long a training takes, and which seeds fit."""
        rows, total, fitting = [], self.before, self.fitting
        for seed, seconds in self.needed.items():
            total += seconds
            rows.append((f'{seed}', f'{self.left[seed]}', format_duration(seconds), format_duration(total),
                         'yes' if seed in fitting else 'no'))
        return [
            TextTable('How long one training takes, about', ('of', 'takes', 'by'),
                      [(name, format_duration(each.seconds), each.source) for name, each in self.estimates.items()],
                      words=(0, 2)),
            TextTable(f'What fits into {format_duration(self.budget)}',
                      ('seed', 'trainings', 'take', 'together', 'fits'), rows,
                      f'Together: with what comes before the first seed, {format_duration(self.before)}')]


def format_duration(seconds: float) -> str:
    """Writes a time as a reader would say it.

    Example:
        >>> format_duration(7.2), format_duration(90), format_duration(7200), format_duration(9000)
        ('7 s', '2 min', '2 h', '2 h 30 min')
    """
    if seconds < 59.5:
        return f'{seconds:.0f} s'
    hours, minutes = divmod(round(seconds / 60), 60)
    return ' '.join(filter(None, [f'{hours} h' if hours else '', f'{minutes} min' if minutes else '']))


def estimate_by_runs(job: Job) -> Estimate | None:
    """How long a training takes, by those that have finished in its folder, or from other seeds; None where none has.

    Runs of another length count by their share of the epochs, or iterations.
    """
    seconds = []
    for file in {job.folder / RESULT_FILE, *job.folder.parent.glob(f'seed*/{RESULT_FILE}')}:
        with suppress(ConfigurationError):  # what can not be read tells nothing
            stored = read_json(file)
            check_run(stored)
            took = stored.get('seconds') or stored['iterations'] * stored['seconds_per_iteration']
            seconds.append(took * read_length(job.config) / max(stored[count_by(job.config)], 1))
    count = len(seconds)
    return Estimate(median(seconds) + STARTUP, f"{count} finished run{'s' * (count > 1)}") if seconds else None


def read_length(config: Config) -> int:
    """For how many epochs a config trains, or iterations, where it counts these."""
    return config.train_cfg.get('max_epochs') or config.train_cfg.get('max_iters') or 1


def count_by(config: Config) -> str:
    """What a config's length counts: ``'epochs'`` or ``'iterations'``."""
    return 'epochs' if config.train_cfg.get('max_epochs') else 'iterations'


def run_trials(jobs: Sequence[Job], pool: JobPool, root: Path, log: Callable[[str], None]) -> list[Run | Failure]:
    """Trains a few steps of each job, in the folder ``trials`` of a work dir; see :func:`estimate_by_trial`."""
    trials = [replace(job, name=f'{job.name}: trial of {TRIAL_STEPS} steps', config=make_trial(job.config),
                      folder=root / TRIALS / f'{index}_{job.folder.parent.name}_{job.folder.name}')
              for index, job in enumerate(jobs)]
    for trial in trials:
        shutil.rmtree(trial.folder, ignore_errors=True)  # of one that was interrupted
    return pool.run(trials, log)


def make_trial(config: Config) -> Config:
    """The config of a few steps of a training, and of as many of its validation."""
    config = copy.deepcopy(config)
    for loader in (config.train_dataloader, config.val_dataloader):
        for leaf in list_leaf_datasets(loader.dataset):
            leaf['indices'] = TRIAL_STEPS * loader.batch_size  # the first images
    if count_by(config) == 'epochs':
        set_epochs(config, 1)
    else:
        config.train_cfg.max_iters = config.train_cfg.val_interval = TRIAL_STEPS
    hooks = dict(config.get('default_hooks') or {})
    hooks['logger'] = dict(hooks.get('logger') or dict(type='LoggerHook'), interval=TRIAL_STEPS)
    if 'distill' in hooks:  # a teacher of a few steps would not be let through
        hooks['distill'] = dict(hooks['distill'], preflight=None)
    config.default_hooks = hooks
    return config


def count_images(config: Config) -> tuple[int, int]:
    """The images of a training epoch and of a validation."""
    with within_scope(get_scope(config)), redirect_stdout(StringIO()):  # of pycocotools
        training, validation = (len(DATASETS.build(copy.deepcopy(config[f'{split}_dataloader'].dataset)))
                                for split in ('train', 'val'))
    return training, validation


def estimate_by_trial(config: Config, trial: Run | Failure, images: tuple[int, int]) -> Estimate:
    """How long a training takes, by a trial of it.

    Its steps and validations take as long as those of the trial, with the loading of their images; and what the trial
    did beside them, such as reading the data and the weights, takes as long again.

    Args:
        config: That trains.
        trial: What came of its trial.
        images: See :func:`count_images`.
    """
    if isinstance(trial, Failure):
        return Estimate(0.0, f'its trial failed: {trial.error}')
    training, validating = _read_pace(Path(trial.scalars))
    step = trial.seconds_per_iteration + training
    steps, batches = (ceil(count / config[f'{split}_dataloader'].batch_size)
                      for count, split in zip(images, ('train', 'val')))
    length, of_epochs = read_length(config), count_by(config) == 'epochs'
    cycle = config.train_cfg.get('val_interval') or (1 if of_epochs else 1000)  # as MMEngine's loops have it
    iterations = length * steps if of_epochs else length
    rest = (trial.seconds or 0.0) - trial.iterations * step - min(batches, TRIAL_STEPS) * validating
    seconds = max(rest, 0.0) + iterations * step + ceil(length / cycle) * batches * validating
    return Estimate(seconds + STARTUP, f'a trial of {trial.iterations} steps')


def _read_pace(scalars: Path) -> tuple[float, float]:
    """Seconds that a training step waits for its images, and that a step of validation takes, by a run's log."""
    waiting = validating = 0.0
    for line in scalars.read_text(encoding='utf-8').splitlines():
        logged = json.loads(line)
        if 'loss' in logged:
            waiting = logged.get('data_time', 0.0)
        else:
            validating = logged.get('time', 0.0)
    return waiting, validating
