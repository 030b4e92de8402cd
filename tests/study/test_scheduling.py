"""Trainings in processes of their own: where they run, and that none outlives the benchmark."""
import os
import signal
import sys
import threading
import time

import pytest
import torch
from mmengine.config import Config

from kd_det.study import worker
from kd_det.study.scheduling import Failure, Job, JobPool


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Makes jobs for whose training a shell script stands."""

    def make(script: str, number: int):
        program = tmp_path / 'python'
        program.write_text(f'#!/bin/sh\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setattr(sys, 'executable', str(program))
        return [Job(f'job {index}', tmp_path / str(index), Config(dict(x=1)), []) for index in range(number)]

    return make


@pytest.mark.skipif(sys.platform == 'win32', reason='SIGTERM ends a process there without a word')
def test_sigterm_ends_the_trainings(jobs, tmp_path, monkeypatch):
    """Otherwise they would go on, and a second benchmark train beside them in the same folders."""
    file = tmp_path / 'pid'

    def send():
        while not (file.is_file() and file.read_text().endswith('\n')):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sender, said = threading.Thread(target=send, daemon=True), []
    try:
        sender.start()
        with pytest.raises(SystemExit) as left:
            JobPool(jobs=1, threads=1).run(jobs(f'echo $$ > {file}; exec sleep 20', 2), said.append)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # as it was
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    assert said == ['job 0: begins']  # job 0 was ended, which is no failure; job 1 never began


@pytest.mark.parametrize('devices, at_once, expected', [
    (('0', '2'), 2, {'0', '2'}),
    (('3', ), 2, {'3'}),
    (('cpu', ), 1, {''}),
    ((), 1, {'as it was'}),
])
def test_each_training_sees_its_device_alone(jobs, monkeypatch, devices, at_once, expected):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'as it was')
    # Of two at once each waits for the other to begin; the third argument is the config in the job's folder.
    wait = ('cd $(dirname $(dirname $3)); touch began$$; '
            f'while [ $(ls | grep -c began) -lt {at_once} ]; do sleep 0.02; done')
    outcomes = JobPool(devices, at_once, threads=1).run(
        jobs(f'{wait}; echo "[$CUDA_VISIBLE_DEVICES] $OMP_NUM_THREADS"; exit 1', 2), lambda text: None)
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    assert {outcome.error for outcome in outcomes} == {f'[{device}] 1' for device in expected}


def test_a_training_is_given_a_pipe_that_ends_with_the_benchmark(jobs):
    outcome, = JobPool(threads=1).run(jobs('[ -p /dev/stdin ] && echo a pipe; exit 1', 1), lambda text: None)
    assert outcome.error == 'a pipe'


@pytest.mark.parametrize('script, error', [
    ('echo "Epoch 1"; kill -9 $$', 'ended by signal 9, perhaps for want of memory'),
    ('echo "Epoch 1"; kill -11 $$', 'ended by signal 11'),
    ('exit 3', 'exit status 3'),
    ('echo "Epoch 1"; exit 0', 'it left no result'),
    ("echo 'KeyError: x'; exit 1", 'KeyError: x'),
])
def test_a_training_that_was_ended_is_not_told_by_its_last_line(script, error, jobs):
    outcome, = JobPool(threads=1).run(jobs(script, 1), lambda text: None)
    assert outcome.error == error


@pytest.mark.parametrize('content', ['{\n  "identity": "', '{', '\0\0'])
def test_a_training_whose_result_is_cut_is_done_again(content, jobs, tmp_path):
    said, made = [], jobs('echo trained; exit 1', 1)
    (tmp_path / '0').mkdir()
    (tmp_path / '0' / 'result.json').write_text(content)
    outcome, = JobPool(threads=1).run(made, said.append)
    assert outcome.error == 'trained' and said[0].endswith('The run is done again.') and 'result.json' in said[0]


def test_a_training_logs_to_the_trackers_under_its_method_and_seed(jobs, tmp_path, monkeypatch):
    outcome, = JobPool(threads=1, trackers=['tensorboard', 'mlflow']).run(
        jobs('shift 4; echo "$@"; exit 1', 1), lambda text: None)
    assert outcome.error == 'tensorboard mlflow'
    trained = []
    monkeypatch.setattr(worker, 'train', lambda name, config, identity: trained.append(config))
    monkeypatch.setattr(worker, 'check_config', lambda config, splits: None)
    monkeypatch.setattr('kd_det.training.runner.find_spec', lambda module: True)
    monkeypatch.setattr(worker, 'use_fast_coco_evaluation', lambda: None)
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    Config(dict(work_dir=str(tmp_path / 'fgd' / 'seed0'))).dump(tmp_path / 'config.py')
    assert worker.main(str(tmp_path / 'config.py'), 'identity', 'wandb', 'mlflow') == 0
    local, wandb, mlflow = trained[0].visualizer.vis_backends
    assert (local.type, wandb.init_kwargs.name, mlflow.run_name) == ('LocalVisBackend', 'fgd/seed0', 'fgd/seed0')
