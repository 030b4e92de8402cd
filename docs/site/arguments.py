"""Makes docs/arguments.md, the reference of all arguments of a config, from their declared types and their docstrings.

Run it when an argument has changed; a test compares the page with what it makes::

    python docs/site/arguments.py
"""
from __future__ import annotations

import inspect
import re
from argparse import Action, ArgumentParser
from collections.abc import Callable, Iterable
from pathlib import Path

from mmdet.registry import MODELS, TASK_UTILS
from mmengine.registry import Registry

from kd_det.checks.arguments import RANGES
from kd_det.cli.main import make_parser
from kd_det.config.arguments import declared_arguments, describe_type
from kd_det.config.detectors import read_model_config
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.inheritance import Inheritance
from kd_det.distillers.policies import Policy
from kd_det.distillers.rounding import Quantization
from kd_det.distillers.schedules import Ramp, Schedule
from kd_det.distillers.supervision import PseudoLabels
from kd_det.losses import DenseTerm, DistillTerm, FeatureTerm, QueryTerm, RoITerm
from kd_det.losses.batch_relations import BatchRelation
from kd_det.masks import Mask
from kd_det.masks.boxes import PyramidMask
from kd_det.study.fidelity import FidelityMetric
from kd_det.teachers.cache import TeacherCache
from kd_det.teachers.engine import Engine
from kd_det.teachers.guide import Guide
from kd_det.teachers.loading import load_strictly
from kd_det.teachers.teacher import NOT_OF_CONFIGS, Teacher
from kd_det.training.finiteness import FiniteHook
from kd_det.training.hooks import DistillHook, Preflight
from kd_det.training.labels import NoisyLabels, WithoutClasses
from kd_det.training.probe import HeldOut, ProbeSettings
from kd_det.training.replay import ReplayedRandomness

PAGE = Path(__file__).parents[1] / 'arguments.md'
INTRODUCTION = """# Arguments

What the config of a distillation can say, and what each value may be. The types are those that the code declares, by
which it refuses what does not fit before anything trains, and in `kd-det doctor` too:

```
model.distill.fgd.temperature: expected a number above 0, got -1.0.
```

No number is `nan` or infinite, and `True` is none. What has no default has to be given. `python docs/site/arguments.py`
makes this page.
"""
OF_MMENGINE = """## What MMEngine reads

Of MMEngine's and MMDetection's parts types and keys are looked up, and these values.
"""
PARTS = {'loop': '`train_cfg`', 'loader': '`train_dataloader` and the others', 'optimizer': '`optim_wrapper.optimizer`',
         'wrapper': '`optim_wrapper`', 'scheduler': '`param_scheduler`', 'hook': 'a hook'}
COMMANDS_INTRODUCTION = """## Commands

`kd-det COMMAND --help` shows the same. `KEY=VALUE` are keys of the config, and what they take stands above.
"""
OF_TYPES = {'path': 'a path', '_folder': 'a path', '_image_count': 'all, none, or an integer of at least 1',
            '_seeds': 'an integer of at least 1, or a list of different integers from 0 to 4294967295',
            '_pickle_file': 'a path that ends in .pkl', '_setting': 'a dotted key and values', '_values': 'a list'}
ROLE = re.compile(r':(?:class|func|meth|attr|data|mod):`~?(?:[\w.]+\.)?(\w+)`')
SEE = re.compile(r'^See :(?:class|func):`~?(?:[\w.]+\.)?(\w+)`')
BASES = (FeatureTerm, BatchRelation, DenseTerm, RoITerm, QueryTerm, PyramidMask, Ramp)  # each with a table of its own
KNOWN: dict[str, type | Callable] = {each.__name__: each for each in (
    DistillTerm, *BASES, *MODELS.module_dict.values(), Engine, load_strictly, read_model_config)}


def make_page() -> str:
    """The whole page, as Markdown."""
    terms, masks = _registered(MODELS, DistillTerm), _registered(MODELS, Mask)
    sections = {
        'The distiller': ("`model = dict(type='DetectionDistiller', …)`", [DetectionDistiller]),
        'A teacher': ('`model.teacher`, or each of a list of them, and its `cache`', [Teacher, TeacherCache]),
        'Starting from a teacher of another size': ('`model.inherit_by`, or the rule alone', [Inheritance]),
        'Other guides': ('`model.teacher`, or each of a list of them, with a `type`', _registered(MODELS, Guide)),
        'Pseudo-labels': ('`model.pseudo_labels`', [PseudoLabels]),
        'Quantisation': ('`model.quantize`', [Quantization]),
        'Policies': ('`model.policy`', _registered(TASK_UTILS, Policy)),
        'Hooks': ('`default_hooks.distill` with its `preflight` and `probe`, and `custom_hooks`',
                  [DistillHook, Preflight, ProbeSettings, FiniteHook]),
        'In data and evaluation': ('Transforms of the training pipeline, a wrapper of the training data, and a metric '
                                   'of `val_evaluator`',
                                   [ReplayedRandomness, NoisyLabels, WithoutClasses, HeldOut, FidelityMetric]),
        'Weights that change': ('`weight` of a term, beside its own arguments: a number of at least 0, by default 1.0, '
                                'or one of these', [Ramp, *_registered(TASK_UTILS, Schedule)]),
        'Terms': ('`model.distill.<name>`', [*(base for base in BASES if issubclass(base, DistillTerm)), *terms]),
        'Masks': ('`mask` of a term, or of another mask: a dict, or the name alone of one that needs no arguments',
                  [PyramidMask, *masks]),
    }
    return '\n'.join([INTRODUCTION, *(f'## {title}\n\n{place}.\n\n' + '\n'.join(map(_describe_class, classes))
                                     for title, (place, classes) in sections.items()),
                      OF_MMENGINE, *_describe_ranges(), COMMANDS_INTRODUCTION,
                      *map(_describe_command, _list_parsers().items())])


