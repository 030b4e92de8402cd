"""Trainings as jobs of submitit's: processes of this machine, several at once, or jobs of a cluster."""
from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from mmengine.config import Config

from kd_det.compat.process import count_processors, sigterm_raises, unheard_interrupts
from kd_det.compat.writing import is_locked, refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.study.identity import identify_run
from kd_det.study.runs import RESULT_FILE, Run, load_finished_run
from kd_det.study.worker import ERROR, Training

if TYPE_CHECKING:
    import submitit

LOG_FILE, CONFIG_FILE = 'log.txt', 'config.py'
JOB_FOLDER = 'job'  # submitit's own files of a run, until it has finished
OTHER_FOLDER = 'Give another --work-dir, or train over it with --force.'
WORKER = (sys.executable, '-m', 'kd_det.study.worker')
# Of one machine; every port is free for each.
LAUNCHER = (sys.executable, '-m', 'torch.distributed.run', '--standalone')
UNLIMITED = 60 * 24 * 365  # minutes; submitit's own limit is two
POLLING = dict(local=0.1, debug=0.0)  # seconds between two looks at the jobs
CLUSTER_POLLING, FILE_DELAY = 1.0, 20.0  # of a cluster; and how long a file may need to be seen from another machine
WAITING = ('PENDING', 'RUNNING', 'REQUEUED', 'COMPLETING', 'CONFIGURING', 'SUSPENDED')  # Slurm's words for jobs


@dataclass(frozen=True)
class Job:
    """A training to be done.

    Attributes:
        name: Shown to the user.
        folder: Its work dir.
        config: Its config.
        inputs: What the result depends on beside the config, see :func:`~kd_det.study.identity.identify_run`.
    """
    name: str
    folder: Path
    config: Config
    inputs: Sequence[Any]


@dataclass(frozen=True)
class Failure:
    """Why there is no result of a training.

    Attributes:
        error: The line of its log that tells why it ended, or what else is known.
        log: The file of its log; empty where it has none.
        status: Of a training that was only asked for (``collect``) it may also be that it runs, or never ran.
    """
    error: str
    log: str
    status: Literal['failed', 'running', 'missing'] = 'failed'


Outcome = Run | Failure


@dataclass(frozen=True)
class Submission:
    """A training that was handed to submitit, and what to tell of it."""
    job: submitit.Job
    slot: str | None
    start_time: float
    said: str


