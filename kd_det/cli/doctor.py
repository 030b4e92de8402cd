"""``kd-det doctor``: a table of what was looked at, what it is like, and what to do about it."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from kd_det.cli.common import add_config_options, add_image_option, read_options

if TYPE_CHECKING:
    from rich.table import Table

    from kd_det.checks.environment import Diagnosis, Finding


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', nargs='?', help='also check this config: its data, its checkpoints, its classes')
    parser.add_argument('--teacher-checkpoint', metavar='FILE', help="check this file as the teacher's weights")
    add_image_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from rich.text import Text

    from kd_det.checks.environment import doctor
    from kd_det.compat.console import PlainConsole
    diagnosis = doctor(options.config, teacher_checkpoint=options.teacher_checkpoint,
                       check_images=options.check_images, data_root=options.data_root,
                       options=read_options(options.cfg_options) if options.cfg_options else None)
    console = PlainConsole(highlight=False)
    if console.is_terminal:
        console.print(render(diagnosis))
        for finding in diagnosis.findings:  # side by side what a column of the table has no room for
            if '\n' in finding.found:
                console.print(f'{finding.subject}: {finding.found}', soft_wrap=True)
    else:
        console.print(*map(spell, diagnosis.findings), sep='\n', soft_wrap=True)
    console.print(Text(f'Faults that would stop a run: {diagnosis.faults}', 'red') if diagnosis.faults else
                  Text('No faults found.', 'green'))
    return 1 if diagnosis.faults else 0


def spell(finding: Finding) -> str:
    """A finding as a line of a file, in the words of the run that it would stop."""
    remedy = f"{'' if finding.found.endswith('.') else '.'} {finding.remedy}." if finding.remedy else ''
    return f'{finding.mark:<5}  {finding.subject}: {finding.found}{remedy}'


def render(diagnosis: Diagnosis) -> Table:
    """The findings as a table; of those of several lines the first."""
    from rich.table import Table
    from rich.text import Text
    table = Table(show_lines=False)
    for column, overflow in zip(diagnosis.tabulate().columns, ('ellipsis', 'fold', 'fold', 'fold')):
        table.add_column(column, overflow=overflow)
    for mark, *cells in diagnosis.tabulate().rows:
        table.add_row(Text(mark, dict(fault='red', note='yellow', ok='green')[mark]), *cells)
    return table
