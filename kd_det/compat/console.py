"""Where kd_det prints: text of users as it is, in whatever encoding there is.

Names of classes, runs, paths and errors may hold anything: brackets that rich would take for markup, colons that it
would take for an emoji, signs that the encoding of the output lacks.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .process import ERRORS


class PlainConsole(Console):
    """A console that prints text as it is, that in tables too; styles come from :class:`rich.text.Text` alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Before rich measures a text, what the encoding lacks is spelt out: so columns stay in line."""
        return super().render_str(text.encode(self.encoding, ERRORS).decode(self.encoding), **settings)

    def on_broken_pipe(self) -> None:
        """Leaves it to the program, which rich would end: called while the error is handled."""
        raise


@dataclass(frozen=True)
class TextTable:
    """A table of texts.

    Attributes:
        title: Stands above it.
        columns: The headings.
        rows: The cells, as many in each row as there are columns.
        caption: Stands below it; may have several lines.
        words: Indices of the columns that hold words, which begin at the left; numbers end at the right.
        no_wrap: Indices of the columns that a narrow terminal does not break into lines.
    """
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ''
    words: Sequence[int] = (0, )
    no_wrap: Sequence[int] = ()

    def to_rich(self) -> Table:
        """Returns the table for a terminal: with lines, as wide as that at most, nothing left out."""
        table = Table(title=self.title, caption=self.caption or None)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify='left' if index in self.words else 'right', overflow='fold',
                             no_wrap=index in self.no_wrap)
        for row in self.rows:
            table.add_row(*row)
        return table

    def to_plain(self) -> str:
        """Returns the table for a pipe or a file: one line a row, as wide as its cells are."""
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(map(cell_len, column)) for column in zip(*cells)]
        lines = ['  '.join(_pad(cell, width, index in self.words)
                           for index, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
        return '\n'.join([self.title, *lines, *([self.caption] if self.caption else [])])

    def to_markdown(self) -> str:
        """Returns the rows in Markdown, without title and caption."""
        aligned = ['---' if index in self.words else '---:' for index in range(len(self.columns))]
        return '\n'.join('| ' + ' | '.join(row) + ' |' for row in (self.columns, aligned, *self.rows))

    def to_html(self) -> str:
        """Returns the table as an HTML element."""
        heading = ''.join(f'<th>{escape(column)}</th>' for column in self.columns)
        rows = (''.join(f'<td style="text-align: {"left" if index in self.words else "right"}">{escape(cell)}</td>'
                        for index, cell in enumerate(row)) for row in self.rows)
        body = ''.join(f'<tr>{row}</tr>' for row in rows)
        below = ''.join(f'<p>{escape(line)}</p>' for line in self.caption.splitlines())
        return (f'<table><caption>{escape(self.title)}</caption><thead><tr>{heading}</tr></thead>'
                f'<tbody>{body}</tbody></table>{below}')


def _pad(cell: str, width: int, left: bool) -> str:
    padding = ' ' * (width - cell_len(cell))  # not str.ljust: some signs are two columns wide
    return cell + padding if left else padding + cell
