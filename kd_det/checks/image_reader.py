"""Reads the images of a data set with its pipeline's own transforms, in several threads, and remembers them."""
from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import current_thread, local, main_thread
from typing import Any, NamedTuple

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import LoadMultiChannelImageFromFiles
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.logging import MMLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd_det.compat.console import PlainConsole
from kd_det.compat.process import count_processors
from kd_det.compat.writing import WritingError, write_whole

MEMORY_FILE = 'checked_images.json'
FORMAT = 1  # of that file; another number makes it forgotten
MOST_FAULTS = 10  # then the reading ends: what follows is probably of the same kind
CHUNK = 16  # images that a thread reads in a row
MOST_THREADS = 16
PAUSE = 10.0  # seconds between the lines of a log that tell how far it is
PROBES = 8  # images that are tried to find out which transforms load
JPEG, JPEG_END, SCAN = b'\xff\xd8\xff', b'\xff\xd9', b'\xda'
GIT_LFS = b'version https://git-lfs'
DECODERS = dict(turbojpeg=('turbojpeg', 'PyTurboJPEG'), tifffile=('tifffile', 'tifffile'))  # module and package

Shape = tuple[int, int, int]  # height, width, channels; zeros where the loader gives no array


class Memory:
    """Which images were read by which loader, as they were then; in a work dir, or only as long as this process lives.

    Args:
        folder: The work dir.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.file = None if folder is None else Path(folder) / MEMORY_FILE
        self.checked: dict[str, dict[str, list]] = {}
        try:
            stored = json.loads(self.file.read_text(encoding='utf-8')) if self.file else {}
            if stored.get('format') == FORMAT:
                self.checked = {loader: dict(images) for loader, images in stored['checked'].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none yet, or something else of that name
            pass

    def recall(self, loader: str, path: str, state: Sequence[int]) -> Shape | None:
        """The shape of an image that this loader has read, and that has not changed since."""
        known = self.checked.get(loader, {}).get(path)
        is_known = isinstance(known, list) and len(known) == 5 and all(type(each) is int for each in known)
        return tuple(known[2:5]) if is_known and known[:2] == list(state) else None

    def add(self, loader: str, look: Look) -> None:
        """Adds an image that was read."""
        self.checked.setdefault(loader, {})[look.key] = [*look.state, *look.shape]

    def save(self) -> None:
        """Writes the file, whole or not at all; where that is not possible nothing is remembered."""
        if self.file is None:
            return
        with suppress(OSError, WritingError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps(dict(format=FORMAT, checked=self.checked)))


class Look(NamedTuple):
    """One image.

    Attributes:
        index: In the data set.
        name: Its path, or how else to find it.
        key: Its path, or paths, from the root.
        state: Bytes and time of its file; None where it has none of its own.
        shape: As it was read; None where it was not.
        annotated: Its height and width as the annotations have them, if they do.
        fault: Why it can not be read.
        known: Whether it was read before.
    """
    index: int
    name: str
    key: str = ''
    state: list[int] | None = None
    shape: Shape | None = None
    annotated: tuple[int, int] | None = None
    fault: str = ''
    known: bool = False


def loading_transforms(dataset: Any) -> list[Callable]:
    """The transforms up to the one that puts ``img`` there.

    Returns:
        Of a data set whose images can not be read, all of its transforms; none if it loads its images itself, or none.
    """
    transforms = list(getattr(getattr(dataset, 'pipeline', None), 'transforms', ()))
    for index in spread(len(dataset), PROBES):
        results = dataset.get_data_info(index)
        try:
            for count, transform in enumerate(transforms, start=1):
                if results.get('img') is not None:
                    return []
                results = transform(results)
                if results is None:
                    break
                if results.get('img') is not None:
                    return transforms[:count]
            else:
                return []
        except Exception:  # of this image; another may be sound
            continue
    return transforms


def read_image(dataset: Any, index: int) -> np.ndarray:
    """An image of a built data set as its own transforms load it: (H, W) or (H, W, C), blue first where there are 3."""
    results = dataset.get_data_info(index)
    for transform in loading_transforms(dataset) or [LoadImageFromFile()]:
        results = results if results.get('img') is not None else transform(results)
    return results['img']


class Reader:
    """Reads images with a pipeline's own transforms, in several threads.

    Args:
        dataset: The data set.
        transforms: See :func:`loading_transforms`.
        memory: What is known from before, and is added to.
    """

    def __init__(self, dataset: Any, transforms: list[Callable], memory: Memory) -> None:
        self.dataset, self.transforms, self.memory = dataset, transforms, memory
        self.identity = '; '.join(map(_identity, transforms))
        # Whether mmcv's own code decodes; somebody else's may do with a damaged file what it likes.
        loads: Any = type(transforms[-1])
        self.decodes_files = loads.transform in (
            LoadImageFromFile.transform, LoadMultiChannelImageFromFiles.transform)
        self._of_thread = local()

    def read(self, indices: Sequence[int]) -> list[Look]:
        """Looks at images, as many of them as this rank's share, until too many can not be read."""
        rank, world = get_dist_info()
        indices, looks, faults, fresh = indices[rank::world], [], 0, 0
        chunks = (indices[start:start + CHUNK] for start in range(0, len(indices), CHUNK))
        threads = _threads() if _can_be_copied(self.transforms) else 1
        try:
            with ThreadPoolExecutor(threads) as pool, _progress(len(indices)) as tell:
                for made in _ahead(pool, self._look_at, chunks, 2 * threads) if threads > 1 else map(
                        self._look_at, chunks):
                    for look in made:
                        if look.fault and threads > 1:  # a loader may not bear threads: training has none
                            look = self._look(look.index, self.transforms)
                        looks.append(look)
                        faults += bool(look.fault)
                        if look.shape and look.state and not look.known:
                            self.memory.add(self.identity, look)
                            fresh += 1
                    tell(len(looks))
                    if faults >= MOST_FAULTS:
                        break
        finally:  # Ctrl-C too
            if fresh and rank == 0:
                self.memory.save()
        return looks

    def _look_at(self, indices: Sequence[int]) -> list[Look]:
        transforms = self.transforms
        if current_thread() is not main_thread():  # each has its own
            if not hasattr(self._of_thread, 'transforms'):
                self._of_thread.transforms = copy.deepcopy(transforms)
            transforms = self._of_thread.transforms
        return [self._look(index, transforms) for index in indices]

    def _look(self, index: int, transforms: list[Callable]) -> Look:
        info = self.dataset.get_data_info(index)
        given = info.get('img_path')
        paths = [str(path) for path in (given if isinstance(given, (list, tuple)) else [given]) if path is not None]
        annotated = (info['height'], info['width']) if info.get('height') and info.get('width') else None
        look = Look(index, paths[0] if paths else f"image {info.get('img_id', index)}",
                    '\n'.join(map(os.path.abspath, paths)), _state(paths), annotated=annotated)
        known = look.state and self.memory.recall(self.identity, look.key, look.state)
        if known:
            return look._replace(shape=known, known=True)
        for transform in transforms:
            try:
                info = transform(info)
            except Exception as error:  # of a decoder, or of anybody's own loader
                said = _lacking(transform) or f'{type(transform).__name__}: {error}'
                return look._replace(fault=_fault(look.name, paths, said))
            if info is None or info.get('img') is not None:
                break
        if info is None and getattr(self.dataset, 'test_mode', False):
            return look._replace(fault=f"The image '{look.name}' is skipped by {type(transform).__name__}, which only "
                                 'a training can bear')
        if info is None:
            return look
        image = info.get('img')
        if not isinstance(image, np.ndarray):
            return look._replace(shape=(0, 0, 0))
        if image.ndim not in (2, 3) or not image.size:
            return look._replace(fault=f"The image '{look.name}' is read as an array of shape {image.shape}, expected "
                                 '(height, width) or (height, width, channels)')
        if self.decodes_files and any(map(_ends_early, paths)):  # OpenCV 4 fills the rest with grey, and says nothing
            return look._replace(fault=_fault(look.name, paths))
        return look._replace(shape=(*image.shape[:2], image.shape[2] if image.ndim == 3 else 1))


