"""Benchmarks: methods side by side on one pair of student and teacher, over seeds; and one method over a grid."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Index, Lengths, Name, Parts, Positive, Ratio, Seeds, declared
from kd_det.config.choices import Split
from kd_det.study.pair import adapt_config, read_pair
from kd_det.study.records import BenchmarkResult
from kd_det.study.scheduling import JobPool
from kd_det.study.series import Series, run_all
from kd_det.study.variants import PLAIN, Variant, expand_grid, parse_variants
from kd_det.training.runner import add_trackers


@declared
def benchmark(pair: str | Path | Config | None = None, *, student: str | Path | Config | None = None,
              teacher: str | Path | Sequence[str | Path] | None = None, teacher_checkpoints: Sequence[str | Path] = (),
              methods: str | Sequence[str] = 'none,kd,fgd,pkd', seeds: Count | Seeds = 3,
              fidelity: Sequence[Split] = (), data_root: str | None = None,
              epochs: Count | Lengths | None = None, teacher_epochs: Count | None = None,
              balance: Ratio | None = None, inherit: Parts = 'auto',
              options: dict[str, Any] | None = None, check_images: Index | None = None, trackers: Sequence[Name] = (),
              work_dir: str | Path = 'work_dirs/benchmark', budget: Positive | None = None,
              devices: Sequence[Name] = (), jobs: Count | None = None, threads: Count | None = None,
              executor: Name = 'local', slurm: dict[str, Any] | None = None, devices_per_run: Count = 1,
              collect: bool = False, force: bool = False,
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
        budget: Seconds in which to be done. What fits is planned first, by finished runs or trials of a few steps, and
            told; then whole seeds are trained, as many as fit.
        devices: Numbers of GPUs among those that ``CUDA_VISIBLE_DEVICES`` names, one training at a time on each, or
            ``'cpu'``.
        jobs: Trainings at once; by default as many as there are devices for, and on a cluster all.
        threads: PyTorch's threads of each process; the processors divided by the processes by default.
        executor: Where trainings run, as submitit calls it: ``'local'``, ``'slurm'``, or ``'debug'`` for one after
            another without submitit's own processes.
        slurm: What each job asks Slurm for, by submitit's names: ``partition``, ``time`` in minutes, …
        devices_per_run: GPUs that train one run together, each a share of every batch.
        collect: Train nothing, and make the tables of what the same call has trained so far.
        force: Train over what another benchmark has left in the work dir.
        log: Given a line when a run begins, ends or fails.

    Raises:
        ConfigurationError: A config, a method or a setting can not serve.
        WritingError: The work dir holds what another benchmark has left, or another one runs there.
        DiagnosisError: A file is missing, or the data can not be trained on.
        TeacherTrainingError: A teacher could not be trained.
    """
    pool = make_pool(devices, jobs, threads, trackers, force, executor, slurm, devices_per_run, collect, work_dir,
                     budget)
    series = prepare(pair, student, teacher, teacher_checkpoints, methods, Path(work_dir), data_root=data_root,
                     epochs=epochs, teacher_epochs=teacher_epochs, balance=balance, inherit=inherit, options=options,
                     fidelity=fidelity)
    series.check(check_images, read_data=not collect)
    run_all([series], list(range(seeds)) if isinstance(seeds, int) else list(seeds), pool, log, budget, force)
    assert series.result is not None  # or it would have raised
    return series.result


def prepare(pair: str | Path | Config | None, student: str | Path | Config | None,
            teacher: str | Path | Sequence[str | Path] | None, checkpoints: Sequence[str | Path],
            methods: str | Sequence[str], root: Path, *, data_root: str | None, epochs: int | Sequence[int] | None,
            teacher_epochs: int | None, balance: Ratio | None, inherit: Parts, options: dict[str, Any] | None,
            fidelity: Sequence[str], name: str = '') -> Series:
    """Prepares the trainings of a benchmark, see :func:`benchmark`."""
    read = read_pair(pair, student, teacher, checkpoints)
    read = replace(read, student=adapt_config(read.student, data_root))
    lengths = [] if epochs is None else [epochs] if isinstance(epochs, int) else sorted(epochs)
    common = Variant('', PLAIN, balance, inherit if isinstance(inherit, str) else tuple(inherit), options or {},
                     epochs=next(iter(lengths), None))
    variants = parse_variants(methods, common, lengths[1:])
    return Series(root, read, variants, data_root, teacher_epochs, fidelity, name)


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


def make_pool(devices: Sequence[str], jobs: int | None, threads: int | None, trackers: Sequence[str], force: bool,
              executor: str, slurm: dict[str, Any] | None, devices_per_run: int, collect: bool, work_dir: str | Path,
              budget: float | None) -> JobPool:
    """Makes what trains, see :func:`benchmark`, once it is known that devices and trackers are there."""
    pool = JobPool(devices, jobs, threads, trackers, force, executor, slurm, devices_per_run, collect)
    if collect and budget is not None:
        raise ConfigurationError('--budget plans what to train, and --collect trains nothing: leave one of them out.')
    if collect and not Path(work_dir).is_dir():
        raise ConfigurationError(f"--collect: there is no folder '{work_dir}'.")
    add_trackers(Config(dict(work_dir=str(work_dir))), trackers)  # whose package is missing is told before, too
    return pool
