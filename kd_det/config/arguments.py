"""The declared types of arguments, with their ranges; what does not fit is refused by its place, and told what would.

An argument's type stands where the argument does, and says all that can be known of a value by itself::

    @declared
    def __init__(self, temperature: Positive = 1.0, pad_aware: bool = True, **kwargs: Any) -> None:

What is given is checked when the function is called (:func:`declared`), and, without calling it, when a config is read
(:func:`check_arguments`). Types are Python's, ranges those of ``annotated_types``, and pydantic compares: strictly, so
that True is no number and '1' neither. The same types make the reference of the documentation, and the random trials of
the tests.

Nothing else of this package is imported here, and pydantic when the first value is checked: every part can use it.
"""
from __future__ import annotations

import builtins
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, wraps
from inspect import Parameter, signature, unwrap
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from annotated_types import Ge, Gt, Le, Len, Lt, MinLen, Predicate
from typing_extensions import TypedDict, is_typeddict

from kd_det.config import ConfigurationError, suggest_names

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MISSPELT = 0.85  # how alike two names are, 0 to 1, of which one is meant to be the other
F = TypeVar('F', bound=Callable[..., Any])


def is_distinct(values: Sequence[Any]) -> bool:
    """no two the same"""  # noqa: D403, D415 (the end of a sentence, see describe_type)
    return len(set(values)) == len(values)


# Ranges that many arguments have; those of one stand where it does.
Positive = Annotated[float, Gt(0)]
Weight = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Index = Annotated[int, Ge(0)]
Count = Annotated[int, Ge(1)]
Size = Annotated[Sequence[Count], Len(2, 2)]  # height and width
Seed = Annotated[int, Ge(0), Lt(2**32)]
Seeds = Annotated[Sequence[Seed], MinLen(1), Predicate(is_distinct)]
Lengths = Annotated[Sequence[Count], MinLen(1), Predicate(is_distinct)]  # numbers of epochs
Name = Annotated[str, MinLen(1)]
Names = Annotated[Sequence[Name], Predicate(is_distinct)]
Bits = Annotated[int, Ge(2), Le(8)]


class Sides(TypedDict):
    """The names of the same thing in both detectors, where they differ."""
    __pydantic_config__ = dict(extra='forbid', strict=True)  # noqa: RUF012 (no other key)
    student: Name
    teacher: Name


EitherSide = Name | Sides  # one name for both, or one for each
Place = Annotated[str | Path, 'the path of a file or folder']
Ratio = Weight | Literal['paper']  # of a method's gradient to the task's, or the published weights
Parts = Name | Sequence[Name]  # of a student, that start from the teacher's weights


def split_sides(names: EitherSide) -> tuple[str, str]:
    """The student's and the teacher's name of what has one for both, or a dict with one for each.

    Example:
        >>> split_sides('bbox_head'), split_sides(dict(student='bbox_head', teacher='rpn_head'))
        (('bbox_head', 'bbox_head'), ('bbox_head', 'rpn_head'))
    """
    return (names, names) if isinstance(names, str) else (names['student'], names['teacher'])


class ArgumentError(ConfigurationError):
    """An argument does not fit.

    Attributes:
        place: Where it stands: a name, or dotted path, of a config.
        problem: What is wrong with it, a sentence or two.
    """

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f'{place}: {problem}' if place else problem)
        self.place, self.problem = place, problem

    def __reduce__(self) -> tuple[type[ArgumentError], tuple[str, str]]:
        return type(self), (self.place, self.problem)

    def within(self, place: str) -> ArgumentError:
        """The same, seen from farther out."""
        return ArgumentError(join_place(place, self.place), self.problem)


def join_place(outer: str, inner: str) -> str:
    """The place of something within a place.

    Example:
        >>> join_place('model', 'teacher'), join_place('levels', '[0]'), join_place('', 'model')
        ('model.teacher', 'levels[0]', 'model')
    """
    return f'{outer}{inner}' if not outer or not inner or inner.startswith('[') else f'{outer}.{inner}'


