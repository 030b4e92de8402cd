"""Reads what a method of a module is given and returns, where no hook of a module would see it."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, NamedTuple

from torch import nn


class Call(NamedTuple):
    """One call of a method: its arguments by name, and what it returned."""
    arguments: dict[str, Any]
    returned: Any


@contextmanager
def recorded_calls(module: nn.Module, method: str) -> Iterator[list[Call]]:
    """Records the calls of one method of one module while the block runs, and leaves the module as it was.

    Args:
        module: The module.
        method: Name of the method.

    Yields:
        A list that grows with each call.
    """
    calls: list[Call] = []
    original = getattr(module, method)

    def record(*args, **kwargs):
        returned = original(*args, **kwargs)
        calls.append(Call(signature(original).bind(*args, **kwargs).arguments, returned))
        return returned

    setattr(module, method, record)  # on the instance, before the class's
    try:
        yield calls
    finally:
        delattr(module, method)
