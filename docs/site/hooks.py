"""Hooks of MkDocs: README.md and its like become pages, each room of the package gets a page of its docstrings."""
from __future__ import annotations

import ast
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from markup import LINK, move_links

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / 'kd_det'
PAGES = {'README.md': 'index.md', 'CHANGELOG.md': 'changelog.md', 'CONTRIBUTING.md': 'contributing.md'}
SOURCES = 'source'  # where files of the repository lie that pages link to


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of the reference into the navigation."""
    for entry in config.nav or []:
        if 'Reference' in entry:
            entry['Reference'] = [{room: _reference_page(room)} for room in _rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/, and the files of the repository that pages link to."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding='utf-8')))
    for room, modules in _rooms().items():
        content = '\n\n'.join([f'# kd_det.{room}', *map(_section, modules)])
        files.append(File.generated(config, _reference_page(room), content=content))
    for file in list(files.documentation_pages()):
        source = _source(file.src_uri)
        for _, link, _ in LINK.findall(file.content_string):
            path = (ROOT / source).parent / link.partition('#')[0]
            target = _target(path.resolve().relative_to(ROOT).as_posix()) if path.is_file() else None
            if target is not None and target.startswith(SOURCES) and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(path.resolve())))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lets the links of a page hold in the site."""
    return move_links(markdown, _source(page.file.src_uri), page.file.src_uri, _target)


def _rooms() -> dict[str, list[Path]]:
    """Name of each package and module of the top level -> the files of its public modules."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob('*.py')):
        room = path.relative_to(PACKAGE).with_suffix('').parts[0]
        if not room.startswith('_') and path.name != '__main__.py':
            rooms.setdefault(room, []).append(path)
    return rooms


def _section(path: Path) -> str:
    """The docstrings of a module; those that a package takes from its modules are shown with these."""
    parts = path.relative_to(ROOT).with_suffix('').parts
    if path.name != '__init__.py':
        return f'::: {".".join(parts)}'
    nodes = ast.parse(path.read_text(encoding='utf-8')).body
    own = [node.name for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return f'::: {".".join(parts[:-1])}\n    options:\n      members: {own or "false"}'


def _reference_page(room: str) -> str:
    return f'reference/{room}.md'


def _source(page: str) -> str:
    """Where a page lies in the repository."""
    return next((source for source, target in PAGES.items() if target == page), f'docs/{page}')


def _target(path: str) -> str | None:
    """Where a file of the repository lies in the site."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith('docs/'):
        return path.removeprefix('docs/')
    return f'{SOURCES}/{path}' if (ROOT / path).is_file() else None
