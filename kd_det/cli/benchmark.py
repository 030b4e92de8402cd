"""``kd-det benchmark``: methods side by side on one pair, over seeds."""
from __future__ import annotations

import copy
import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import (
    ConfigAction,
    add_image_option,
    add_inheritance_option,
    add_weight_options,
    inherited_parts,
    read_options,
)
from kd_det.cli.tracking import add_tracking_option, track
from kd_det.config.choices import SPLITS

if TYPE_CHECKING:
    from mmengine.config import Config

    from kd_det.study.variants import Variant

TEACHER_SEED = 0


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--methods', default='none,kd,fgd,pkd', metavar='A,B+C,D@SETTING',
                        help='methods, sums of methods, or inherit; @paper, @balance=RATIO, @inherit=PART+PART, '
                        '@teachers=N, @augment=mosaic+mixup and @dotted.key=value are settings of one of them. none, '
                        "the plain student, always takes part, also in each setting of the student ('none,kd,fgd,pkd')")
    add_common_arguments(parser)


def add_common_arguments(parser: ArgumentParser) -> None:
    """Adds the options that a sweep has too."""
    pair = parser.add_argument_group('what is compared')
    pair.add_argument('pair', nargs='?', metavar='PAIR',
                      help='config of a distillation: its student and its teacher count, its terms do not; such as '
                      'configs/_base_/pairs/retinanet_r101_r18.py')
    pair.add_argument('--student', metavar='CONFIG', help="the student's config, in place of the pair's")
    pair.add_argument('--teacher', metavar='CONFIG', help="the teacher's config, in place of the pair's")
    pair.add_argument('--teacher-checkpoint', nargs='+', default=(), metavar='FILE',
                      help="the teacher's weights, and those of more for @teachers=N; without any, and where the "
                      "pair's are not there, as many teachers as are needed are trained first, with their own config "
                      'and a seed each')
    pair.add_argument('--seeds', type=_seeds, default='3', metavar='N',
                      help="number of seeds, from 0 on, or a list of them: '3,5,8', or '7,' for one alone (3)")
    pair.add_argument('--fidelity', nargs='*', choices=SPLITS, metavar='SPLIT',
                      help='also measure how closely the students follow the teacher, on val (if none is named) and '
                      'train images')
    training = parser.add_argument_group('how it is trained')
    training.add_argument('--data', '--data-root', metavar='DIR',
                          help="folder of the data, in place of the configs' data_root")
    training.add_argument('--epochs', type=int, metavar='N',
                          help="epochs of the students (their config's), and their schedules with them")
    training.add_argument('--teacher-epochs', type=int, metavar='N', help="epochs of the teacher (its config's)")
    add_weight_options(training)
    add_inheritance_option(training)
    training.add_argument('--cfg-options', nargs='+', action=ConfigAction, default=[], metavar='KEY=VALUE',
                          help='settings that override the config of every student; model.distill… and '
                          'default_hooks.distill… reach the distilled ones')
    add_image_option(training)
    add_tracking_option(training)
    machine = parser.add_argument_group('where')
    machine.add_argument('--work-dir', type=Path, default=Path('work_dirs/benchmark'), metavar='DIR',
                         help='folder of runs and results (work_dirs/benchmark); finished runs that are there are kept')
    machine.add_argument('--devices', type=lambda text: text.split(','), default=(), metavar='A,B',
                         help='numbers of GPUs, one training on each, or cpu')
    machine.add_argument('--jobs', type=int, metavar='N', help='trainings at once (as many as devices)')
    machine.add_argument('--threads', type=int, metavar='N', help="PyTorch's threads of each (processors / jobs)")


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(number) for number in text.rstrip(',').split(',')]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers) or numbers == [0] and ',' not in text:
        raise ArgumentTypeError(f"expected a number of seeds, 1 or more, or a list, '3,5,8' or '7,', got '{text}'")
    return numbers if ',' in text else list(range(numbers[0]))


