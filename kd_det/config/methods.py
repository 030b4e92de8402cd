"""The methods: where their files lie, and what each file states of itself.

A method is a dict of terms by name, in a file that bears the method's name: ``<method>_<family>.py`` for one family of
heads, ``<method>.py`` for all others. The file lies

- in ``configs/_base_/methods``, or where a package's entry point of the group ``kd_det.methods`` leads: to a module, or
  to a package whose files are methods; such methods go by their names;
- anywhere else: it then goes by its path, or within a package by ``package::folder/file.py``.

What the file states of itself is a dict of literals named ``__about__`` (MMEngine leaves such names out of a config),
see :func:`read_about`. So all methods are listed without running a file, and without importing more than the standard
library.
"""
from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kd_det.config import ConfigurationError, suggest_names
from kd_det.config.choices import CONFIG_ROOT, DETECTOR_FAMILIES, FAMILIES

METHOD_ROOT = CONFIG_ROOT / '_base_' / 'methods'
MEASURED = METHOD_ROOT / 'measured.json'  # out of the records in docs/results, by benchmarks/measurements.py
ENTRY_POINTS = 'kd_det.methods'  # the group of those that lead to methods of other packages
ABOUT = '__about__'
ALL = 'all'

# What the parts that methods read are called in tables.
PARTS = {'backbone': 'backbone features', 'neck': 'neck features', 'encoder': 'encoder features',
         'bbox_head': 'dense head', 'bbox_head.queries': 'queries', 'bbox_head.decoder': 'decoder',
         'rpn_head': 'RPN', 'roi_head': 'RoI head'}

Files = dict[str, Path]  # of one method, by family; '' for all families without a file of their own


@dataclass(frozen=True)
class Method:
    """One method, as its files describe it.

    Attributes:
        name: As ``kd-det distill --method`` takes it.
        paper: Where it was published; None where its files do not state it, and so for what follows.
        idea: What it compares.
        reads: The parts of student and teacher that it reads, of :data:`PARTS`.
        detectors: The kinds of detectors that it serves, of :data:`~kd_det.config.choices.DETECTOR_FAMILIES`.
        files: Its files, by family.
        source: The package that brings it by an entry point; '' for one of kd_det's own.
        error: Why it can not be used, or described; '' otherwise.
    """
    name: str
    paper: str | None = None
    idea: str | None = None
    reads: tuple[str, ...] | None = None
    detectors: tuple[str, ...] | None = None
    files: Files = field(default_factory=dict)
    source: str = ''
    error: str = ''

    @property
    def families(self) -> tuple[str, ...]:
        """The families of detectors that it has weights for, of :data:`~kd_det.config.choices.FAMILIES`."""
        return tuple(family for family in FAMILIES if family in self.files or '' in self.files)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        files = {family: str(file) for family, file in self.files.items()}
        return {**asdict(self), 'files': files, 'families': self.families}


