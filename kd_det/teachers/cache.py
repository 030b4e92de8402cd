"""A teacher's outputs kept on disk, image by image; and the store beneath, which processes share, within a bound."""
from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock
from mmengine.dist import all_reduce
from mmengine.logging import print_log
from safetensors.numpy import save
from safetensors.torch import load
from torch import Tensor

from kd_det.compat.writing import refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Name, Positive, declared
from kd_det.taps import Features

Outputs = dict[str, Features]
Tensors = dict[str, Tensor]

DTYPES = dict(float16=torch.float16, float32=torch.float32)
GIGABYTE = 10**9
ENTRY, UNFINISHED = '.entry', '.tmp'
CHECKSUM = 4  # bytes
OTHER_FOLDER = 'Give another folder as model.teacher.cache.dir.'
ABANDONED = 3600.0  # seconds after which a file that was never renamed is taken for what a killed process left


@dataclass
class CacheCounts:
    """What a cache did: images read and computed, bytes read and written."""
    hits: int = 0
    misses: int = 0
    read: int = 0
    written: int = 0


class TeacherCache:
    """Keeps a teacher's outputs on disk, image by image.

    The key of an entry is a hash of all that the outputs depend on: the question (the teacher's weights and config,
    what is read of it, how it is run), the shape of the batch, and the very pixels that the teacher is given, whatever
    file and transform made them. So an entry is found when an image recurs pixel by pixel in a batch of the same shape,
    and never otherwise. The number of images is part of that shape, because convolutions choose their kernels by it,
    and results differ in the last bits: a batch of which some image is absent is computed as a whole.

    Results do not depend on what the cache holds: a batch that is computed passes through the form in which it is kept.
    With ``dtype='float32'`` that changes no bit, with ``'float16'`` it rounds; a level with a value beyond the range
    of float16 is kept in float32.

    Args:
        dir: The folder, see :class:`~kd_det.teachers.cache.TensorStore`; runs, ranks and teachers may share it.
        dtype: ``'float16'`` or ``'float32'``, the form in which numbers are kept.
        max_gb: Gigabytes (10⁹ bytes) that the folder may hold. When it is full, nothing more is kept.

    Raises:
        ArgumentError: An argument does not fit.
    """

    @declared
    def __init__(self, dir: Name | Path, dtype: Literal['float16', 'float32'] = 'float16',
                 max_gb: Positive = 20.0) -> None:
        self.folder, self.dtype, self.max_gb = str(dir), dtype, max_gb
        self.counts = CacheCounts()
        self._stores = True

    @cached_property
    def store(self) -> TensorStore:
        """The folder; made when it is first needed."""
        try:
            return TensorStore(self.folder, int(self.max_gb * GIGABYTE))
        except OSError as error:
            raise ConfigurationError(
                f"model.teacher.cache.dir='{self.folder}' can not be written to: {error}") from error

    def recall(self, question: str, images: Tensor, image_shapes: Sequence[tuple[int, int]],
               compute: Callable[[], Outputs]) -> Outputs:
        """Reads the outputs for a batch, or computes and keeps them.

        Args:
            question: All that the outputs depend on beside the batch.
            images: (N, 3, H, W), as the teacher is given them.
            image_shapes: Height and width of each image within the batch.
            compute: Makes the outputs: name -> tuple of (N, C, H, W).

        Returns:
            The outputs, in the form in which they are kept.
        """
        keys = self._compute_keys(question, images, image_shapes)
        entries = [entry for entry in map(self.store.get, keys) if entry is not None]
        if len(entries) == len(keys):
            self.counts.hits += len(keys)
            self.counts.read += sum(tensor.nbytes for entry in entries for tensor in entry.values())
        else:
            self.counts.misses += len(keys)
            entries = list(self._split_images(compute()))
            for key, entry in zip(keys, entries):
                self._store_entry(key, entry)
        return _join_images(entries, images.device)

    def report(self) -> str:
        """One line on what was done on all ranks since the last report."""
        hits, misses, read, written = _sum_over_ranks(self.counts)
        self.counts = CacheCounts()
        return (f'Teacher cache: {hits} images read ({read / GIGABYTE:.3f} GB), {misses} computed '
                f'({written / GIGABYTE:.3f} GB written); {self.folder} holds {self.store.size / GIGABYTE:.3f} of '
                f'{self.max_gb:g} GB')

    def _compute_keys(self, question: str, images: Tensor, image_shapes: Sequence[tuple[int, int]]) -> list[str]:
        # What a matrix product comes out as tells of an autocast around the step.
        one = images.new_ones(1, 1)
        common = repr((question, self.dtype, tuple(images.shape), images.dtype, (one @ one).dtype, images.device.type))
        start = hashlib.sha256(common.encode())
        keys = []
        for image, shape in zip(images.detach().cpu(), image_shapes):
            digest = start.copy()
            digest.update(repr(tuple(shape)).encode())
            digest.update(image.contiguous().view(-1).view(torch.uint8).numpy())
            keys.append(digest.hexdigest())
        return keys

    def _store_entry(self, key: str, entry: Tensors) -> None:
        if not self._stores:
            return
        try:
            self.counts.written += self.store.put(key, entry)
        except (StoreFullError, OSError) as error:
            self._stores = False
            print_log(f"The teacher cache '{self.folder}' takes no more images: {error}. What it holds is still read, "
                      'all else is computed in each step. Raise model.teacher.cache.max_gb, or empty the folder.',
                      logger='current', level=logging.WARNING)

    def _split_images(self, outputs: Outputs) -> Iterator[Tensors]:
        """Splits the outputs into images, each tensor named ``name/level/dtype/memory format``."""
        levels = {f'{name}/{index}/{str(level.dtype)[6:]}/{_find_memory_format(level)}': level.detach().cpu()
                  for name, each in outputs.items() for index, level in enumerate(each)}
        for image in range(len(next(iter(levels.values())))):
            yield {name: self._round(level[image]).contiguous() for name, level in levels.items()}

    def _round(self, values: Tensor) -> Tensor:
        kept = values.to(DTYPES[self.dtype])
        return kept if self.dtype == 'float32' or kept.isfinite().all() else values.float()


