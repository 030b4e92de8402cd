"""How fast exported files run, and what they need, side by side."""
from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from kd_det.compat.console import TextTable
from kd_det.compat.process import count_processors
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Place, Size, declared
from kd_det.config.choices import CHECKPOINTS
from kd_det.deploy.runtime import ONNX, OPENVINO

RUNS_OF = {ONNX: ('onnxruntime', 'openvino'), OPENVINO: ('openvino', ),  # the default first
           **dict.fromkeys(CHECKPOINTS, ('torch', ))}
TURN = 5  # runs in a row, after one that does not count
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Latency:
    """One file in one runtime.

    Attributes:
        file: The file.
        runtime: By what it was run.
        size: Height and width of the image.
        precision: ``'float32'``, ``'float16'`` or ``'int8'``.
        times: Milliseconds of each run, in the order in which they were taken.
        memory: Bytes of its process: ``before`` the file was opened, with the runtime imported, ``loaded``, and at its
            ``peak``; None where the system does not tell.
        bytes: Size of the file, of OpenVINO with the weights.
        macs: Multiplications, each with its addition, of convolutions and matrix products.
    """
    file: Path
    runtime: str
    size: tuple[int, int]
    precision: str
    times: tuple[float, ...]
    memory: dict[str, int | None]
    bytes: int
    macs: int


@dataclass(frozen=True)
class Latencies:
    """Files that were measured side by side.

    Attributes:
        files: Each with its runtime, as they were given.
        threads: How many each might use.
        processor: The name of the CPU.
    """
    files: tuple[Latency, ...]
    threads: int
    processor: str

    @property
    def ratios(self) -> tuple[tuple[float, float, float], ...]:
        """First quartile, median, third quartile of each file's times, divided by the first file's of the same turn."""
        first = np.array(self.files[0].times)
        return tuple(_find_quartiles(np.array(each.times) / first) for each in self.files)

    def tabulate(self) -> TextTable:
        """Makes a table with a row for each file."""
        rows = []
        for each, (low, ratio, high) in zip(self.files, self.ratios):
            fast, time, slow = _find_quartiles(np.array(each.times))
            rows.append((str(each.file), each.runtime, each.precision, f'{each.size[0]} × {each.size[1]}',
                         f'{time:.3g}', f'{fast:.3g}–{slow:.3g}', f'{ratio:.3f}', f'{low:.3f}–{high:.3f}',
                         *(_format_memory(each.memory[key]) for key in ('before', 'loaded', 'peak')),
                         f'{each.bytes / MEBIBYTE:.2f}', f'{each.macs / 1e9:.3f}'))
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return TextTable('Latency', ('file', 'runtime', 'precision', 'image', 'ms', 'quartiles', 'ratio', 'quartiles',
                                     'MiB before', 'loaded', 'peak', 'file MiB', 'GMACs'), rows,
                         f'{len(self.files[0].times)} runs of each, {threads}, {self.processor}. Ratios are to the '
                         'first row.', words=(0, 1, 2, 3))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(asdict(self), files=[dict(asdict(each), file=str(each.file)) for each in self.files])

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Latencies:
        """Reads what :meth:`to_dict` made."""
        files = (Latency(**{**each, 'file': Path(each['file']), 'size': tuple(each['size']),
                            'times': tuple(each['times'])}) for each in values['files'])
        return cls(tuple(files), values['threads'], values['processor'])

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def measure_latency(models: Place | Sequence[Place], *,
                    runtimes: Sequence[Literal['onnxruntime', 'openvino', 'torch']] = (), threads: Count | None = None,
                    runs: Count = 50, size: Size | None = None) -> Latencies:
    """Measures files side by side, on one image of noise.

    Each file is opened in a process of its own, whose memory is then its own, too. The processes take turns of a few
    runs, so that what else the machine does meanwhile hits all alike, and ratios are of the same turn. The one whose
    turn it is not waits at a pipe: it uses no processor, and its runtime's threads do not either, which else spin for
    a while after each run (onnxruntime's are told to stop with it). The first run of a turn does not count, for the
    caches hold what ran last.

    Args:
        models: Files that :func:`~kd_det.deploy.export.export` wrote: ``.onnx``, ``.xml``, or a plain student's
            ``.pth`` with its config beside it, which PyTorch runs as the graph that the others were traced from.
        runtimes: By what they are run: each file by each of these that can; by default by what its name says.
        threads: How many each may use; by default as many as there are processors.
        runs: Of each file that count.
        size: Height and width of the image for files that leave them open; by default what the test pipeline of the
            detector makes.

    Raises:
        ConfigurationError: There is no such file, it is none of kd_det's, or none of the runtimes can run it.
        ModuleNotFoundError: A runtime is not installed.
    """
    files = [Path(each) for each in ([models] if isinstance(models, (str, Path)) else models)]
    tasks = [(file, runtime) for file in files for runtime in _find_runtimes(file, runtimes)]
    if not tasks:
        raise ConfigurationError('There is no file to measure.')
    threads = threads or count_processors()
    with ExitStack() as stack:
        workers = [stack.enter_context(started(file)) for file, _ in tasks]
        loaded = [worker.ask(do='load', file=str(file), runtime=runtime, threads=threads, size=size)
                  for worker, (file, runtime) in zip(workers, tasks)]
        times: list[list[float]] = [[] for _ in tasks]
        for start in range(0, runs, TURN):
            for worker, of_file in zip(workers, times):
                of_file += worker.ask(do='run', runs=min(TURN, runs - start))['times']
        ended = [worker.ask(do='count') for worker in workers]
    return Latencies(tuple(
        Latency(file, runtime, tuple(first['size']), first['precision'], tuple(of_file), last['memory'], first['bytes'],
                last['macs'])
        for (file, runtime), first, of_file, last in zip(tasks, loaded, times, ended)), threads, find_processor())


