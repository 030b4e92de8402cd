"""The options that several commands share, and what they do to a config."""
from __future__ import annotations

import math
import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_det.config.choices import AUTO, IMPORTANCES, INHERITANCE_RULES, PAPER, RATIO, TRACKERS

if TYPE_CHECKING:
    from rich.console import Console

    from kd_det.compat.console import TextTable


KEY_AND_VALUE = re.compile(r'[^.=\s]+(\.[^.=\s]+)*=')  # a dotted key without an empty part


class ConfigAction(Action):
    """Collects texts KEY=VALUE in a list, of which :func:`read_options` makes a dict."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any,
                 option_string: str | None = None) -> None:
        for value in values:
            if not KEY_AND_VALUE.match(value):
                parser.error(f"argument {option_string}: expected KEY=VALUE, got '{value}'")
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), *values])


def read_options(texts: Sequence[str], option: str = '--cfg-options') -> dict[str, Any]:
    """What a :class:`ConfigAction` collected for an option, each value read as MMEngine's ``DictAction`` reads it."""
    from kd_det.config.options import read_value
    pairs = [text.split('=', maxsplit=1) for text in texts]
    return {key: read_value(value, f'{option} {key}') for key, value in pairs}


class Number:
    """The type of an option that is a finite number; the ranges are those of the function that gets it.

    The functions declare theirs (:mod:`kd_det.config.arguments`), but reading those imports more than a refusal needs.

    Args:
        kind: int or float.
        least: The smallest that fits.
        most: The largest that fits.
    """

    def __init__(self, kind: type, least: float, most: float = math.inf) -> None:
        self.kind, self.least, self.most = kind, least, most
        limit = f' and of at most {most:.12g}' if most < math.inf else ''
        self.expected = f"{'an integer' if kind is int else 'a number'} of at least {least:g}{limit}"

    def __call__(self, text: str) -> Any:
        try:
            number = self.kind(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and self.least <= number <= self.most):
            raise ArgumentTypeError(f"expected {self.expected}, got '{text}'")
        return number


count, index, seed, amount = Number(int, 1), Number(int, 0), Number(int, 0, 2**32 - 1), Number(float, 0)
bits = Number(int, 2, 8)


def path(text: str) -> Path:
    """The type of an option that names a file or folder; '' would be the folder that one is in."""
    if not text.strip():
        raise ArgumentTypeError('expected the path of a file or folder, got nothing')
    return Path(text)


def share(text: str) -> float:
    """The type of an option that is a part of something, neither none of it nor all."""
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ArgumentTypeError(f"expected a number above 0 and below 1, got '{text}'")
    return share


def _folder(text: str) -> str:
    return str(path(text))


def add_image_option(parser: ArgumentParser) -> None:
    """Adds ``--check-images``."""
    parser.add_argument('--check-images', type=_image_count, default='all', metavar='N',
                        help='read all images before training and tell which can not be read (all); or N of each data '
                        'set, evenly spread; or none')


def _image_count(text: str) -> int | None:
    """All, which is None, or a number."""
    if text in ('all', 'none'):
        return None if text == 'all' else 0
    try:
        return count(text)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"expected all, none, or an integer of at least 1, got '{text}'") from None


def add_config_options(parser: ArgumentParser) -> None:
    """Adds the options that change a config."""
    parser.add_argument('--data-root', type=_folder, metavar='DIR',
                        help="folder of the data, in place of the config's data_root")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigAction,
        default=[],
        metavar='KEY=VALUE',
        help='settings that override the config, such as train_dataloader.batch_size=4; lists as key="[a,b]" or '
        'key=a,b, no white space')


def add_force_option(parser: ArgumentParser) -> None:
    """Adds ``--force``."""
    parser.add_argument('--force', action='store_true', help='write over files that kd_det did not write')


def add_run_options(parser: ArgumentParser) -> None:
    """Adds the options of a run, MMDetection's own, beside those that change its config."""
    parser.add_argument('--work-dir',
                        type=_folder,
                        metavar='DIR',
                        help='folder for logs and checkpoints (work_dirs/CONFIG by default)')
    add_config_options(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes --local-rank, older versions --local_rank; torchrun sets the variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=index, default=0, metavar='RANK',
                        help='set by the launcher')


def add_tracking_option(parser: ArgumentParser) -> None:
    """Adds ``--track``: sends logs to experiment trackers beside mmengine's own files."""
    parser.add_argument('--track', nargs='+', choices=TRACKERS, default=(), metavar='TRACKER',
                        help=f"log to {', '.join(TRACKERS)} too; losses of terms are loss_*, their parts distill/*")


def add_importance_option(parser: ArgumentParser) -> None:
    """Adds ``--importance``."""
    parser.add_argument('--importance', choices=(AUTO, *IMPORTANCES), default=AUTO,
                        help='which channels are pruned first: those that the loss on training images asks least for '
                        '(taylor), those of small weights (group_norm), or any (random); by default taylor, and '
                        'group_norm where there are no training images, which the table tells')


def add_inheritance_option(parser: ArgumentParser) -> None:
    """Adds ``--inherit``."""
    parser.add_argument('--inherit', nargs='+', default=['auto'], metavar='PART',
                        help="parts of the student that start from the teacher's weights where shapes agree, such "
                        'as neck rpn_head roi_head; all but the backbone by default (auto), or none')


def add_inheritance_rule_option(parser: ArgumentParser) -> None:
    """Adds ``--inherit-by``."""
    parser.add_argument('--inherit-by', choices=INHERITANCE_RULES, default=INHERITANCE_RULES[0],
                        help='how a student starts from a teacher of another size, its backbone too: selection, a '
                        'smaller one with evenly spaced channels and the first layers of each stage; growth, a larger '
                        'one that computes what the teacher does; by default only where shapes agree (shape)')


def add_weight_options(parser: ArgumentParser) -> None:
    """Adds ``--balance`` and ``--paper-weights``."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--balance', type=amount, metavar='RATIO',
                         help="keep each method's gradient on the student's features at RATIO times the task's "
                         f"({RATIO:g}, unless the method's file says otherwise)")
    weights.add_argument('--paper-weights', dest='balance', action='store_const', const=PAPER,
                         help="the method's published weights, which are made for COCO")


def inherited_parts(options: Namespace) -> str | tuple[str, ...]:
    """What ``--inherit`` says, as :func:`~kd_det.config.composition.distillation_config` takes it."""
    parts = tuple(options.inherit)
    if parts == ('auto', ):
        return 'auto'
    return () if parts == ('none', ) else parts


def print_tables(console: Console, tables: Iterable[TextTable]) -> None:
    """Prints tables: with lines and as wide as a terminal, or, into a pipe or a file, one line a row and whole."""
    for table in tables:
        if console.is_terminal:
            console.print(table.to_rich())
        else:
            console.print(table.to_plain(), '', sep='\n', soft_wrap=True, highlight=False)
