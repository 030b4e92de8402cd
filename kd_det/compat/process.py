"""What kd_det asks of its process: an encoding for any text, random numbers that nobody else misses, a clean end.

Importing it costs next to nothing, for every command line starts with it.
"""
from __future__ import annotations

import atexit
import codecs
import locale
import os
import random
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1  # of Linux's prctl

ERRORS = 'kd_det.spelt_out'
# How signs of kd_det's own texts and tables are spelt where the encoding lacks them; all others become \x.., \u....
SPELT_OUT = {'…': '...', '–': '-', '−': '-', '±': '+/-', '→': '->', '×': 'x', '·': '*', 'Δ': 'delta ', '≥': '>=',
             '≤': '<=', **dict.fromkeys('─━╸╺', '-'), **dict.fromkeys('│┃', '|'),
             **dict.fromkeys('┌┬┐├┼┤└┴┘┏┳┓┡╇┩', '+')}


def count_processors() -> int:
    """How many processors this process may use, which in an allocation of a cluster are fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def use_any_encoding() -> None:
    """Lets this process print and write any text: called once, before anything is printed.

    What the encoding of the standard streams lacks is spelt out. Files that MMEngine and pycocotools open without
    naming an encoding are UTF-8, which Windows alone does not allow (there ``PYTHONUTF8=1`` does).
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # not what a test or a notebook puts in their place
            stream.reconfigure(errors=ERRORS)
    for name in ('C.UTF-8', 'en_US.UTF-8', 'UTF-8') if not files_are_utf8() else ():
        try:
            locale.setlocale(locale.LC_CTYPE, name)
        except locale.Error:  # not installed
            continue
        if files_are_utf8():
            break


def files_are_utf8() -> bool:
    """Whether a file that is opened without naming an encoding is UTF-8."""
    return codecs.lookup(locale.getpreferredencoding(False)).name == 'utf-8'


def _spell_out(error: UnicodeError):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start:error.end]
    spelt = (SPELT_OUT.get(sign) or sign.encode('ascii', 'backslashreplace').decode() for sign in signs)
    return ''.join(spelt), error.end


codecs.register_error(ERRORS, _spell_out)


def save_randomness() -> Callable[[], None]:
    """Takes the state of the generators of Python, NumPy and PyTorch (CPU, current GPU).

    Returns:
        A function that puts them back into it, as often as it is called.
    """
    import numpy as np
    import torch
    python_state, numpy_state, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking for all GPUs would give this rank a context on each of them.
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    device_state = None if device is None else torch.cuda.get_rng_state(device)

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(state)
        if device_state is not None:
            torch.cuda.set_rng_state(device_state, device)

    return restore


def reseed() -> None:
    """Seeds PyTorch's CPU generator by a number that it draws: what is drawn next is no copy of what was drawn last."""
    import torch
    torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, ())))


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the generators are then as before, see :func:`save_randomness`."""
    restore = save_randomness()
    try:
        yield
    finally:
        restore()


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Within, SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt; only a main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not Python's own


@contextmanager
def unheard_interrupts() -> Iterator[None]:
    """Within, Ctrl-C does nothing; and never to a process that is started meanwhile, which this one is to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


INTERRUPTED, TERMINATED = 128 + 2, 128 + 15  # exit statuses, as shells give them
OUT_OF_MEMORY = re.compile('out of memory|can.t allocate memory', re.IGNORECASE)
LESS_MEMORY = 'Take a smaller train_dataloader.batch_size or smaller images, or --amp on a GPU.'
# What collective operations raise on the other ranks when one is gone: Gloo's, NCCL's and the store's words.
RANK_GONE = re.compile('Connection closed by peer|Connection reset by peer|Broken pipe|ncclRemoteError|'
                       'NCCL communicator was aborted|Socket closed|Timed out waiting|Timed out after')


def is_expected(error: BaseException) -> bool:
    """Whether an error speaks for itself.

    It is kd_det's own, or of a file that can not be used, a name in no registry, a module that is not installed, too
    little memory, or a process that is gone. Anything else may be a fault of the program, and comes with its traceback.
    """
    return (type(error).__module__.split('.')[0] == 'kd_det' or isinstance(error, (OSError, MemoryError))
            or isinstance(error, KeyError) and 'registry' in str(error) or bool(_explain(error)))


def describe(error: BaseException) -> str:
    """The message of an error, with its kind where the message alone would not say much."""
    # A KeyError shows its message quoted, and a data-loader worker puts its whole traceback into it.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if message.startswith('Caught ') and 'DataLoader worker' in message:
        message = message.splitlines()[-1]
    return _explain(error) or (message if is_expected(error) and message else f'{type(error).__name__}: {message}')


