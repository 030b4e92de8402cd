"""``results.json``: what it holds, by version; and reading it.

:class:`Results` is the schema. ``kd-det results schema`` prints it as JSON Schema.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.study.fidelity import Splits
from kd_det.study.results import (
    RESULTS_FILE,
    TABLE_FILE,
    format_markdown,
    mark_twins,
    summarize,
    summarize_fidelity,
    summarize_gains,
    tabulate,
)
from kd_det.study.runs import Run, check_run, check_shape, read_json
from kd_det.study.variants import find_twin
from kd_det.training.pictures import draw_gains, is_picture, save_figure

VERSION = 2  # of results.json: 1 is what was written before there was this key
GAINS_FILE = 'gains.png'  # against the epochs, where there are several lengths


class Described(TypedDict):
    """What a run of a study names: the variant, its settings, and the plain student that it is compared with."""
    variant: str
    method: str
    seed: int
    settings: dict[str, Any]
    twin: str
    folder: str


class UnfinishedRun(Described):
    """A training that has no result: why, by the last line of its log, and the file of that."""
    status: Literal['failed', 'running', 'missing']
    error: str
    log: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class FinishedRun(Run):
    """A training that finished. Paths are relative to the file's folder.

    Attributes:
        same_start: Whether it began with the weights of its twin of the same seed; None without one.
        same_order: Whether it saw the images in the same order.
        fidelity: Split -> number of FidelityMetric -> value.
    """
    variant: str
    method: str
    seed: int
    settings: dict[str, Any]
    twin: str
    folder: str
    status: Literal['finished']
    same_start: bool | None
    same_order: bool | None
    fidelity: Splits = field(default_factory=dict)


class PairEntry(TypedDict):
    """Student and teacher: their configs, and the weights of the first teacher.

    The hashes are of what the student's config holds, of the teacher's model, and of the weights.
    """
    student: str
    teacher: str
    checkpoint: str
    checkpoint_hash: str
    student_hash: NotRequired[str]
    teacher_hash: NotRequired[str]


class DataEntry(TypedDict):
    """The data: its folder, where that was given, and the hash of annotations and images."""
    root: str | None
    hash: str


class FurtherTeacher(TypedDict):
    """The second teacher of an ensemble, and those after it; ``run`` where it was trained for the study."""
    checkpoint: str
    checkpoint_hash: str
    run: Run | None


class MeanEntry(TypedDict):
    """Mean and standard deviation over the seeds."""
    mean: float
    std: float | None


class MetricEntry(MeanEntry):
    """A metric of a variant in points; where its twin has it too, the paired difference, its interval and verdict."""
    seeds: int
    pairs: NotRequired[int]
    by_seed: NotRequired[dict[int, float]]
    difference: NotRequired[float]
    interval: NotRequired[tuple[float, float] | None]
    verdict: NotRequired[str]


class BudgetEntry(TypedDict):
    """``--budget``: what was given and what all that was asked for would have taken, in seconds; seeds left out."""
    seconds: float
    needed: float
    not_run: list[int]


class Source(TypedDict):
    """A file that was joined into this one."""
    file: str
    command: str
    seeds: list[int]


class Results(TypedDict):
    """``results.json``. What it sums up, ``summary`` and ``fidelity``, follows from its runs."""
    version: Literal[2]
    command: str
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]
    pair: PairEntry
    data: DataEntry
    seeds: list[int]
    teacher: Run | None
    further_teachers: list[FurtherTeacher]
    runs: list[Annotated[FinishedRun | UnfinishedRun, Field(discriminator='status')]]
    summary: dict[str, dict[str, MetricEntry]]
    fidelity: dict[str, dict[str, dict[str, MeanEntry]]]
    budget: NotRequired[BudgetEntry]
    sources: NotRequired[list[Source]]
    note: NotRequired[str]


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes:
        work_dir: Where its runs lie, and the files below.
        results: What ``results.json`` holds, see :class:`Results`.
    """
    work_dir: Path
    results: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """The results as JSON, their tables as Markdown, and, of several lengths, the plot of the gains."""
        names = (RESULTS_FILE, TABLE_FILE, *((GAINS_FILE, ) if summarize_gains(self.results) else ()))
        return tuple(self.work_dir / name for name in names)

    @property
    def failed_runs(self) -> list[dict[str, Any]]:
        """The entries of the runs that did not finish, each with its ``error`` and its ``log``."""
        return [run for run in self.results['runs'] if run['status'] == 'failed']

    def tabulate(self) -> list[TextTable]:
        """Makes the tables: what the detectors detect, what they cost, and their fidelity where it was measured."""
        return tabulate(self.results)

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON holds them, with the work dir."""
        return dict(self.results, work_dir=str(self.work_dir))

    def _repr_html_(self) -> str:
        return ''.join(table.to_html() for table in self.tabulate())

    def save(self) -> None:
        """Writes its files."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        write_whole(self.work_dir / RESULTS_FILE, json.dumps(self.results, indent=2) + '\n')
        write_whole(self.work_dir / TABLE_FILE, format_markdown(self.results))
        gains = summarize_gains(self.results)
        if gains:
            save_figure(draw_gains(gains), self.work_dir / GAINS_FILE)


