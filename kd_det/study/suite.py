"""Suites: the same methods on several data sets, each with its pair; a table of all, and the mean over the data sets.

What a suite is, :mod:`kd_det.study.suite_file` tells. Each data set's benchmark is an ordinary one, in a folder of its
name within the work dir; beside these lie ``suite.json``, see :class:`SuiteRecord`, and its tables, ``suite.md``.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mmengine.config import Config
from typing_extensions import NotRequired, TypedDict

from kd_det.checks.environment import DiagnosisError
from kd_det.compat.console import TextTable
from kd_det.compat.writing import locked_folder, refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Index, Lengths, Name, Parts, Positive, Ratio, Seeds, declared
from kd_det.config.choices import Split
from kd_det.config.layouts import put_on
from kd_det.study.benchmark import make_pool, prepare
from kd_det.study.pair import read_pair
from kd_det.study.records import BenchmarkResult, BudgetEntry, DataEntry, MetricEntry, PairEntry, read_results
from kd_det.study.results import (
    NONE,
    ROUNDING,
    format_difference,
    format_mean,
    paired_difference,
    tell_left_out,
    tell_power,
)
from kd_det.study.runs import check_shape, describe_environment, read_command_line, read_json
from kd_det.study.scheduling import OTHER_FOLDER
from kd_det.study.series import Series, run_all
from kd_det.study.suite_file import DataSet, Suite, name_folder, read_suite_file
from kd_det.study.variants import PLAIN

SUITE_FILE, SUITE_TABLE, VERSION = 'suite.json', 'suite.md', 1
METRIC = 'bbox_mAP'
TEACHER_MARK = '# A teacher, put on the data of a set by kd-det benchmark --suite.\n'


class DataSetRecord(TypedDict):
    """A data set in ``suite.json``: where its results lie, or why there are none."""
    name: str
    folder: str
    pair: NotRequired[PairEntry]
    data: NotRequired[DataEntry]
    error: NotRequired[str]


class MeanRecord(TypedDict):
    """Over the data sets: of how many, mean mAP in points, and the mean of their differences with its interval."""
    datasets: int
    mean: float
    by_dataset: NotRequired[dict[str, float]]
    difference: NotRequired[float]
    interval: NotRequired[tuple[float, float] | None]
    verdict: NotRequired[str]


class VariantRecord(TypedDict):
    """A variant in ``suite.json``: data set -> summary of its mAP, as in ``results.json``; and over the data sets."""
    by_dataset: dict[str, MetricEntry]
    mean: MeanRecord


class SuiteRecord(TypedDict):
    """``suite.json``. The summary follows from the data sets' ``results.json``."""
    version: Literal[1]
    command: str
    commit: str | None
    versions: dict[str, str]
    machine: dict[str, Any]
    suite: str
    seeds: list[int]
    datasets: list[DataSetRecord]
    summary: dict[str, VariantRecord]
    budget: NotRequired[BudgetEntry]


@dataclass(frozen=True)
class SuiteResult:
    """What a suite of benchmarks found.

    Attributes:
        work_dir: Where its files lie, and in a folder for each data set all of its benchmark.
        results: What ``suite.json`` holds, see :class:`SuiteRecord`.
        benchmarks: Data set -> what its benchmark found; those whose teacher failed are not among them.
    """
    work_dir: Path
    results: dict[str, Any]
    benchmarks: dict[str, BenchmarkResult]

    @property
    def files(self) -> tuple[Path, Path]:
        """The results as JSON, and their tables as Markdown."""
        return self.work_dir / SUITE_FILE, self.work_dir / SUITE_TABLE

    @property
    def failed_runs(self) -> list[dict[str, Any]]:
        """The entries of the runs that did not finish, with the name of their data set in ``dataset``."""
        teachers = [dict(dataset=each['name'], variant='teacher', error=each['error'])
                    for each in self.results['datasets'] if 'error' in each]
        return [*teachers, *(dict(run, dataset=name) for name, found in self.benchmarks.items()
                             for run in found.failed_runs)]

    def tabulate(self) -> list[TextTable]:
        """Makes the tables: mAP of each variant on each data set, and what it gains there; and the means of both."""
        return tabulate_suite(self.results)

    def to_dict(self) -> dict[str, Any]:
        """Returns the results as JSON holds them, with the work dir."""
        return dict(self.results, work_dir=str(self.work_dir))

    def _repr_html_(self) -> str:
        return ''.join(table.to_html() for table in self.tabulate())


