"""Declared types of arguments: what is said of them, and that values which do not fit are refused by their place."""
import pickle
import runpy
from collections.abc import Sequence
from contextlib import nullcontext
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from annotated_types import Ge, Gt, Le, Len, MinLen, Predicate
from mmengine.config import ConfigDict
from torch import nn

import kd_det
from kd_det.cli.common import Number
from kd_det.cli.main import make_parser
from kd_det.config import ConfigurationError
from kd_det.config.arguments import (
    ArgumentError,
    Count,
    EitherSide,
    Index,
    Names,
    Positive,
    Seeds,
    Share,
    Sides,
    Weight,
    at,
    check_arguments,
    check_keys,
    check_value,
    declared,
    declared_arguments,
    describe_type,
    is_distinct,
    join_place,
    refuse,
    split_sides,
    suggest_names,
)
from kd_det.study.demo import DemoSettings

FORMS = Literal['giou', 'bounded']


@pytest.mark.parametrize(('kind', 'words'), [
    (Positive, 'a number above 0'),
    (Weight, 'a number of at least 0'),
    (Share, 'a number from 0 to 1'),
    (Annotated[float, Gt(0), Le(2.5)], 'a number above 0 and of at most 2.5'),
    (Annotated[float, Ge(0), Le(0)] | Annotated[float, Ge(1)], '0 or a number of at least 1'),
    (Count | None, 'an integer of at least 1 or None'),
    (FORMS, 'one of giou, bounded'),
    (Literal['auto'], 'auto'),
    (Literal['mean', 'same'] | Index, 'mean, same, or an integer of at least 0'),
    (EitherSide, 'a text that is not empty or dict(student=…, teacher=…)'),
    (Names, 'a list, no two the same, each a text that is not empty'),
    (Annotated[Sequence[Weight], Len(3, 3)], 'a list of 3, each a number of at least 0'),
    (Annotated[Sequence[int], MinLen(1), 'a list of indices'] | None, 'a list of indices or None'),
    (dict[str, Any] | bool, 'a dict or True or False'),
    (nn.Module, 'a Module'),
    (Any, 'anything'),
])
def test_a_type_is_told_in_words(kind, words):
    assert describe_type(kind) == words


@pytest.mark.parametrize(('value', 'kind', 'problem'), [
    (0, Positive, 'a number above 0, got 0.'),
    (float('nan'), Positive, 'a number above 0, got nan.'),
    (float('inf'), float, 'a number, got inf.'),
    ('0.5', float, "a number, got '0.5'."),
    (None, float, 'a number, got None.'),
    (True, float, 'a number, got True.'),
    (1.5, Share, 'a number from 0 to 1, got 1.5.'),
    (1.0, int, 'an integer, got 1.0.'),
    (0, Count, 'an integer of at least 1, got 0.'),
    (np.int64(-1), Index, 'an integer of at least 0, got np.int64(-1).'),
    ('False', bool, "True or False, got 'False'."),
    (1, bool, 'True or False, got 1.'),
    ('bound', FORMS, "one of giou, bounded, got 'bound'. Nearest: bounded."),
    (None, FORMS, 'one of giou, bounded, got None.'),
    (['giou'], FORMS, "one of giou, bounded, got ['giou']."),
    (torch.zeros(2), FORMS, 'one of giou, bounded, got tensor([0., 0.]).'),
    ('neck', Names, "a list, no two the same, each a text that is not empty, got 'neck'."),
    (['neck', 'neck'], Names, "a list, no two the same, each a text that is not empty, got ['neck', 'neck']."),
    (dict(a=1), Sequence[int], "a list, each an integer, got {'a': 1}."),
])
def test_a_value_that_does_not_fit_is_told_with_what_would(value, kind, problem):
    with pytest.raises(ArgumentError) as error:
        check_value('model.size', value, kind)
    assert str(error.value) == f'model.size: expected {problem}'
    assert (error.value.place, error.value.problem) == ('model.size', f'expected {problem}')


