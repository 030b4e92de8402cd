"""Benchmarks: methods side by side on one pair of student and teacher, over seeds; and one method over a grid."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config

from kd_det.checks.arguments import inspect_arguments
from kd_det.checks.checkpoints import inspect_checkpoint, inspect_finite
from kd_det.checks.doctor import check_config, inspect_data
from kd_det.checks.environment import raise_faults
from kd_det.checks.image_reader import Memory
from kd_det.compat.console import TextTable
from kd_det.compat.writing import locked_folder, refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Index, Name, Parts, Ratio, Seeds, declared
from kd_det.study.fidelity import add_fidelity
from kd_det.study.pair import Pair, adapt_config, hash_data, hash_weights, read_pair
from kd_det.study.results import (
    RESULTS_FILE,
    TABLE_FILE,
    format_markdown,
    make_run_entry,
    mark_twins,
    summarize,
    summarize_fidelity,
    summarize_lengths,
    tabulate,
)
from kd_det.study.runs import Run, describe_environment, read_command_line
from kd_det.study.scheduling import OTHER_FOLDER, Failure, Job, JobPool
from kd_det.study.variants import PLAIN, Variant, expand_grid, parse_variants, variant_config
from kd_det.training.pictures import draw_gains, save_figure
from kd_det.training.runner import add_trackers

TEACHER_SEED = 0
GAINS_FILE = 'gains.png'  # against the epochs, where there are several lengths
Split = Literal['val', 'train']


class TeacherTrainingError(RuntimeError):
    """The training of a teacher failed, so that there is nothing to compare."""


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark found.

    Attributes:
        work_dir: Where its runs lie, and the files below.
        results: What ``results.json`` holds, see :mod:`kd_det.study.results`.
    """
    work_dir: Path
    results: dict[str, Any]

    @property
    def files(self) -> tuple[Path, Path]:
        """The results as JSON, and their tables as Markdown."""
        return self.work_dir / RESULTS_FILE, self.work_dir / TABLE_FILE

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


