"""From the markup of docstrings and of files beside docs/ to that of the site; standard library only."""
from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

ROLE = re.compile(r':(?:class|func|meth|attr|data|mod):`([^`]+)`')
LINK = re.compile(r'(!?\[[^\]]*\]\()([^)\s]+)(\))')
RULE = re.compile(r'^( *)=+( +=+)+$')


def convert_roles(text: str, resolve: Callable[[str], str | None]) -> str:
    """Makes Markdown's cross-references of Sphinx's roles.

    Args:
        text: A docstring.
        resolve: From a name as written to the full path of a documented object; None of any other.

    Example:
        >>> convert_roles('See :func:`~pkg.a.run` and :class:`torch.Tensor`.', {'pkg.a.run': 'pkg.a.run'}.get)
        'See [`run`][pkg.a.run] and `torch.Tensor`.'
    """

    def convert(match: re.Match[str]) -> str:
        written = match[1]
        name = written.removeprefix('~')
        shown = name.rpartition('.')[2] if written.startswith('~') else name
        path = resolve(name)
        return f'`{shown}`' if path is None else f'[`{shown}`][{path}]'

    return ROLE.sub(convert, text)


def convert_tables(text: str) -> str:
    """Makes Markdown's tables of reStructuredText's simple ones, whose first row is the head.

    Example:
        >>> print(convert_tables('''
        ... ==== =====
        ... name value
        ... ==== =====
        ... a    N
        ... ==== =====
        ... '''.strip()))
        | name | value |
        | --- | --- |
        | a | N |
    """
    lines, columns = [], None
    for line in text.splitlines():
        if RULE.match(line):
            if columns is None:
                columns = [part.start() for part in re.finditer('=+', line)]
                rules = 0
            rules += 1
            if rules == 2:
                lines.append(' ' * columns[0] + '| ' + ' | '.join('---' for _ in columns) + ' |')
            if rules == 3:
                columns = None
        elif columns is None:
            lines.append(line)
        else:
            cells = [line[start:end].strip() for start, end in zip(columns, [*columns[1:], None])]
            lines.append(' ' * columns[0] + '| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def convert_literals(text: str) -> str:
    """A paragraph that ends in two colons introduces a block of code, which its indentation makes in Markdown, too.

    Example:
        >>> convert_literals('The layout::')
        'The layout:'
    """
    return re.sub(r'::$', ':', text, flags=re.MULTILINE)


def move_links(text: str, source: str, target: str, moved: Callable[[str], str | None]) -> str:
    """Writes the links of a page so that they hold where the page lies in the site.

    Args:
        text: The page, Markdown.
        source: Its path in the repository.
        target: Its path in the site.
        moved: From a path in the repository to one in the site, None for what is not there.

    Returns:
        The page; addresses, anchors of the page and links to what is not in the site are as they were.

    Example:
        >>> site = {'docs/methods.md': 'methods.md', 'README.md': 'index.md'}
        >>> move_links('[all](docs/methods.md#fgd), [this](#top), [one](gone.md)', 'README.md', 'index.md', site.get)
        '[all](methods.md#fgd), [this](#top), [one](gone.md)'
        >>> move_links('[home](../README.md)', 'docs/methods.md', 'methods.md', site.get)
        '[home](index.md)'
    """

    def move(match: re.Match[str]) -> str:
        link, hash_sign, anchor = match[2].partition('#')
        if not link or re.match(r'[a-z]+:', link):
            return match[0]
        path = moved(posixpath.normpath(posixpath.join(posixpath.dirname(source), link)))
        if path is None:
            return match[0]
        return match[1] + posixpath.relpath(path, posixpath.dirname(target) or '.') + hash_sign + anchor + match[3]

    return LINK.sub(move, text)
