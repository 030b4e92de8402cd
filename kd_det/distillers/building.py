"""What is wrong with a config that can not be built, in its writer's words and with the nearest right ones."""
from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from typing import Any

from mmdet.registry import MODELS, TASK_UTILS
from torch import nn

from kd_det.config.files import ConfigurationError
from kd_det.distillers.weights import Weight, WeightConfig, build_weight
from kd_det.heads import ROI_HEAD, HeadRequest, StudentHeads, StudentOutputs, find_head
from kd_det.heads.capture import can_be_kept
from kd_det.heads.towers import tower_widths
from kd_det.losses import DistillTerm
from kd_det.losses.base import InputSpecs
from kd_det.registry import build_own
from kd_det.taps import Features, Taps
from kd_det.teachers import TeacherError, of_teacher, probe_config, probe_levels, probe_towers, read_model_config

UNKNOWN_ARGUMENT = re.compile(r"got an unexpected keyword argument '(\w+)'")
UNKNOWN_TYPE = re.compile(r'(\w+) is not in the \S+ registry')


def reason(error: Exception, config: Any) -> str:
    """Why building failed.

    Args:
        error: What building raised.
        config: What was built: a dict with a ``type``, other such dicts perhaps within, or a class.

    Returns:
        For a name that does not exist, those like it; for anything else the error's own message.
    """
    message = str(error)
    argument, kind = UNKNOWN_ARGUMENT.search(message), UNKNOWN_TYPE.search(message)
    if isinstance(error, TypeError) and argument:
        others = _arguments(config) - {argument[1]}  # which another part, or a base class, may have
        return f"there is no argument '{argument[1]}'.{nearest(argument[1], others)}"
    if isinstance(error, KeyError) and kind:
        own = (name for name, each in MODELS.module_dict.items() if each.__module__.startswith('kd_det.'))
        return f"there is no '{kind[1]}'.{nearest(kind[1], own)} If it is your own, import it with custom_imports."
    return message


def nearest(name: str, names: Iterable[str]) -> str:
    """A sentence on the names that are most like a wrong one; empty where none is."""
    found = get_close_matches(name, sorted(names))
    return f" Nearest names: {', '.join(found)}." if found else ''


def _arguments(config: Any) -> set[str]:
    """The arguments of all that a config names."""
    if isinstance(config, type):
        return {name for ancestor in config.__mro__[:-1] for name in signature(ancestor.__init__).parameters}
    if isinstance(config, (list, tuple)):
        return set().union(*map(_arguments, config))
    if not isinstance(config, dict):
        return set()
    kind = config.get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind) or TASK_UTILS.get(kind)
    return set().union(*map(_arguments, config.values()), _arguments(kind)) - {'self', 'args', 'kwargs'}


def measured_taps(student: nn.Module, term: DistillTerm) -> tuple[str, ...]:
    """The paths where the gradient of a term is measured: its own, or the neck's for one that reads heads alone."""
    return term.student_taps or ('neck' if getattr(student, 'neck', None) is not None else 'backbone', )