@declared
def benchmark(pair: str | Path | Config | None = None, *, student: str | Path | Config | None = None,
              teacher: str | Path | Sequence[str | Path] | None = None, teacher_checkpoints: Sequence[str | Path] = (),
              methods: str | Sequence[str] = 'none,kd,fgd,pkd', seeds: Count | Seeds = 3,
              fidelity: Sequence[Split] = (), data_root: str | None = None,
              epochs: Count | Sequence[Count] | None = None, teacher_epochs: Count | None = None,
              balance: Ratio | None = None, inherit: Parts = 'auto',
              options: dict[str, Any] | None = None, check_images: Index | None = None, trackers: Sequence[Name] = (),
              work_dir: str | Path = 'work_dirs/benchmark', devices: Sequence[Name] = (), jobs: Count | None = None,
              threads: Count | None = None, executor: Name = 'local', slurm: dict[str, Any] | None = None,
              devices_per_run: Count = 1, collect: bool = False, force: bool = False,
              log: Callable[[str], None] = print) -> BenchmarkResult:
    """Trains a pair with several methods and seeds, and tells which difference is more than chance.

    Every training is a job of its own. Those in the work dir that finished before are kept.

    Args:
        pair: A distillation, whose student and teacher count and whose terms do not: a file, ``'package::file.py'`` or
            a config.
        student: The student's config, in place of the pair's.
        teacher: The teacher's config, in place of the pair's; or those of several unlike ones, for ``@teachers=N``.
        teacher_checkpoints: The teacher's weights, and those of more for ``@teachers=N``. Without any, and where the
            pair's are not there, as many teachers as are needed are trained first, with a seed each.
        methods: Methods and their settings, see :func:`~kd_det.study.variants.parse_variants`.
        seeds: How many, from 0 on; or a list of them.
        fidelity: On which images, ``'val'`` and ``'train'``, to measure how closely the students follow the teacher.
        data_root: Folder of the data, in place of the configs'.
        epochs: Of the students, and their schedules with them; their config's by default. Of several each variant is
            trained for each, and compared with the plain student that trained as long.
        teacher_epochs: Of the teacher; its config's by default.
        balance: Each method's gradient at this ratio of the task's; ``'paper'`` for the published weights.
        inherit: Parts of the student that start from the teacher's weights; ``'auto'`` for all but the backbone, ``()``
            for none.
        options: Settings of every student's config, by dotted key; ``model.distill…`` reaches the distilled ones.
        check_images: Read so many images of each data set before; all by default.
        trackers: ``'tensorboard'``, ``'wandb'``, ``'mlflow'``: where the runs log, too.
        work_dir: Folder of runs and results.
        devices: Numbers of GPUs among those that ``CUDA_VISIBLE_DEVICES`` names, one training at a time on each, or
            ``'cpu'``.
        jobs: Trainings at once; by default as many as there are devices for, and on a cluster all.
        threads: PyTorch's threads of each process; the processors divided by the processes by default.
        executor: Where trainings run, as submitit calls it: ``'local'``, ``'slurm'``, or ``'debug'`` for one after
            another without submitit's own processes.
        slurm: What each job asks Slurm for, by submitit's names: ``partition``, ``time`` in minutes, …
        devices_per_run: GPUs that train one run together, each a share of every batch.
        collect: Train nothing, and make the tables of what is there.
        force: Train over what another benchmark has left in the work dir.
        log: Given a line when a run begins, ends or fails.

    Raises:
        ConfigurationError: A config, a method or a setting can not serve.
        WritingError: The work dir holds what another benchmark has left, or another one runs there.
        DiagnosisError: A file is missing, or the data can not be trained on.
        TeacherTrainingError: A teacher could not be trained.
    """
    root = Path(work_dir)
    pair = read_pair(pair, student, teacher, teacher_checkpoints)
    pair = replace(pair, student=adapt_config(pair.student, data_root))
    lengths: Sequence[int] = () if epochs is None else [epochs] if isinstance(epochs, int) else epochs
    common = Variant('', PLAIN, balance, inherit if isinstance(inherit, str) else tuple(inherit), options or {},
                     epochs=next(iter(lengths), None))
    variants = parse_variants(methods if isinstance(methods, str) else ','.join(methods), common, lengths[1:])
    teachers = count_teachers(variants, pair.checkpoints)
    if pair.further and teachers != len(pair.teachers):
        raise ConfigurationError(f'--teacher names {len(pair.teachers)} configs, and the methods ask for {teachers} '
                                 f'teachers at most: name one with @teachers={len(pair.teachers)}.')
    pool = JobPool(devices, jobs, threads, trackers, force, executor, slurm, devices_per_run, collect)
    if collect and not root.is_dir():
        raise ConfigurationError(f"--collect: there is no folder '{root}'.")
    check_config(pair.student, splits=('train', 'val'))  # its annotations tell the size of images
    for variant in variants:  # what can not be composed or built is told before a teacher is trained
        raise_faults(inspect_arguments(variant_config(variant, pair, ['teacher.pth'] * teachers)))
    raise_faults(inspect_checkpoint('--teacher-checkpoint', checkpoint, 'Give the path of a checkpoint')
                 for checkpoint in teacher_checkpoints)
    raise_faults(chain.from_iterable(inspect_finite('teacher checkpoint', each) for each in pair.checkpoints))
    if not collect:
        raise_faults(inspect_data(pair.student, ('train', 'val'), Memory(root), check_images))
    data = hash_data(pair.student)
    add_trackers(Config(dict(work_dir=str(root))), trackers)  # whose package is missing is told before, too
    with nullcontext() if collect else locked_folder(root):  # to collect, others may be at work there
        _refuse_to_replace(root, pair, data, force)
        teacher_runs: list[Run | None] = [None] * teachers
        if not pair.checkpoints:
            teacher_runs = _train_teachers(pair, teachers, data_root, teacher_epochs, data, root, pool, log)
            pair = replace(pair, checkpoints=tuple(run.checkpoint for run in teacher_runs))
        teacher_hashes = [hash_weights(each) for each in pair.checkpoints]

        seeds = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
        runs, made = [], []
        for seed, variant in product(seeds, variants):
            folder = root / variant.folder / f'seed{seed}'
            config = _set_seed(variant_config(variant, pair, pair.checkpoints, seed), seed)
            made.append(Job(f'{variant.name}, seed {seed}', folder, config,
                            [data] if variant.is_plain else [data, *teacher_hashes[:variant.teachers]]))
            runs.append((variant, seed, folder))
        outcomes = pool.run(made, log)

        entries = [make_run_entry(*each, outcome, root) for each, outcome in zip(runs, outcomes)]
        mark_twins(entries)
        add_fidelity(entries, root, dict(config=pair.teacher, checkpoint=pair.checkpoints[0]), fidelity, log)
        trained = [None if run is None else run.to_dict(root) for run in teacher_runs]
        result = BenchmarkResult(root, dict(
            command=read_command_line(),
            **describe_environment(pool.threads),
            pair=dict(student=str(pair.student.filename), teacher=pair.teacher, checkpoint=pair.checkpoints[0],
                      checkpoint_hash=teacher_hashes[0]),
            data=dict(root=data_root, hash=data),
            seeds=seeds,
            teacher=trained[0],
            further_teachers=[
                dict(checkpoint=checkpoint, checkpoint_hash=digest, run=run)
                for checkpoint, digest, run in zip(pair.checkpoints[1:], teacher_hashes[1:], trained[1:])],
            runs=entries,
            summary=summarize(entries),
            fidelity=summarize_fidelity(entries, fidelity)))
        json_file, markdown_file = result.files
        write_whole(json_file, json.dumps(result.results, indent=2) + '\n')
        write_whole(markdown_file, format_markdown(result.results))
        gains = {name: by_length for name, by_length in summarize_lengths(result.results).items() if name != PLAIN}
        if gains:
            save_figure(draw_gains(gains), root / GAINS_FILE)
        return result


