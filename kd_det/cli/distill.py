"""``kd-det distill``: composes a distillation out of a student's config and a teacher, saves it, and trains it."""
from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from kd_det.cli.common import (
    add_inheritance_option,
    add_inheritance_rule_option,
    add_weight_options,
    bits,
    inherited_parts,
)
from kd_det.cli.train import add_training_options, read_training_options
from kd_det.config.choices import FAMILIES, LEARNT_FROM, POLICIES
from kd_det.config.methods import available_methods

if TYPE_CHECKING:
    from mmengine.config import Config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('student', metavar='STUDENT_CONFIG',
                        help="config of the detector to train: a file, or 'mmdet::folder/file.py'")
    parser.add_argument('--teacher',
                        nargs='+',
                        default=(),
                        metavar='CONFIG',
                        help="config of the teacher, or 'mmdet::folder/file.py', or a file with another guide, such as "
                        "teacher = dict(type='mmdet.Backbone', name=…); or configs of several; none is needed beside "
                        '--peers')
    parser.add_argument('--teacher-checkpoint',
                        nargs='+',
                        default=(),
                        metavar='FILE',
                        help="the teacher's weights: a file or address; of several teachers each one's, or several of "
                        'one config; from them the student learns as from an ensemble, or by --policy')
    parser.add_argument('--policy', choices=POLICIES, metavar='POLICY',
                        help=f"who teaches in each step, of several teachers: {', '.join(POLICIES)}; for bandit and "
                        'agent images of the training data are held out')
    parser.add_argument('--method', required=True,
                        help=f"{', '.join(available_methods())}; a file, as my_method.py or package::folder/file.py; "
                        'or a sum of them: a+b; auto lets a bandit choose between all that fit, auto:a+b between these')
    parser.add_argument('--family', choices=FAMILIES, default='',
                        help="whose published weights to use (told by the student's heads by default)")
    add_inheritance_option(parser)
    add_inheritance_rule_option(parser)
    parser.add_argument('--peers', nargs='+', default=(), metavar='N|CONFIG',
                        help="how many detectors of the student's own kind learn beside it in the same steps, or the "
                        'configs of others')
    parser.add_argument('--share', nargs='+', default=(), metavar='PART',
                        help='parts that they have in common with the student, from the image on: backbone neck')
    parser.add_argument('--guide', choices=LEARNT_FROM, default=LEARNT_FROM[0],
                        help='what they learn from by the method: each other (peers), their mean, their mean by a '
                        'learnt gate, or a learner of their fused features (fusion)')
    parser.add_argument('--quantize', type=bits, metavar='BITS',
                        help='train the student as it computes with integers of so many bits; from a trained one: '
                        '--cfg-options load_from=FILE')
    add_weight_options(parser)
    add_training_options(parser)


def run(options: Namespace) -> int:
    from kd_det.training.runs import distill
    distill(options.student, options.teacher, options.teacher_checkpoint, options.method,
            inherit=inherited_parts(options), inherit_by=options.inherit_by, balance=options.balance,
            family=options.family, on_config=show, quantize=options.quantize, peers=read_peers(options),
            share=options.share, guide=options.guide, policy=options.policy, **read_training_options(options))
    return 0


def read_peers(options: Namespace) -> int | tuple[str, ...]:
    """A number, or configs."""
    return int(options.peers[0]) if len(options.peers) == 1 and options.peers[0].isdecimal() else tuple(options.peers)


def show(config: Config) -> None:
    """Shows the config, and how ``kd-det train`` or ``tools/train.py`` repeat the run."""
    from rich.syntax import Syntax
    from rich.text import Text

    from kd_det.compat.console import PlainConsole
    console = PlainConsole()
    console.print(Syntax(config.pretty_text, 'python', background_color='default'))
    saved = Text.assemble('This config is saved as ', (config.filename, 'bold'),
                          f'. To repeat the run: kd-det train {shlex.quote(config.filename)}')
    console.print(saved, soft_wrap=True)  # so that the command can be copied
