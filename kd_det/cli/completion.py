"""``kd-det --completion``: a script by which a shell completes commands, options and paths."""
from __future__ import annotations

from argparse import Action, ArgumentParser
from collections.abc import Iterator
from typing import Any

from kd_det.config.methods import available_methods

SHELLS = ('bash', 'zsh', 'fish')
FOLDERS = ('DIR', 'WORK_DIR')  # what a value is, told by its name in the help
FILES = ('FILE', 'FILE.pkl', 'OUT', 'OUT.pth', 'MODEL', 'IMAGE', 'METHOD', 'CONFIG', 'STUDENT_CONFIG', 'STUDENT',
         'N|CONFIG', 'PAIR', 'CHECKPOINT', 'config', 'checkpoint')


def completion_script(parser: ArgumentParser, shell: str) -> str:
    """What a shell evaluates at its start, such as ``eval "$(kd-det --completion bash)"``.

    Args:
        parser: Of the whole program; changed.
        shell: One of :data:`SHELLS`.
    """
    import shtab
    for action in _actions(parser):
        name = action.metavar or action.dest
        if name in FOLDERS or name in FILES:
            kind = shtab.DIRECTORY if name in FOLDERS else shtab.FILE
            action.complete = kind  # type: ignore[attr-defined]  # which shtab looks for
        elif name == 'method':  # no choices of the parser's, which takes sums of them too
            action.choices = tuple(available_methods())
    return shtab.complete(parser, shell)


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    """All arguments, those of the commands too."""
    for action in parser._actions:
        yield action
        commands: Any = action.choices or {}
        for command in commands.values() if action.nargs == 'A...' else ():
            yield from _actions(command)