class Methods(tuple[Method, ...]):
    """Methods, as ``kd-det methods`` lists them: a tuple, which a notebook shows as a table."""

    COLUMNS = ('Method', 'Compares', 'Reads', 'Serves', 'Paper')
    CAPTION = f"{ALL}: {', '.join(DETECTOR_FAMILIES)}"

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The cells of each method; an error stands in place of what it compares."""
        for method in self:
            parts = None if method.reads is None else ', '.join(PARTS.get(part, part) for part in method.reads)
            described = method.idea, parts, _spell_detectors(method.detectors), method.paper
            cells = (method.error, '', '', '') if method.error else ('not stated' if each is None else each
                                                                     for each in described)
            yield f'{method.name} ({method.source})' if method.source else method.name, *cells

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """The methods by name; of two with one name the first."""
        named: dict[str, dict[str, Any]] = {}
        for method in self:
            named.setdefault(method.name, method.to_dict())
        return named

    def _repr_html_(self) -> str:
        from html import escape
        rows = ''.join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows())
        head = ''.join(f'<th>{name}</th>' for name in self.COLUMNS)
        return f'<table><caption>{self.CAPTION}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _spell_detectors(detectors: Sequence[str] | None) -> str | None:
    """Names those that a method serves, or those that it does not where these are fewer."""
    if detectors is None:
        return None
    others = [detector for detector in DETECTOR_FAMILIES if detector not in detectors]
    if not others:
        return ALL
    return f"all but {', '.join(others)}" if len(others) < len(detectors) else ', '.join(detectors)


# ------------------------------------------------------------------------------------------------- what files state


def methods(*names: str) -> Methods:
    """Lists methods.

    Args:
        names: As ``kd-det distill --method`` takes them, files too. What these do not state is found out by building
            their terms, which imports MMDetection. By default all methods that go by their names, as their files
            describe them; one that can not be used, or described, has an ``error``.

    Raises:
        ConfigurationError: There is no method of a name that is given, or it can not be used.
        FileNotFoundError: There is no such file.
    """
    return Methods(map(_complete, names) if names else _list_all())


def _list_all() -> Iterator[Method]:
    found: dict[str, Method] = {}
    for source in _find_sources():
        if source.error:
            yield Method(source.name, source=source.package, error=source.error)
        for name, files in group_files(source.files).items():
            method = Method(name, files=files, source=source.package)
            try:
                if name in found:
                    raise ConfigurationError(f"The name is taken by a method of {found[name].source or 'kd_det'}; this "
                                             f"one goes by its file: {', '.join(map(str, files.values()))}")
                method = replace(describe_method(name, files), source=source.package)
            except (ConfigurationError, OSError) as error:
                method = replace(method, error=str(error))
            found.setdefault(name, method)
            yield method


def describe_method(name: str, files: Files) -> Method:
    """Unites what the files of a method state.

    Raises:
        ConfigurationError: One can not be read.
    """
    about = {family: read_about(file) for family, file in files.items()}
    stated = {key: next((each[key] for each in about.values() if key in each), None) for key in ('paper', 'idea')}
    reads = detectors = None
    if all('reads' in each for each in about.values()):
        reads = tuple(dict.fromkeys(part for each in about.values() for part in each['reads']))
    if all('serves' in each for each in about.values()):
        served = {detector for family, each in about.items()
                  for detector in (served_kinds(files, family) if each['serves'] == ALL else each['serves'])}
        detectors = (*(each for each in DETECTOR_FAMILIES if each in served), *sorted(served - {*DETECTOR_FAMILIES}))
    return Method(name, **stated, reads=reads, detectors=detectors, files=files)


def served_kinds(files: Files, family: str) -> list[str]:
    """The kinds of detectors for which a method's file of this family is taken."""
    return [kind for kind, its_family in DETECTOR_FAMILIES.items()
            if family == (its_family if its_family in files else '')]


def read_about(file: Path) -> dict[str, Any]:
    """Reads what a method's file states of itself, without running it.

    Returns:
        Its ``__about__``, all keys of which may be missing: ``paper`` and ``idea``, texts; ``reads``, a list of parts
        of student and teacher, such as those of :data:`PARTS`; ``serves``, a list of kinds of detectors, or ``'all'``
        for all kinds of the file's family.

    Raises:
        ConfigurationError: The file is not valid Python, or what it states has another form.
    """
    try:
        body = ast.parse(file.read_bytes(), file.name).body
    except (SyntaxError, ValueError) as error:
        raise ConfigurationError(f"The method's file '{file}' is not valid Python: {error}") from error
    node = next((each.value for each in body if isinstance(each, ast.Assign)
                 and any(isinstance(target, ast.Name) and target.id == ABOUT for target in each.targets)), None)
    if node is None:
        return {}
    try:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
            about: Any = {each.arg: ast.literal_eval(each.value) for each in node.keywords}
        else:
            about = ast.literal_eval(node)
    except (TypeError, ValueError):
        about = None
    forms = dict(paper=_is_text, idea=_is_text, reads=_is_list, serves=lambda each: each == ALL or _is_list(each))
    if not isinstance(about, dict) or not all(key in forms and forms[key](each) for key, each in about.items()):
        raise ConfigurationError(
            f"{file}, line {node.lineno}: {ABOUT} is expected in the form dict(paper='arXiv 2111.11837', "
            "idea='what is compared', reads=['neck', 'bbox_head'], serves=['RetinaNet', 'ATSS']), of literals alone; "
            "or serves='all', of its family.")
    return about


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


def _complete(name: str) -> Method:
    """Describes a method by its files, and by its terms where these state nothing."""
    method = describe_method(name, find_files(name))
    if method.reads is None or method.detectors is None:
        from kd_det.config.composition import find_parts, find_served, load_method
        terms = {family: load_method(file).terms for family, file in method.files.items()}
        parts = dict.fromkeys(part for each in terms.values() for part in find_parts(each))
        served = {kind for family, each in terms.items()
                  for kind in find_served(each, served_kinds(method.files, family))}
        method = replace(method, reads=method.reads or tuple(parts),
                         detectors=method.detectors or tuple(kind for kind in DETECTOR_FAMILIES if kind in served))
    return method


