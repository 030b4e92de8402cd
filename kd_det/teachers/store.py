"""Arrays kept on disk, entry by entry: read whole or not at all, by several processes, within a bound."""
from __future__ import annotations

import io
import os
import time
import uuid
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Dict, Iterator, Optional

import numpy as np
from filelock import FileLock

Arrays = Dict[str, np.ndarray]

ENTRY, UNFINISHED = '.npz', '.tmp'
CHECKSUM = 4  # bytes
ABANDONED = 3600.0  # seconds after which a file that was never renamed is taken for what a killed process left


class StoreFullError(RuntimeError):
    """Another entry would exceed the store's limit."""


class ArrayStore:
    """A folder of entries; each holds some arrays by name, under a key.

    Several processes may read and write at once. An entry is written under another name and renamed when it is
    complete, so that a process that is killed leaves no torn one. It is an uncompressed ``.npz`` archive, whose
    checksums are verified at each read; an entry that fails is removed and counts as absent. Reading takes no lock.

    Args:
        folder: Made if need be; ``~`` is the user's home.
        limit: Bytes that the folder may hold, files that are being written included, whoever writes them.

    Raises:
        OSError: The folder can not be made or written to.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(self.folder / 'lock'))
        self._count = self.folder / 'size'
        with self._lock:
            self._remove_abandoned()
            self._set_size(self._measured())

    @property
    def size(self) -> int:
        """Bytes that the folder holds."""
        return self._size()

    def get(self, key: str) -> Optional[Arrays]:
        """The arrays under a key, a string of hexadecimal digits; None where none can be read whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:  # there is none, or it may not be read
            return None
        if content[-CHECKSUM:] != _checksum(memoryview(content)[:-CHECKSUM]):
            self._remove(path)
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def put(self, key: str, arrays: Arrays) -> int:
        """Keeps arrays under a key, unless there are some already.

        Returns:
            The number of bytes written.

        Raises:
            StoreFullError: They would exceed the limit.
            OSError: The disk is full, or can not be written to.
        """
        path = self._path(key)
        if path.exists():
            return 0
        content = io.BytesIO()
        np.savez(content, **arrays)
        content.write(_checksum(content.getbuffer()))
        content = content.getvalue()
        unfinished = path.with_suffix(f'.{uuid.uuid4().hex}{UNFINISHED}')
        try:
            self._reserve(unfinished, len(content))
            unfinished.write_bytes(content)
            with self._lock:  # whoever measures the folder finds a file under one name
                os.replace(unfinished, path)
        except OSError:
            self._remove(unfinished)
            raise
        return len(content)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f'{key}{ENTRY}'

    def _reserve(self, unfinished: Path, count: int) -> None:
        """Makes a file of its later size, so that whoever measures the folder meanwhile counts it in full."""
        with self._lock:
            size = self._size() + count
            if size > self.limit:
                raise StoreFullError(f'{size} bytes would exceed the limit of {self.limit}')
            unfinished.parent.mkdir(exist_ok=True)
            with open(unfinished, 'xb') as file:
                file.truncate(count)
            self._set_size(size)

    def _remove(self, path: Path) -> None:
        with suppress(OSError), self._lock:  # another process may have been faster, or the folder is read-only
            count = path.stat().st_size
            path.unlink()
            self._set_size(self._size() - count)

    def _size(self) -> int:
        try:
            return int(self._count.read_text())
        except (OSError, ValueError):  # a process was killed while it wrote the number
            return self._measured()

    def _set_size(self, size: int) -> None:
        self._count.write_text(str(size))

    def _measured(self) -> int:
        return sum(file.stat().st_size for file in self._files(ENTRY, UNFINISHED))

    def _remove_abandoned(self) -> None:
        for file in self._files(UNFINISHED):
            if time.time() - file.stat().st_mtime > ABANDONED:
                os.unlink(file)

    def _files(self, *suffixes: str) -> Iterator[os.DirEntry]:
        for folder in os.scandir(self.folder):
            if folder.is_dir():
                yield from (file for file in os.scandir(folder) if file.name.endswith(suffixes))


def _checksum(content: memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM, 'big')