def make_schema() -> dict[str, Any]:
    """Returns the JSON Schema of ``results.json``."""
    return TypeAdapter(Results).json_schema()


def refuse_tables(folder: Path, has_lengths: bool, force: bool, advice: str) -> None:
    """Refuses a folder whose table, or plot over several lengths, has a benchmark's name and was made by somebody else.

    Raises:
        WritingError: It holds such.
    """
    refuse_to_replace(folder / TABLE_FILE, lambda content: content.startswith(b'| method |'),
                      'the table of a benchmark', force, advice)
    if has_lengths:
        refuse_to_replace(folder / GAINS_FILE, is_picture, 'the plot of a benchmark', force, advice)


def name_file(path: str) -> str:
    """The name of a file without its folder, of Windows or not."""
    return PureWindowsPath(path).name


def is_of_benchmark(content: bytes, student: str, data: str) -> bool:
    """Whether the content of a file is that of ``results.json``, of this student on this data, if it is not cut short.

    Args:
        content: Of the file.
        student: Name of the student's config, without its folder.
        data: The data's hash.
    """
    try:
        stored = json.loads(content)
        return (stored['data']['hash'] == data and {'runs', 'summary'} <= set(stored)
                and name_file(stored['pair']['student']) == student)
    except ValueError:  # cut short
        return content.startswith((b'{\n  "version": ', b'{\n  "command": '))
    except (KeyError, TypeError):
        return False


def read_results(file: str | Path) -> BenchmarkResult:
    """Reads ``results.json``, whatever version wrote it; what it holds is then that of this one.

    Args:
        file: The file, or the folder that has one.

    Raises:
        FileNotFoundError: There is none.
        ConfigurationError: It is that of another command or of a later version, or a value is not as it has to be; the
            message tells which.
    """
    file = Path(file, RESULTS_FILE) if Path(file).is_dir() else Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}'.")
    results = read_json(file)
    version = results.get('version', 1)
    is_number = type(version) is int  # True is none
    if is_number and version > VERSION:
        raise ConfigurationError(f"'{file}': version: expected one of 1 to {VERSION}, got {version}: it was written by "
                                 'a later kd_det. Install that one.')
    lacking = [key for key in ('runs', 'summary', 'pair', 'data') if key not in results]
    if lacking:
        raise ConfigurationError(f"'{file}' is not that of kd-det benchmark: it has no {', '.join(lacking)}.")
    if not is_number or version < 1:
        raise ConfigurationError(f"'{file}': version: expected one of 1 to {VERSION}, got {version!r}.")
    try:
        check_shape(results['runs'], list[dict], 'runs')
        entries = [_complete(entry) for entry in results['runs']]
        results = dict(dict(commit=None, further_teachers=[]), **results)
        if version == 1 and isinstance(results.get('teacher'), dict):  # one had no note of what it saw
            results['teacher'] = dict(results['teacher'], order=results['teacher'].get('order') or '')
        results.update(version=VERSION, runs=entries, summary={}, fidelity={})
        check_shape(results, Results)
        for index, entry in enumerate(entries):
            if entry['status'] == 'finished':
                check_run(entry, f'runs.{index}.')
    except ConfigurationError as error:
        raise ConfigurationError(f"'{file}': {error}") from None
    return BenchmarkResult(file.parent, sum_up(results))


def _complete(entry: dict) -> dict:
    """The entry of a run with what earlier versions left out, or what is made anew in a moment."""
    followed = dict(same_start=None, same_order=None) if entry.get('status') == 'finished' else {}
    return {**followed, **entry, 'twin': find_twin(str(entry.get('variant')))}


def sum_up(results: dict) -> dict:
    """The results with what follows from their runs: whether each began as its twin, summary and fidelity."""
    entries = results['runs']
    mark_twins(entries)
    splits = list(dict.fromkeys(split for entry in entries for split in entry.get('fidelity', ())))
    return dict(results, summary=summarize(entries), fidelity=summarize_fidelity(entries, splits))

