"""docs/api.md says what is public: no name too few, none too many, and each with the arguments that it has."""
import ast
import dataclasses
import inspect
import re
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import mmdet.registry
import mmengine.registry
import pytest
from mmengine.registry import Registry

import kd_det
from kd_det.cli.main import COMMANDS

PAGE = (Path(__file__).parents[1] / 'docs' / 'api.md').read_text(encoding='utf-8')
WORDS = set(re.findall(r'\w+', PAGE))
MOST_NAMES = 64  # beside the registered types
CONTEXT = {'DistillContext', 'ComparedLevel'}  # public too, of a module that has no list
FUNCTIONS = [name for name in kd_det.__all__ if inspect.isfunction(getattr(kd_det, name))]
RESULTS = [name for name in kd_det.__all__ if dataclasses.is_dataclass(getattr(kd_det, name))]


def registered_types() -> dict[str, type]:
    """The types of kd_det that configs name."""
    registries = {value for module in (mmdet.registry, mmengine.registry) for value in vars(module).values()
                  if isinstance(value, Registry)}
    return {name: value for registry in registries for name, value in registry.module_dict.items()
            if getattr(value, '__module__', '').startswith('kd_det.')}


def public_names() -> set[str]:
    """What all packages list as theirs, without the registered types."""
    packages = [import_module(each.name) for each in walk_packages(kd_det.__path__, 'kd_det.') if each.ispkg]
    types = set(registered_types().values())
    return {name for package in (kd_det, *packages) for name in getattr(package, '__all__', ())
            if getattr(package, name) not in types}


def signature(function, name: str) -> str:
    """``name(argument, *, option=default)``."""
    parameters = [each.replace(annotation=inspect.Parameter.empty)
                  for each in inspect.signature(function).parameters.values()]
    return f'{name}{inspect.Signature(parameters)}'.replace('<built-in function print>', 'print')


def sections() -> dict[str, str]:
    """Heading -> text, of the page's parts."""
    title, *parts = re.split(r'^## (.*)\n', PAGE, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2]))


def blocks(text: str) -> list[str]:
    """The code of a text."""
    return re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL)


def test_every_public_name_is_on_the_page():
    names = public_names() | CONTEXT
    assert names <= WORDS, names - WORDS
    assert len(names) <= MOST_NAMES, sorted(names)
    assert all(hasattr(import_module('kd_det.context'), name) for name in CONTEXT)


def test_each_package_lists_names_that_it_has_once():
    for package in (kd_det, *(import_module(f'kd_det.{each}') for each in
                              ('heads', 'teachers', 'distillers', 'losses', 'masks', 'training', 'study.report'))):
        assert len(set(package.__all__)) == len(package.__all__) > 0
        assert all(hasattr(package, name) for name in package.__all__), package


def test_distill_has_the_arguments_that_were_promised():
    promised = ("(student, teacher=None, checkpoint=(), method='fgd', *, data_root=None, work_dir=None, epochs=None, "
                "inherit='auto', balance=None, seed=None, amp=False, resume=False, launcher='none', options=None")
    assert signature(kd_det.distill, '').startswith(f'{promised}, ')
    parameters = list(inspect.signature(kd_det.distill).parameters.values())
    assert [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD] == [
        'student', 'teacher', 'checkpoint', 'method']
    assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in parameters[4:])
    assert inspect.signature(kd_det.distill).return_annotation == 'RunResult'


@pytest.mark.parametrize('name', FUNCTIONS)
def test_the_arguments_of_each_function_are_those_of_the_page(name):
    text = ' '.join(re.sub(r'\(\s+', '(', PAGE).split())
    assert f'{signature(getattr(kd_det, name), f"kd_det.{name}")} ' in text
    examples = [block for block in blocks(sections()['Functions']) if ', *' not in block and '=None)' not in block]
    calls = [node for block in examples for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == f'kd_det.{name}']
    assert calls
    for call in calls:  # the function takes it
        inspect.signature(getattr(kd_det, name)).bind(*call.args, **{each.arg: None for each in call.keywords})


@pytest.mark.parametrize('name', RESULTS)
def test_the_fields_of_each_result_are_on_the_page(name):
    kind = getattr(kd_det, name)
    row, = re.findall(rf'^\| `{name}` \|.*$', PAGE, re.MULTILINE)
    fields = {each.name for each in dataclasses.fields(kind)}
    fields |= {key for key, value in vars(kind).items() if isinstance(value, property)}
    assert fields <= set(re.findall(r'`(\w+)`', row)), name
    assert callable(kind.to_dict) and callable(kind._repr_html_)


def test_types_have_the_arguments_that_stand_on_the_page():
    types = dict(registered_types(), **vars(kd_det.losses))
    told = [node for block in blocks(sections()['Registered types']) for node in ast.parse(block).body]
    assert len(told) > 40
    for node in told:
        name = node.value.func.id
        assert ast.unparse(node) == ast.unparse(ast.parse(signature(types[name], name))), name


def test_every_command_is_on_the_page():
    assert set(COMMANDS) <= set(re.findall(r'`([\w-]+)`', sections()['Commands']))