def sweep(pair: str | Path | Config | None = None, *, method: str,
          settings: Mapping[str, Sequence] | Sequence[tuple[str, Sequence]], **arguments: Any) -> BenchmarkResult:
    """Benchmarks one method over a grid of settings.

    Args:
        pair: See :func:`benchmark`.
        method: A method, or a sum of methods.
        settings: The values of each setting, see :func:`~kd_det.study.variants.expand_grid`.
        **arguments: As :func:`benchmark` takes them.

    Raises:
        ConfigurationError: There are no settings; and see :func:`benchmark`.
    """
    pairs = list(settings.items() if isinstance(settings, Mapping) else settings)
    if not pairs:
        raise ConfigurationError('There is nothing to try: give --set, --teachers, --augment, --noise, --shift '
                                 'or --without.')
    return benchmark(pair, methods=expand_grid(method, pairs), **arguments)


def _refuse_to_replace(root: Path, pair: Pair, data: str, force: bool) -> None:
    """Refuses a work dir with the results of another pair or other data, or of no benchmark."""

    def is_of_this(content: bytes) -> bool:
        try:
            stored = json.loads(content)
            return (stored['data']['hash'] == data and {'runs', 'summary'} <= set(stored)
                    and Path(stored['pair']['student']).name == Path(str(pair.student.filename)).name)
        except ValueError:  # cut short
            return content.startswith(b'{\n  "command": ')
        except (KeyError, TypeError):
            return False

    refuse_to_replace(root / RESULTS_FILE, is_of_this, 'the results of a benchmark of this student on this data', force,
                      OTHER_FOLDER)
    refuse_to_replace(root / TABLE_FILE, lambda content: content.startswith(b'| method |'), 'the table of a benchmark',
                      force, OTHER_FOLDER)


def count_teachers(variants: Sequence[Variant], checkpoints: Sequence[str]) -> int:
    """Counts the teachers of the variant with the most of them.

    Raises:
        ConfigurationError: Weights are given, but of fewer teachers or of more.
    """
    most = max(variants, key=lambda variant: variant.teachers)
    if checkpoints and len(checkpoints) != most.teachers:
        counts = f'{len(checkpoints)} checkpoint{"s are" if len(checkpoints) > 1 else " is"} given'
        if len(checkpoints) < most.teachers:
            raise ConfigurationError(f'{most.name}: {counts}. Give {most.teachers} with --teacher-checkpoint, one for '
                                     'each teacher.')
        raise ConfigurationError(f'{counts}, but no method asks for more than {most.teachers}: name one with '
                                 f'@teachers={len(checkpoints)}.')
    return most.teachers


def _train_teachers(pair: Pair, number: int, data_root: str | None, epochs: int | None, data: str, root: Path,
                    pool: JobPool, log: Callable[[str], None]) -> list[Run]:
    """Trains so many teachers, of the same config or of one each, each from a seed of its own."""
    configs = [adapt_config(pair.teacher_config(index), data_root, epochs) for index in range(number)]
    names = ['teacher', *(f'teacher_{index + 2}' for index in range(number - 1))]
    outcomes = pool.run([Job(name, root / name, _set_seed(configs[index], TEACHER_SEED + index), [data])
                         for index, name in enumerate(names)], log)
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    if failed:
        said = f'. All that was said is in {failed[0].log}' if failed[0].log else f' ({failed[0].error})'
        raise TeacherTrainingError(f'Without a teacher there is nothing to compare{said}.')
    return [outcome for outcome in outcomes if not isinstance(outcome, Failure)]


def _set_seed(config: Config, seed: int) -> Config:
    config.randomness = dict(config.get('randomness') or {}, seed=seed)
    return config
