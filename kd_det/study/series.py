"""All trainings of a pair on its data: its teachers, then each variant from each seed; within a budget."""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

from mmengine.config import Config

from kd_det.checks.arguments import inspect_arguments
from kd_det.checks.checkpoints import inspect_checkpoint, inspect_finite
from kd_det.checks.doctor import check_config, inspect_data
from kd_det.checks.environment import raise_faults
from kd_det.checks.image_reader import Memory
from kd_det.compat.writing import locked_folder, refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.config.arguments import at, refuse
from kd_det.config.detectors import guides_of
from kd_det.config.options import set_seed
from kd_det.study.fidelity import add_fidelity
from kd_det.study.identity import hash_data, hash_model, hash_weights, identify_run, name_data
from kd_det.study.pair import Pair, adapt_config
from kd_det.study.planning import (
    TRIALS,
    Estimate,
    Plan,
    count_images,
    estimate_by_runs,
    estimate_by_trial,
    format_duration,
    read_length,
    run_trials,
)
from kd_det.study.records import VERSION, BenchmarkResult, is_of_benchmark, refuse_tables, sum_up
from kd_det.study.results import RESULTS_FILE, make_run_entry
from kd_det.study.runs import Run, describe_environment, read_command_line
from kd_det.study.scheduling import OTHER_FOLDER, Failure, Job, JobPool, Outcome
from kd_det.study.variants import Variant, variant_config, without_length

TEACHER_SEED = 0
SLACK = 1.1  # of a budget: a seed that ends a little late is better than none


class TeacherTrainingError(RuntimeError):
    """The training of a teacher failed, so that there is nothing to compare."""


