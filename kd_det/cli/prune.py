"""``kd-det prune``: a smaller detector out of a trained one, and the table of its parts."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from kd_det.cli.common import (
    add_config_options,
    add_force_option,
    add_importance_option,
    count,
    path,
    print_tables,
    read_options,
    seed,
    share,
)

if TYPE_CHECKING:
    from pathlib import Path


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help='config of the detector, or of the run that wrote the checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out',
                        metavar='OUT.pth',
                        type=path,
                        help='file to write; the config comes beside it, as OUT.py')
    parser.add_argument('--macs', type=share, default=0.5, metavar='SHARE',
                        help='of the multiply-accumulate operations that is left at most (0.5)')
    add_importance_option(parser)
    parser.add_argument('--batches', type=count, default=8, metavar='N',
                        help='of training images, for taylor (8)')
    parser.add_argument('--seed', type=seed, default=0, help='of what is drawn at random (0)')
    parser.add_argument('--no-eval', dest='evaluation', action='store_false',
                        help='do not evaluate it before and after')
    steps = parser.add_argument_group('in steps, with distillation between them')
    steps.add_argument('--steps', type=count, default=1, metavar='N', help='prune in N steps (1)')
    steps.add_argument('--teacher', metavar='CONFIG', help="config of the teacher, or 'mmdet::folder/file.py'")
    steps.add_argument('--teacher-checkpoint', metavar='FILE', help="the teacher's weights: a file or address")
    steps.add_argument('--method', default='fgd', help='see kd-det methods (fgd)')
    steps.add_argument('--epochs', type=count, metavar='N', help="of each distillation (the config's own)")
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.config import ConfigurationError
    from kd_det.deploy.pruning import prune
    teacher = options.teacher, options.teacher_checkpoint
    if (options.steps > 1) != all(teacher) or any(teacher) and not all(teacher):
        raise ConfigurationError('--steps needs --teacher and --teacher-checkpoint, with which the detector is '
                                 'distilled between the steps, and they need --steps of at least 2.')
    settings = dict(data_root=options.data_root, options=read_options(options.cfg_options))
    pruned = prune(options.config, options.checkpoint, options.out, options.macs, importance=options.importance,
                   batches=options.batches, steps=options.steps, evaluation=options.evaluation, seed=options.seed,
                   train=partial(_distill, options) if options.steps > 1 else None, force=options.force, **settings)
    print_tables(PlainConsole(), [pruned.tabulate()])
    before, after = pruned.macs
    print(f'{pruned.checkpoint} holds a {pruned.detector} of {after / before:.3f} of the MACs, {pruned.config} its '
          'config, whose training starts from it.')
    return 0


def _distill(options: Namespace, config: Path, checkpoint: Path, step: int) -> Any:
    """Distils the teacher into what a step has left; its config starts from the checkpoint."""
    from kd_det.training.runs import distill
    run = distill(config, options.teacher, options.teacher_checkpoint, options.method, epochs=options.epochs,
                  inherit=(), seed=options.seed, work_dir=checkpoint.with_name(f'distilled_{step}'))
    return run.best_checkpoint or run.checkpoint