@contextmanager
def at(place: str) -> Iterator[None]:
    """Puts a place before that of an argument which is refused within the block.

    Example:
        >>> with at('model.distill.fgd'):
        ...     refuse('temperature', -1, 'a number above 0')
        Traceback (most recent call last):
        kd_det.config.arguments.ArgumentError: model.distill.fgd.temperature: expected a number above 0, got -1.
    """
    try:
        yield
    except ArgumentError as error:
        raise error.within(place) from error.__cause__


def refuse(place: str, value: object, expected: str, advice: str = '') -> NoReturn:
    """Raises the error of an argument that does not fit.

    Args:
        place: Of the argument.
        value: What was given.
        expected: What would fit, the end of a sentence that begins with 'expected'.
        advice: A sentence more.

    Raises:
        ArgumentError: Always.
    """
    raise ArgumentError(place, f'expected {expected}, got {value!r:.80}.{advice and f" {advice}"}')


# --------------------------------------------------------------------------------------------------- what is declared


class Argument(NamedTuple):
    """One argument of a function or a class, as its signature declares it.

    Attributes:
        annotation: Its type; Any where none is declared.
        default: What it is where it is not given; Parameter.empty where it must be.
    """
    annotation: Any
    default: Any


class Arguments(dict[str, Argument]):
    """Arguments by name.

    Attributes:
        is_open: Whether others are taken too: of a function that takes any keywords, or has no signature to be read.
    """
    is_open = False


@cache
def declared_arguments(function: Callable[..., Any]) -> Arguments:
    """The arguments that a function or class can be given in a config.

    Those of a class are also those of its bases, as far as it passes on what it does not know.

    Example:
        >>> def cook(minutes: Positive, salt: bool = True): ...
        >>> list(declared_arguments(cook))
        ['minutes', 'salt']
    """
    constructors = ([vars(base)['__init__'] for base in function.__mro__[:-1] if '__init__' in vars(base)]
                    if isinstance(function, type) else [function])
    found = Arguments()
    for constructor in constructors:
        try:
            parameters = list(signature(constructor).parameters.values())[isinstance(function, type):]
        except (TypeError, ValueError):
            break
        types_by_name = _read_types(constructor)
        passes_on = False
        for parameter in parameters:
            if parameter.kind is Parameter.VAR_KEYWORD:
                passes_on = True
            elif parameter.kind is Parameter.VAR_POSITIONAL:
                passes_on = passes_on or constructor is not constructors[-1]
            elif parameter.kind is not Parameter.POSITIONAL_ONLY:
                found.setdefault(parameter.name,
                                 Argument(types_by_name.get(parameter.name, Any), parameter.default))
        if not passes_on:
            return found
    found.is_open = bool(constructors)
    return found


def _read_types(function: Callable[..., Any]) -> dict[str, Any]:
    """The declared types of a function's arguments; none of code whose own names can not be resolved."""
    try:
        return get_type_hints(function, localns=_Known(function), include_extras=True)
    except (TypeError, AttributeError, SyntaxError):
        return {}


