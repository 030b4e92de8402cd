"""``kd-det benchmark``: methods side by side on one pair, over seeds."""
from __future__ import annotations

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import (
    ConfigAction,
    add_force_option,
    add_image_option,
    add_inheritance_option,
    add_tracking_option,
    add_weight_options,
    count,
    inherited_parts,
    path,
    print_tables,
    read_options,
    seed,
)
from kd_det.config.choices import SPLITS

if TYPE_CHECKING:
    from kd_det.study.records import BenchmarkResult
    from kd_det.study.suite import SuiteResult


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--suite', type=path, metavar='FILE',
                        help='several data sets in place of one pair: a YAML file that names them, their pairs and the '
                        'methods (docs/evaluation.md); --data is then the folder that holds the data sets, and '
                        'options that are given count in place of what the file says')
    parser.add_argument('--methods', metavar='A,B+C,D@SETTING',
                        help='methods, sums of methods, inherit or pseudo_labels; @paper, @balance=RATIO, '
                        '@inherit=PART+PART, @teachers=N, @policy=POLICY, @epochs=N, @augment=mosaic+mixup, '
                        '@noise=SHARE, @shift=SHARE, @without=CLASS+CLASS, @pseudo_labels=SCORE and '
                        '@dotted.key=value are settings of one of them. none, the plain student, always takes '
                        "part, also in each setting of the student ('none,kd,fgd,pkd')")
    add_common_arguments(parser)


def add_common_arguments(parser: ArgumentParser) -> None:
    """Adds the options that a sweep has too."""
    pair = parser.add_argument_group('what is compared')
    pair.add_argument('pair', nargs='?', metavar='PAIR',
                      help='config of a distillation: its student and its teacher count, its terms do not; such as '
                      'configs/_base_/pairs/retinanet_r101_r18.py')
    pair.add_argument('--student', metavar='CONFIG', help="the student's config, in place of the pair's")
    pair.add_argument('--teacher', nargs='+', metavar='CONFIG',
                      help="the teacher's config, in place of the pair's; or those of several, for @teachers=N")
    pair.add_argument('--teacher-checkpoint', nargs='+', default=(), metavar='FILE',
                      help="the teacher's weights, and those of more for @teachers=N; without any, and where the "
                      "pair's are not there, as many teachers as are needed are trained first, with their own config "
                      'and a seed each')
    pair.add_argument('--seeds', type=_seeds, metavar='N',
                      help="number of seeds, from 0 on, or a list of them: '3,5,8', or '7,' for one alone (3)")
    pair.add_argument('--fidelity', nargs='*', choices=SPLITS, metavar='SPLIT',
                      help='also measure how closely the students follow the teacher, on val (if none is named) and '
                      'train images')
    training = parser.add_argument_group('how it is trained')
    training.add_argument('--data', '--data-root', metavar='DIR',
                          help="folder of the data, in place of the configs' data_root")
    training.add_argument('--epochs', type=_lengths, metavar='N,M',
                          help="epochs of the students (their config's), and their schedules with them; several, as "
                          '12,24,48, train and compare each method at each length')
    training.add_argument('--teacher-epochs', type=count, metavar='N', help="epochs of the teacher (its config's)")
    add_weight_options(training)
    add_inheritance_option(training)
    training.add_argument('--cfg-options', nargs='+', action=ConfigAction, default=[], metavar='KEY=VALUE',
                          help='settings that override the config of every student; model.distill… and '
                          'default_hooks.distill… reach the distilled ones')
    add_image_option(training)
    add_tracking_option(training)
    machine = parser.add_argument_group('where')
    machine.add_argument('--work-dir', type=path, default=Path('work_dirs/benchmark'), metavar='DIR',
                         help='folder of runs and results (work_dirs/benchmark); finished runs that are there are kept')
    machine.add_argument('--budget', type=_duration, metavar='TIME',
                         help="do what fits into this time, such as '2h' or '1h30m': how long a training takes is told "
                         'by finished ones, or by trials of a few steps; whole seeds are trained, and those that do '
                         'not fit are told')
    add_force_option(machine)
    machine.add_argument('--executor', default='local', metavar='NAME',
                         help='local, slurm, or debug for one training after another (local); '
                         "submitit's, with the plugins that are installed")
    machine.add_argument('--slurm', nargs='+', action=ConfigAction, default=[], metavar='KEY=VALUE',
                         help="what each job asks Slurm for, by submitit's names: time=240 (minutes, required), "
                         'partition, gpus_per_node, cpus_per_task, mem, …, additional_parameters.NAME')
    machine.add_argument('--devices', type=lambda text: text.split(','), default=(), metavar='A,B',
                         help='numbers of GPUs among those of CUDA_VISIBLE_DEVICES, one training on each, or cpu')
    machine.add_argument('--devices-per-run', type=count, default=1, metavar='N',
                         help='GPUs that train one run together, each a share of every batch (1)')
    machine.add_argument('--jobs', type=count, metavar='N',
                         help='trainings at once (as many as there are devices for; with slurm all)')
    machine.add_argument('--threads', type=count, metavar='N',
                         help="PyTorch's threads of each process (processors / processes)")
    machine.add_argument('--collect', action='store_true',
                         help='train nothing: make the tables of what the same command has trained so far')