def _state(paths: Sequence[str]) -> list[int] | None:
    """Bytes and time of the files together; None if one is no file, as where a loader reads from a data base."""
    try:
        found = [os.stat(path) for path in paths]
    except (OSError, ValueError):
        return None
    return [sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)] if found else None


def _fault(name: str, paths: Sequence[str], said: str = '') -> str:
    """Why an image can not be read: what its file is like, or what the loader said."""
    if len(paths) == 1 and not os.path.exists(name):
        return f"The image '{name}' does not exist" + (f' ({said})' if name not in said else '')
    reasons = list(filter(None, map(find_damage, paths))) or [said]
    return f"The image '{name}' can not be read ({reasons[0]})"


def _lacking(transform: Callable) -> str:
    """The package that a loader of mmcv's needs and that is not installed: mmcv would ask None for a picture."""
    backend = getattr(transform, 'imdecode_backend', None)
    package = DECODERS.get(backend)
    return '' if package is None or find_spec(package[0]) else (
        f"imdecode_backend='{backend}' needs a package that is not installed: pip install {package[1]}")


def find_damage(path: str) -> str:
    """What is wrong with a file, as its bytes tell; empty where they do not."""
    try:
        with open(path, 'rb') as file:
            head = file.read(80)
    except OSError as error:
        return str(error)
    if not head:
        return 'the file is empty'
    if head.startswith(GIT_LFS):
        return 'it is a pointer of Git LFS: git lfs pull fetches the image'
    if _ends_early(path):
        return 'the end of its JPEG data is missing'
    text = head.splitlines()[0].decode('ascii', 'ignore')
    return f"it holds text: '{text}'" if len(text) > 7 and text.isprintable() and head.startswith(text.encode()) else ''


