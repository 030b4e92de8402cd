"""The entry point ``kd-det``: finds the command, and turns what goes wrong into one clear line."""
from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NoReturn

import kd_det
from kd_det.cli.completion import SHELLS, completion_script
from kd_det.compat.process import (
    INTERRUPTED,
    TERMINATED,
    describe,
    end_rank,
    end_with_parent,
    find_place,
    is_expected,
    is_pipe_closed,
    noticed_interrupts,
    use_any_encoding,
    was_interrupted,
)

COMMANDS = {
    'train': 'train a detector from a config, with or without distillation',
    'test': 'evaluate a checkpoint, the student alone, or an exported file',
    'distill': "distil a teacher into a student given the student's config; no config to write",
    'generations': 'train a student, and generations of it that each learn from the one before: Born-Again',
    'methods': 'list the methods: what they compare, what they read, which detectors they serve, and the papers',
    'inspect': "look at one batch of a distillation: taps, each term's value and gradient, masks over the image",
    'export': 'write a student as a file of its own: ONNX, OpenVINO, or plain weights for stock MMDetection',
    'predict': 'run an exported file on photographs: paint what it finds, and write it as COCO results',
    'latency': 'measure exported files side by side: time, memory, size and multiplications',
    'quantize': 'write a student as a file that computes in integers, by calibration on images',
    'prune': 'make a smaller detector out of a trained one, by taking channels from its layers',
    'compress': 'distil, prune, quantise, export and measure: the whole way to a device in one command',
    'doctor': 'check the installation and a config: what would fail, and what to do about it',
    'benchmark': 'train a pair with several methods and seeds, and tell which difference is more than chance',
    'benchmark-step': 'measure what a distilled step costs: time and memory of student, teacher and each term',
    'sweep': 'benchmark one method over a grid of settings, such as its temperature',
    'results': 'show what benchmarks found, join their results, or compare two of them seed by seed',
    'report': 'make one page of what runs left behind: does it help, by how much, and where',
    'demo': 'generate data, train a teacher and two students, with and without distillation, and compare them',
}

# What MMDetection brings; without it only kd_det.functional works.
MMDETECTION = ('mmengine', 'mmcv', 'mmdet', 'pycocotools')
WITHOUT_MMDETECTION = ('doctor', 'methods')  # the commands that need none
BROKEN_PIPE = 128 + 13  # the exit status of programs that SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``kd-det``.

    Args:
        arguments: The command line after the program's name.

    Returns:
        The exit status: 0, 1 if ``doctor`` found faults, 2 for an error, 130 if interrupted, 141 if nobody reads what
        it prints, 143 if it was told to end.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = next((argument for argument in arguments if not argument.startswith('-')), None)
    return _run(lambda: make_parser([asked] if asked else []), arguments)


def run_tool(command: str, arguments: Sequence[str] | None = None) -> int:
    """Runs one command as a program of its own, as the files in ``tools/`` do."""

    def make() -> Parser:
        parser = Parser(description=_description(command))
        _prepare(parser, command)
        return parser

    return _run(make, sys.argv[1:] if arguments is None else arguments)


def make_parser(commands: Container[str] = tuple(COMMANDS)) -> Parser:
    """The parser of ``kd-det``; only these commands' own options are known, and their modules imported."""
    parser = Parser('kd-det', description='Knowledge distillation for MMDetection.')
    parser.add_argument('--version', action='version', version=f'kd-det {kd_det.__version__}')
    parser.add_argument('--completion', action=CompletionAction, choices=SHELLS,
                        help='print a script by which this shell completes commands, options and paths')
    subparsers = parser.add_subparsers(metavar='COMMAND')  # required, but after a misspelt option that is told
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=_description(name))
        if name in commands:
            _prepare(subparser, name)
    return parser


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, and which name is nearest to one that is not known."""

    def parse_args(self, args=None, namespace=None):
        options, unknown = self.parse_known_args(args, namespace)
        if not unknown and not hasattr(options, 'command'):
            self.error('the following arguments are required: COMMAND')
        if unknown:
            names = [name for parser in (self, *self._commands(options)) for name in parser._option_string_actions]
            near = [_suggest(argument.partition('=')[0], names) if argument.startswith('-') else ''
                    for argument in unknown]
            self.error('unrecognized arguments: ' + ', '.join(map(str.__add__, unknown, near)))
        return options

    def error(self, message: str) -> NoReturn:
        message = message.rstrip('.').replace('\n', '\\n')
        stop = '' if message.endswith('?') else '.'
        self.exit(2, f'kd-det: error: {message}{stop} See {self.prog} --help\n')

    def _print_message(self, message: str, file: Any = None) -> None:
        with suppress(OSError) if file is sys.stderr else nullcontext():  # a help that nobody gets is told of
            (file or sys.stderr).write(message)

    def _commands(self, options: argparse.Namespace) -> Iterator[argparse.ArgumentParser]:
        """The parser of the command that was given."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and hasattr(options, 'command'):
                yield action.choices[options.command]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"invalid choice: '{value}'{_suggest(value, action.choices)} (choose "
                                                 f"from {', '.join(map(str, action.choices))})")