@declared
def benchmark_suite(suite: str | Path, *, data_root: str | Path | None = None,
                    methods: str | Sequence[str] | None = None, seeds: Count | Seeds | None = None,
                    fidelity: Sequence[Split] | None = None, epochs: Count | Lengths | None = None,
                    teacher_epochs: Count | None = None, balance: Ratio | None = None, inherit: Parts | None = None,
                    options: dict[str, Any] | None = None, check_images: Index | None = None,
                    trackers: Sequence[Name] = (), work_dir: str | Path = 'work_dirs/benchmark',
                    budget: Positive | None = None, devices: Sequence[Name] = (), jobs: Count | None = None,
                    threads: Count | None = None, executor: Name = 'local', slurm: dict[str, Any] | None = None,
                    devices_per_run: Count = 1, collect: bool = False, force: bool = False,
                    log: Callable[[str], None] = print) -> SuiteResult:
    """Benchmarks the same methods on several data sets, and tells what they gain on each and in the mean.

    All data sets are looked at before anything is trained. Trainings that have finished are kept, as those of a
    benchmark are; a data set whose teacher can not be trained is left out, and told.

    Args:
        suite: A file of YAML, see :class:`Suite` and :class:`DataSet`.
        data_root: The folder that holds the data sets, in place of the suite's.
        methods: In place of the suite's, as are all others that :func:`~kd_det.study.benchmark.benchmark` has, too.
        seeds: See there.
        fidelity: See there.
        epochs: Of the students on all data sets.
        teacher_epochs: Of the teachers that are trained.
        balance: See there.
        inherit: See there.
        options: Settings of every student's config, which count last.
        check_images: See there.
        trackers: See there.
        work_dir: Folder of all.
        budget: Seconds for all data sets together; of each as many seeds are trained as of the others.
        devices: See there.
        jobs: See there.
        threads: See there.
        executor: See there.
        slurm: See there.
        devices_per_run: See there.
        collect: See there.
        force: Train over what another benchmark has left in the work dir.
        log: Given a line when a run begins, ends or fails.

    Raises:
        ConfigurationError: The file, a config, a method or a setting can not serve; or not even the first seed fits
            into the budget.
        WritingError: The work dir holds what another benchmark has left, or another one runs there.
        DiagnosisError: A file is missing, or the data can not be trained on.
    """
    file, root = Path(suite), Path(work_dir)
    given = dict(methods=methods, seeds=seeds, fidelity=fidelity, balance=balance, inherit=inherit)
    common, sets = read_suite_file(file, {name: value for name, value in given.items() if value is not None},
                                   data_root)
    chosen = list(range(common.seeds)) if isinstance(common.seeds, int) else list(common.seeds)
    pool = make_pool(devices, jobs, threads, trackers, force, executor, slurm, devices_per_run, collect, root, budget)
    with nullcontext() if collect else locked_folder(root):
        for name, mark in ((SUITE_FILE, b'"datasets": ['), (SUITE_TABLE, b'| method |')):
            refuse_to_replace(root / name, lambda content, mark=mark: mark in content, 'the result of a suite', force,
                              OTHER_FOLDER)
        series = []
        for each in sets:
            with _told_of(file, each.name):
                series.append(_prepare(each, common, root, epochs, teacher_epochs, options or {}, force))
                series[-1].check(check_images, read_data=not collect)
        plan = run_all(series, chosen, pool, log, budget, force)
        benchmarks = {each.name: each.result for each in series if each.result is not None}
        told = next((found.results['budget'] for found in benchmarks.values() if plan), None)
        result = SuiteResult(root, dict(
            version=VERSION, command=read_command_line(), **describe_environment(pool.threads), suite=str(file),
            seeds=sorted({seed for found in benchmarks.values() for seed in found.results['seeds']}),
            datasets=[_record(each) for each in series], summary=summarize_suite(benchmarks),
            **({} if told is None else dict(budget=told))), benchmarks)
        json_file, markdown_file = result.files
        write_whole(json_file, json.dumps(result.results, indent=2) + '\n')
        write_whole(markdown_file, format_suite(result))
        return result


