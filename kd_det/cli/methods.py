"""``kd-det methods``: a table of the methods that ``kd-det distill`` knows."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Iterable

from rich.console import Console
from rich.table import Table

from kd_det.catalogue import MethodEntry, catalogue
from kd_det.composition import FAMILIES


def add_arguments(parser: ArgumentParser) -> None:
    """It has no options of its own."""


def run(options: Namespace) -> int:
    console = Console()
    console.print(render(catalogue()))
    console.print('Take one with kd-det distill … --method fgd, or a sum of them: fgd+dkd.', highlight=False)
    return 0


def render(entries: Iterable[MethodEntry]) -> Table:
    """The methods as a table."""
    table = Table('Method', 'Compares', 'Reads', 'Weights for', 'Paper')
    for entry in entries:
        families = 'all' if entry.families == FAMILIES else ', '.join(entry.families).replace('_', '-')
        table.add_row(f'[bold]{entry.name}[/bold]', entry.idea, ', '.join(entry.needs), families, entry.paper)
    return table