class Series:
    """All trainings of a pair on its data.

    Args:
        root: Folder of runs and results.
        pair: Student and teacher.
        variants: The plain student first.
        data_root: Folder of the teachers' data, in place of their configs'.
        teacher_epochs: Of the teachers that are trained; their configs' by default.
        fidelity: On which images to measure how closely the students follow the teacher.
        name: Of the data set, where there are several.

    Attributes:
        student: The plain student's config, with the data and settings that all its runs have.
        result: What was found so far; None before anything was.
        error: Why there is nothing, where the teacher could not be trained.

    Raises:
        ConfigurationError: There are fewer teachers than the variants ask for, or more.
    """

    def __init__(self, root: Path, pair: Pair, variants: Sequence[Variant], data_root: str | None = None,
                 teacher_epochs: int | None = None, fidelity: Sequence[str] = (), name: str = '') -> None:
        self.root, self.pair, self.variants, self.name = root, pair, variants, name
        self.data_root, self.teacher_epochs, self.fidelity = data_root, teacher_epochs, fidelity
        self.teachers = count_teachers(variants, pair.checkpoints)
        if pair.further and self.teachers != len(pair.teachers):
            raise ConfigurationError(f'--teacher names {len(pair.teachers)} configs, and the methods ask for '
                                     f'{self.teachers} teachers at most: name one with @teachers={len(pair.teachers)}.')
        self.student = variant_config(variants[0], pair)
        self.result: BenchmarkResult | None = None
        self.error = ''
        self._teacher_runs: list[Run | None] = [None] * self.teachers
        self._hashes: dict[str, str] = {}  # of weights, models and data, by the names of their files
        self._outcomes: list[tuple[Variant, int, Path, Outcome]] = []

    def check(self, images: int | None = None, read_data: bool = True) -> None:
        """Looks for all that would fail, before anything is trained, and at the data.

        Args:
            images: Look at so many of each data set; at all by default.
            read_data: Whether to look at the images.

        Raises:
            ConfigurationError: A variant can not be composed.
            DiagnosisError: A file is missing, a setting does not fit, or the data can not be trained on.
        """
        check_config(self.student, splits=('train', 'val'))  # its annotations tell the size of images
        folders: dict[str, str] = {}
        for variant in self.variants:
            other = folders.setdefault(variant.folder, variant.name)
            if other != variant.name:
                raise ConfigurationError(f"--methods {variant.name} and {other}: both would train in the folder "
                                         f"'{variant.folder}'. Write one in another way.")
            config = variant_config(variant, self.pair, ['teacher.pth'] * self.teachers)
            raise_faults(inspect_arguments(config))
            check_saving(config)
        for index in range(0 if self.pair.checkpoints else self.teachers):
            with at('teacher'):
                check_saving(self.pair.teacher_config(index))
        raise_faults(inspect_checkpoint('--teacher-checkpoint', checkpoint, 'Give the path of a checkpoint')
                     for checkpoint in self.pair.checkpoints)
        raise_faults(chain.from_iterable(inspect_finite('teacher checkpoint', each) for each in self.pair.checkpoints))
        if read_data:
            raise_faults(inspect_data(self.student, ('train', 'val'), Memory(self.root), images))
        self.data = self._hash_data(self.student)

    def refuse_to_replace(self, force: bool) -> None:
        """Refuses a work dir with the results of another pair or other data, or of no benchmark.

        Raises:
            WritingError: It holds such.
        """
        student = Path(str(self.pair.student.filename)).name
        refuse_to_replace(self.root / RESULTS_FILE, lambda content: is_of_benchmark(content, student, self.data),
                          'the results of a benchmark of this student on this data', force, OTHER_FOLDER)
        has_lengths = any(without_length(each.name) != each.name for each in self.variants)
        refuse_tables(self.root, has_lengths, force, OTHER_FOLDER)

    def train(self, seeds: Sequence[int], pool: JobPool, log: Callable[[str], None]) -> None:
        """Trains the teachers, if need be, then every variant from these seeds; what has finished before is kept.

        Raises:
            TeacherTrainingError: A teacher could not be trained.
        """
        if not self.pair.checkpoints:
            outcomes = pool.run(self._list_teacher_jobs(), log)
            failed = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
            if failed:
                said = f'. All that was said is in {failed[0].log}' if failed[0].log else f' ({failed[0].error})'
                raise TeacherTrainingError(f'Without a teacher there is nothing to compare{said}.')
            self._take_teachers(outcomes)
        made = [(variant, seed, self._make_job(variant, seed)) for seed in seeds for variant in self.variants]
        outcomes = pool.run([job for _, _, job in made], log)
        self._outcomes += [(variant, seed, job.folder, outcome)
                           for (variant, seed, job), outcome in zip(made, outcomes)]

    def collect(self, pool: JobPool, log: Callable[[str], None], budget: dict | None = None) -> BenchmarkResult:
        """Makes and writes the results of all that was trained.

        Args:
            pool: That trained.
            log: Given a line on what is measured.
            budget: See :class:`~kd_det.study.records.BudgetEntry`; None where there was none.
        """
        entries = [make_run_entry(*each, self.root) for each in self._outcomes]
        self.result = self._sum_up(entries, pool, budget)
        self.result.save()  # before what takes long
        if self.fidelity:
            teacher = dict(config=self.pair.teacher, checkpoint=self.pair.checkpoints[0])
            add_fidelity(entries, self.root, teacher, self.fidelity, log)
            self.result = self._sum_up(entries, pool, budget)
            self.result.save()
        return self.result

    def _sum_up(self, entries: list[dict], pool: JobPool, budget: dict | None) -> BenchmarkResult:
        trained = [None if run is None else run.to_dict(self.root) for run in self._teacher_runs]
        weights = [self._hash(each, hash_weights) for each in self.pair.checkpoints]
        return BenchmarkResult(self.root, sum_up(dict(
            version=VERSION,
            command=read_command_line(),
            **describe_environment(pool.threads),
            pair=dict(student=str(self.pair.student.filename), teacher=self.pair.teacher,
                      checkpoint=self.pair.checkpoints[0], checkpoint_hash=weights[0],
                      student_hash=identify_run(self.pair.student),
                      teacher_hash=self._hash(self.pair.teacher, hash_model)),
            data=dict(root=self.data_root, hash=self.data),
            seeds=list(dict.fromkeys(seed for _, seed, *_ in self._outcomes)),
            teacher=trained[0],
            further_teachers=[
                dict(checkpoint=checkpoint, checkpoint_hash=digest, run=run)
                for checkpoint, digest, run in zip(self.pair.checkpoints[1:], weights[1:], trained[1:])],
            runs=entries,
            **({} if budget is None else dict(budget=budget)))))

    def estimate(self, pool: JobPool, log: Callable[[str], None]) -> dict[str, Estimate]:
        """How long one training takes, by finished runs or by trials: of each teacher that lacks, and of each variant.

        Raises:
            TeacherTrainingError: The trial of a teacher failed.
        """
        estimates: dict[str, Estimate] = {}
        jobs = [] if self.pair.checkpoints else self._list_teacher_jobs()
        runs = [pool.find_finished(job) for job in jobs]
        lacking = [index for index, run in enumerate(runs) if run is None]
        if jobs and not lacking:
            self._take_teachers(runs)
        for index, trial in zip(lacking, run_trials([jobs[index] for index in lacking], pool, self.root, log)):
            if isinstance(trial, Failure):
                raise TeacherTrainingError(f'The trial of the teacher failed. All that was said is in {trial.log}.')
            config = jobs[index].config
            estimates[jobs[index].name] = estimate_by_trial(config, trial, count_images(config))
            runs[index] = trial
        checkpoints = self.pair.checkpoints or [run.checkpoint for run in runs]
        made = {variant.name: self._make_job(variant, TEACHER_SEED, checkpoints) for variant in self.variants}
        estimates.update({name: each for name, each in zip(made, map(estimate_by_runs, made.values())) if each})
        # Of those that differ in their length alone one trial tells.
        told, untold = set(map(without_length, estimates)), dict[str, str]()
        for name in made:
            if without_length(name) not in told:
                untold.setdefault(without_length(name), name)
        trials = run_trials([made[name] for name in untold.values()], pool, self.root, log)
        images = count_images(self.student) if untold else (0, 0)
        for name, trial in zip(untold.values(), trials):
            estimates[name] = estimate_by_trial(made[name].config, trial, images)
        for name in [name for name in made if name not in estimates]:
            kin = next(each for each in made if each in estimates and without_length(each) == without_length(name))
            estimates[name] = estimates[kin].stretch(read_length(made[name].config) / read_length(made[kin].config))
        shutil.rmtree(self.root / TRIALS, ignore_errors=True)
        return estimates

    def list_unfinished(self, seed: int, pool: JobPool) -> list[str]:
        """The names of the variants that are still to be trained from a seed."""
        if not self.pair.checkpoints:
            return [variant.name for variant in self.variants]
        return [variant.name for variant in self.variants
                if pool.find_finished(self._make_job(variant, seed)) is None]

    def _list_teacher_jobs(self) -> list[Job]:
        """The trainings of the teachers, of the same config or of one each, each from a seed of its own."""
        names = ['teacher', *(f'teacher_{index + 2}' for index in range(self.teachers - 1))]
        configs = [adapt_config(self.pair.teacher_config(index), self.data_root, self.teacher_epochs)
                   for index in range(self.teachers)]
        return [Job(name, self.root / name, set_seed(config, TEACHER_SEED + index), [self.data])
                for index, (name, config) in enumerate(zip(names, configs))]

    def _take_teachers(self, runs: Sequence[Run]) -> None:
        self._teacher_runs = list(runs)
        self.pair = replace(self.pair, checkpoints=tuple(run.checkpoint for run in runs))

    def _make_job(self, variant: Variant, seed: int, checkpoints: Sequence[str] = ()) -> Job:
        """The training of a variant from a seed; under other teachers than the pair's, for a trial."""
        checkpoints = checkpoints or self.pair.checkpoints
        config = set_seed(variant_config(variant, self.pair, checkpoints, seed), seed)
        return Job(f'{variant.name}, seed {seed}', self.root / variant.folder / f'seed{seed}', config,
                   [self._hash_data(config), *self._hash_teachers(config)])

    def _hash_teachers(self, config: Config) -> list[str]:
        """The hashes of the weights and of the models of all that teach in a training."""
        return [self._hash(guide[key], hash_file) for _, guide in guides_of(config)
                for key, hash_file in (('checkpoint', hash_weights), ('config', hash_model))
                if isinstance(guide.get(key), str)]

    def _hash_data(self, config: Config) -> str:
        """The hash of a config's data, which a variant's own settings may have exchanged."""
        return self._hash(name_data(config), lambda name: hash_data(config))

    def _hash(self, file: str, hash_file: Callable[[str], str]) -> str:
        """The hash of a file, which is read once for all trainings."""
        if file not in self._hashes:
            self._hashes[file] = hash_file(file)
        return self._hashes[file]