def _ends_early(path: str) -> bool:
    """Whether a file is a JPEG without its end: in a scan the two bytes of the end can not stand otherwise."""
    with open(path, 'rb') as file:
        if file.read(len(JPEG)) != JPEG:
            return False
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        if file.read().rstrip(b'\0').endswith(JPEG_END):  # nearly all are decided here
            return False
        file.seek(0)
        data = file.read()
    position = 2
    while data[position:position + 1] == b'\xff' and data[position + 1:position + 2] != SCAN:  # a segment of the header
        filler = data[position + 1:position + 2] == b'\xff'
        position += 1 if filler else 2 + int.from_bytes(data[position + 2:position + 4], 'big')
    return data.find(JPEG_END, position) < 0


def gathered(looks: list[Look], memory: Memory, identity: str) -> list[Look]:
    """The looks of all ranks; what others have read is remembered too."""
    rank, world = get_dist_info()
    if world == 1:
        return looks
    looks = sorted((look for each in all_gather_object(looks) for look in each), key=lambda look: look.index)
    for look in looks:
        if look.shape and look.state:
            memory.add(identity, look)
    if rank == 0 and not all(look.known for look in looks):
        memory.save()
    return looks


def _identity(transform: Callable) -> str:
    """A transform in words: its class, its settings and its code."""
    kind = type(transform)
    try:
        code = hashlib.sha256(inspect.getsource(kind).encode('utf-8', 'replace')).hexdigest()[:12]
    except (OSError, TypeError):  # written in a notebook, or compiled
        code = ''
    settings = repr(transform) if kind.__repr__ is not object.__repr__ else repr(sorted(vars(transform).items()))
    return f'{kind.__module__}.{settings} {code}'


def _can_be_copied(transforms: Sequence[Callable]) -> bool:
    """Whether each thread can have its own transforms: not those that hold an open file."""
    try:
        return bool(copy.deepcopy(transforms))
    except Exception:  # whatever they hold says so in its own way
        return False


def _threads() -> int:
    """Threads for this process; the other ranks on the machine take theirs."""
    return min(MOST_THREADS, max(1, count_processors() // int(os.environ.get('LOCAL_WORLD_SIZE', get_dist_info()[1]))))


def _ahead(pool: ThreadPoolExecutor, work: Callable, items: Iterator, ahead: int) -> Iterator[Any]:
    """The results in order, of work that is at most so far ahead."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for each in waiting:
            each.cancel()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Tells how far it is: in a terminal by a bar, else by a line of the log now and then; only rank 0."""
    console, began = PlainConsole(stderr=True), time.monotonic()
    if get_dist_info()[0] or not console.is_terminal:
        last = [began]

        def tell(done: int) -> None:
            now = time.monotonic()
            if now - last[0] > PAUSE:
                last[0] = now
                MMLogger.get_current_instance().info(
                    f'Images: {done:,} of {total:,} read, about {(now - began) / done * (total - done):.0f} s left')
        yield tell
        return
    columns = (TextColumn('{task.description}', markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
        task = progress.add_task('images', total=total)
        yield lambda done: progress.update(task, completed=done)


def spread(length: int, most: int | None = None) -> list[int]:
    """Indices of a data set, all or evenly spread."""
    count = length if most is None else min(length, most)
    return [index * length // count for index in range(count)]
