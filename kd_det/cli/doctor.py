"""``kd-det doctor``: a table of what was looked at, what it is like, and what to do about it."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kd_det.cli.common import add_config_options, add_image_option, apply_config_options

if TYPE_CHECKING:
    from rich.table import Table

    from kd_det.checks.environment import Finding


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', nargs='?', help='also check this config: its data, its checkpoints, its classes')
    parser.add_argument('--teacher-checkpoint', metavar='FILE', help="check this file as the teacher's weights")
    add_image_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from rich.text import Text

    from kd_det.checks.environment import inspect_environment
    from kd_det.compat.console import PlainConsole
    findings = list(inspect_environment())
    installed = not any(finding.fault for finding in findings)
    if options.config and installed:
        findings.extend(diagnose_config(options))
    faults = sum(finding.fault for finding in findings)
    console = PlainConsole()
    console.print(render(findings))
    for finding in findings:  # side by side what a column of the table has no room for
        if '\n' in finding.found:
            console.print(f'{finding.subject}: {finding.found}', soft_wrap=True)
    console.print(Text(f'Faults that would stop a run: {faults}', 'red') if faults else
                  Text('No faults found.', 'green'))
    return 1 if faults else 0


def diagnose_config(options: Namespace) -> list[Finding]:
    """What there is to say about the config on the command line."""
    from kd_det.checks.doctor import inspect_config
    from kd_det.checks.environment import Finding
    from kd_det.config.files import ConfigurationError, is_distillation, load_config
    from kd_det.registry import prepare_without_runner
    try:
        config = load_config(options.config)
        prepare_without_runner(config, seed=0)
        apply_config_options(config, options)
        if options.teacher_checkpoint:
            if not is_distillation(config):
                raise ConfigurationError(
                    '--teacher-checkpoint: the config has no teacher, its model is a plain detector')
            config.model.teacher.checkpoint = options.teacher_checkpoint
        return [Finding('config', options.config), *inspect_config(config, options.check_images)]
    except (ConfigurationError, OSError) as error:
        return [Finding('config', str(error), 'Correct the config', fault=True)]


def render(findings: Iterable[Finding]) -> Table:
    """The findings as a table; of those of several lines the first."""
    from rich.table import Table
    from rich.text import Text
    table = Table(show_lines=False)
    table.add_column('')
    table.add_column('Looked at')
    table.add_column('Found', overflow='fold')
    table.add_column('What to do', overflow='fold')
    for finding in findings:
        colour, mark = ('red', 'fault') if finding.fault else ('yellow', 'note') if finding.remedy else ('green', 'ok')
        lines = finding.found.splitlines()
        table.add_row(Text(mark, colour), finding.subject, lines[0] + (' (below)' if lines[1:] else ''), finding.remedy)
    return table