class _Known(dict[str, Any]):
    """The names that a function's types are written in; Any for one that is imported for type checkers alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__({**vars(builtins), **getattr(unwrap(function), '__globals__', {})})

    def __missing__(self, name: str) -> Any:
        return Any


def declared(function: F) -> F:
    """Has a function, or a dataclass, refuse what the types of its signature do not allow. A default is taken as it is.

    Example:
        >>> @declared
        ... def cook(minutes: Positive, salt: bool = True): ...
        >>> cook(-1.0)
        Traceback (most recent call last):
        kd_det.config.arguments.ArgumentError: minutes: expected a number above 0, got -1.0.
    """
    if isinstance(function, type):
        function.__init__ = declared(function.__init__)
        return function
    parameters = signature(function)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind_partial(*args, **kwargs)
        annotations = _cached_types(function)
        for name, annotation in annotations.items():
            default = parameters.parameters[name].default
            if name not in given.arguments and default is Parameter.empty:
                raise ArgumentError(name, f'expected {describe_type(annotation)}, got nothing.')
            if given.arguments.get(name, default) is not default:
                check_value(name, given.arguments[name], annotation)
                given.arguments[name] = _to_plain(given.arguments[name])
        return function(*given.args, **given.kwargs)

    checked.is_declared = True  # type: ignore[attr-defined]
    return cast(F, checked)


@cache
def _cached_types(function: Callable[..., Any]) -> dict[str, Any]:
    kinds = {name: parameter.kind for name, parameter in signature(function).parameters.items()}
    return {name: annotation for name, annotation in _read_types(function).items()
            if kinds.get(name) not in (None, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)}


# ------------------------------------------------------------------------------------------------------ what is given


def check_keys(function: Callable[..., Any], given: Iterable[str], besides: Iterable[str] = (),
               internal: Iterable[str] = (), exactly: bool = True) -> None:
    """Refuses names that a function or class has no argument of; where it takes any, those that seem misspelt.

    Args:
        function: What is called.
        given: The names.
        besides: Names that are someone else's.
        internal: Names of arguments that a config does not give.
        exactly: False where others may take a name from the dict before: only what seems misspelt is refused then.

    Raises:
        ArgumentError: There is no such argument.
    """
    arguments = declared_arguments(function)
    known = {*arguments, *besides}.difference(internal)
    for name in given:
        vague = arguments.is_open or not exactly
        if name in known or vague and not get_close_matches(name, known, n=1, cutoff=MISSPELT):
            continue
        advice = suggest_names(name, known)
        if not advice:
            named = ', '.join(sorted(known - {'type', '_scope_'}))
            advice = f'Expected one of {named}.' if named else 'It takes none.'
        raise ArgumentError(str(name), f'there is no such key. {advice}')


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], besides: Iterable[str] = (),
                    internal: Iterable[str] = ()) -> None:
    """Checks names and values of arguments, as a config holds them, without calling what they are of.

    Args:
        function: A function or class.
        given: Values by name.
        besides: Names that are someone else's.
        internal: Names of arguments that a config does not give.

    Raises:
        ArgumentError: An argument that there is not, that lacks, or whose value does not fit.
    """
    check_keys(function, given, besides, internal)
    for name, argument in declared_arguments(function).items():
        if name in given:
            if given[name] is not argument.default:
                check_value(name, given[name], argument.annotation)
        elif argument.default is Parameter.empty and name not in (*besides, *internal):
            raise ArgumentError(name, f'expected {describe_type(argument.annotation)}, got nothing.')


def check_value(place: str, value: Any, annotation: Any) -> None:
    """Checks a value against a declared type.

    Raises:
        ArgumentError: It does not fit.

    Example:
        >>> check_value('model.distill.hint.distance', 'cosin', Literal['mse', 'cosine'])
        Traceback (most recent call last):
        kd_det.config.arguments.ArgumentError: model.distill.hint.distance: expected one of mse, cosine, got 'cosin'. \
