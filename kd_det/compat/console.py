"""Where kd_det prints: text of users as it is, in whatever encoding there is.

Names of classes, runs, paths and errors may hold anything: brackets that rich would take for markup, colons that it
would take for an emoji, signs that the encoding of the output lacks.
"""
from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from .process import ERRORS


class PlainConsole(Console):
    """A console that prints text as it is, that in tables too; styles come from :class:`rich.text.Text` alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Before rich measures a text, what the encoding lacks is spelt out: so columns stay in line."""
        return super().render_str(text.encode(self.encoding, ERRORS).decode(self.encoding), **settings)
