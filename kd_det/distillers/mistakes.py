"""What is wrong with a config that can not be built, in its writer's words and with the nearest right ones."""
from __future__ import annotations

import re
from difflib import get_close_matches
from inspect import signature
from typing import Any, Iterable, Set

from mmdet.registry import MODELS, TASK_UTILS

UNKNOWN_ARGUMENT = re.compile(r"got an unexpected keyword argument '(\w+)'")
UNKNOWN_TYPE = re.compile(r'(\w+) is not in the \S+ registry')


def reason(error: Exception, config: Any) -> str:
    """Why building failed.

    Args:
        error: What building raised.
        config: What was built: a dict with a ``type``, other such dicts perhaps within, or a class.

    Returns:
        For a name that does not exist, those like it; for anything else the error's own message.
    """
    message = str(error)
    argument, kind = UNKNOWN_ARGUMENT.search(message), UNKNOWN_TYPE.search(message)
    if isinstance(error, TypeError) and argument:
        others = _arguments(config) - {argument[1]}  # which another part, or a base class, may have
        return f"there is no argument '{argument[1]}'.{nearest(argument[1], others)}"
    if isinstance(error, KeyError) and kind:
        own = (name for name, each in MODELS.module_dict.items() if each.__module__.startswith('kd_det.'))
        return f"there is no '{kind[1]}'.{nearest(kind[1], own)} If it is your own, import it with custom_imports."
    return message


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence on the names that are most like a wrong one; empty where none is."""
    found = get_close_matches(name, sorted(names))
    return f" Nearest names: {', '.join(found)}." if found else ''


def _arguments(config: Any) -> Set[str]:
    """The arguments of all that a config names."""
    if isinstance(config, type):
        return {name for ancestor in config.__mro__[:-1] for name in signature(ancestor.__init__).parameters}
    if isinstance(config, (list, tuple)):
        return set().union(*map(_arguments, config))
    if not isinstance(config, dict):
        return set()
    kind = config.get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind) or TASK_UTILS.get(kind)
    return set().union(*map(_arguments, config.values()), _arguments(kind)) - {'self', 'args', 'kwargs'}
