"""``kd-det methods``: a table of the methods that ``kd-det distill`` knows."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from kd_det.config.methods import Methods


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('methods', nargs='*', metavar='METHOD',
                        help='show these alone, by name or file (my_method.py, package::folder/file.py), with what the '
                        "files do not state: it is found out by building their terms (all that have names)")


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.config.methods import methods
    console = PlainConsole()
    console.print(render(methods(*options.methods)))
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
