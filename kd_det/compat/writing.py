"""Writing: a file whole or not at all, never over one of somebody else's, and one run at a time in a folder."""
from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from kd_det.compat.process import sigterm_raises

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PARTIAL = '.partial'  # the end of the name of what is not whole yet
LOCK_FILE = '.kd_det.lock'
LOCK_ATTEMPTS = 5  # for who looks whether a folder is locked locks it for a moment
BLOCKED = errno.EACCES, errno.EAGAIN
# What launchers tell each process its number by.
RANKS = dict(none='', pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')


class WritingError(RuntimeError):
    """A file can not be written whole, would replace one of somebody else's, or another run writes in its folder."""


def write_whole(file: str | Path, content: str | bytes) -> None:
    """Writes a file under a name beside it, and renames that once all of it is on the disk.

    Whoever is killed meanwhile leaves what was there before, and ``FILE.PROCESS.partial``, see
    :func:`remove_partial_files`; after an error, Ctrl-C or SIGTERM not even that.

    Args:
        file: Its folder exists; text is UTF-8.
        content: All of it.

    Raises:
        WritingError: The disk is full, or can not be written to.
    """
    file = Path(file)
    data = content.encode('utf-8') if isinstance(content, str) else content
    partial = file.with_name(f'{file.name}.{os.getpid()}{PARTIAL}')
    is_device = file.exists() and not file.is_file()  # such as /dev/stdout
    try:
        with sigterm_raises(), open(file if is_device else partial, 'wb') as opened:
            opened.write(data)
            opened.flush()
            with _forgiven(errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):  # a file system that has no such thing
                os.fsync(opened.fileno())
        if not is_device:
            os.replace(partial, file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise WritingError(f"'{file}' can not be written: {error.strerror or error}. What was there before is "
                               'there still.') from error
        raise


@contextmanager
def _forgiven(*codes: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in codes:
            raise


def remove_partial_files(folder: str | Path, pattern: str) -> None:
    """Removes what killed processes have left of :func:`write_whole` for files of a pattern such as ``'*.pth'``."""
    for file in Path(folder).glob(f'{pattern}.*{PARTIAL}'):
        if file.name[:-len(PARTIAL)].rpartition('.')[2].isdigit():
            with suppress(OSError):
                file.unlink()


def refuse_to_replace(file: str | Path, is_own: Callable[[bytes], bool], what: str, force: bool = False,
                      advice: str = 'Give another name, or replace it with --force.') -> None:
    """Ends the program rather than replace a file that it did not write.

    Args:
        file: What is to be written.
        is_own: Given the content of what is there, tells whether it is something of kd_det's, made to be replaced.
        what: It would be, for the message: ``'a report'``.
        force: Replace whatever is there.
        advice: What to do about it.

    Raises:
        WritingError: It exists and is not.
    """
    file = Path(file)
    if file.is_dir():
        raise WritingError(f"'{file}' is a folder: give the name of a file.")
    content = file.read_bytes() if not force and file.is_file() else b''  # once: others may be writing it
    if content and not is_own(content):
        raise WritingError(f"'{file}' exists, and is not {what} that kd_det wrote. {advice}")


def is_first_process(launcher: str) -> bool:
    """Whether this is the first process of its run, or the only one, before any of them knows the others.

    Args:
        launcher: What started it, of :data:`RANKS`.
    """
    return os.environ.get(RANKS.get(launcher, ''), '0') == '0'


@contextmanager
def kept_after_errors(file: str | Path) -> Iterator[None]:
    """Puts a file back as it was, or away if it was not there, when what happens within fails."""
    file = Path(file)
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    except BaseException:
        if before is not None and (not file.is_file() or file.read_bytes() != before):
            write_whole(file, before)
        elif before is None:
            with suppress(OSError):
                file.unlink()
        raise


@contextmanager
def locked_folder(folder: str | Path, launcher: str = 'none') -> Iterator[None]:
    """Keeps other runs out of a work dir; of a run of several processes the first keeps it for all.

    What a killed run has left of files that it wrote there is removed.

    The lock is the operating system's, and belongs to this process alone: it is gone with it, however it ends, though
    its data-loader workers may live for a while. On a file system that machines share it holds among them where that
    has POSIX locks: NFS has, Lustre if it is mounted with ``flock``. Where the file system has none, a warning says so.

    Args:
        folder: Made if need be.
        launcher: What started this process, of :data:`RANKS`.

    Raises:
        WritingError: Another run holds it; the message tells which.
    """
    if not is_first_process(launcher):
        yield
        return
    folder = Path(folder)
    file = _open_locked(folder)
    if file is not None:
        remove_partial_files(folder, '*')
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (folder / LOCK_FILE).unlink()
            file.close()


def is_locked(folder: str | Path) -> bool:
    """Whether another process keeps a folder by :func:`locked_folder`; never, where there are no locks.

    A process does not see a lock of its own, and would lose it by asking.
    """
    path = Path(folder) / LOCK_FILE
    if fcntl is None or not path.is_file():
        return False
    with path.open('r', encoding='utf-8') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in BLOCKED
    return False


def _open_locked(folder: Path) -> TextIO | None:
    """The opened and locked file of a folder; None where there are no locks."""
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open('a+', encoding='utf-8')  # stays open as long as the lock holds
        while not _lock(file, path):  # whoever held it has removed the file meanwhile
            file.close()
            file = path.open('a+', encoding='utf-8')
    except OSError as error:
        from mmengine.logging import print_log
        print_log(f"'{folder}' can not be locked ({error.strerror}): see to it that no other run writes there.",
                  'current', logging.WARNING)
        return None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}, since {time.strftime("%Y-%m-%d %H:%M:%S")}')
    file.flush()
    return file


def _lock(file: TextIO, path: Path) -> bool:
    """Locks an open file; tells whether it still is the one of that path."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    for attempt in range(LOCK_ATTEMPTS):
        try:
            # Unlike flock's, these locks are not shared with processes that this one forks, and that may outlive it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in BLOCKED:
                raise
            if attempt + 1 < LOCK_ATTEMPTS:
                time.sleep(0.02)
                continue
            file.seek(0)
            raise WritingError(f"'{path.parent}' is in use by another run ({file.read() or 'which has just begun'}): "
                               'two would write over each other. Wait for it, or give another --work-dir.') from None
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
