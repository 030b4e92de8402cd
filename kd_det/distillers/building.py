"""Builds a distiller from its config: student, terms and their schedules, and the connections between what they read.

An error says in its writer's words what is wrong in the config and where, with the nearest right names.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain

from mmdet.registry import MODELS
from torch import nn

from kd_det.compat.process import preserved_randomness
from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError, at, refuse
from kd_det.config.detectors import check_student, extract_plain_detector
from kd_det.config.files import build_own, explain_build_error
from kd_det.distillers.schedules import Schedule, ScheduleConfig, build_schedule
from kd_det.distillers.supervision import check_teacher_index
from kd_det.heads import ROI_HEAD, HeadRequest, StudentHeads, StudentOutputs, find_head
from kd_det.heads.capture import can_be_kept
from kd_det.heads.towers import tower_widths
from kd_det.losses import DistillTerm
from kd_det.losses.base import InputSpecs
from kd_det.registry import build_detector
from kd_det.taps import Features, Taps
from kd_det.teachers import (
    check_teacher_arguments,
    explain_model_errors,
    probe_config,
    probe_levels,
    probe_towers,
    read_model_config,
)


def build_student(config: dict) -> nn.Module:
    """Builds the plain detector that ``model.student`` stands for.

    Raises:
        ConfigurationError: It is no detector.
    """
    check_student(config, 'model.student')
    return build_detector(extract_plain_detector(config))


def list_teacher_configs(teacher: dict | Sequence[dict]) -> list[dict]:
    """Lists the configs of the teachers.

    Raises:
        ArgumentError: There is none, one lacks its config, or an argument of one does not fit.
    """
    configs = [teacher] if isinstance(teacher, dict) else list(teacher)
    for index, config in enumerate(configs):
        with at('model.teacher' if isinstance(teacher, dict) else f'model.teacher[{index}]'):
            check_teacher_arguments(config)
    if not configs:
        refuse('model.teacher', [], 'at least one teacher')
    return configs


def build_terms(distill: dict[str, dict], teachers: int) -> tuple[dict[str, Schedule], dict[str, DistillTerm]]:
    """Builds the terms whose weight is not 0 throughout, and the schedules of their weights.

    Args:
        distill: Name -> term, with its weight.
        teachers: How many teachers there are.

    Raises:
        ConfigurationError: A term can not be built; the message says which and why.
    """
    schedules, terms = {}, {}
    for name, config in distill.items():
        where = f'model.distill.{name}'
        if 'loss' in name:
            raise ArgumentError(where, "a term's name may not contain 'loss', which mmengine takes for a loss to add; "
                                       f"the term is logged as 'loss_{name}' by itself. Rename it.")
        if not isinstance(config, dict) or 'type' not in config:
            refuse(where, config, "a dict with a 'type', such as dict(type='FGD', tap='neck')")
        arguments = copy.deepcopy(dict(config))
        with at(where), _explained(config):
            with at('weight'):
                schedule = build_schedule(arguments.pop('weight', 1.0))
            with preserved_randomness() if schedule.is_zero else nullcontext():  # it is built to be checked
                term = build_own(MODELS, arguments)
            if not isinstance(term, DistillTerm):
                refuse('type', config['type'], f'a distillation term, which {type(term).__name__} is not')
            check_teacher_index(term.teacher_index, teachers)
        if not schedule.is_zero:
            schedules[name], terms[name] = schedule, term
    return schedules, terms


@contextmanager
def _explained(config: dict) -> Iterator[None]:
    """Says why something could not be built, what code of others raises too."""
    try:
        yield
    except ArgumentError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ArgumentError('', explain_build_error(error, config)) from error


def build_task_schedule(config: ScheduleConfig) -> Schedule:
    """Builds the schedule of the weight of the student's own losses.

    Raises:
        ConfigurationError: It can not be built, or is balanced.
    """
    with at('model.task_weight'), _explained(config):
        schedule = build_schedule(config)
        if schedule.balance is not None:
            refuse('', config, 'a number or a schedule of numbers',
                   "The task's gradient is what Balance measures terms by.")
    return schedule


class Connections:
    """The taps and the readers of heads that the terms ask for. Each term is told the form of what it will read.

    Args:
        student: The student.
        teachers: Config of each teacher; none is built.
        terms: The terms by name.

    Attributes:
        gradient_taps: For each term the paths where its gradient is measured: those that it taps, or the neck's, or
            without a neck the backbone's, for a term that reads heads alone.
        student_levels: Levels of each tap of the student.
        teacher_taps: For each teacher the paths that its terms read.
        teacher_heads: For each teacher the heads that its terms read.
        teacher_levels: For each teacher the levels of each of its taps.

    Raises:
        ConfigurationError: A term can not read what it asks for; the message says which and why.
    """

    def __init__(self, student: nn.Module, teachers: Sequence[dict], terms: dict[str, DistillTerm]) -> None:
        last = 'neck' if getattr(student, 'neck', None) is not None else 'backbone'
        self.gradient_taps = {name: term.student_taps or (last, ) for name, term in terms.items()}
        self.student_taps = Taps(student, chain.from_iterable(self.gradient_taps.values()))
        self.student_levels = probe_levels(student, self.student_taps) if terms else {}

        self.teacher_taps, self.teacher_heads, self.teacher_levels = [], [], []
        for index, teacher in enumerate(teachers):
            taught = [term for term in terms.values() if term.teacher_index == index]
            taps = [path for term in taught for path in term.teacher_taps]
            with explain_model_errors(teacher['config']):
                levels = probe_config(read_model_config(teacher['config']), taps) if taps else {}
            self.teacher_taps.append(taps)
            self.teacher_heads.append([head for term in taught for head in term.teacher_heads])
            self.teacher_levels.append(levels)

        for name, term in terms.items():
            try:
                _connect(term, student, self.student_levels, teachers[term.teacher_index],
                         self.teacher_levels[term.teacher_index])
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


def _connect(term: DistillTerm, student: nn.Module, student_levels: InputSpecs, teacher: dict,
             teacher_levels: InputSpecs) -> None:
    """Tells a term the levels of its taps, and the widths of those of its heads that are towers.

    Raises:
        ValueError: It can not compare them, a head lacks, or the teacher's cache keeps no outputs of that head.
    """
    uncached = [head for head in term.teacher_heads if not can_be_kept(head)] if teacher.get('cache') else []
    if uncached:
        why = ', which depend on the regions that the student samples in each step' if uncached[0] == ROI_HEAD else ''
        raise ConfigurationError(f"it reads the outputs of the teacher's {uncached[0]}{why}: a cache keeps features "
                                 'and the maps of dense heads alone. Remove model.teacher.cache, or this term.')
    heads = {request: find_head(student, request) for request in map(HeadRequest.parse, term.student_heads)}
    student_towers = {request: tower_widths(head) for request, head in heads.items() if request.part == 'towers'}
    teacher_towers = probe_towers(teacher['config'], term.teacher_heads)
    term.connect({**student_levels, **student_towers},  # type: ignore[dict-item]  # a request equals its name
                 {**teacher_levels, **teacher_towers})  # type: ignore[dict-item]
