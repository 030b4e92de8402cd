"""What kd_det asks of its process: an encoding for any text, random numbers that nobody else misses, a gentle end.

Importing it costs next to nothing, for every command line starts with it.
"""
from __future__ import annotations

import codecs
import locale
import random
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ERRORS = 'kd_det.spelt_out'
# How signs of kd_det's own texts and tables are spelt where the encoding lacks them; all others become \x.., \u....
SPELT_OUT = {'…': '...', '–': '-', '−': '-', '±': '+/-', '→': '->', '×': 'x', '·': '*', 'Δ': 'delta ', '≥': '>=',
             '≤': '<=', **dict.fromkeys('─━╸╺', '-'), **dict.fromkeys('│┃', '|'),
             **dict.fromkeys('┌┬┐├┼┤└┴┘┏┳┓┡╇┩', '+')}


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


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and PyTorch (CPU, current GPU) are then as before."""
    import numpy as np
    import torch
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Asking for all GPUs would give this rank a context on each of them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


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


def is_expected(error: Exception) -> bool:
    """Whether an error speaks for itself: kd_det's own, a file that can not be used, or a name in no registry.

    Anything else may be a fault of the program, and comes with its traceback.
    """
    return (type(error).__module__.split('.')[0] == 'kd_det' or isinstance(error, OSError)
            or isinstance(error, KeyError) and 'registry' in str(error))


def describe(error: Exception) -> str:
    """The message of an error, with its kind where the message alone would not say much."""
    # A KeyError shows its message quoted, and a data-loader worker puts its whole traceback into it.
    message = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    if message.startswith('Caught ') and 'DataLoader worker' in message:
        message = message.splitlines()[-1]
    return message if is_expected(error) and message else f'{type(error).__name__}: {message}'