def _seeds(text: str) -> list[int]:
    try:
        numbers = [seed(number) for number in text.removesuffix(',').split(',')]
    except ArgumentTypeError:
        numbers = []
    if not numbers or len(set(numbers)) < len(numbers) or numbers == [0] and ',' not in text:
        raise ArgumentTypeError("expected a number of seeds, 1 or more, or a list of seeds below 2**32, no two the "
                                f"same: '3,5,8' or '7,', got '{text}'")
    return numbers if ',' in text else list(range(numbers[0]))


def _duration(text: str) -> float:
    """Seconds of a time such as '2h', '90m', '1h30m' or '1d'."""
    units = dict(d=86400, h=3600, m=60, s=1)
    found = re.fullmatch(r'(?=.)' + ''.join(rf'(?:(\d+(?:\.\d+)?){unit})?' for unit in units), text.strip())
    seconds = sum(float(number) * unit for number, unit in zip(found.groups('0'), units.values())) if found else 0
    if not seconds:
        raise ArgumentTypeError(f"expected a time such as 2h, 90m or 1h30m, got '{text}'")
    return seconds


def _lengths(text: str) -> int | list[int]:
    numbers = [count(number) for number in text.split(',')]
    if len(set(numbers)) < len(numbers):
        raise ArgumentTypeError("expected a number of epochs, or a list of them, no two the same: '12,24', got "
                                f"'{text}'")
    return sorted(numbers) if len(numbers) > 1 else numbers[0]


def run(options: Namespace) -> int:
    from kd_det.config import ConfigurationError
    from kd_det.study.benchmark import benchmark
    from kd_det.study.suite import benchmark_suite
    if options.suite is None:
        return print_benchmark(partial(benchmark, **_given(methods=options.methods)), options)
    named = [name for name, value in (('PAIR', options.pair), ('--student', options.student),
                                      ('--teacher', options.teacher),
                                      ('--teacher-checkpoint', options.teacher_checkpoint)) if value]
    if named:
        raise ConfigurationError(f"{', '.join(named)}: the file of --suite names the pairs. Leave it out, or write it "
                                 'there.')
    inherited = inherited_parts(options)
    return _print(partial(benchmark_suite, options.suite, methods=options.methods,
                          inherit=None if inherited == 'auto' else inherited), options)


def print_benchmark(function: Callable[..., BenchmarkResult], options: Namespace) -> int:
    """Calls a function with what :func:`add_common_arguments` added, and prints its tables; returns the exit status."""
    return _print(partial(function, options.pair, student=options.student, teacher=options.teacher,
                          teacher_checkpoints=options.teacher_checkpoint, inherit=inherited_parts(options)), options)


def _print(function: Callable[..., BenchmarkResult | SuiteResult], options: Namespace) -> int:
    """Calls a function with the options that benchmarks and suites have, and prints its tables."""
    from kd_det.compat.console import PlainConsole
    from kd_det.study.series import TeacherTrainingError
    console = PlainConsole(highlight=False)

    def log(text: str) -> None:
        console.print(text, soft_wrap=True)

    fidelity = ('val', ) if options.fidelity == [] else options.fidelity
    try:
        result = function(
            **_given(seeds=options.seeds, fidelity=fidelity), data_root=options.data, epochs=options.epochs,
            teacher_epochs=options.teacher_epochs, balance=options.balance, options=read_options(options.cfg_options),
            check_images=options.check_images, trackers=options.track, work_dir=options.work_dir,
            budget=options.budget, devices=options.devices, jobs=options.jobs, threads=options.threads,
            executor=options.executor, slurm=read_options(options.slurm, '--slurm'),
            devices_per_run=options.devices_per_run, collect=options.collect, force=options.force, log=log)
    except TeacherTrainingError as error:
        log(str(error))
        return 1
    print_tables(console, result.tabulate())
    log(f"Saved {', '.join(map(str, result.files))}.")
    return 1 if result.failed_runs else 0


def _given(**options: object) -> dict[str, object]:
    """The options that were given: all others have the function's own defaults."""
    return {name: value for name, value in options.items() if value is not None}
