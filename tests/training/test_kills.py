"""A run that is killed at any moment, and resumed, ends where the uninterrupted one does; so does a benchmark.

SIGKILL comes from within, at points that are counted: before a step, in the middle of a file, before and after it gets
its name, before an old one goes, while a line is logged, in a validation. ``make soak`` sends it from outside.
"""
import builtins
import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmdet.models import SingleStageDetector
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.visualization import vis_backend

import kd_det
from kd_det.compat import writing
from kd_det.config.files import load_config
from kd_det.distillers import DetectionDistiller
from kd_det.study.runs import train
from kd_det.study.worker import Training
from kd_det.training.pictures import read_scalars

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a process to kill')


class Killer:
    """Kills this process at the n-th moment of a kind; at none where n is 0."""

    def __init__(self, kind: str = '', n: int = 0) -> None:
        self.kind, self.left = kind, n

    def pass_(self, kind: str) -> None:
        self.left -= kind == self.kind
        if kind == self.kind and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, kind: str, owner, name: str) -> None:
        """Makes the beginning and the end of a call such moments."""
        function = getattr(owner, name)

        def call(*args, **kwargs):
            self.pass_(kind)
            returned = function(*args, **kwargs)
            self.pass_(kind)
            return returned

        setattr(owner, name, call)

    def within_files(self, kind: str, module) -> None:
        """Makes the middle of all that a module writes at once such a moment."""

        def open_(*args, **kwargs):
            file = builtins.open(*args, **kwargs)
            write = file.write
            return Halves(file, lambda data: (write(data[:len(data) // 2]), file.flush(), self.pass_(kind),
                                              write(data[len(data) // 2:])))

        module.open = open_

    def install(self) -> None:
        self.within_files('save', writing)
        self.within_files('log', vis_backend)
        for kind, owner, name in (('save', os, 'replace'), ('save', os, 'fsync'), ('save', Path, 'unlink'),
                                  ('cache', Path, 'write_bytes'), ('cache', Path, 'write_text'),
                                  ('step', DetectionDistiller, 'loss'), ('validation', SingleStageDetector, 'predict'),
                                  ('validation', LoggerHook, 'after_val_epoch')):
            self.around(kind, owner, name)


# Of each kind as many as pass in one epoch, more or less.
MOMENTS = dict(step=4, save=30, validation=6, log=60, cache=12)


def draw_moments(number: int, seed: int) -> list[tuple[str, int]]:
    draw = random.Random(seed)
    kinds = [list(MOMENTS)[index % len(MOMENTS)] for index in range(number)]
    draw.shuffle(kinds)
    return [(kind, draw.randint(1, MOMENTS[kind])) for kind in kinds]


class Halves:

    def __init__(self, file, write: Callable) -> None:
        self._file, self.write = file, write

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self._file.close()


def run_killed(function: Callable[[], object], *moment: str | int) -> bool:
    """Runs a function in a process of its own, which is killed at this moment; tells whether it came to its end."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Killer(*moment).install()
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), 'it failed by itself: see the traceback above'
    return status == 0


def kill_until_done(function: Callable[[bool], object], moments: list[tuple[str, int]]) -> int:
    """Runs and resumes a function, killing it at these moments, then lets it end; returns how often it was killed."""
    killed = 0
    for moment in moments:
        if run_killed(lambda: function(True), *moment):
            return killed
        killed += 1
    assert run_killed(lambda: function(True))
    return killed


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Spares each process what costs most of its start: the layout of the configs that are saved, and collections."""
    monkeypatch.setattr('mmengine.config.config.FormatCode', lambda text, **_: (text, True))
    monkeypatch.setattr('mmengine.dataset.base_dataset.gc.collect', lambda: 0)
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def teacher(retinanet, tmp_path):
    Config(dict(default_scope='mmdet', model=retinanet(neck=12))).dump(tmp_path / 'teacher.py')
    torch.save(dict(state_dict=MODELS.build(retinanet(neck=12)).state_dict()), tmp_path / 'teacher.pth')
    return str(tmp_path / 'teacher.py'), str(tmp_path / 'teacher.pth')


@pytest.fixture
def trained(retinanet, run_config, teacher, tmp_path):
    """Trains with EMA, Balance, a cache and a best checkpoint, within the work dir of this name."""
    file, checkpoint = teacher

    def run(name: str, resume: bool) -> None:
        cache = dict(dir=str(tmp_path / f'{name}_cache'), dtype='float32')
        model = dict(type='DetectionDistiller', student=retinanet(),
                     teacher=dict(config=file, checkpoint=checkpoint, cache=cache),
                     distill=dict(fgd=dict(type='FGD', alpha=1e-2, weight=dict(type='Balance', ratio=0.5, interval=2))))
        config = run_config(model, epochs=2, val=True, name=name, log_level='ERROR',
                            custom_hooks=[dict(type='EMAHook', momentum=0.3)],
                            visualizer=dict(vis_backends=[dict(type='LocalVisBackend')]),
                            **{'default_hooks.checkpoint': dict(max_keep_ckpts=1, save_best='coco/bbox_mAP'),
                               'default_hooks.logger': dict(type='LoggerHook', interval=1)})
        kd_det.train(config, resume=resume)

    return run


PARTS = ('state_dict', 'ema_state_dict', 'distill', 'optimizer', 'param_schedulers')


def assert_same(first, second, where: str = '') -> None:
    assert type(first) is type(second), where
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f'{where}.{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second)):
            assert_same(*pair, f'{where}[{index}]')
    else:
        assert first == second or first != first and second != second, where


def outcome(folder: Path) -> tuple:
    """The weights that a run has left behind, by file, and what it has logged, without times."""
    files = sorted(file.name for file in folder.glob('*') if file.is_file() and file.suffix != '.py')
    weights = {file.name: {part: saved[part] for part in PARTS if part in saved}
               for file in folder.glob('*.pth') for saved in [torch.load(file, weights_only=True)]}
    logged = read_scalars(sorted(folder.glob('*/vis_data/scalars.json')))
    logged = {name: values for name, values in logged.items()
              if 'time' not in name and name not in ('memory', 'kd_memory')}
    return files, weights, logged


def test_a_run_that_is_killed_at_any_moment_ends_as_the_uninterrupted_one(trained, tmp_path):
    assert run_killed(lambda: trained('straight', False))
    expected = outcome(tmp_path / 'straight')
    assert [file for file in expected[0] if file.startswith('epoch')] == ['epoch_2.pth']
    assert kill_until_done(lambda resume: trained('killed', resume), draw_moments(5, seed=13)) == 5
    assert_same(outcome(tmp_path / 'killed'), expected)


@pytest.fixture
def benchmarked(retinanet, run_config, teacher, monkeypatch):
    """Benchmarks a plain and a distilled student in this work dir, each trained in this process."""

    def train_here(training):
        config, identity = training.command[-2:]
        train('run', load_config(config), identity, log=lambda text: None)
        return 0

    monkeypatch.setattr(Training, '__call__', train_here)
    student = run_config(retinanet(), epochs=1, val=True, custom_hooks=[dict(type='EMAHook')], log_level='ERROR')
    for key in ('work_dir', 'experiment_name', 'visualizer'):
        student.pop(key)
    student.default_hooks.pop('distill')
    return lambda folder: kd_det.benchmark(
        student=student, teacher=teacher[0], teacher_checkpoints=[teacher[1]], methods='none,fgd', seeds=1, threads=1,
        work_dir=folder, executor='debug', options={'default_hooks.distill.preflight': None}, log=lambda text: None)


def test_a_benchmark_that_is_killed_at_any_moment_ends_as_the_uninterrupted_one(benchmarked, tmp_path):
    straight, killed = tmp_path / 'straight', tmp_path / 'killed'
    assert run_killed(lambda: benchmarked(straight))
    assert kill_until_done(lambda _: benchmarked(killed), [('save', 13), ('save', 9)]) == 2
    read = [json.loads((folder / 'results.json').read_text()) for folder in (straight, killed)]
    for first, second in zip(*(results['runs'] for results in read), strict=True):
        for name in ('variant', 'status', 'identity', 'start', 'order', 'metrics', 'checkpoint'):
            assert first[name] == second[name], name
        states = [torch.load(folder / first['checkpoint'], weights_only=True) for folder in (straight, killed)]
        assert_same(*({part: state[part] for part in PARTS if part in state} for state in states))
    assert_same(read[0]['summary'], read[1]['summary'])
    assert not list(killed.rglob('*.partial'))