# ------------------------------------------------------------------------------------------------- where files lie


@dataclass(frozen=True)
class _Source:
    """Files of methods: kd_det's own, or those that an entry point leads to; or why it leads to none."""
    name: str
    package: str = ''
    files: tuple[Path, ...] = ()
    error: str = ''


def available_methods() -> dict[str, Files]:
    """Finds the methods that go by their names: name -> family -> file.

    Of two with one name the first holds: kd_det's own, then those of other packages in the order of their entry points.
    """
    found: dict[str, Files] = {}
    for source in _find_sources():
        for name, files in group_files(source.files).items():
            found.setdefault(name, files)
    return found


def find_files(method: str) -> Files:
    """The files of one method, by family.

    Args:
        method: A name of :func:`available_methods`; a file ``folder/name.py``; or ``'package::folder/name.py'`` for one
            within a package, or within the configs that it ships.

    Raises:
        ConfigurationError: There is no such method, or no such package.
        FileNotFoundError: There is no such file.
    """
    if is_file(method):
        file = _find_file(method)
        return {split_family(file)[1]: file}
    found = available_methods()
    if method not in found:
        meant = (f"Did you mean the file '{method}.py'?" if Path(f'{method}.py').is_file()
                 else suggest_names(method, found, most=1))
        raise ConfigurationError(f"There is no method '{method}'. Choose from {', '.join(found)}, or a sum: a+b. "
                                 f'{meant}'.rstrip())
    return found[method]


def is_file(method: str) -> bool:
    """Whether a method is given by its file."""
    return method.endswith('.py') or '::' in method


def split_family(file: Path) -> tuple[str, str]:
    """The name of a method, and the family of heads that its file is for: '' for all others."""
    family = next((family for family in FAMILIES if file.stem.endswith(f'_{family}')), '')
    return file.stem[:-len(family) - 1] if family else file.stem, family


def name_sum(methods: str) -> str:
    """The names of a sum, those of files too, in a form that serves as a part of a file name."""
    return '+'.join(Path(each.rpartition('::')[2]).stem if is_file(each) else each for each in methods.split('+'))


def group_files(files: Iterable[Path]) -> dict[str, Files]:
    """Files of methods by name and family."""
    grouped: dict[str, Files] = {}
    for file in files:
        name, family = split_family(file)
        grouped.setdefault(name, {})[family] = file
    return grouped


def _find_file(method: str) -> Path:
    package, _, path = method.rpartition('::')
    if not package:
        places = [Path(path)]
    else:
        folder = find_module(package)
        places = [folder / '.mim' / 'configs' / path, folder / path]
    for place in places:
        if place.is_file():
            return place
    names = {file.name for place in places if place.parent.is_dir() for file in place.parent.glob('*.py')}
    raise FileNotFoundError(f"There is no method's file '{method}'. {suggest_names(places[0].name, names)}".rstrip())


def _find_sources() -> Iterator[_Source]:
    yield _Source('kd_det', files=tuple(sorted(METHOD_ROOT.glob('*.py'))))
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        package = point.dist.name if point.dist else point.value
        try:
            yield _Source(point.name, package, tuple(_find_methods_of(point)))
        except ConfigurationError as error:
            yield _Source(point.name, package, error=str(error))


def _find_methods_of(point: EntryPoint) -> list[Path]:
    place = find_module(point.value)
    files = [place]
    if place.is_dir():
        files = [file for file in sorted(place.glob('*.py')) if not file.name.startswith('_')]
    if not files:
        raise ConfigurationError(f"The entry point {point.name} = {point.value} leads to '{place}', which holds no "
                                 'method.')
    return files


def find_module(name: str) -> Path:
    """The file of a module, or the folder of a package, found without importing anything.

    Raises:
        ConfigurationError: There is none.
    """
    top, *within = name.split('.')
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        place = Path(folder, *within)
        if place.is_dir():
            return place
        if within and place.with_suffix('.py').is_file():
            return place.with_suffix('.py')
    if spec and spec.has_location and not within:
        return Path(spec.origin)
    raise ConfigurationError(f"There is no package '{top}'." if spec is None else f"There is no module '{name}'.")
