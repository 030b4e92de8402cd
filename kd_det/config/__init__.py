"""Configs: reading and composing them, the methods, and what classes and detectors they mean."""
from collections.abc import Iterable
from difflib import get_close_matches


class ConfigurationError(ValueError):
    """A config can not be read, or can not serve."""


def suggest_names(name: object, names: Iterable[str], most: int = 3) -> str:
    """Makes a sentence of the names that are most like a wrong one; empty where none is.

    Example:
        >>> suggest_names('cosin', ('mse', 'cosine'))
        'Nearest: cosine.'
    """
    found = get_close_matches(name, sorted(names), n=most) if isinstance(name, str) else []
    return f"Nearest: {', '.join(found)}." if found else ''
