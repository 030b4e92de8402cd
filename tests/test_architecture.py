"""The house as docs/architecture.md draws it: its rooms, which way imports point, how large files are, no renaming."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'kd_det'

# Each room of the top level, from the ground up, and the rooms below that it may import.
ROOMS = {
    'functional': '',
    'taps': '',
    'compat': '',
    'registry': 'compat',
    'heads': 'functional taps',
    'config': 'compat registry heads',
    'context': 'functional heads taps',
    'masks': 'config context functional heads registry',
    'losses': 'config context functional heads masks registry taps',
    'datasets': 'config compat registry',
    'teachers': 'compat config context datasets heads registry taps',
    'distillers': 'compat config context datasets functional heads losses registry taps teachers',
    'checks': 'compat config context datasets distillers heads losses registry taps teachers',
    'training': 'checks compat config context datasets distillers heads registry taps teachers',
    'deploy': 'checks compat config context datasets distillers functional heads registry taps teachers training',
    'study': 'checks compat config context datasets deploy distillers functional heads losses masks registry taps '
             'teachers training',
    'cli': 'checks compat config context datasets deploy distillers functional heads losses masks registry study '
           'teachers training',
}
# The door names its rooms by strings and opens them when asked; of it all may take the version.
DOOR = ('__init__', '__main__')
# What Python runs at its start, without kd_det; later it gives MMDetection's init_detector a plain student's config.
EXCEPTIONS = {('kd_det.compat.startup', 'kd_det.config.files')}
MOST_PACKAGES, MOST_MODULES, MOST_LINES = 13, 4, 450


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix('').parts
    return '.'.join(part for part in parts if part != '__init__')


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob('*.py')) if '.mim' not in path.parts}


def room_of(module: str) -> str:
    return module.split('.')[1] if '.' in module else '__init__'


def imports_of(tree: ast.Module, module: str, is_package: bool) -> Iterator[str]:
    """The modules of kd_det that a module imports anywhere, for more than type hints."""
    for node in without_type_hints(tree):
        if isinstance(node, ast.Import):
            found = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split('.')[:len(module.split('.')) - node.level + is_package] if node.level else []
            source = '.'.join([*package, *([node.module] if node.module else [])])
            names = [f'{source}.{name.name}' for name in node.names]
            found = [name if name in MODULES else source for name in names]
        else:
            continue
        yield from (name for name in found if name.split('.')[0] == 'kd_det')


def without_type_hints(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below this one but those under ``if TYPE_CHECKING``."""
    hints = isinstance(tree, ast.If) and 'TYPE_CHECKING' in ast.unparse(tree.test)
    for node in tree.orelse if hints else ast.iter_child_nodes(tree):
        yield node
        yield from without_type_hints(node)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def test_the_top_level_is_small():
    modules = [path.stem for path in PACKAGE.glob('*.py') if path.stem not in DOOR]
    packages = [path.parent.name for path in PACKAGE.glob('*/__init__.py')]
    assert len(packages) <= MOST_PACKAGES and len(modules) <= MOST_MODULES
    assert sorted([*packages, *modules]) == sorted(ROOMS)


def test_the_order_of_the_rooms_has_no_cycle():
    below = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= below, room
        below.add(room)


@pytest.mark.parametrize('room', ROOMS)
def test_imports_point_one_way(room):
    wrong = []
    for module, path in MODULES.items():
        if room_of(module) == room:
            for imported in imports_of(parse(path), module, path.name == '__init__.py'):
                allowed = {room, '__init__', *ROOMS[room].split()}
                if room_of(imported) not in allowed and (module, imported) not in EXCEPTIONS:
                    wrong.append(f'{module} imports {imported}')
    assert not wrong


def test_the_door_imports_nothing_heavy():
    for name in ('kd_det', 'kd_det.__main__'):
        imported = {room_of(module) for module in imports_of(parse(MODULES[name]), name, name == 'kd_det')}
        assert imported <= ({'compat'} if name == 'kd_det' else {'cli'})


@pytest.mark.parametrize('source, module, expected', [
    ('def f():\n    from kd_det.losses import PKD', 'kd_det.masks.base', ['kd_det.losses']),
    ('from kd_det import taps', 'kd_det.masks.base', ['kd_det.taps']),
    ('from .checkpoint import load_checkpoint', 'kd_det.compat.operators', ['kd_det.compat.checkpoint']),
    ('from ..taps import Taps', 'kd_det.heads.dense', ['kd_det.taps']),
    ('if TYPE_CHECKING:\n    from kd_det.losses import PKD\nelse:\n    import kd_det.taps', 'kd_det.heads.roi',
     ['kd_det.taps']),
])
def test_every_kind_of_import_is_found(source, module, expected):
    assert list(imports_of(ast.parse(source), module, False)) == expected


def test_no_file_is_too_long():
    files = [*MODULES.values(), *(PACKAGE.parent / 'benchmarks').glob('*.py')]
    lengths = {path: len(path.read_text(encoding='utf-8').splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES}


def renamed(function: ast.FunctionDef) -> str | None:
    """What a function is but another name of: it calls that with its own arguments, as they are, and nothing else."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if len(body) != 1 or not isinstance(body[0], ast.Return) or not isinstance(body[0].value, ast.Call):
        return None
    call, arguments = body[0].value, function.args
    if arguments.defaults or any(arguments.kw_defaults) or function.decorator_list:
        return None
    own = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    own += [f'*{arguments.vararg.arg}'] if arguments.vararg else []
    own += [f'{argument.arg}={argument.arg}' for argument in arguments.kwonlyargs]
    own += [f'**{arguments.kwarg.arg}'] if arguments.kwarg else []
    passed = [ast.unparse(argument) for argument in call.args]
    passed += [f'{keyword.arg}={ast.unparse(keyword.value)}' if keyword.arg else f'**{ast.unparse(keyword.value)}'
               for keyword in call.keywords]
    is_name = isinstance(call.func, (ast.Name, ast.Attribute))
    return ast.unparse(call.func) if is_name and own and passed == own else None


@pytest.mark.parametrize('source, expected', [
    ('def f(a, *b, **c):\n    """Doc."""\n    return g.h(a, *b, **c)', 'g.h'),
    ('def f(a, b):\n    return g(b, a)', None),
    ('def f(a, b=1):\n    return g(a, b)', None),
    ('def f():\n    return g()', None),
])
def test_renaming_is_recognised(source, expected):
    assert renamed(ast.parse(source).body[0]) == expected


def test_no_function_only_renames_another():
    found = []
    for module, path in MODULES.items():
        scopes = [node for node in ast.walk(parse(path)) if isinstance(node, (ast.Module, ast.ClassDef))]
        functions = [node for scope in scopes for node in scope.body if isinstance(node, ast.FunctionDef)]
        found += [f'{module}.{function.name} is {renamed(function)}' for function in functions if renamed(function)]
    assert not found
