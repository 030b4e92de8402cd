"""``kd-det methods``: a table of the methods that ``kd-det distill`` knows."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from kd_det.config.methods import MethodEntry


def add_arguments(parser: ArgumentParser) -> None:
    """It has no options of its own."""


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.config.methods import catalogue
    console = PlainConsole()
    console.print(render(catalogue()))
    console.print('Take one with kd-det distill … --method fgd, or a sum of them: fgd+dkd.', highlight=False)
    return 0


def render(entries: Sequence[MethodEntry]) -> Table:
    """The methods as a table."""
    from rich.table import Table
    from rich.text import Text

    from kd_det.config.detectors import DETECTORS
    table = Table('Method', 'Compares', 'Reads', 'Serves', 'Paper', caption=f"all: {', '.join(DETECTORS)}",
                  caption_justify='left')
    for entry in entries:
        table.add_row(Text(entry.name, 'bold'), entry.idea, ', '.join(entry.needs), _served(entry), entry.paper)
    return table


def _served(entry: MethodEntry) -> str:
    """The detectors that a method serves, or those that it does not where these are fewer."""
    from kd_det.config.detectors import DETECTORS
    others = [detector for detector in DETECTORS if detector not in entry.detectors]
    if not others:
        return 'all'
    return f"all but {', '.join(others)}" if len(others) < len(entry.detectors) else ', '.join(entry.detectors)