def _find_runtimes(file: Path, runtimes: Sequence[str]) -> list[str]:
    """By what a file is to be run.

    Raises:
        ConfigurationError: There is no such file, or nothing runs it.
    """
    if not file.is_file():
        raise ConfigurationError(f"'{file}': there is no such file.")
    able = RUNS_OF.get(file.suffix)
    if able is None:
        raise ConfigurationError(f"'{file}': expected a file that kd-det export wrote, .onnx, .xml or .pth.")
    found = [runtime for runtime in dict.fromkeys(runtimes) if runtime in able] if runtimes else [able[0]]
    if not found:
        raise ConfigurationError(f"'{file}' can not be run by {' or '.join(runtimes)}: expected {' or '.join(able)}.")
    if file.suffix in CHECKPOINTS and not file.with_suffix('.py').is_file():
        raise ConfigurationError(f"'{file}' has no config beside it: there is no '{file.with_suffix('.py')}'. Export "
                                 'it with kd-det export CONFIG CHECKPOINT OUT.pth.')
    return found


class Worker:
    """A process that answers requests, see :mod:`kd_det.deploy.worker`."""

    def __init__(self, file: Path, process: subprocess.Popen, log: IO[str]) -> None:
        self.file, self._process, self._log = file, process, log

    def ask(self, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            ConfigurationError: The file can not be run, or the process has ended.
            ModuleNotFoundError: The runtime is not installed.
        """
        line = ''
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            said = self._log.read().strip().splitlines()[-1:] if status > 0 else [f'signal {-status}']
            raise ConfigurationError(f"'{self.file}' can not be measured: its process has ended "
                                     f"({''.join(said) or f'exit status {status}'}).")
        answer = json.loads(line)
        if answer.get('lacks'):
            raise ModuleNotFoundError(answer['error'], name=answer['lacks'])
        if 'error' in answer:
            raise ConfigurationError(answer['error'])
        return answer


@contextmanager
def started(file: Path) -> Iterator[Worker]:
    """Within, a process waits for requests; it ends with the block, and when this process is gone."""
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as log, subprocess.Popen(
            [sys.executable, '-m', 'kd_det.deploy.worker'], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            text=True, encoding='utf-8', start_new_session=True,  # Ctrl-C is for this process alone
            env=dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))) as process:
        try:
            yield Worker(file, process, log)
        finally:
            process.kill()
            with suppress(BrokenPipeError):  # of a request that a process which had ended did not read
                process.stdin.close()


def find_processor() -> str:
    """The name of the CPU, as well as the system tells it."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        lines = []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, '') or platform.processor() or platform.machine()


def _find_quartiles(values: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _format_memory(size: int | None) -> str:
    return '–' if size is None else f'{size / MEBIBYTE:.0f}'