@contextmanager
def _told_of(file: Path, name: str) -> Iterator[None]:
    """Within, what can not serve is told with the data set that it is of."""
    for_whom = f"'{file}', {name}: "
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{for_whom}{error}') from error
    except DiagnosisError as error:
        raise DiagnosisError(f'{for_whom}{error}') from error
    except ConfigurationError as error:
        raise ConfigurationError(f'{for_whom}{error}') from error


def _prepare(data: DataSet, common: Suite, root: Path, epochs: int | Sequence[int] | None, teacher_epochs: int | None,
             options: dict[str, Any], force: bool) -> Series:
    """Puts the pair of a data set on it, and prepares the trainings."""
    folder = root / name_folder(data.name)
    pair = read_pair(data.pair, data.student, data.teacher, data.teacher_checkpoint)
    student, teachers = pair.student, [pair.teacher, *pair.further]
    checkpoints = pair.checkpoints
    if data.root is not None:
        student, checkpoints = put_on(student, data.root), tuple(data.teacher_checkpoint)
        if not checkpoints:  # of given weights the config is that of their own data
            teachers = [_write_teacher(pair.teacher_config(index), data.root, folder, index, force)
                        for index in range(len(teachers))]
    return prepare(None, student, teachers, checkpoints, common.methods, folder, data_root=data.root,
                   epochs=data.epochs if epochs is None else epochs,
                   teacher_epochs=data.teacher_epochs if teacher_epochs is None else teacher_epochs,
                   balance=common.balance, inherit=common.inherit, options={**(data.options or {}), **options},
                   fidelity=common.fidelity, name=data.name)


def _write_teacher(config: Config, data: str, folder: Path, index: int, force: bool) -> str:
    """Writes a teacher's config on the data of a set, as its own training and all that learn from it read it."""
    file = folder / f"teacher{f'_{index + 1}' if index else ''}.py"
    refuse_to_replace(file, lambda content: content.startswith(TEACHER_MARK.encode()),
                      "the config of a suite's teacher", force, OTHER_FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, TEACHER_MARK + put_on(config, data).pretty_text)
    return str(file)


def _record(series: Series) -> dict[str, Any]:
    told = dict(name=series.name, folder=series.root.name)
    if series.result is None:
        return dict(told, error=series.error)
    return dict(told, **{key: series.result.results[key] for key in ('pair', 'data')})


def summarize_suite(benchmarks: Mapping[str, BenchmarkResult]) -> dict[str, dict]:
    """Summarizes benchmarks: of every variant its mAP on each data set and over all, see :class:`SuiteRecord`.

    A data set counts as one, however many seeds it has: its difference is the mean over its seeds, and the interval of
    the mean over the data sets, by Student's t, comes from how these differ. It is about data sets like these.
    """
    summary: dict[str, dict] = {}
    for name, found in benchmarks.items():
        for variant, metrics in found.results['summary'].items():
            if METRIC in metrics:
                summary.setdefault(variant, {})[name] = metrics[METRIC]
    return {variant: dict(by_dataset=by_dataset, mean=_average(by_dataset)) for variant, by_dataset in summary.items()}