WEIGHTS = Sequence[Weight]


@pytest.mark.parametrize('kind', [WEIGHTS, WEIGHTS | None, Annotated[WEIGHTS, MinLen(1)] | None])
def test_of_a_list_the_item_is_told(kind):
    with pytest.raises(ArgumentError, match=r'^weights\[1\]: expected a number of at least 0, got -2\.$'):
        check_value('weights', [1, -2], kind)
    with pytest.raises(ArgumentError, match=r'^weights: expected a list'):
        check_value('weights', 1, kind)


@pytest.mark.parametrize(('value', 'kind'), [
    (0, Share), (1, Share), (1e-9, Positive), (1, Count), (np.float32(0.5), Share), (np.int64(3), Count),
    (np.bool_(True), bool), (range(3), Sequence[int]), ((0, 1), Seeds),
    ([np.int64(1)], Sequence[int]), ('giou', FORMS), (None, Count | None),
    (ConfigDict(student='a', teacher='b'), EitherSide), ('neck', EitherSide), (object(), Any), ([], Names)])
def test_what_fits_passes(value, kind):
    check_value('size', value, kind)


@pytest.mark.parametrize('value', [3, '', None, dict(student='neck'), dict(student='neck', teacher=1), dict(
    student='neck', teacher='neck', other='neck'), dict(student='neck', teacher='')])
def test_names_of_both_sides(value):
    assert split_sides('neck') == ('neck', 'neck')
    assert split_sides(Sides(teacher='backbone', student='neck')) == ('neck', 'backbone')
    with pytest.raises(ArgumentError, match=r'^tap: expected a text that .* or dict\(student=…, teacher=…\), got'):
        check_value('tap', value, EitherSide)


class Base:
    def __init__(self, teacher: Index = 0) -> None:
        self.teacher = teacher


class Derived(Base):
    @declared
    def __init__(self, size: Positive, form: FORMS = 'giou', *, later: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size, self.form, self.later = size, form, later


class Open:
    def __init__(self, interval: Count = 1, **options: Any) -> None:
        ...


def test_arguments_are_those_of_the_bases_too():
    assert {name: each.annotation for name, each in declared_arguments(Derived).items()} == dict(
        size=Positive, form=FORMS, later=bool | None, teacher=Index)
    assert not declared_arguments(Derived).is_open and declared_arguments(Open).is_open
    assert declared_arguments(Derived)['teacher'].default == 0


def test_a_declared_function_refuses_what_does_not_fit():
    assert vars(Derived(2, 'bounded', later=True, teacher=1)) == dict(size=2, form='bounded', later=True, teacher=1)
    with pytest.raises(ArgumentError, match=r'^size: expected a number above 0, got 0\.$'):
        Derived(0)
    with pytest.raises(ArgumentError, match=r'^later: expected True or False or None, got 1\.$'):
        Derived(1, later=1)
    with pytest.raises(ArgumentError, match=r'^size: expected a number above 0, got nothing\.$'):
        Derived(form='giou')
    with pytest.raises(TypeError, match='tacher'):
        Derived(1, tacher=1)
    assert type(Derived(np.float64(2)).size) is float and Derived.__init__.is_declared

    @declared
    class Table:
        def __init__(self, sizes: Sequence[Positive] = None, *rest: int) -> None:  # a default is taken as it is
            self.sizes, self.rest = sizes, rest

    assert Table().sizes is None and Table([1.0], 'x').rest == ('x', )
    with pytest.raises(ArgumentError, match=r'^sizes\[0\]: expected'):
        Table([-1.0])


def test_keys_that_are_not_there_are_refused_with_the_nearest():
    check_keys(Derived, ['size', 'teacher', 'type'], besides=['type'])
    check_keys(Open, ['anything'])
    with pytest.raises(ArgumentError, match=r'^taecher: there is no such key\. Nearest: teacher\.$'):
        check_keys(Derived, ['taecher'])
    with pytest.raises(ArgumentError, match=r'^xyz: there .*\. Expected one of form, later, size, teacher\.$'):
        check_keys(Derived, ['xyz'])
    with pytest.raises(ArgumentError, match=r'^later: there is no such key\.'):
        check_keys(Derived, ['later'], internal=['later'])
    with pytest.raises(ArgumentError, match=r'^intervall: there is no such key\. Nearest: interval\.$'):
        check_keys(Open, ['intervall'])
    with pytest.raises(ArgumentError, match=r'^size: there is no such key\. It takes none\.$'):
        check_keys(lambda: None, ['size'])


def test_arguments_are_checked_without_a_call():
    check_arguments(Derived, dict(size=1, type='Derived'), besides=['type'])
    check_arguments(Derived, {}, internal=['size'])
    for given, message in ((dict(size=-1), '^size: expected a number above 0, got -1'),
                           (dict(size=1, teacher=-1), '^teacher: expected an integer of at least 0, got -1'),
                           ({}, '^size: expected a number above 0, got nothing'),
                           (dict(siz=1), '^siz: .* Nearest: size')):
        with pytest.raises(ArgumentError, match=message):
            check_arguments(Derived, given)


def test_the_place_grows_from_within():
    with pytest.raises(ArgumentError) as error:
        with at('model'), at('distill.hint'), at('masks[1]'):
            Derived(-1)
    assert error.value.place == 'model.distill.hint.masks[1].size'
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value) and again.place == error.value.place and isinstance(again, ConfigurationError)
    with pytest.raises(ArgumentError, match=r'^model: expected a detector, got 3\. Give one\.$'):
        with at('model'):
            refuse('', 3, 'a detector', 'Give one.')
    assert join_place('model', '') == 'model' and join_place('levels', '[0][1]') == 'levels[0][1]'


