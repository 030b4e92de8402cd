"""Trainings as jobs of submitit's: where they run, how they end, and that none outlives the benchmark."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from submitit.core.utils import DelayedSubmission

from kd_det.compat.writing import WritingError, is_locked, locked_folder
from kd_det.config import ConfigurationError
from kd_det.study import scheduling, worker
from kd_det.study.identity import identify_run
from kd_det.study.runs import Run, load_finished_run, train
from kd_det.study.scheduling import Failure, Job, JobPool, allot_devices
from kd_det.study.worker import Training

ROOT = Path(__file__).parents[2]
only_here = pytest.mark.skipif(sys.platform == 'win32', reason="submitit's local executor needs POSIX")
# The program's third argument is the config in the job's folder, the fourth the identity.
FINISH = 'cp {result} $(dirname $3)/result.json; touch $(dirname $3)/last.pth $(dirname $3)/scalars.json'


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Makes jobs for whose training a shell script stands."""

    def make(script: str, number: int = 1):
        program = tmp_path / 'python'
        program.write_text(f'#!/bin/sh\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setattr(scheduling, 'WORKER', (str(program), '-m', 'kd_det.study.worker'))
        return [Job(f'job {index}', tmp_path / str(index), Config(dict(x=1)), []) for index in range(number)]

    return make


@pytest.fixture
def result(tmp_path):
    """The file of a result that the jobs above would leave."""
    identity = identify_run(Config(dict(x=1)), [])
    run = Run(identity, 'start', 'order', 'last.pth', 'scalars.json', dict(bbox_mAP=0.5), parameters=1, flops=None,
              seconds_per_iteration=0.1, peak_memory=None, peak_device_memory=None, epochs=1, iterations=2)
    (tmp_path / 'prepared.json').write_text(json.dumps(asdict(run)))
    return tmp_path / 'prepared.json'


def train_one(job: Job, **options) -> scheduling.Outcome:
    """What comes of a job that this process itself starts."""
    return JobPool(executor='debug', threads=1, **options).run([job], lambda text: None)[0]


def wait_for(file: Path) -> str:
    for _ in range(1000):
        if file.is_file() and file.read_text().endswith('\n'):
            return file.read_text()
        time.sleep(0.02)
    raise TimeoutError(file)


def has_ended(number: int) -> bool:
    for _ in range(200):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.kill(number, signal.SIGKILL)
    return False


# ---------------------------------------------------------------- on this machine


@only_here
def test_sigterm_ends_the_trainings(jobs, tmp_path):
    """Otherwise they would go on, and a second benchmark train beside them in the same folders."""
    file = tmp_path / 'pid'

    def send():
        wait_for(file)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sender, said = threading.Thread(target=send, daemon=True), []
    try:
        sender.start()
        with pytest.raises(SystemExit) as left:
            JobPool(jobs=1, threads=1).run(jobs(f'echo $$ > {file}; exec sleep 60', 2), said.append)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN  # as it was
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)
    assert said == ['job 0: begins']  # job 0 was ended, which is no failure; job 1 never began


@only_here
def test_trainings_at_once_see_a_device_each(jobs, monkeypatch):
    """Devices are numbers within what the process was given itself."""
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '4,5,6')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    # Each waits for the other to begin.
    wait = 'cd $(dirname $(dirname $3)); touch began$$; while [ $(ls | grep -c began) -lt 2 ]; do sleep 0.02; done'
    made = jobs(f'{wait}; echo "[$CUDA_VISIBLE_DEVICES] $OMP_NUM_THREADS"; exit 1', 2)
    outcomes = JobPool(['0', '2'], threads=1).run(made, lambda text: None)
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    assert {outcome.error for outcome in outcomes} == {'[4] 1', '[6] 1'}
    submitted, = (made[0].folder / 'job').glob('*_submitted.pkl')
    assert DelayedSubmission.load(submitted).function.owner == os.getpid()  # they end with it, see below


OWNER = """
import os, sys, time
from submitit import LocalExecutor
from kd_det.study.worker import Training
folder, file, log = sys.argv[1:]
executor = LocalExecutor(folder)
executor.update_parameters(timeout_min=60)
# What stands for the training ends as that does: with its input.
executor.submit(Training(('sh', '-c', f'echo $$ > {file}; exec cat'), log, {}, owner=os.getpid()))
time.sleep(60)
"""