def _explain(error: BaseException) -> str:
    """What to know of an error of PyTorch's or Python's own whose message does not say it; else empty."""
    message = str(error).strip().splitlines()[0] if str(error).strip() else ''
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split('.')[0] != 'kd_det':
        place = find_place(error)
        return (f"there is no module '{error.name}'{f', which {place} imports' if place else ''}. Install what has it, "
                'or set PYTHONPATH to the folder that holds it.')
    if isinstance(error, MemoryError):
        return f'out of memory{f": {message}" if message else ""}. {LESS_MEMORY}'
    if isinstance(error, RuntimeError):
        if type(error).__name__ == 'OutOfMemoryError' or OUT_OF_MEMORY.search(message):
            return f'{message} {LESS_MEMORY}' if message.endswith('.') else f'{message}. {LESS_MEMORY}'
        if message.startswith('DataLoader worker') and ('killed by signal' in message or 'exited unexp' in message):
            return (f'{message.rstrip(".")}. The system ends processes when memory runs out: take fewer num_workers, '
                    'or give it more (in a container, its shared memory too).')
        if RANK_GONE.search(str(error)) and _count_ranks() > 1:
            return f'{_name_other_rank()} is gone; its own message, if it had one, is above ({message}).'
    return ''


def _count_ranks() -> int:
    return _read_number('WORLD_SIZE', 1)


def _name_other_rank() -> str:
    own = _read_number('RANK', 0)
    return f'rank {1 - own}' if _count_ranks() == 2 else f'another rank of {_count_ranks()} (this is {own})'


def _read_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, '')
    return int(text) if text.isdigit() else default


def find_place(error: BaseException) -> str:
    """Where the user's own code raised an error: ``'file.py', line 3``; empty where it was none of the user's."""
    import traceback
    if isinstance(error, SyntaxError) and error.filename:
        return f"'{error.filename}', line {error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    own = [frame for frame in frames if 'site-packages' not in Path(frame.filename).parts]
    return f"'{(own or frames)[-1].filename}', line {(own or frames)[-1].lineno}" if frames else ''


def is_raised_by_user(error: BaseException) -> bool:
    """Whether a line of the user's own code raises an error, which Ctrl-C does not need."""
    import traceback
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (frame.line or '').startswith('raise') and not _is_machinery(frame.filename)


def _is_machinery(file: str) -> bool:
    """Whether a file is of Python's library, MMEngine or kd_det."""
    folders = [Path(os.__file__).parent, PACKAGE]
    if 'mmengine' in sys.modules:
        folders.append(Path(sys.modules['mmengine'].__file__ or '').parent)
    parents = Path(file).parents
    return file.startswith('<') or any(
        folder in parents and not (folder == folders[0] and 'site-packages' in Path(file).parts) for folder in folders)


# ---------------------------------------------------------------- signals


_interrupted = False


@contextmanager
def noticed_interrupts() -> Iterator[None]:
    """Within, Ctrl-C is known by :func:`was_interrupted`, whatever it causes; while modules are imported it ends all.

    Libraries catch, wrap or print a KeyboardInterrupt in the midst of their import, and are of no use after it.
    """
    global _interrupted
    _interrupted = False
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (
            None, signal.SIG_IGN):  # as under nohup
        yield
        return
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed within :func:`noticed_interrupts`."""
    return _interrupted


def _interrupt(number, frame) -> None:
    global _interrupted
    _interrupted = True
    while frame:
        if frame.f_code.co_filename.startswith('<frozen importlib'):
            leave_interrupted()
        frame = frame.f_back
    raise KeyboardInterrupt


def leave_interrupted() -> NoReturn:
    """Ends the process at once, in one line."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: it came while a line was being printed
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, b'kd-det: interrupted\n')
    os._exit(INTERRUPTED)


def end_with_parent(watch_input: bool = False, owner: int | None = None) -> None:
    """Has this process end as soon as the one that started it is gone, even if that was killed and could not see to it.

    Args:
        watch_input: Its standard input is a pipe that the other holds open and does not write to. Where there is no
            such pipe, the parent's number tells, which Windows does not change.
        owner: Number of a further process, such as the parent's own parent, that this one ends with.
    """
    parent = os.getppid()
    if sys.platform == 'linux':
        with suppress(OSError, AttributeError):
            import ctypes
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        if watch_input:
            with suppress(OSError, ValueError):
                while os.read(0, 1024):
                    pass
        else:
            while os.getppid() == parent and (owner is None or is_running(owner)):
                time.sleep(1)
        os._exit(TERMINATED)

    threading.Thread(target=watch, name='watches the parent', daemon=True).start()


def is_running(number: int) -> bool:
    """Whether there is a process of this number on this machine, that has not ended though nobody has waited for it."""
    try:
        os.kill(number, 0)
        return Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except ProcessLookupError:
        return False
    except (OSError, IndexError):  # another user's; or a system that tells no more
        return True


def end_rank(code: int, failed: bool = False) -> None:
    """Leaves the process group of a launched run, and has the process end without the interpreter's own end.

    The group's threads may outlive it. One that asks for the interpreter while that ends aborts the process, now and
    then, with all its work done. Nothing is done where there is no group.

    Args:
        code: The exit status.
        failed: The other ranks may wait for this one, and leaving the group would wait for them: it is not left.
    """
    distributed = sys.modules.get('torch.distributed')
    if distributed and distributed.is_available() and distributed.is_initialized():
        if not failed:
            distributed.destroy_process_group()
        atexit.register(_exit, code)


def _exit(code: int) -> NoReturn:
    """Runs what was registered for the end of the process before this, and ends it."""
    atexit.unregister(_exit)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def is_pipe_closed(stream) -> bool:
    """Whether nobody reads any more what a stream writes, as after ``| head``."""
    try:
        poll = select.poll()  # Windows has none
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError, AttributeError):
        return False