class Connections:
    """The taps and the readers of heads that the terms ask for. Each term is told the form of what it will read.

    Args:
        student: The student.
        teachers: Config of each teacher; none is built.
        terms: The terms by name.

    Attributes:
        student_levels: Levels of each tap of the student.
        teacher_taps: For each teacher the paths that its terms read.
        teacher_heads: For each teacher the heads that its terms read.
        teacher_levels: For each teacher the levels of each of its taps.

    Raises:
        ConfigurationError: A term can not read what it asks for; the message says which and why.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[dict], terms: dict[str, DistillTerm]) -> None:
        self.student_taps = Taps(student, (path for term in terms.values() for path in measured_taps(student, term)))
        self.student_levels = probe_levels(student, self.student_taps) if terms else {}
        of_teachers = [[term for term in terms.values() if term.teacher_index == index] for index in range(len(teachers))]
        self.teacher_taps = [[path for term in each for path in term.teacher_taps] for each in of_teachers]
        self.teacher_heads = [[head for term in each for head in term.teacher_heads] for each in of_teachers]
        self.teacher_levels = []
        for config, taps in zip(teachers, self.teacher_taps):
            with of_teacher(config['config']):
                self.teacher_levels.append(probe_config(read_model_config(config['config']), taps) if taps else {})
        for name, term in terms.items():
            try:
                check_cached(teachers[term.teacher_index], term.teacher_heads)
                term.connect(self._student_specs(student, term), self._teacher_specs(teachers[term.teacher_index], term))
            except ValueError as error:
                raise ConfigurationError(f'model.distill.{name}: {error}') from error
        self.student_heads = StudentHeads(student, (head for term in terms.values() for head in term.student_heads))

    @contextmanager
    def capture(self) -> Iterator[tuple[dict[str, Features], StudentOutputs]]:
        """Reads one step of the student.

        Yields:
            Features by path and outputs by head; both are filled when the block ends.
        """
        with self.student_taps.capture() as features, self.student_heads.capture() as outputs:
            yield features, outputs

    def _student_specs(self, student: nn.Module, term: DistillTerm) -> InputSpecs:
        heads = {request: find_head(student, request) for request in map(HeadRequest.parse, term.student_heads)}
        towers = {request: tower_widths(head) for request, head in heads.items() if request.part == 'towers'}
        return {**self.student_levels, **towers}

    def _teacher_specs(self, teacher: dict, term: DistillTerm) -> InputSpecs:
        return {**self.teacher_levels[term.teacher_index], **probe_towers(teacher['config'], term.teacher_heads)}


def checked_teachers(teacher: dict | Sequence[dict]) -> list[dict]:
    """The configs of the teachers as a list.

    Raises:
        TeacherError: There is none, or one lacks its config.
    """
    configs = [teacher] if isinstance(teacher, dict) else list(teacher)
    for config in configs:
        if 'config' not in config:
            raise TeacherError("model.teacher lacks 'config': a config file, 'mmdet::…' or a model dict.")
    if not configs:
        raise TeacherError('model.teacher is an empty list: at least one teacher is needed.')
    return configs


def check_cached(teacher: dict, heads: Sequence[str]) -> None:
    """Checks that a teacher's cache, if it has one, can keep what a term reads of its heads.

    Raises:
        ConfigurationError: It can not; the message says what.
    """
    unkept = [head for head in heads if not can_be_kept(head)] if teacher.get('cache') else []
    if unkept:
        reason = ', which depend on the regions that the student samples in each step' if unkept[0] == ROI_HEAD else ''
        raise ConfigurationError(f"it reads the outputs of the teacher's {unkept[0]}{reason}: a cache keeps features "
                                 'and the maps of dense heads alone. Remove model.teacher.cache, or this term.')


def build_terms(distill: dict[str, dict], teachers: int) -> tuple[dict[str, Weight], dict[str, DistillTerm]]:
    """Builds the terms whose weight is not 0 throughout, and their weights.

    Args:
        distill: Name -> term, with its weight.
        teachers: How many teachers there are.

    Raises:
        ConfigurationError: A term can not be built; the message says which and why.
    """
    weights, terms = {}, {}
    for name, config in distill.items():
        where = f'model.distill.{name}'
        if 'loss' in name:
            raise ConfigurationError(f"{where}: a term's name may not contain 'loss', which mmengine takes for a loss "
                                     f"to add; the term is logged as 'loss_{name}' by itself. Rename it.")
        if not isinstance(config, dict) or 'type' not in config:
            raise ConfigurationError(f"{where} = {config!r:.80}: expected a dict with a 'type', such as "
                                     "dict(type='FGD', tap='neck').")
        whole, config = config, copy.deepcopy(dict(config))
        try:
            weight = build_weight(config.pop('weight', 1.0))
            if weight.is_zero:
                continue
            term = build_own(MODELS, config)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f'{where}: {reason(error, whole)}') from error
        if not isinstance(term, DistillTerm):
            raise ConfigurationError(
                f"{where}: '{config['type']}' is a {type(term).__name__}, not a distillation term.")
        if not 0 <= term.teacher_index < teachers:
            raise ConfigurationError(
                f'{where}: teacher={term.teacher_index}, but there are {teachers} teachers, counted from 0.')
        weights[name], terms[name] = weight, term
    return weights, terms


def build_task_weight(config: WeightConfig) -> Weight:
    """Builds the weight of the student's own losses.

    Raises:
        ConfigurationError: It can not be built, or is balanced.
    """
    try:
        weight = build_weight(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f'model.task_weight: {reason(error, config)}') from error
    if weight.balance is not None:
        raise ConfigurationError("model.task_weight: the task's gradient is what Balance measures terms by. Give a "
                                 'number or a schedule of numbers.')
    return weight