def check_saving(config: Config) -> None:
    """Checks that a training leaves the weights of its last epoch in its work dir.

    Raises:
        ConfigurationError: Its CheckpointHook does not.
    """
    hooks = config.get('default_hooks') or {}
    hook = hooks.get('checkpoint', {})
    remedy = 'A run leaves the weights of its last epoch in a folder of its own.'
    if hook is None:
        refuse('default_hooks.checkpoint', hook, 'a CheckpointHook', remedy)
    if hook.get('out_dir') is not None:
        refuse('default_hooks.checkpoint.out_dir', hook.out_dir, 'None, the work dir', remedy)
    if not hook.get('save_last', True):
        refuse('default_hooks.checkpoint.save_last', hook.save_last, 'True', remedy)


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


def run_all(series: Sequence[Series], seeds: Sequence[int], pool: JobPool, log: Callable[[str], None],
            budget: float | None = None, force: bool = False) -> Plan | None:
    """Trains several series, one after the other; within a budget seed by seed, so that all have the same.

    Each then has its result. Where there are several, one whose teacher can not be trained has none, and an ``error``.

    Args:
        series: What is trained.
        seeds: From which.
        pool: That trains.
        log: Given a line on what is done.
        budget: Seconds in which to be done: seeds that do not fit are left out. None for any number.
        force: Write over what others have left in the folders.

    Returns:
        What was planned for the budget.

    Raises:
        ConfigurationError: Not even the first seed fits.
        WritingError: A folder holds what another benchmark has left, or another one runs there.
        TeacherTrainingError: The teacher of the only one could not be trained.
    """
    begin = time.monotonic()
    with ExitStack() as stack:
        for each in series:
            if not pool.collect:  # others may be at work there
                stack.enter_context(locked_folder(each.root))
            each.refuse_to_replace(force)
        if budget is None:
            for each in series:
                _advance(each, seeds, pool, log, None, alone=len(series) == 1)
            return None
        plan = make_plan(series, seeds, pool, log, budget, begin)
        for table in plan.tabulate():
            log(table.to_plain())
        if not plan.fitting:
            raise ConfigurationError(f'--budget: in {format_duration(budget)} not even the first seed fits, which '
                                     f'takes about {format_duration(plan.before + plan.needed[seeds[0]])}. Give more '
                                     'time, or fewer methods or epochs.')
        trained: list[int] = []
        planned, took = plan.before, 0.0
        for seed in plan.fitting:
            start = time.monotonic()
            pace = took / planned if any(plan.needed[each] for each in trained) else 1.0  # of what was there, none
            expected = plan.needed[seed] * max(1.0, pace)
            if trained and expected and start - begin + expected > SLACK * budget:
                log(f'Seed {seed} is left out: the trainings take longer than planned.')
                continue
            trained.append(seed)
            told = dict(seconds=budget, needed=plan.total, not_run=[each for each in seeds if each not in trained])
            for each in series:
                _advance(each, [seed], pool, log, told, alone=len(series) == 1)
            planned, took = planned + plan.needed[seed], took + time.monotonic() - start
        return plan


