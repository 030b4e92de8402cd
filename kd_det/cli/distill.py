"""``kd-det distill``: composes a distillation out of a student's config and a teacher, saves it, and trains it."""
from __future__ import annotations

import os
import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import add_inheritance_option, add_weight_options, inherited_parts
from kd_det.cli.train import add_training_options, apply_training_options, train
from kd_det.config.choices import FAMILIES
from kd_det.config.methods import available_methods, name_sum

if TYPE_CHECKING:
    from mmengine.config import Config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('student', metavar='STUDENT_CONFIG',
                        help="config of the detector to train: a file, or 'mmdet::folder/file.py'")
    parser.add_argument('--teacher',
                        required=True,
                        metavar='CONFIG',
                        help="config of the teacher, or 'mmdet::folder/file.py'")
    parser.add_argument('--teacher-checkpoint',
                        nargs='+',
                        required=True,
                        metavar='FILE',
                        help="the teacher's weights: a file or address; from several, all trained with this config, "
                        'the student learns as from an ensemble')
    parser.add_argument('--method', required=True,
                        help=f"{', '.join(available_methods())}; a file, as my_method.py or package::folder/file.py; "
                        'or a sum of them: a+b')
    parser.add_argument('--family', choices=FAMILIES, default='',
                        help="whose published weights to use (told by the student's heads by default)")
    add_inheritance_option(parser)
    add_weight_options(parser)
    add_training_options(parser)


def run(options: Namespace) -> int:
    from kd_det.checks.doctor import check_config
    from kd_det.config.composition import distillation_config, make_ensemble
    from kd_det.config.files import rename_config
    checkpoints = options.teacher_checkpoint
    config = distillation_config(options.student, options.teacher, checkpoints[0], options.method,
                                 inherited_parts(options), options.family, options.balance)
    several = f'_{len(checkpoints)}_teachers' if len(checkpoints) > 1 else ''
    name = f'{Path(options.student).stem}_{name_sum(options.method)}{several}'
    if several:
        config = make_ensemble(config, checkpoints)
    apply_training_options(config, options, name)  # last: what is set of a term holds for all teachers, or for one
    config = rename_config(config, Path(config.work_dir) / f'{name}.py')
    check_config(config, splits=('train', 'val'))  # before anything is written
    if int(os.environ.get('RANK', 0)) == 0:
        save(config)
    train(config, options.resume, options.check_images)
    return 0


def save(config: Config) -> None:
    """Shows the config and saves it under its name, so that ``kd-det train`` and ``tools/train.py`` repeat the run."""
    from rich.syntax import Syntax
    from rich.text import Text

    from kd_det.compat.console import PlainConsole
    console = PlainConsole()
    console.print(Syntax(config.pretty_text, 'python', background_color='default'))
    Path(config.filename).parent.mkdir(parents=True, exist_ok=True)
    config.dump(config.filename)
    saved = Text.assemble('This config is saved as ', (config.filename, 'bold'),
                          f'. To repeat the run: kd-det train {shlex.quote(config.filename)}')
    console.print(saved, soft_wrap=True)  # so that the command can be copied
