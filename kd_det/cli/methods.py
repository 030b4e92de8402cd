"""``kd-det methods``: a table of the methods that ``kd-det distill`` knows, or of those that fit a student."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from kd_det.config.fitting import Fitting
    from kd_det.config.methods import Methods


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('methods', nargs='*', metavar='METHOD',
                        help='show these alone, by name or file (my_method.py, package::folder/file.py), with what the '
                        "files do not state: it is found out by building their terms (all that have names)")
    parser.add_argument('--for', dest='student', metavar='STUDENT_CONFIG',
                        help='show those that fit the student of this config, first what has gained most where its '
                        'kind was measured, and why others do not fit')
    parser.add_argument('--teacher', metavar='CONFIG', help='beside --for: the config of its teacher, which they must '
                        'fit, too')


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    console = PlainConsole()
    if options.student is None:
        from kd_det.config import ConfigurationError
        from kd_det.config.methods import methods
        if options.teacher is not None:
            raise ConfigurationError('--teacher: whose? Name the student, too: --for STUDENT_CONFIG.')
        console.print(render(methods(*options.methods)))
    else:
        from kd_det.config.fitting import find_fitting
        fitting = find_fitting(options.student, options.teacher, options.methods)
        console.print(render_fitting(fitting))
        for name, problem in fitting.others.items():
            console.print(f'{name}: {problem}', highlight=False)
    console.print('Take one with kd-det distill … --method fgd, or a sum of them: fgd+dkd.', highlight=False)
    return 0


def render(methods: Methods) -> Table:
    """The methods as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text
    table = Table(*methods.COLUMNS, caption=methods.CAPTION, caption_justify='left')
    for method, (name, *cells) in zip(methods, methods.rows()):
        table.add_row(Text(name, 'bold'), *(Text(cell, 'red' if method.error else '') for cell in cells))
    return table


def render_fitting(fitting: Fitting) -> Table:
    """The methods that fit as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text
    table = Table('Method', 'Compares', 'Gain, mAP', 'Cost', caption=fitting.caption, caption_justify='left')
    for method in fitting.methods:
        gain = '' if method.gain is None else '{:+.1f} ({:+.1f} to {:+.1f})'.format(*method.gain)
        table.add_row(Text(method.name, 'bold'), method.idea or '', gain,
                      '' if method.cost is None else f'{method.cost:.2f}')
    return table
