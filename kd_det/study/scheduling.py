"""A pool of trainings: processes of their own, several at once, on one device or on several."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue

from mmengine.config import Config

from kd_det.compat.process import sigterm_raises
from kd_det.compat.writing import refuse_to_replace
from kd_det.study.runs import RESULT_FILE, Run, identify_run, load_finished_run

LOG_FILE, CONFIG_FILE = 'log.txt', 'config.py'
OTHER_FOLDER = 'Give another --work-dir, or train over it with --force.'


@dataclass(frozen=True)
class Job:
    """A training to be done.

    Attributes:
        name: Shown to the user.
        folder: Its work dir.
        config: Its config.
        inputs: What the result depends on beside the config, see :func:`~kd_det.study.runs.identify_run`.
    """
    name: str
    folder: Path
    config: Config
    inputs: Sequence[str]


@dataclass(frozen=True)
class Failure:
    """Why a training did not finish.

    Attributes:
        error: The last line of its log.
        log: The file of its log.
    """
    error: str
    log: str


Outcome = Run | Failure


class JobPool:
    """Runs trainings in processes of their own, as many at once as it has slots.

    Args:
        devices: One training at a time on each: numbers of GPUs as ``CUDA_VISIBLE_DEVICES`` has them, or ``cpu``.
            Without any the processes see what this one sees.
        jobs: Trainings at once; as many as devices by default, and dealt out to them in turn.
        threads: PyTorch's threads of each training; the processors divided by the jobs by default.
        trackers: Where trainings log too, see :func:`~kd_det.training.runner.add_trackers`; no part of their identity.
        force: Train over finished runs of another identity.
    """

    def __init__(self, devices: Sequence[str] = (), jobs: int | None = None, threads: int | None = None,
                 trackers: Sequence[str] = (), force: bool = False) -> None:
        self.jobs = jobs or max(1, len(devices))
        self.threads = threads or max(1, (os.cpu_count() or 1) // self.jobs)
        self.trackers, self.force = trackers, force
        self.slots: Queue = Queue()
        for slot in range(self.jobs):
            self.slots.put(devices[slot % len(devices)] if devices else None)
        self._processes: list[subprocess.Popen] = []
        self._stopped = False

    def run(self, jobs: Iterable[Job], log: Callable[[str], None]) -> list[Outcome]:
        """Runs the jobs, all but those that were finished before; one that fails does not stop the others.

        Args:
            jobs: The trainings.
            log: Given a line when a job begins, is kept, ends or fails.

        Returns:
            What came of each, in the order of the jobs.

        Raises:
            WritingError: In the folder of one lies a finished run of something else.
        """
        jobs, futures = list(jobs), {}
        for job in jobs if not self.force else ():
            is_own = partial(_may_be, identify_run(job.config, job.inputs))
            refuse_to_replace(job.folder / RESULT_FILE, is_own,
                              f'the result of this run ({job.name})', advice='It was trained with other data, weights '
                              f'or settings, or something else than a benchmark wrote it. {OTHER_FOLDER}')
        with sigterm_raises(), ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = {pool.submit(self._run_job, job, log): index for index, job in enumerate(jobs)}
                outcomes = {futures[future]: future.result() for future in as_completed(futures)}
            except BaseException:  # Ctrl-C or SIGTERM: no training outlives the benchmark
                self._stopped = True
                for future in futures:
                    future.cancel()
                for process in self._processes:
                    process.terminate()
                raise
        return [outcomes[index] for index in range(len(jobs))]

    def _run_job(self, job: Job, log: Callable[[str], None]) -> Outcome:
        identity = identify_run(job.config, job.inputs)
        kept = load_finished_run(job.folder, identity, log)
        if kept is not None:
            log(f'{job.name}: kept from before, {_format_ap(kept)}')
            return kept
        device = self.slots.get()
        try:
            return self._train(job, identity, device, log)
        finally:
            self.slots.put(device)

    def _train(self, job: Job, identity: str, device: str | None, log: Callable[[str], None]) -> Outcome:
        job.folder.mkdir(parents=True, exist_ok=True)
        config = Config(dict(job.config.to_dict(), work_dir=str(job.folder)))
        config.dump(job.folder / CONFIG_FILE)
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads), PYTHONIOENCODING='utf-8:backslashreplace')
        if device is not None:
            environment['CUDA_VISIBLE_DEVICES'] = '' if device == 'cpu' else device
        log(f'{job.name}: begins' + ('' if device is None else f' on {device}'))
        start_time, log_file = time.monotonic(), job.folder / LOG_FILE
        command = [sys.executable, '-m', 'kd_det.study.worker', str(job.folder / CONFIG_FILE), identity,
                   *self.trackers]
        with open(log_file, 'w', encoding='utf-8') as output:
            # The input says nothing: it ends when this process does, and the training with it.
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
                                  env=environment) as process:
                self._processes.append(process)
                if self._stopped:  # as it was started
                    process.terminate()
                process.wait()
        run = load_finished_run(job.folder, identity) if process.returncode == 0 else None
        if run is None:
            lines = log_file.read_text(encoding='utf-8', errors='replace').strip().splitlines()
            failure = Failure(_describe_end(process.returncode, lines), str(log_file))
            if not self._stopped:  # else it was ended, and did not fail
                log(f'{job.name}: failed: {failure.error} (see {log_file})')
            return failure
        log(f'{job.name}: {_format_ap(run)}, {time.monotonic() - start_time:.0f} s')
        return run


def _describe_end(status: int, lines: list[str]) -> str:
    """Why a training ended: the last line of its log, unless a signal ended it."""
    if status < 0:
        killed = status == -getattr(signal, 'SIGKILL', 0)
        return f'ended by signal {-status}' + (', perhaps for want of memory' if killed else '')
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