def test_names_are_suggested_by_likeness():
    assert suggest_names('cosin', ('mse', 'cosine')) == 'Nearest: cosine.'
    assert suggest_names('xyz', ('mse', 'cosine')) == suggest_names(3, ('mse', )) == ''
    assert is_distinct([1, 2]) and not is_distinct([1, 1])
    assert describe_type(Annotated[Sequence[int], Predicate(is_distinct)]) == 'a list, no two the same, each an integer'


def test_the_documented_arguments_are_those_that_are_declared():
    script = Path(__file__).parents[2] / 'docs' / 'site' / 'arguments.py'
    page = runpy.run_path(str(script))
    assert page['PAGE'].read_text(encoding='utf-8') == page['make_page'](), 'Run `python docs/site/arguments.py`.'


@pytest.mark.parametrize(('command', 'function'), [
    ('train', kd_det.train), ('distill', kd_det.distill), ('test', kd_det.evaluate), ('benchmark', kd_det.benchmark),
    ('sweep', kd_det.benchmark), ('benchmark-step', kd_det.measure_step_costs), ('report', kd_det.report),
    ('demo', DemoSettings)])
def test_numbers_on_a_command_line_have_the_range_of_the_argument_that_gets_them(command, function):
    parsers = next(action.choices for action in make_parser()._actions if action.dest not in ('help', 'version')
                   and isinstance(action.choices, dict))
    numbers = {action.dest: action.type for action in parsers[command]._actions
               if isinstance(action.type, Number) and action.dest != 'local_rank'}
    assert numbers
    arguments = declared_arguments(function)
    for name, number in numbers.items():
        beyond = [number.least - 1, *([number.most + 1] if number.most < inf else [])]
        for value, fits in ((number.kind(number.least), True), *((number.kind(each), False) for each in beyond)):
            value = [value, value] if name == 'size' and command != 'demo' else value  # height and width
            with nullcontext() if fits else pytest.raises(ArgumentError):
                check_value(name, value, arguments[name].annotation)