def _find_memory_format(level: Tensor) -> str:
    contiguous = level.is_contiguous() or not level.is_contiguous(memory_format=torch.channels_last)
    return 'contiguous_format' if contiguous else 'channels_last'


def _join_images(entries: Sequence[Tensors], device: torch.device) -> Outputs:
    """Joins these images to a batch, with the floating-point type and memory format that the teacher had put out."""
    outputs: dict[str, list[Tensor]] = {}
    levels = [(name, *name.rsplit('/', 3)) for name in entries[0]]
    for name, path, _, dtype, memory_format in sorted(levels, key=lambda level: int(level[2])):
        images = [entry[name] for entry in entries]
        level = torch.empty((len(images), *images[0].shape), dtype=getattr(torch, dtype),
                            memory_format=getattr(torch, memory_format))
        for image, kept in zip(level, images):
            image.copy_(kept)
        outputs.setdefault(path, []).append(level.to(device))
    return {path: tuple(levels) for path, levels in outputs.items()}


def _sum_over_ranks(counts: CacheCounts) -> list[int]:
    total = torch.tensor(astuple(counts), dtype=torch.long)
    all_reduce(total)
    return total.tolist()


class TensorStore:
    """A folder of entries; each holds some tensors of the host by name, under a key.

    Several processes may read and write at once. An entry is written under another name and renamed when it is
    complete, so that a process that is killed leaves no torn one. It is in the form of safetensors, and behind that
    stands a checksum of all of it, which is verified at each read; an entry that fails is removed and counts as absent.
    Reading takes no lock.

    Args:
        folder: Made if need be; ``~`` is the user's home.
        limit: Bytes that the folder may hold, files that are being written included, whoever writes them.

    Raises:
        OSError: The folder can not be made or written to.
        WritingError: It holds somebody else's files of the names that a store needs.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._count, lock = self.folder / 'size', self.folder / 'lock'
        refuse_to_replace(self._count, bytes.isdigit, 'the size of a cache', advice=OTHER_FOLDER)
        refuse_to_replace(lock, lambda content: False, 'the lock of a cache, which is empty,', advice=OTHER_FOLDER)
        self._lock = FileLock(str(lock))
        with self._lock:
            self._remove_abandoned()
            self._write_size(self._measure())

    @property
    def size(self) -> int:
        """Bytes that the folder holds."""
        return self._read_size()

    def get(self, key: str) -> Tensors | None:
        """The tensors under a key, a string of hexadecimal digits; None where none can be read whole."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:  # there is none, or it may not be read
            return None
        if content[-CHECKSUM:] != _compute_checksum(memoryview(content)[:-CHECKSUM]):
            self._remove(path)
            return None
        return load(content[:-CHECKSUM])

    def put(self, key: str, tensors: Tensors) -> int:
        """Keeps tensors under a key, unless there are some already.

        Returns:
            The number of bytes written.

        Raises:
            StoreFullError: They would exceed the limit.
            OSError: The disk is full, or can not be written to.
        """
        path = self._path(key)
        if path.exists():
            return 0
        content = save({name: tensor.numpy() for name, tensor in tensors.items()})
        content += _compute_checksum(content)
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
            size = self._read_size() + count
            if size > self.limit:
                raise StoreFullError(f'{size} bytes would exceed the limit of {self.limit}')
            unfinished.parent.mkdir(exist_ok=True)
            with open(unfinished, 'xb') as file:
                file.truncate(count)
            self._write_size(size)

    def _remove(self, path: Path) -> None:
        with suppress(OSError), self._lock:  # another process may have been faster, or the folder is read-only
            count = path.stat().st_size
            path.unlink()
            self._write_size(self._read_size() - count)

    def _read_size(self) -> int:
        try:
            return int(self._count.read_text())
        except (OSError, ValueError):  # a process was killed while it wrote the number
            return self._measure()

    def _write_size(self, size: int) -> None:
        self._count.write_text(str(size))

    def _measure(self) -> int:
        return sum(file.stat().st_size for file in self._find_files(ENTRY, UNFINISHED))

    def _remove_abandoned(self) -> None:
        for file in self._find_files(UNFINISHED):
            if time.time() - file.stat().st_mtime > ABANDONED:
                os.unlink(file)

    def _find_files(self, *suffixes: str) -> Iterator[os.DirEntry]:
        for folder in os.scandir(self.folder):
            if folder.is_dir() and re.fullmatch('[0-9a-f]{2}', folder.name):  # others are not the store's
                yield from (file for file in os.scandir(folder)
                            if file.name.startswith(folder.name) and file.name.endswith(suffixes))


class StoreFullError(RuntimeError):
    """Another entry would exceed the store's limit."""


def _compute_checksum(content: bytes | memoryview) -> bytes:
    return zlib.crc32(content).to_bytes(CHECKSUM, 'big')