def _advance(series: Series, seeds: Sequence[int], pool: JobPool, log: Callable[[str], None], budget: dict | None,
             alone: bool) -> None:
    """Trains from further seeds, and writes what is known then."""
    say = _prefix(series.name, log)
    if series.error:
        return
    try:
        series.train(seeds, pool, say)
    except TeacherTrainingError as error:
        if alone:
            raise
        series.error = str(error)
        say(series.error)
    else:
        series.collect(pool, say, budget)


def make_plan(series: Sequence[Series], seeds: Sequence[int], pool: JobPool, log: Callable[[str], None], budget: float,
              begin: float) -> Plan:
    """Plans what fits into a budget, of which the time since ``begin`` is spent, that of trials among it."""
    estimates: dict[str, Estimate] = {}
    teachers, needed, left = 0.0, dict.fromkeys(seeds, 0.0), dict.fromkeys(seeds, 0)
    for each in series:
        try:
            found = each.estimate(pool, _prefix(each.name, log))
        except TeacherTrainingError as error:
            if len(series) == 1:
                raise
            each.error = str(error)
            log(f'{each.name}: {error}')
            continue
        names = {name for name in found if name not in {variant.name for variant in each.variants}}
        teachers += _run_together([found[name].seconds for name in names], pool.jobs)
        for seed in seeds:
            unfinished = each.list_unfinished(seed, pool)
            needed[seed] += _run_together([found[name].seconds for name in unfinished], pool.jobs)
            left[seed] += len(unfinished)
        estimates.update({f'{each.name}: {name}' if each.name else name: one for name, one in found.items()})
    return Plan(budget, estimates, time.monotonic() - begin + teachers, needed, left)


def _prefix(name: str, log: Callable[[str], None]) -> Callable[[str], None]:
    """A log whose lines begin with the name of a data set, where it has one."""
    return (lambda text: log(f'{name}: {text}')) if name else log


def _run_together(seconds: Sequence[float], jobs: int | None) -> float:
    """How long trainings take, so many at once; None for all."""
    return max(sum(seconds) / (jobs or max(len(seconds), 1)), max(seconds, default=0.0))