def _describe_ranges() -> list[str]:
    """The rows of the values of MMEngine's parts that have a range."""
    return ['| of | key | expected |', '| --- | --- | --- |',
            *(f'| {PARTS[part]} | `{key}` | {describe_type(annotation)} |'
              for part, ranges in RANGES.items() for key, annotation in ranges.items()), '']


def _list_parsers() -> dict[str, ArgumentParser]:
    return next(action.choices for action in make_parser()._actions if action.dest == 'command' or action.choices
                and isinstance(action.choices, dict))


def _describe_command(command: tuple[str, ArgumentParser]) -> str:
    """A heading, and a table of the arguments of a command."""
    name, parser = command
    rows = [(' '.join(f'`{option}`' for option in action.option_strings) or f'`{action.metavar or action.dest}`',
             _describe_option(action), action.help.replace('%%', '%'))
            for action in parser._actions if action.dest != 'help']
    lines = [f'### kd-det {name}', '', '| option | expected | |', '| --- | --- | --- |']
    return '\n'.join([*lines, *map(_make_row, rows), ''])


def _make_row(cells: Iterable[str]) -> str:
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def _describe_option(action: Action) -> str:
    if action.nargs == 0:
        return 'nothing'
    one = f"one of {', '.join(map(str, action.choices))}" if action.choices else getattr(
        action.type, 'expected', OF_TYPES.get(getattr(action.type, '__name__', ''), 'a text'))
    several = {'+': 'one or more, each ', '*': 'none or more, each '}.get(action.nargs, '')
    if isinstance(action.nargs, int):
        several = f'{action.nargs}, each '
    return f"{several}{one}{' or nothing' if action.nargs == '?' and action.option_strings else ''}"


def _registered(registry: Registry, base: type) -> list[type]:
    return sorted((each for each in registry.module_dict.values()
                   if issubclass(each, base) and each.__module__.startswith('kd_det.')), key=lambda each: each.__name__)


def _describe_class(described: type) -> str:
    """A heading, the first sentence of its docstring, and a table of its own arguments."""
    arguments = {name: each for name, each in declared_arguments(described).items() if name not in NOT_OF_CONFIGS}
    base = next((base for base in described.__mro__[1:] if base in BASES), None)
    definer = next(each for each in described.__mro__ if '__init__' in vars(each))
    own = [] if definer is base else [name for name in inspect.signature(definer).parameters if name in arguments]
    lines = [f'### {described.__name__}', '', _to_markdown(inspect.getdoc(described).partition('\n\n')[0]), '']
    if own:
        lines += ['| argument | expected | default | |', '| --- | --- | --- | --- |']
    for name in own:
        default = arguments[name].default
        cells = (f'`{name}`', describe_type(arguments[name].annotation),
                 '' if default is inspect.Parameter.empty else f'`{default!r}`', _find_meaning(described, name))
        lines.append(_make_row(cells))
    inherited = [f'`{name}`' for name in arguments if name not in own]
    if inherited:
        link = f'[{base.__name__}](#{base.__name__.lower()})'
        lines += [*([''] if own else []), f"{'Also' if own else 'Takes'} {', '.join(inherited)} of {link}."]
    return '\n'.join([*lines, ''])


def _find_meaning(described: type | Callable, name: str) -> str:
    """What an argument means: its entry in the docstring, or in the one that this refers to."""
    for each in getattr(described, '__mro__', (described, )):
        text = _read_entries(each.__doc__ or '').get(name, '')
        reference = SEE.match(text)
        if reference and reference[1] in KNOWN:
            meaning = _find_meaning(KNOWN[reference[1]], name)
            return meaning.removesuffix('.') + _to_markdown(text[reference.end():])
        if text == 'See above.':
            return f'`help({described.__module__}.{described.__name__})` tells them.'
        if text:
            return _to_markdown(text)
    raise LookupError(f'The docstring of {described.__name__} does not tell what {name} is.')


def _read_entries(docstring: str) -> dict[str, str]:
    """Entries of the section of arguments of a docstring, each in one line, by name."""
    entries: dict[str, str] = {}
    _, _, section = inspect.cleandoc(docstring).partition('\nArgs:\n')
    for line in section.partition('\n\n')[0].splitlines():
        entry = re.match(r'    ([\w*, ]+): (.*)', line)
        if entry:
            names = entry[1].split(', ')
            entries |= dict.fromkeys(names, entry[2])
        else:
            entries |= {name: f'{entries[name]} {line.strip()}' for name in names}
    return entries


def _to_markdown(text: str) -> str:
    return ROLE.sub(r'`\1`', ' '.join(text.split())).replace('``', '`')


if __name__ == '__main__':
    PAGE.write_text(make_page(), encoding='utf-8')
