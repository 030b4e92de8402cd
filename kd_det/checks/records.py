"""The lists of an annotation file as JSON holds them, and how damage in them is told."""
from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from kd_det.checks.environment import Finding

CORRECT = 'Correct these entries of the annotation file, or take them out (entries are counted from 0)'
LARGEST = 2**1000  # of the whole numbers; JSON has larger ones, but no box


class UnreadableError(ValueError):
    """A file is no COCO annotation file at all; the message says why."""


def read_json(path: str) -> tuple[Any, bool]:
    """Reads a JSON file, and whether it is free of NaN and Infinity, which Python reads though they are no JSON.

    Raises:
        UnreadableError: It is empty, cut off, no JSON, or not encoded as UTF-8.
    """
    constants: list[str] = []

    def read_constant(name: str) -> float:
        constants.append(name)
        return float(name)

    data = Path(path).read_bytes()
    if not data.strip():
        raise UnreadableError('it is empty')
    try:
        text = data.decode('utf-8')
        return json.loads(text, parse_constant=read_constant), not constants
    except UnicodeDecodeError as error:
        raise UnreadableError(f'it is not encoded as UTF-8: {error}') from error
    except json.JSONDecodeError as error:
        cut = 'it is cut off' if not text[error.pos:].strip() or 'Unterminated' in error.msg else 'it is no JSON'
        raise UnreadableError(f'{cut}: {error}') from error
    except (RecursionError, ValueError) as error:  # of lists in lists, of numbers of thousands of digits
        raise UnreadableError(f'it can not be read: {error}') from error


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A million new dicts would be searched for garbage again and again, and there is none."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Damages:
    """Counts damages by kind, and keeps of each kind what is told of the first.

    Args:
        subject: Whose they are.
        remedy: What to do about them, unless a kind has its own.
    """

    def __init__(self, subject: str, remedy: str) -> None:
        self.subject, self.remedy = subject, remedy
        self._kinds: dict[str, tuple[str, str, bool]] = {}
        self._counts: Counter = Counter()

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def add(self, kind: str, text: str, count: int = 1, remedy: str = '', fault: bool = True) -> None:
        """Adds so many damages of a kind; the text tells of the first."""
        self._kinds.setdefault(kind, (text, remedy or self.remedy, fault))
        self._counts[kind] += count

    def findings(self) -> Iterator[Finding]:
        """One finding for each kind."""
        for kind, (text, remedy, fault) in self._kinds.items():
            count = self._counts[kind]
            yield Finding(self.subject, text + (f' (the first of {count:,})' if count > 1 else ''), remedy, fault)


class Entries:
    """One of the lists of a COCO file.

    Args:
        kind: What one entry is called.
        entries: The list, all of whose entries are dicts.
        report: Makes a finding of ``(text, remedy, fault)``.
    """

    def __init__(self, kind: str, entries: list[dict], report: Callable[[str, str, bool], Finding]) -> None:
        self.kind, self.entries, self.report = kind, entries, report
        self._columns: dict[str, list] = {}
        self._complete: set[str] = set()

    def __getitem__(self, key: str) -> list:
        """The values of a key, None where an entry lacks it."""
        if key not in self._columns:
            try:
                self._columns[key] = list(map(itemgetter(key), self.entries))
                self._complete.add(key)
            except KeyError:
                self._columns[key] = [entry.get(key) for entry in self.entries]
        return self._columns[key]

    def has(self, key: str) -> bool:
        """Whether all entries have a key."""
        self[key]
        return key in self._complete

    def damage(self, indices: Sequence[int] | np.ndarray, what: str | Callable[[int], str], remedy: str = CORRECT,
               fault: bool = True) -> Iterator[Finding]:
        """Tells of entries of one kind of damage: which is the first, what is wrong with it, and how many there are."""
        if len(indices):
            first = int(indices[0])
            entry = self.entries[first]
            name = f'{self.kind} {first}' + (
                f" (id {show(entry['id'])})" if isinstance(entry, dict) and 'id' in entry else '')
            text = what if isinstance(what, str) else what(first)
            yield self.report(f'{name}: {text}' + (f' (the first of {len(indices):,})' if len(indices) > 1 else ''),
                              remedy, fault)

    def missing(self, keys: Sequence[str], among: Sequence[int] | np.ndarray | None = None) -> Iterator[Finding]:
        """Tells of entries that lack keys."""
        if all(map(self.has, keys)):
            return
        lacking: dict[str, list[int]] = {}
        for index in range(len(self.entries)) if among is None else among:
            entry = self.entries[index]
            if absent := [key for key in keys if key not in entry]:
                lacking.setdefault(', '.join(map(repr, absent)), []).append(index)
        for absent, indices in lacking.items():
            yield from self.damage(indices, f'no {absent}')

    def repeated(self, key: str) -> list[int]:
        """Each entry whose value an earlier one has, too."""
        values, seen, again = self[key], set(), []
        if len(set(values)) < len(values):
            for index, value in enumerate(values):
                if value in seen:
                    again.append(index)
                elif value is not None:
                    seen.add(value)
        return again


def to_numbers(values: list, count: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Reads numbers, or lists of so many, NaN and Infinity among them.

    Returns:
        (N, ) or (N, count) float64, NaN where there are none; and an (N, ) mask of the places that hold something else.
    """
    shape = (len(values), count) if count else (len(values), )
    try:
        array = np.array(values)
        if array.dtype.kind in 'iuf' and array.shape == shape:
            return array.astype(float), np.zeros(len(values), bool)
    except (ValueError, OverflowError):  # of different lengths
        pass

    def reads(value: Any) -> bool:
        return type(value) is float or type(value) is int and abs(value) < LARGEST

    broken = [not (isinstance(value, list) and len(value) == count and all(map(reads, value)) if count
                   else reads(value)) for value in values]
    filler = [np.nan] * count if count else np.nan
    return np.array([filler if wrong else value for wrong, value in zip(broken, values)],
                    float).reshape(shape), np.array(broken, bool)


def as_text(value: Any) -> str:
    """An id as a text, by which the same one of another type is found."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def kind_of(value: Any) -> str:
    """What a value of a JSON file is, in words."""
    kinds = {dict: 'an object', list: 'a list', str: 'a text', bool: 'a truth value', type(None): 'null'}
    return kinds.get(type(value), 'a number')


def name_of(value: Any) -> str:
    """A value after what it is, such as ``the text '7'``."""
    return f"the {kind_of(value).split()[-1]} {show(value)}"


def show(value: Any, most: int = 60) -> str:
    """A value as Python writes it, a long one cut off."""
    text = repr(value)
    return text if len(text) <= most else f'{text[:most]}…'


def list_some(values: Sequence, most: int = 6) -> str:
    """The first values, and how many more there are."""
    rest = len(values) - most
    return ', '.join(map(str, values[:most])) + (f', … and {rest} more' if rest > 0 else '')