def _suggest(name: str, names: Iterable[str]) -> str:
    near = get_close_matches(name, list(names), n=1)
    return f", did you mean '{near[0]}'?" if near else ''


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


def _run(make: Callable[[], Parser], arguments: Sequence[str]) -> int:
    use_any_encoding()
    debug = bool(os.environ.get('KD_DET_DEBUG'))
    with noticed_interrupts(), raised_broken_pipes():
        try:
            options = _parse(make, arguments)
            debug = options.debug
            if 'TORCHELASTIC_RUN_ID' in os.environ:  # the parent is torchrun: killed, it would leave this one training
                end_with_parent()
            code = options.run(options)
            end_rank(code)
            sys.stdout.flush()  # else what does not get through is told as Python ends, and with a traceback
            return code
        except _Usage as usage:
            raise SystemExit(usage.code) from None
        except BaseException as error:
            code = _end(error, debug)
            end_rank(code, failed=True)
            return code


class _Usage(Exception):
    """The parser has said all there is to say."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def _parse(make: Callable[[], Parser], arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line, and ends the program where MMDetection lacks."""
    try:
        parser = make()
        options = parser.parse_args(arguments)
        # MMEngine imports pkg_resources for each config it looks up, and each time setuptools complains.
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
        if options.command not in WITHOUT_MMDETECTION:
            _need_mmdetection(parser, options.command)
        return options
    except SystemExit as exit_:
        sys.stdout.flush()
        raise _Usage(exit_.code) from None


def _end(error: BaseException, debug: bool) -> int:
    """Says in one line why the program ends; shows where only if asked to, or if that may be a fault of the program."""
    if was_interrupted() or isinstance(error, KeyboardInterrupt):
        code, said = INTERRUPTED, 'interrupted'
    elif isinstance(error, SystemExit) and error.code == TERMINATED:
        code, said = TERMINATED, 'terminated'
    elif isinstance(error, BrokenPipeError) and is_pipe_closed(sys.stdout):
        code, said = BROKEN_PIPE, ''
    elif isinstance(error, SystemExit):
        place = find_place(error)
        code, said = 2, f"error: sys.exit({error.code!r}) was called{f' in {place}' if place else ''}"
    else:
        code, said = 2, f'error: {describe(error)}'
        debug = debug or not is_expected(error)
    with suppress(OSError):  # nobody may read this either
        if debug and said:
            traceback.print_exception(error)
        if said:
            print(f'kd-det: {said}', file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:  # what is left would be told of as Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


@contextmanager
def raised_broken_pipes() -> Iterator[None]:
    """Within, logging to a pipe that nobody reads raises, and does not print a traceback a line."""
    handle = logging.Handler.handleError

    def raise_or_handle(handler: logging.Handler, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        handle(handler, record)

    logging.Handler.handleError = raise_or_handle
    try:
        yield
    finally:
        logging.Handler.handleError = handle


def _need_mmdetection(parser: argparse.ArgumentParser, command: str) -> None:
    """Ends the program where MMDetection is not installed, or can not be imported."""
    lacking = next((name for name in MMDETECTION if find_spec(name) is None), None)
    if lacking:
        parser.exit(2, f"kd-det: error: '{command}' needs MMDetection, but there is no module '{lacking}'. "
                       "Install it: pip install 'kd-det[mmdet]'\n")
    warnings.filterwarnings('ignore', message='kd_det registered nothing')  # which is said below
    error = kd_det.MMDETECTION_ERROR
    if error:
        message = (str(error).strip().splitlines() or [''])[0].rstrip('.')
        parser.exit(2, f'kd-det: error: MMDetection can not be imported: {type(error).__name__}: {message}. '
                       'Run kd-det doctor.\n')
