"""The entry point ``kd-det``: finds the command, and turns what goes wrong into one clear line."""
from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Container, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import kd_det
from kd_det.cli.completion import SHELLS, completion_script
from kd_det.compat.process import describe, is_expected, use_any_encoding

COMMANDS = {
    'train': 'train a detector from a config, with or without distillation',
    'test': 'evaluate a checkpoint: the student alone, no teacher is built',
    'distill': "distil a teacher into a student given the student's config; no config to write",
    'methods': 'list the methods: what they compare, what they read, which detectors they serve, and the papers',
    'inspect': "look at one batch of a distillation: taps, each term's value and gradient, masks over the image",
    'export': "write a plain student: its weights alone, and a config that stock MMDetection reads",
    'doctor': 'check the installation and a config: what would fail, and what to do about it',
    'benchmark': 'train a pair with several methods and seeds, and tell which difference is more than chance',
    'benchmark-step': 'measure what a distilled step costs: time and memory of student, teacher and each term',
    'sweep': 'benchmark one method over a grid of settings, such as its temperature',
    'report': 'make one page of what runs left behind: does it help, by how much, and where',
    'demo': 'generate data, train a teacher and two students, with and without distillation, and compare them',
}

# What MMDetection brings; without it only kd_det.functional works.
MMDETECTION = ('mmengine', 'mmcv', 'mmdet', 'pycocotools')
WITHOUT_MMDETECTION = ('doctor', 'methods')  # the commands that need none


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``kd-det``.

    Args:
        arguments: The command line after the program's name.

    Returns:
        The exit status: 0, 1 if ``doctor`` found faults, 2 for an error, 130 if interrupted.
    """
    use_any_encoding()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = next((argument for argument in arguments if not argument.startswith('-')), None)
    return _run(make_parser([asked] if asked else []), arguments)


def run_tool(command: str, arguments: Sequence[str] | None = None) -> int:
    """Runs one command as a program of its own, as the files in ``tools/`` do."""
    use_any_encoding()
    parser = argparse.ArgumentParser(description=_description(command))
    _prepare(parser, command)
    return _run(parser, sys.argv[1:] if arguments is None else arguments)


def make_parser(commands: Container[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of ``kd-det``; only these commands' own options are known, and their modules imported."""
    parser = argparse.ArgumentParser('kd-det', description='Knowledge distillation for MMDetection.')
    parser.add_argument('--version', action='version', version=f'kd-det {kd_det.__version__}')
    parser.add_argument('--completion', action=CompletionAction, choices=SHELLS,
                        help='print a script by which this shell completes commands, options and paths')
    subparsers = parser.add_subparsers(metavar='COMMAND', required=True)
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=_description(name))
        if name in commands:
            _prepare(subparser, name)
    return parser


class CompletionAction(argparse.Action):
    """Prints the completion script of a shell, and that is all."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        print(completion_script(make_parser(), values))
        parser.exit()


def _description(command: str) -> str:
    return f'{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.'


def _prepare(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument('--debug', action='store_true', default=bool(os.environ.get('KD_DET_DEBUG')),
                        help='show the full traceback of an error (also: KD_DET_DEBUG=1)')
    module = import_module(f"kd_det.cli.{command.replace('-', '_')}")
    module.add_arguments(parser)
    parser.set_defaults(run=module.run, command=command)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    options = parser.parse_args(arguments)
    # MMEngine imports pkg_resources for each config it looks up, and each time setuptools complains.
    warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
    if options.command not in WITHOUT_MMDETECTION:
        _need_mmdetection(parser, options.command)
    try:
        code = options.run(options)
        _leave_process_group()
        return code
    except KeyboardInterrupt:
        print('kd-det: interrupted', file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug or not is_expected(error):
            traceback.print_exc()
        print(f'kd-det: error: {describe(error)}', file=sys.stderr)
        return 2


def _need_mmdetection(parser: argparse.ArgumentParser, command: str) -> None:
    """Ends the program where MMDetection is not installed, or can not be imported."""
    lacking = next((name for name in MMDETECTION if find_spec(name) is None), None)
    if lacking:
        parser.exit(2, f"kd-det: error: '{command}' needs MMDetection, but there is no module '{lacking}'. "
                       "Install it: pip install 'kd-det[mmdet]'\n")
    error = kd_det.MMDETECTION_ERROR
    if error:
        parser.exit(2, f'kd-det: error: MMDetection can not be imported: {type(error).__name__}: {error}. '
                       'Run kd-det doctor.\n')


def _leave_process_group() -> None:
    """Ends the process group of a launched run: threads that outlive the interpreter abort the process now and then.

    Not after an error: the other processes may wait for this one, and leaving would wait for them.
    """
    distributed = sys.modules.get('torch.distributed')
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
