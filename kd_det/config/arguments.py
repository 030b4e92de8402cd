"""Checks of arguments when a part of a distillation is built: what does not fit is refused with its name and value.

Each check raises a ValueError such as ``distance='cosin': expected one of mse, cosine. Nearest: cosine.``; who builds
from a config puts the place in the config before it. Nothing of this package is imported here: every part can use it.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, NoReturn

SIDES = ('student', 'teacher')


def refuse(name: str, value: object, expected: str) -> NoReturn:
    """Raises the ValueError of an argument that does not fit.

    Args:
        name: Of the argument.
        value: What was given.
        expected: What would fit, and why where that helps; the end of a sentence that begins with 'expected'.

    Example:
        >>> refuse('ratio', 2, 'a share of the cells.')
        Traceback (most recent call last):
        ValueError: ratio=2: expected a share of the cells.
    """
    raise ValueError(f'{name}={value!r:.80}: expected {expected}')


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Checks a word that must be one of some.

    Raises:
        ValueError: It is not; the message lists them, and the nearest one.

    Example:
        >>> check_choice('distance', 'cosin', ('mse', 'cosine'))
        Traceback (most recent call last):
        ValueError: distance='cosin': expected one of mse, cosine. Nearest: cosine.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        nearest = get_close_matches(value, choices, n=1) if isinstance(value, str) else []
        refuse(name, value, f"one of {', '.join(choices)}.{f' Nearest: {nearest[0]}.' if nearest else ''}")


def check_number(name: str, value: object, *, least: float | None = None, above: float | None = None,
                 most: float | None = None, below: float | None = None, whole: bool = False,
                 meaning: str | None = None) -> None:
    """Checks a finite number, True and False are none.

    Args:
        name: Of the argument.
        value: What was given.
        least: The smallest that fits.
        above: What it must exceed.
        most: The largest that fits.
        below: What it must stay under.
        whole: It must be an integer.
        meaning: What it says, for the message.

    Raises:
        ValueError: It is no such number.

    Example:
        >>> check_number('ratio', 1.0, least=0, below=1)
        Traceback (most recent call last):
        ValueError: ratio=1.0: expected a number of at least 0 and below 1.
        >>> check_number('layers', 0, least=1, whole=True, meaning='the number of layers')
        Traceback (most recent call last):
        ValueError: layers=0: expected the number of layers, an integer of at least 1.
    """
    kind = Integral if whole else Real
    number = float(value) if isinstance(value, kind) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or not ((least is None or number >= least) and (above is None or number > above)
                                         and (most is None or number <= most) and (below is None or number < below)):
        bounds = (('of at least', least), ('above', above), ('of at most', most), ('below', below))
        limits = ' and '.join(f'{words} {bound:g}' for words, bound in bounds if bound is not None)
        expected = f"{'an integer' if whole else 'a number'} {limits}".strip()
        refuse(name, value, f'{meaning}, {expected}.' if meaning else f'{expected}.')


def check_flags(**flags: object) -> None:
    """Checks arguments, by their names, that say yes or no.

    Raises:
        ValueError: One is neither True nor False.

    Example:
        >>> check_flags(resize=True, pad_aware='no')
        Traceback (most recent call last):
        ValueError: pad_aware='no': expected True or False.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            refuse(name, value, 'True or False.')


def check_weights(**weights: object) -> None:
    """Checks factors of parts, by their names: numbers of at least 0.

    Raises:
        ValueError: One is no such number.

    Example:
        >>> check_weights(alpha=1e-3, beta=-1.0)
        Traceback (most recent call last):
        ValueError: beta=-1.0: expected a number of at least 0.
    """
    for name, value in weights.items():
        check_number(name, value, least=0)


def split_sides(name: str, value: Any) -> tuple[str, str]:
    """The student's and the teacher's name of an argument that is one for both, or a dict with one for each.

    Raises:
        ValueError: It is neither.

    Example:
        >>> split_sides('head', 'bbox_head')
        ('bbox_head', 'bbox_head')
        >>> split_sides('head', dict(student='bbox_head', teacher='rpn_head'))
        ('bbox_head', 'rpn_head')
        >>> split_sides('tap', 3)
        Traceback (most recent call last):
        ValueError: tap=3: expected a name, or dict(student=…, teacher=…) of names.
    """
    names: Sequence[object] = (value, value)
    if isinstance(value, Mapping):
        names = [value.get(side) for side in SIDES] if set(value) == set(SIDES) else (None, None)
    if not all(isinstance(each, str) and each for each in names):
        refuse(name, value, 'a name, or dict(student=…, teacher=…) of names.')
    return str(names[0]), str(names[1])
