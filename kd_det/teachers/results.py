"""Reads files of COCO results, and tells which images they mean."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from kd_det.config.arguments import Place
from kd_det.config.detectors import TeacherError

MOST_SHOWN = 6


class Results(NamedTuple):
    """The entries of a file of COCO results, R of them.

    Attributes:
        boxes: (R, 4) of x1, y1, x2, y2 in pixels of the original images, float32.
        scores: (R, ) of float32.
        images: The ids of the images, each once, as texts.
        image_of: (R, ) of indices into ``images``.
        categories: The ids of the categories, each once, as texts.
        category_of: (R, ) of indices into ``categories``.
    """
    boxes: np.ndarray
    scores: np.ndarray
    images: list[str]
    image_of: np.ndarray
    categories: list[str]
    category_of: np.ndarray


def read_results(file: str) -> Results:
    """Reads a file of COCO results.

    Raises:
        TeacherError: There is none, it holds something else, or an entry is damaged.
    """
    try:
        entries = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise TeacherError(f"There is no file of detections '{file}' ({error.strerror}): model.teacher.file names COCO "
                           'results.') from error
    except (ValueError, RecursionError) as error:
        raise TeacherError(f"'{file}' is no JSON file of COCO results ({error}).") from error
    if not isinstance(entries, list):
        annotations = isinstance(entries, dict) and 'annotations' in entries
        raise TeacherError(f"'{file}' holds {'a COCO annotation file' if annotations else type(entries).__name__}, "
                           'expected COCO results: a list of {"image_id": …, "category_id": …, "bbox": [x, y, width, '
                           'height], "score": …}.')
    if not entries:
        raise TeacherError(f"'{file}' holds no detections: its list is empty.")
    for index, entry in enumerate(entries):
        problem = _find_problem(entry)
        if problem:
            raise TeacherError(f"'{file}': detection {index}: {problem} (entries are counted from 0).")
    boxes = np.array([entry['bbox'] for entry in entries], float)
    boxes[:, 2:] += boxes[:, :2]
    columns = {}
    for key in ('image_id', 'category_id'):
        places: dict[str, int] = {}
        of_entries = [places.setdefault(to_key(entry[key]), len(places)) for entry in entries]
        columns[key] = list(places), np.array(of_entries)
    return Results(boxes.astype(np.float32), np.array([entry['score'] for entry in entries], np.float32),
                   *columns['image_id'], *columns['category_id'])


def _find_problem(entry: Any) -> str | None:
    """What is wrong with one entry of COCO results; None for nothing."""
    if not isinstance(entry, dict):
        return f'it is {entry!r:.40}, expected an object'
    for key in ('image_id', 'category_id', 'bbox', 'score'):
        if key not in entry:
            return f"it has no '{key}'"
    for key in ('image_id', 'category_id'):
        value = entry[key]
        if type(value) not in (int, str) and not (type(value) is float and value.is_integer()):
            return f'its {key} is {value!r:.40}, expected a whole number or a text'
    box, score = entry['bbox'], entry['score']
    if not isinstance(box, list) or len(box) != 4 or not all(type(each) in (int, float) for each in box):
        return f'its bbox is {box!r:.60}, expected 4 numbers: x, y, width, height'
    if not all(map(np.isfinite, box)):
        return f'its bbox is {box}, which is not finite'
    if box[2] < 0 or box[3] < 0:
        return f'its bbox is {box}, of negative size: COCO writes x, y, width, height'
    if type(score) not in (int, float) or not 0 <= score <= 1:
        return f'its score is {score!r:.40}, expected a number from 0 to 1'
    return None


def to_key(value: Any) -> str:
    """An id as a text, whether a file has it as a number or as one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def read_file_names(annotations: Place) -> dict[str, str]:
    """The file names of the images of a COCO file by their ids, as texts."""
    try:
        images = json.loads(Path(annotations).read_bytes())['images']
        return {to_key(image['id']): str(image['file_name']) for image in images}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TeacherError(f"model.teacher.annotations: '{annotations}' is no COCO file of images "
                           f'({type(error).__name__}: {error}).') from error


def index_names(names: Sequence[tuple[str, int]]) -> Callable[[str, str], int]:
    """Makes what finds an image by its path and the folder of its data set; -1 where it is none of them.

    Folders have to agree, as far as both have some; of the folders of a whole path, those within the data set.

    Args:
        names: File names, or their stems, each with what it stands for.
    """
    by_name: dict[str, list[tuple[tuple[str, ...], int, bool]]] = {}
    for name, index in names:
        path = PurePosixPath(name.replace('\\', '/'))
        by_name.setdefault(path.name, []).append((path.parts[::-1], index, path.is_absolute()))

    def find(path: str, folder: str) -> int:
        path, folder = (each.replace(os.sep, '/') for each in (path, folder))  # of Windows
        file = PurePosixPath(path)
        within = file.relative_to(folder) if folder and file.is_relative_to(folder) else file
        own = file.parts[::-1]
        for parts, index, is_whole in (*by_name.get(file.name, ()), *by_name.get(file.stem, ())):
            length = len(within.parts) if is_whole else min(len(parts), len(own))
            if parts[1:length] == own[1:length]:
                return index
        return -1

    return find


def is_same_file(first: Place, second: Place) -> bool:
    """Whether two paths lead to one file."""
    try:
        return os.path.samefile(first, second)
    except OSError:  # an address, or none
        return str(first) == str(second)


def list_some(values: Sequence[str] | Mapping[str, str]) -> str:
    """The first of some names, or of ids with what they are called."""
    values = [f"{key} ('{name}')" for key, name in values.items()] if isinstance(values, Mapping) else list(values)
    rest = len(values) - MOST_SHOWN
    return ', '.join(values[:MOST_SHOWN]) + (f', … and {rest} more' if rest > 0 else '')