def _average(by_dataset: Mapping[str, dict]) -> dict[str, Any]:
    made: dict[str, Any] = dict(datasets=len(by_dataset),
                                mean=float(np.mean([each['mean'] for each in by_dataset.values()])))
    differences = {name: each['difference'] for name, each in by_dataset.items() if 'difference' in each}
    found = paired_difference(dict.fromkeys(differences, 0.0), differences, ROUNDING)
    if found is not None:
        verdict = 'one data set, no statement' if found.interval is None else found.verdict
        made.update(by_dataset=dict(found.by_seed), difference=found.mean, interval=found.interval, verdict=verdict)
    return made


def tabulate_suite(results: dict) -> list[TextTable]:
    """Makes the tables of what ``suite.json`` holds."""
    names = [each['name'] for each in results['datasets']]
    points, differences = [], []
    for variant, each in results['summary'].items():
        by_dataset, mean = each['by_dataset'], each['mean']
        cells = [by_dataset.get(name) for name in names]
        fewer = f", {mean['datasets']} of {len(names)}" if mean['datasets'] < len(names) else ''
        points.append([variant, *(NONE if cell is None else format_mean(cell['mean'], cell['std']) for cell in cells),
                       format_mean(mean['mean']) + fewer])
        if variant != PLAIN:
            counted = len(mean.get('by_dataset', ()))
            fewer = f', {counted} of {len(names)} data sets' if counted < len(names) else ''
            told = format_difference(dict(mean, by_seed=mean.get('by_dataset', {})), counted)
            differences.append([variant, *(NONE if cell is None else format_difference(cell, cell['seeds'])
                                           for cell in cells), told + fewer if told else NONE])
    columns = ('method', *names, 'mean')
    unbroken = range(len(columns))
    below = ["Δ: paired mean over seeds against the plain student in the same setting ± half of its 95 % interval "
             "(Student's t). mean: of the data sets' Δ, ± half of the 95 % interval over data sets, of which each "
             'counts as one',
             tell_power({variant: each['mean'].get('by_dataset', {}) for variant, each in results['summary'].items()},
                        'Data sets'), tell_left_out(results),
             *(f"{each['name']}: nothing. {each['error']}" for each in results['datasets'] if 'error' in each)]
    return [TextTable('mAP on the validation images of each data set; mean ± standard deviation over seeds', columns,
                      points, no_wrap=unbroken),
            TextTable('What each gains, in points of mAP', columns, differences, '\n'.join(filter(None, below)))]


def format_suite(result: SuiteResult) -> str:
    """Writes the tables in Markdown, with the runs that failed below them."""
    points, differences = result.tabulate()
    failed = [f"- {name}: {run['variant']}, seed {run['seed']} {run['status']}: {run['error']}"
              for name, found in result.benchmarks.items() for run in found.results['runs']
              if run['status'] != 'finished']
    return '\n'.join([points.to_markdown(), '', f'{points.title}.', '', differences.to_markdown(), '',
                      f'{differences.title}. {differences.caption}', *failed]) + '\n'


def is_suite(folder: Path) -> bool:
    """Whether a folder is one of :func:`benchmark_suite`."""
    return (folder / SUITE_FILE).is_file()


def read_suite(file: str | Path) -> SuiteResult:
    """Reads what :func:`benchmark_suite` left; its summary is made anew of what the data sets' folders hold.

    Args:
        file: ``suite.json``, or the folder that has it.

    Raises:
        FileNotFoundError: A data set's results have gone.
        ConfigurationError: The file, or that of a data set, can not be read.
    """
    file = Path(file, SUITE_FILE) if Path(file).is_dir() else Path(file)
    results = read_json(file)
    if results.get('version') != VERSION:
        raise ConfigurationError(f"'{file}': version: expected {VERSION}, got {results.get('version')!r}.")
    try:
        check_shape(results, SuiteRecord)
    except ConfigurationError as error:
        raise ConfigurationError(f"'{file}': {error}") from None
    benchmarks = {each['name']: read_results(file.parent / each['folder']) for each in results['datasets']
                  if 'error' not in each}
    return SuiteResult(file.parent, dict(results, summary=summarize_suite(benchmarks)), benchmarks)