def run(options: Namespace) -> int:
    import torch
    from mmengine.config import Config

    from kd_det.checks.checkpoints import inspect_checkpoint
    from kd_det.checks.doctor import check_config, inspect_data
    from kd_det.checks.environment import raise_faults
    from kd_det.checks.image_reader import Memory
    from kd_det.compat.console import PlainConsole
    from kd_det.config.files import ConfigurationError
    from kd_det.study.fidelity import add_fidelity, summarize_fidelity
    from kd_det.study.pair import adapted, data_hash, read_pair, weights_hash
    from kd_det.study.results import mark_twins, relative, run_entry, summarize
    from kd_det.study.runs import command_line, environment
    from kd_det.study.scheduling import Failure, Job, Machine
    from kd_det.study.tables import markdown_table, rich_tables
    from kd_det.study.variants import PLAIN, Variant, parse_variants, variant_config
    console = PlainConsole(highlight=False)
    root: Path = options.work_dir

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    pair = read_pair(options.pair, options.student, options.teacher, options.teacher_checkpoint)
    pair = replace(pair, student=adapted(pair.student, options.data, options.epochs))
    common = Variant('', PLAIN, options.balance, inherited_parts(options), read_options(options.cfg_options))
    variants = parse_variants(options.methods, common)
    number = teachers_needed(variants, pair.checkpoints)
    if set(options.devices) - {'cpu'} and not torch.cuda.is_available():
        raise ConfigurationError(f"--devices {','.join(options.devices)}: there is no GPU. Leave the option out, or "
                                 'give cpu.')
    for variant in variants:  # what can not be composed is told before a teacher is trained
        variant_config(variant, pair, [''] * number)
    raise_faults(inspect_checkpoint('--teacher-checkpoint', checkpoint, 'Give the path of a checkpoint')
                 for checkpoint in options.teacher_checkpoint)
    check_config(pair.student, splits=('train', 'val'))
    raise_faults(inspect_data(pair.student, ('train', 'val'), Memory(root), options.check_images))
    data = data_hash(pair.student)
    track(Config(dict(work_dir=str(root))), options.track)  # whose package is missing is told before, too
    machine = Machine(options.devices, options.jobs, options.threads, options.track)

    teachers = [None] * number
    if not pair.checkpoints:
        config = adapted(pair.teacher_config(), options.data, options.teacher_epochs)
        names = ['teacher', *(f'teacher_{index + 2}' for index in range(number - 1))]
        teachers = machine.run([Job(name, root / name, seeded(copy.deepcopy(config), TEACHER_SEED + index), [data])
                                for index, name in enumerate(names)], say)
        failed = [each for each in teachers if isinstance(each, Failure)]
        if failed:
            say(f'Without a teacher there is nothing to compare. All that was said is in {failed[0].log}.')
            return 1
        pair = replace(pair, checkpoints=tuple(teacher.checkpoint for teacher in teachers))
    taught_by = [weights_hash(each) for each in pair.checkpoints]

    jobs, runs = [], []
    for seed, variant in product(options.seeds, variants):
        folder = root / variant.folder / f'seed{seed}'
        config = seeded(variant_config(variant, pair, pair.checkpoints), seed)
        jobs.append(Job(f'{variant.name}, seed {seed}', folder, config,
                        [data] if variant.is_plain else [data, *taught_by[:variant.teachers]]))
        runs.append((variant, seed, folder))
    outcomes = machine.run(jobs, say)

    entries = [run_entry(*each, outcome, root) for each, outcome in zip(runs, outcomes)]
    mark_twins(entries)
    trained = [None if teacher is None else relative(teacher, root) for teacher in teachers]
    splits = ('val', ) if options.fidelity == [] else options.fidelity or ()
    add_fidelity(entries, root, dict(config=pair.teacher, checkpoint=pair.checkpoints[0]), splits, say)
    results = dict(
        command=command_line(),
        **environment(machine.threads),
        pair=dict(student=str(pair.student.filename), teacher=pair.teacher, checkpoint=pair.checkpoints[0],
                  checkpoint_hash=taught_by[0]),
        data=dict(root=options.data, hash=data),
        seeds=options.seeds,
        teacher=trained[0],
        further_teachers=[dict(checkpoint=checkpoint, checkpoint_hash=digest, run=run)
                          for checkpoint, digest, run in zip(pair.checkpoints[1:], taught_by[1:], trained[1:])],
        runs=entries,
        summary=summarize(entries),
        fidelity=summarize_fidelity(entries, splits))
    (root / 'results.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
    (root / 'results.md').write_text(markdown_table(results), encoding='utf-8')
    for table in rich_tables(results):
        console.print(table)
    say(f"Saved {root / 'results.json'}, {root / 'results.md'}.")
    return 1 if any(isinstance(outcome, Failure) for outcome in outcomes) else 0


def teachers_needed(variants: Sequence[Variant], checkpoints: Sequence[str]) -> int:
    """How many teachers the variant with the most of them has.

    Raises:
        ConfigurationError: Weights are given, but of fewer teachers or of more.
    """
    from kd_det.config.files import ConfigurationError
    most = max(variants, key=lambda variant: variant.teachers)
    if checkpoints and len(checkpoints) != most.teachers:
        counts = f'{len(checkpoints)} checkpoint{"s are" if len(checkpoints) > 1 else " is"} given'
        if len(checkpoints) < most.teachers:
            raise ConfigurationError(f'{most.name}: {counts}. Give {most.teachers} with --teacher-checkpoint, one for '
                                     'each teacher.')
        raise ConfigurationError(f'{counts}, but no method asks for more than {most.teachers}: name one with '
                                 f'@teachers={len(checkpoints)}.')
    return most.teachers


def seeded(config: Config, seed: int) -> Config:
    """The config with a seed."""
    config.randomness = dict(config.get('randomness') or {}, seed=seed)
    return config