Nearest: cosine.
        >>> check_value('costs', [1.0, -2.0], Sequence[Weight])
        Traceback (most recent call last):
        kd_det.config.arguments.ArgumentError: costs[1]: expected a number of at least 0, got -2.0.
    """
    if annotation in (Any, Parameter.empty, object):
        return
    from pydantic import ValidationError
    try:
        _make_adapter(annotation).validate_python(_to_plain(value))
    except ValidationError as error:
        _refuse_innermost(place, value, annotation, error.errors(include_url=False)[0]['loc'])


@cache
def _make_adapter(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, TypeAdapter
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    return TypeAdapter(annotation, config=None if is_typeddict(annotation) else config)


def _to_plain(value: Any) -> Any:
    """What NumPy and range hold, as Python's own numbers and lists: NumPy's integers are no ``int``."""
    if type(value).__module__ == 'numpy' and getattr(value, 'ndim', None) == 0:
        return value.item()
    if type(value) in (list, tuple):
        return type(value)(map(_to_plain, value))
    return list(value) if isinstance(value, range) else value


def _refuse_innermost(place: str, value: Any, annotation: Any, where: Sequence[Any]) -> NoReturn:
    """Refuses the item of a list that is wrong, or the whole, where it is no list of items."""
    kinds = [kind for kind in _members(annotation) if kind is not type(None)]
    bare = kinds[0] if len(kinds) == 1 else annotation
    bare = get_args(bare)[0] if get_origin(bare) is Annotated else bare
    if where and isinstance(where[0], int) and get_origin(bare) in (Sequence, list, tuple) and where[0] < len(value):
        _refuse_innermost(f'{place}[{where[0]}]', value[where[0]], get_args(bare)[0], where[1:])
    choices = [choice for kind in _members(annotation) if get_origin(kind) is Literal for choice in get_args(kind)
               if isinstance(choice, str)]
    refuse(place, value, describe_type(annotation), suggest_names(value, choices, most=1))


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types that a union joins, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation, )


# ------------------------------------------------------------------------------------------------------ what is meant

PLAIN = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a text', dict: 'a dict',
         type(None): 'None', Any: 'anything'}
BOUNDS = {Ge: ('of at least', 'ge'), Gt: ('above', 'gt'), Le: ('of at most', 'le'), Lt: ('below', 'lt')}


def describe_type(annotation: Any) -> str:
    """What a declared type allows, in words.

    Example:
        >>> describe_type(Annotated[float, Ge(0), Lt(1)])
        'a number of at least 0 and below 1'
        >>> describe_type(Literal['mean', 'same'] | Index)
        'mean, same, or an integer of at least 0'
        >>> describe_type(Annotated[Sequence[Index], MinLen(1), Predicate(is_distinct)])
        'a list that is not empty, no two the same, each an integer of at least 0'
        >>> describe_type(Annotated[Sequence[Weight], Len(3, 3)])
        'a list of 3, each a number of at least 0'
    """
    members = _members(annotation)
    if len(members) > 1:
        described = [word for member in members for word in
                     (map(str, get_args(member)) if get_origin(member) is Literal else [describe_type(member)])]
        return f"{', '.join(described[:-1])}{',' * (len(described) > 2)} or {described[-1]}"
    if get_origin(annotation) is Annotated:
        return _describe_range(*get_args(annotation))
    if get_origin(annotation) is Literal:
        words = list(map(str, get_args(annotation)))
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if is_typeddict(annotation):
        return f"dict({', '.join(f'{name}=…' for name in annotation.__annotations__)})"
    return _describe_list(annotation, []) or PLAIN.get(annotation) or PLAIN.get(get_origin(annotation)) or (
        f'a {annotation.__name__}' if isinstance(annotation, type) else 'anything')


def _describe_range(kind: Any, *constraints: Any) -> str:
    said = [constraint for constraint in constraints if isinstance(constraint, str)]  # in the words of who declares it
    if said:
        return said[0]
    if kind in (int, float) and {Ge(0), Le(0)} <= set(constraints):
        return '0'
    if kind is str:
        return 'a text that is not empty' if constraints else 'a text'
    listed = _describe_list(kind, constraints)
    if listed:
        return listed
    if [type(each) for each in constraints] == [Ge, Le]:
        least, most = constraints
        return f'{describe_type(kind)} from {least.ge:g} to {most.le:g}'
    limits = ' and '.join(f'{words} {getattr(each, name):.12g}' for each in constraints
                          for bound, (words, name) in BOUNDS.items() if isinstance(each, bound))
    return f'{describe_type(kind)} {limits}'.strip()


def _describe_list(kind: Any, constraints: Sequence[Any]) -> str:
    if get_origin(kind) not in (Sequence, list, tuple):
        return ''
    conditions = [f' of {each.min_length}' if isinstance(each, Len) else f', {each.func.__doc__}'
                  if isinstance(each, Predicate) else ' that is not empty' for each in constraints
                  if isinstance(each, Len | MinLen | Predicate)]
    items = [item for item in get_args(kind) if item not in (Any, Ellipsis)]
    return f"a list{''.join(conditions)}{f', each {describe_type(items[0])}' if items else ''}"