@only_here
def test_no_training_is_left_when_the_benchmark_is_killed(tmp_path):
    """submitit's processes are made to survive who started them."""
    file = tmp_path / 'pid'
    owner = subprocess.Popen([sys.executable, '-c', OWNER, tmp_path / 'job', file, tmp_path / 'log.txt'],
                             env={**os.environ, 'PYTHONPATH': str(ROOT)})
    trains = int(wait_for(file))
    os.kill(trains, 0)  # it is there
    owner.kill()
    owner.wait(20)
    assert has_ended(trains)


@pytest.mark.parametrize('given, devices, expected', [
    ('as it was', (), 'as it was'), ('as it was', ('cpu', ), ''), (None, (), 'all'), (None, ('cpu', ), '')])
def test_without_numbers_a_training_sees_what_the_benchmark_sees_or_no_gpu(jobs, monkeypatch, given, devices, expected):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if given:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', given)
    job, = jobs('echo "[${CUDA_VISIBLE_DEVICES-all}]"; exit 1')
    executor = 'debug' if given or devices else 'local'  # which shows its jobs none
    outcome, = JobPool(devices, threads=1, executor=executor).run([job], lambda text: None)
    assert outcome.error == f'[{expected}]'


@pytest.mark.parametrize('allocated, devices, together, expected', [
    (None, ['0', '2'], 1, ['0', '2']),
    ('4,5,7', ['1'], 1, ['5']),
    ('4,5,7', ['2', 'cpu'], 1, ['7', 'cpu']),
    ('GPU-a, GPU-b,MIG-c', ['1', 'GPU-a'], 1, ['GPU-b', 'GPU-a']),
    ('4,5,7,8', ['3', '0', '1', '2'], 2, ['8,4', '5,7']),
    ('4,5,7', [], 2, []),
    ('4,5,7', ['3'], 1, 'numbers of GPUs from 0 to 2 (of CUDA_VISIBLE_DEVICES=4,5,7), or cpu, got '),
    (None, ['3'], 1, 'numbers of GPUs from 0 to 2, or cpu, got '),
    ('4,5,7', ['0', '1', '2'], 2, '--devices-per-run 2: there are 3 GPUs to deal out'),
    ('4,5,7', [], 4, '--devices-per-run 4: there are 3 GPUs'),
])
def test_devices_are_dealt_out_within_an_allocation(allocated, devices, together, expected, monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if allocated:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', allocated)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: len(allocated.split(',')) if allocated else 3)
    if isinstance(expected, list):
        assert allot_devices(devices, together) == expected
    else:
        with pytest.raises(ConfigurationError) as refused:
            allot_devices(devices, together)
        assert expected in str(refused.value)


def test_a_training_is_given_a_pipe_that_ends_with_its_job(jobs):
    job, = jobs('[ -p /dev/stdin ] && echo a pipe; exit 1')
    assert train_one(job).error == 'a pipe'


@pytest.mark.parametrize('script, error', [
    ('echo "Epoch 1"; kill -9 $$', 'ended by signal 9, perhaps for want of memory'),
    ('echo "Epoch 1"; kill -11 $$', 'ended by signal 11'),
    ('exit 3', 'exit status 3'),
    ('echo "Epoch 1"; exit 0', 'it left no result'),
    ("echo 'KeyError: x'; exit 1", 'KeyError: x'),
    # Of several processes, whose launcher has the last word.
    ("echo 'kd-det: error: out of memory'; echo 'kd-det: error: rank 0 is gone'; echo ChildFailedError; exit 1",
     'out of memory'),
])
def test_a_training_that_was_ended_is_not_told_by_its_last_line(script, error, jobs):
    job, = jobs(script)
    outcome = train_one(job)
    assert outcome.error == error and outcome.log == str(job.folder / 'log.txt')


@pytest.mark.parametrize('content', ['{\n  "identity": "', '{', '\0\0'])
def test_a_training_whose_result_is_cut_is_done_again(content, jobs, tmp_path):
    said, (job, ) = [], jobs('echo trained; exit 1')
    job.folder.mkdir()
    (job.folder / 'result.json').write_text(content)
    outcome, = JobPool(executor='debug', threads=1).run([job], said.append)
    assert outcome.error == 'trained' and said[0].startswith('job 0: ')
    assert said[0].endswith('The run is done again.') and 'result.json' in said[0]


def test_a_training_logs_to_the_trackers_under_its_method_and_seed(jobs, tmp_path, monkeypatch):
    job, = jobs('shift 4; echo "$@"; exit 1')
    assert train_one(job, trackers=['tensorboard', 'mlflow']).error == 'tensorboard mlflow'
    trained = []
    monkeypatch.setattr('kd_det.study.runs.train', lambda name, config, identity: trained.append(config))
    monkeypatch.setattr('kd_det.checks.doctor.check_config', lambda config, splits: None)
    monkeypatch.setattr('kd_det.training.runner.find_spec', lambda module: True)
    monkeypatch.setattr('kd_det.study.runs.use_fast_coco_evaluation', lambda: None)
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    Config(dict(work_dir=str(tmp_path / 'fgd' / 'seed0'))).dump(tmp_path / 'config.py')
    assert worker.main(str(tmp_path / 'config.py'), 'identity', 'wandb', 'mlflow') == 0
    local, wandb, mlflow = trained[0].visualizer.vis_backends
    assert (local.type, wandb.init_kwargs.name, mlflow.run_name) == ('LocalVisBackend', 'fgd/seed0', 'fgd/seed0')


@pytest.mark.parametrize('options, message', [
    (dict(executor='slrm'), '--executor slrm: .*slrm'),
    (dict(executor='slurm', slurm=dict(time=240)), '--executor slurm: .*srun'),
    (dict(executor='slurm'), 'how many minutes one training may take, such as with --slurm time=240.'),
    (dict(executor='slurm', slurm=dict(time='4:00:00')), "got '4:00:00'"),
    (dict(executor='slurm', slurm=dict(time=240), devices=['0']), 'which GPUs a job of slurm sees'),
    (dict(executor='debug', jobs=2), '--jobs 2: --executor debug trains one run after another'),
    (dict(slurm=dict(time=240)), '--slurm time: that is for --executor slurm, not for local'),
])
def test_executors_that_can_not_be_are_told_before_anything_is_trained(options, message, monkeypatch):
    monkeypatch.setenv('PATH', '/nowhere')
    with pytest.raises(ConfigurationError, match=message):
        JobPool(**options)


# ---------------------------------------------------------------- what is there


def test_finished_runs_are_kept_and_leave_no_files_of_submitits(jobs, result):
    said, (job, ) = [], jobs(FINISH.format(result=result))
    first, = JobPool(threads=1).run([job], said.append)
    again, = JobPool(threads=1).run([job], said.append)
    assert first == again and first.metrics == dict(bbox_mAP=0.5)
    assert said[0] == 'job 0: begins' and said[1].startswith('job 0: mAP 50.0, ')
    assert said[2] == 'job 0: kept from before, mAP 50.0' and len(said) == 3
    assert not (job.folder / 'job').exists()


def test_a_training_counts_that_fails_after_its_result(jobs, result):
    job, = jobs(f'{FINISH.format(result=result)}; kill -SEGV $$')
    assert train_one(job).metrics == dict(bbox_mAP=0.5)


HOLD = """
import sys, time
from kd_det.compat.writing import locked_folder
with locked_folder(sys.argv[1]):
    print('locked', flush=True)
    time.sleep(60)
"""


@only_here
def test_what_is_there_is_told_without_training(jobs, result, tmp_path):
    """Finished, failed, stopped, of other settings, at work, and never begun."""
    made = jobs(f'case $3 in */0/*) {FINISH.format(result=result)}; exit 0 ;; esac\n'
                'echo "kd-det: error: no memory"; exit 1', 6)
    JobPool(executor='debug', threads=1).run(made[:2], lambda text: None)
    for number, (file, content) in enumerate([('log.txt', 'Epoch 3'), ('result.json', '{"identity": "other"}')], 2):
        made[number].folder.mkdir()
        (made[number].folder / file).write_text(content)
    made[4].folder.mkdir()
    before = sorted(tmp_path.rglob('*'))
    with subprocess.Popen([sys.executable, '-c', HOLD, made[4].folder], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)}) as other:
        assert other.stdout.readline() == 'locked\n'
        said = []
        outcomes = JobPool(collect=True).run(made, said.append)
        with pytest.raises(WritingError, match='in use by another run'):
            with locked_folder(made[4].folder):
                pass
        other.terminate()
    assert not is_locked(made[4].folder)  # for who held it is gone
    assert [getattr(outcome, 'status', 'finished') for outcome in outcomes] == [
        'finished', 'failed', 'failed', 'missing', 'running', 'missing']
    assert [outcome.error for outcome in outcomes[1:3]] == ['no memory', 'it was stopped before its end']
    assert 'job 3: missing: The run that is there had other data, weights or settings' in said
    assert said[5] == 'job 5: missing: it has not been trained'
    assert {path for path in tmp_path.rglob('*') if path.name != '.kd_det.lock'} == set(before)