class JobPool:
    """Has submitit run trainings, and waits for them.

    Args:
        devices: Of this machine: one training at a time on each, or on as many as it takes; numbers of GPUs among those
            that ``CUDA_VISIBLE_DEVICES`` names, or ``cpu``. Without any a training sees what this process sees.
        jobs: Trainings at once. On this machine as many as the devices are enough for by default, dealt out in turn; on
            a cluster all of them, as its queue lets them.
        threads: PyTorch's threads of each process; those of the machine divided by the processes by default.
        trackers: Where trainings log too, see :func:`~kd_det.training.runner.add_trackers`; no part of their identity.
        force: Train over finished runs of another identity.
        executor: One of submitit's: ``'local'``, ``'slurm'`` or a plugin's; ``'debug'`` trains one after another, and
            needs nothing of the system.
        slurm: What Slurm is asked for, by submitit's names: ``partition``, ``time`` in minutes, …
        devices_per_run: Processes that train a run together, a GPU each; they share each batch.
        collect: Train nothing: only say what there is.

    Raises:
        ConfigurationError: There is no such executor, device or parameter; or they do not fit together.
    """

    def __init__(self, devices: Sequence[str] = (), jobs: int | None = None, threads: int | None = None,
                 trackers: Sequence[str] = (), force: bool = False, executor: str = 'local',
                 slurm: Mapping[str, Any] | None = None, devices_per_run: int = 1, collect: bool = False) -> None:
        self.executor, self.processes = executor, devices_per_run
        self.trackers, self.force, self.collect = trackers, force, collect
        self.is_local = executor in ('local', 'debug')
        if devices and not self.is_local:
            raise ConfigurationError(f"--devices {','.join(devices)}: which GPUs a job of {executor} sees is for that "
                                     'to choose. Leave the option out; --devices-per-run says how many.')
        if executor == 'debug' and jobs not in (None, 1):
            raise ConfigurationError(f'--jobs {jobs}: --executor debug trains one run after another.')
        slots = allot_devices(devices, devices_per_run) if self.is_local else []
        self.jobs = 1 if executor == 'debug' else jobs or (max(1, len(slots)) if self.is_local else None)
        self.slots = deque(slots[index % len(slots)] if slots else None for index in range(self.jobs or 0))
        self.threads = threads
        if threads is None and self.jobs is not None and self.is_local:
            self.threads = max(1, count_processors() // (self.jobs * devices_per_run))
        self.parameters = {} if collect else self._set_parameters(slurm or {})
        if not collect:
            with TemporaryDirectory() as folder:
                self._open(Path(folder))

    def _set_parameters(self, slurm: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of submitit's executor, by the names that it has for all of them."""
        if self.executor != 'slurm':
            if slurm:
                raise ConfigurationError(f"--slurm {', '.join(slurm)}: that is for --executor slurm, not for "
                                         f'{self.executor}.')
            return dict(timeout_min=UNLIMITED) if self.is_local else {}
        minutes = slurm.get('time', slurm.get('timeout_min'))
        if not isinstance(minutes, int):
            raise ConfigurationError('--executor slurm: say how many minutes one training may take, such as with '
                                     f"--slurm time=240{'' if minutes is None else f', got {minutes!r}'}.")
        prefix = 'additional_parameters.'
        further = {name.removeprefix(prefix): value for name, value in slurm.items() if name.startswith(prefix)}
        parameters: dict[str, Any] = dict(job_name='kd_det', **(dict(additional_parameters=further) if further else {}),
                                          **(dict(gpus_per_node=self.processes) if self.processes > 1 else {}))
        parameters.update((name, value) for name, value in slurm.items() if not name.startswith(prefix))
        return {f'slurm_{name}': value for name, value in parameters.items()}

    def _open(self, folder: Path) -> submitit.AutoExecutor:
        """Makes the executor that keeps its files in a folder."""
        from submitit import AutoExecutor
        if self.executor == 'local' and sys.platform == 'win32':
            raise ConfigurationError("--executor local: submitit's does not run on Windows. Give --executor debug, "
                                     'which trains one run after another.')
        try:
            # A job that has used up its time would do so again: it is put back only when it was preempted.
            executor = AutoExecutor(folder, cluster=self.executor, slurm_max_num_timeout=0)
            executor.update_parameters(**self.parameters)
        except (AssertionError, NameError, TypeError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')
            raise ConfigurationError(f'--executor {self.executor}: {reason}.') from None
        return executor

    def run(self, jobs: Iterable[Job], log: Callable[[str], None]) -> list[Outcome]:
        """Runs the jobs, all but those that were finished before; one that fails does not stop the others.

        Args:
            jobs: The trainings.
            log: Given a line when a job begins, is kept, ends or fails.

        Returns:
            What came of each, in the order of the jobs.

        Raises:
            ConfigurationError: The batches of one can not be shared among its processes, or it waits on a cluster.
            WritingError: In the folder of one lies a finished run of something else.
        """
        jobs = [self._share(job) for job in jobs]
        for job in jobs if not self.collect else ():
            identity = identify_run(job.config, job.inputs)
            self._refuse_other_executor(job, identity)
            if self.force:
                continue
            is_own = partial(_may_be, identity)
            refuse_to_replace(job.folder / RESULT_FILE, is_own,
                              f'the result of this run ({job.name})', advice='It was trained with other data, weights '
                              f'or settings, or something else than a benchmark wrote it. {OTHER_FOLDER}')
        queue, outcomes = deque(enumerate(jobs)), dict[int, Outcome]()
        running: dict[int, Submission] = {}
        with sigterm_raises():
            try:
                while queue or running:
                    while queue and (self.jobs is None or len(running) < self.jobs):
                        index, job = queue.popleft()
                        outcome = self._find(job, log)
                        if outcome is None:
                            running[index] = self._submit(job)
                            log(f'{job.name}: {running[index].said}')
                        else:
                            outcomes[index] = outcome
                    for index in [index for index, each in running.items() if each.job.done()]:
                        ended = running.pop(index)
                        outcomes[index] = self._conclude(jobs[index], ended, log)
                        if self.is_local:
                            self.slots.append(ended.slot)
                    time.sleep(POLLING.get(self.executor, CLUSTER_POLLING) if running else 0)
            except BaseException:  # Ctrl-C or SIGTERM: no training outlives the benchmark
                self._end([each.job for each in running.values()])
                raise
        return [outcomes[index] for index in range(len(jobs))]

    def find_finished(self, job: Job) -> Run | None:
        """The run of a job that has finished before; None where none has."""
        shared = self._share(job)
        return load_finished_run(shared.folder, identify_run(shared.config, shared.inputs))

    def _share(self, job: Job) -> Job:
        """The job as it is trained by as many processes as it is to be; several draw other random numbers than one."""
        if self.processes == 1:
            return job
        size = job.config.train_dataloader.batch_size
        if size % self.processes:
            raise ConfigurationError(f'--devices-per-run {self.processes}: {job.name} trains on batches of {size} '
                                     'images, which so many can not share equally. Set train_dataloader.batch_size, '
                                     'with --cfg-options.')
        return replace(job, inputs=[*job.inputs, dict(processes=self.processes)])

    def _refuse_other_executor(self, job: Job, identity: str) -> None:
        """Refuses a training that an earlier benchmark left to a cluster, for both would write into its folder."""
        earlier = _find_earlier(job.folder / JOB_FOLDER, identity)
        executor = self.executor if earlier is None else cast(Training, earlier.submission().function).executor
        if earlier is not None and executor != self.executor:
            raise ConfigurationError(f'{job.name}: {executor} has it still, as job {earlier.job_id}. Go on with '
                                     f'--executor {executor}, or cancel that job.')

    def _find(self, job: Job, log: Callable[[str], None]) -> Outcome | None:
        """What is there of a run; None if it is to be trained."""
        identity = identify_run(job.config, job.inputs)
        reasons: list[str] = []
        kept = load_finished_run(job.folder, identity, reasons.append)
        if kept is not None:
            log(f'{job.name}: kept from before, {_format_ap(kept)}')
        for reason in reasons if not self.collect else ():
            log(f'{job.name}: {reason} The run is done again.')
        if kept is not None or not self.collect:
            return kept
        log_file = job.folder / LOG_FILE
        if is_locked(job.folder) or _find_earlier(job.folder / JOB_FOLDER, identity):
            found = Failure('its training runs, or waits to', str(log_file), 'running')
        elif reasons:
            found = Failure(reasons[0].rstrip('.'), '', 'missing')
        elif log_file.is_file():
            found = Failure(_describe_end(None, _read_lines(log_file)), str(log_file))
        else:
            found = Failure('it has not been trained', '', 'missing')
        log(f'{job.name}: {found.status}: {found.error}')
        return found

    def _submit(self, job: Job) -> Submission:
        identity, folder = identify_run(job.config, job.inputs), job.folder / JOB_FOLDER
        earlier = _find_earlier(folder, identity)
        if earlier is not None:
            return Submission(earlier, None, time.monotonic(), f'{self.executor} has it still, as job {earlier.job_id}')
        job.folder.mkdir(parents=True, exist_ok=True)
        Config(dict(job.config.to_dict(), work_dir=str(job.folder))).dump(job.folder / CONFIG_FILE)
        slot = self.slots.popleft() if self.is_local else None
        environment: dict[str, str | None] = dict(PYTHONIOENCODING='utf-8:backslashreplace')
        if self.threads is not None:
            environment['OMP_NUM_THREADS'] = str(self.threads)
        if slot is not None:
            environment['CUDA_VISIBLE_DEVICES'] = '' if slot == 'cpu' else slot
        elif self.is_local:  # submitit's own would show it none
            environment['CUDA_VISIBLE_DEVICES'] = os.environ.get('CUDA_VISIBLE_DEVICES')
        command = WORKER if self.processes == 1 else (*LAUNCHER, f'--nproc_per_node={self.processes}', *WORKER[1:])
        training = Training((*command, str(job.folder / CONFIG_FILE), identity, *self.trackers),
                            str(job.folder / LOG_FILE), environment, self.processes,
                            os.getpid() if self.executor == 'local' else None, self.executor)
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier job has left
        (job.folder / LOG_FILE).unlink(missing_ok=True)
        # Each of submitit's processes would answer a Ctrl-C with a traceback; they are told by _end.
        with unheard_interrupts():
            submitted = self._open(folder).submit(training)
        said = f'begins on {slot}' if slot else 'begins'
        if not self.is_local:
            said = f'handed to {self.executor} as job {submitted.job_id}'
        return Submission(submitted, slot, time.monotonic(), said)

    def _conclude(self, job: Job, ended: Submission, log: Callable[[str], None]) -> Outcome:
        log_file, status, error = job.folder / LOG_FILE, None, f' ended without a result ({ended.job.state})'
        try:
            if self.executor == 'debug' or ended.job.paths.result_pickle.exists():  # else submitit waits for it
                status = ended.job.result()
        except Exception:  # what the process met that waits for the training; the last line that it said
            error = ''
        load = partial(load_finished_run, job.folder, identify_run(job.config, job.inputs))
        # What is written whole counts, however the process ended then; on a cluster it may be seen late.
        run, deadline = load(), time.monotonic() + FILE_DELAY
        may_come = not self.is_local and (status == 0 or status is None and ended.job.state == 'COMPLETED')
        while may_come and run is None and time.monotonic() < deadline:
            time.sleep(1)
            run = load()
        if run is not None:
            shutil.rmtree(job.folder / JOB_FOLDER, ignore_errors=True)
            log(f'{job.name}: {_format_ap(run)}, {time.monotonic() - ended.start_time:.0f} s')
            return run
        if status is None:
            said = (ended.job.stderr() or '').strip().splitlines()
            error = f'job {ended.job.job_id}{error}' + (f': {said[-1]}' if said else '')
            failure = Failure(error, str(log_file if log_file.is_file() else ended.job.paths.stderr))
        else:
            failure = Failure(_describe_end(status, _read_lines(log_file)), str(log_file))
        log(f'{job.name}: failed: {failure.error} (see {log_file})')
        return failure

    def _end(self, jobs: list[submitit.Job]) -> None:
        """Ends the trainings of jobs; those of this machine are over when this returns."""
        if not self.is_local:
            for job in jobs:
                job.cancel(check=False)
        while self.executor == 'local' and jobs:
            for job in jobs:
                # Not by submitit's cancel, a Ctrl-C. It is told again where it was told before that process heeds it.
                with suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGTERM)
            time.sleep(0.1)
            jobs = [job for job in jobs if not job.done()]


def allot_devices(devices: Sequence[str], together: int = 1) -> list[str]:
    """Deals out GPUs to trainings.

    Args:
        devices: Their numbers among those that ``CUDA_VISIBLE_DEVICES`` names, their identifiers, or ``cpu``.
        together: How many a training takes.

    Returns:
        For each training at once the ``CUDA_VISIBLE_DEVICES`` that it gets, or ``'cpu'``.

    Raises:
        ConfigurationError: There is no such GPU, and a training that saw none would use the CPU; or there are too few.
    """
    gpus = [device for device in devices if device != 'cpu']
    if gpus and not torch.cuda.is_available():
        raise ConfigurationError(f"--devices {','.join(devices)}: there is no GPU. Leave the option out, or give cpu.")
    allocated = os.environ.get('CUDA_VISIBLE_DEVICES')
    for gpu in gpus:
        # CUDA_VISIBLE_DEVICES takes the identifiers of GPUs and of their parts as well.
        if not gpu.startswith(('GPU-', 'MIG-')) and not (gpu.isdecimal() and int(gpu) < torch.cuda.device_count()):
            within = f' (of CUDA_VISIBLE_DEVICES={allocated})' if allocated else ''
            raise ConfigurationError(f"--devices: expected numbers of GPUs from 0 to {torch.cuda.device_count() - 1}"
                                     f"{within}, or cpu, got '{gpu}'.")
    if together > 1:
        at_hand = len(gpus) if gpus else 0 if 'cpu' in devices else torch.cuda.device_count()
        if at_hand % together if gpus else 0 < at_hand < together:
            raise ConfigurationError(f'--devices-per-run {together}: there are {at_hand} GPUs to deal out.')
    names = [allocated.split(',')[int(gpu)].strip() if allocated and gpu.isdecimal() else gpu for gpu in gpus]
    groups = [','.join(names[first:first + together]) for first in range(0, len(names), together)]
    return [*groups, *(device for device in devices if device == 'cpu')]


def _find_earlier(folder: Path, identity: str) -> submitit.Job | None:
    """The job of a run that an earlier benchmark left to a cluster, and that waits or runs there.

    What this machine ran is over with its benchmark.
    """
    from submitit.core.plugins import get_executors
    from submitit.core.utils import DelayedSubmission
    for file in folder.glob('*_submitted.pkl'):
        with suppress(Exception):  # what another version wrote
            training = cast(Training, DelayedSubmission.load(file).function)
            if training.owner is None and identity in training.command:
                kind = get_executors()[training.executor].job_class
                job = kind(folder, file.name.removesuffix('_submitted.pkl'))
                if job.get_info().get('State') in WAITING:
                    return job
    return None


def _read_lines(file: Path) -> list[str]:
    return file.read_text(encoding='utf-8', errors='replace').strip().splitlines() if file.is_file() else []


def _describe_end(status: int | None, lines: list[str]) -> str:
    """Why a training ended: what its log says of that, unless a signal ended it; without a status, it was stopped."""
    told = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    if status is not None and status < 0:
        killed = status == -getattr(signal, 'SIGKILL', 0)
        return f'ended by signal {-status}' + (', perhaps for want of memory' if killed else '')
    if told:
        return told[0]  # of several processes: the first to fail, for the others miss it
    if status is None:
        return 'it was stopped before its end'
    if status == 0:
        return 'it left no result'
    return lines[-1] if lines else f'exit status {status}'


def _may_be(identity: str, content: bytes) -> bool:
    """Whether the content of a result is that of a run of this identity, or was not written to its end."""
    try:
        stored = json.loads(content)
    except ValueError:
        begin = b'{\n  "identity": '
        return content[:len(begin)] == begin[:len(content)] or not content.strip(b'\0')
    return isinstance(stored, dict) and stored.get('identity') == identity


def _format_ap(run: Run) -> str:
    return f"mAP {100 * run.metrics['bbox_mAP']:.1f}"
