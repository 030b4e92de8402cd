"""What each method is and which detectors it serves, read from its files in ``configs/_base_/methods``: from their
first lines and from what their terms read."""
from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

from kd_det.config.composition import available_methods, build_term, check_terms, method_terms
from kd_det.config.detectors import DETECTORS, FAMILIES, family_of
from kd_det.config.files import ConfigurationError, load_config
from kd_det.heads import HeadRequest

FIRST_LINE = re.compile(r'\S.* \((?P<paper>.+?)\): (?P<idea>.+)\.')
READS = {'backbone': 'backbone features', 'neck': 'neck features', 'encoder': 'encoder features',
         'bbox_head': 'dense head', 'bbox_head.queries': 'queries', 'rpn_head': 'RPN', 'roi_head': 'RoI head'}


class MethodEntry(NamedTuple):
    """One method.

    Attributes:
        name: As ``kd-det distill --method`` takes it.
        families: The families of detectors that it has weights for, of :data:`~kd_det.config.detectors.FAMILIES`.
        detectors: Those that it serves, of :data:`~kd_det.config.detectors.DETECTORS`.
        paper: Where it was published.
        needs: What it reads of student and teacher.
        idea: What it compares.
    """
    name: str
    families: tuple[str, ...]
    detectors: tuple[str, ...]
    paper: str
    needs: tuple[str, ...]
    idea: str


def catalogue() -> list[MethodEntry]:
    """All methods.

    Raises:
        ConfigurationError: A file does not say what it is.
    """
    return [_entry(name, files) for name, files in available_methods().items()]


def read_first_line(file: Path) -> dict[str, str]:
    """The ``paper`` and the ``idea`` in the first line of a method's file: ``NAME (PAPER): IDEA.``

    Raises:
        ConfigurationError: It has another form.
    """
    first, *_ = (ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or '').splitlines() or ['']
    match = FIRST_LINE.fullmatch(first)
    if match is None:
        raise ConfigurationError(f"{file}: its first line is '{first}', expected the form NAME (PAPER): IDEA., such as "
                                 'CWD (arXiv 2011.13256): each channel as a distribution over the cells.')
    return match.groupdict()


def _entry(name: str, files: dict[str, Path]) -> MethodEntry:
    terms = [term for file in files.values() for term in load_config(file)[name].values()]
    needs = [READS[part] for term in terms for part in _reads(term)]
    return MethodEntry(name=name,
                       families=tuple(family for family in FAMILIES if family in files or '' in files),
                       detectors=tuple(detector for detector in DETECTORS if _serves(name, detector)),
                       needs=tuple(dict.fromkeys(needs)),
                       **read_first_line(next(iter(files.values()))))


def _serves(method: str, detector: str) -> bool:
    heads = DETECTORS[detector]
    try:
        check_terms(method, method_terms(method, family_of(detector, heads)), detector, heads)
    except ConfigurationError:
        return False
    return True


def _reads(config: dict) -> list[str]:
    """The parts of student and teacher that a term reads."""
    term = build_term(config)
    requests = map(HeadRequest.parse, (*term.student_heads, *term.teacher_heads))
    return [*(path.split('.')[0] for path in term.student_taps),
            *(request if request in READS else request.head for request in requests)]