# ---------------------------------------------------------------- several processes


def test_batches_that_can_not_be_shared_are_told(tmp_path):
    job = Job('fgd, seed 0', tmp_path, Config(dict(train_dataloader=dict(batch_size=3))), [])
    with pytest.raises(ConfigurationError, match='fgd, seed 0 trains on batches of 3 images, which so many can not'):
        JobPool(devices_per_run=2, devices=['cpu']).run([job], print)


def test_two_processes_train_as_one_does_on_the_whole_batch(run_config, one_stage, tmp_path, monkeypatch):
    """Here on the CPU: the same images, batch by batch, and the same weights but for rounding.

    ATSS counts the boxes of all processes; of a RetinaNet each process counts its own, which is no whole batch.
    """
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    configs = []
    for name in ('one', 'two'):
        model = one_stage('atss')
        model.backbone.norm_eval = True  # of a share the statistics would be others
        model.test_cfg.update(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20)
        config = run_config(model, epochs=1, val=True)
        config.train_dataloader.dataset.pipeline[2].prob = 0.0  # each process would draw flips of its own
        for key in ('experiment_name', 'visualizer'):
            config.pop(key)
        config.work_dir = str(tmp_path / name)
        configs.append(config)
    one = train('one', configs[0], 'identity', log=lambda text: None)
    said, job = [], Job('two', tmp_path / 'two', configs[1], ['data'])
    two, = JobPool(['cpu'], threads=1, devices_per_run=2).run([job], said.append)
    assert isinstance(two, Run), (tmp_path / 'two' / 'log.txt').read_text()[-4000:]
    assert two.iterations == one.iterations and two.start == one.start and two.flops == one.flops
    assert two.identity != identify_run(job.config, job.inputs)  # random numbers of each process are its own
    assert two.environment['machine']['processes'] == 2 and 'processes' not in one.environment['machine']
    states = [torch.load(run.checkpoint, weights_only=True)['state_dict'] for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        torch.testing.assert_close(value, states[0][key], rtol=1e-4, atol=1e-5, msg=lambda said: f'{key}: {said}')
    assert two.metrics['bbox_mAP'] == pytest.approx(one.metrics['bbox_mAP'], abs=1e-3)


# ---------------------------------------------------------------- on a cluster


ASKED = dict(time=240, partition='gpu', cpus_per_task=4, **{'additional_parameters.reservation': 'mine'})


@only_here
def test_slurm_is_asked_for_what_was_said_and_runs_the_training(slurm, jobs, result):
    said, made = [], jobs(FINISH.format(result=result), 2)
    outcomes = JobPool(executor='slurm', slurm=ASKED).run(made, said.append)
    assert [outcome.metrics for outcome in outcomes] == [dict(bbox_mAP=0.5)] * 2, list(slurm.glob('*'))
    assert said[:2] == ['job 0: handed to slurm as job 1', 'job 1: handed to slurm as job 2']
    script = (slurm / 'script1').read_text()
    for line in ('--time=240', '--partition=gpu', '--cpus-per-task=4', '--reservation=mine', '--job-name=kd_det',
                 '--nodes=1'):
        assert f'#SBATCH {line}\n' in script
    assert '--gpus' not in script and str(made[0].folder / 'job') in script
    assert load_finished_run(made[0].folder, identify_run(made[0].config, [])) == outcomes[0]


@only_here
def test_slurm_gives_a_training_of_several_processes_as_many_gpus(slurm, jobs, monkeypatch):
    job, = jobs('exit 1')
    job = Job(job.name, job.folder, Config(dict(train_dataloader=dict(batch_size=4))), [])
    monkeypatch.setattr(scheduling, 'LAUNCHER', ('sh', '-c', 'echo "$@ $OMP_NUM_THREADS"; exit 1', 'launcher'))
    outcome, = JobPool(executor='slurm', slurm=dict(time=5), devices_per_run=2).run([job], lambda text: None)
    assert '#SBATCH --gpus-per-node=2\n' in (slurm / 'script1').read_text()
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert outcome.error.startswith('--nproc_per_node=2 -m kd_det.study.worker ')
    assert outcome.error.endswith(f' {threads}')


@only_here
@pytest.mark.parametrize('name', ['partitoin', 'devices'])
def test_what_slurm_is_not_asked_for_is_told(name, slurm):
    with pytest.raises(ConfigurationError, match=f"--executor slurm: .*'{name}'.*partition"):
        JobPool(executor='slurm', slurm={'time': 5, name: 'gpu'})


@only_here
def test_a_benchmark_finds_the_jobs_that_a_killed_one_left_to_slurm(slurm, jobs, result, tmp_path):
    go = tmp_path / 'go'
    job, = jobs(f'while [ ! -f {go} ]; do sleep 0.05; done; {FINISH.format(result=result)}')
    JobPool(executor='slurm', slurm=dict(time=5))._submit(job)  # and it is killed
    for executor in ('slurm', 'local'):  # to collect needs no word of where it trained
        collected, = JobPool(executor=executor, collect=True).run([job], lambda text: None)
        assert collected.status == 'running'
    with pytest.raises(ConfigurationError, match='job 0: slurm has it still, as job 1. Go on with --executor slurm'):
        JobPool(executor='debug', threads=1, force=True).run([job], print)  # two would write into one folder
    said = []

    def log(text: str) -> None:
        said.append(text)
        go.touch()

    outcome, = JobPool(executor='slurm', slurm=dict(time=5)).run([job], log)
    assert said[0] == 'job 0: slurm has it still, as job 1' and outcome.metrics == dict(bbox_mAP=0.5)
    assert not (slurm / 'script2').exists()


@only_here
def test_jobs_of_slurm_are_cancelled_with_the_benchmark(slurm, jobs, tmp_path):
    file = tmp_path / 'pid'

    def log(text: str) -> None:
        wait_for(file)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        JobPool(executor='slurm', slurm=dict(time=5)).run(jobs(f'echo $$ > {file}; exec cat', 2), log)
    assert (slurm / 'cancelled').read_text() == '1\n' and not (slurm / 'script2').exists()
    assert has_ended(int(file.read_text()))


@only_here
def test_a_job_that_has_used_up_its_time_is_not_put_back(slurm, jobs, tmp_path):
    """It would begin anew, and be ended again."""
    file, (job, ) = tmp_path / 'pid', jobs(f'echo $PPID > {tmp_path / "pid"}; exec sleep 60')

    def log(text: str) -> None:
        if 'handed' in text:
            os.kill(int(wait_for(file)), signal.SIGUSR2)  # as Slurm tells it

    outcome, = JobPool(executor='slurm', slurm=dict(time=5)).run([job], log)
    assert outcome.error.startswith('job 1: ') and 'Job not requeued because: timed-out too many' in outcome.error
    assert not (slurm / 'requeued').exists()


@only_here
def test_a_preempted_job_trains_anew(tmp_path):
    """By submitit's own local executor, which puts back into its queue as Slurm does."""
    from submitit import LocalExecutor
    executor, file = LocalExecutor(tmp_path / 'job'), tmp_path / 'runs'
    executor.update_parameters(timeout_min=60)
    script = f'echo $PPID >> {file}; [ $(wc -l < {file}) = 2 ] && exit 7; exec sleep 60'
    training = Training(('sh', '-c', script), str(tmp_path / 'log.txt'), {})
    job = executor.submit(training)
    os.kill(int(wait_for(file)), signal.SIGUSR2)  # as Slurm tells it
    assert job.result() == 7 and len(file.read_text().splitlines()) == 2
    assert training.checkpoint().function == training
