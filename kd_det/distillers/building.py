"""Builds a distiller from its config: student, terms and their schedules, and the connections between what they read.

An error says in its writer's words what is wrong in the config and where, with the nearest right names.
"""
from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain

from mmdet.models import TridentFasterRCNN
from mmdet.registry import MODELS
from torch import nn

from kd_det.compat.process import preserved_randomness
from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError, at, refuse
from kd_det.config.detectors import check_student, extract_plain_detector
from kd_det.config.files import build_own, explain_build_error
from kd_det.distillers.schedules import Schedule, ScheduleConfig, build_schedule
from kd_det.distillers.supervision import check_teacher_index
from kd_det.heads import ROI_HEAD, HeadError, StudentHeads, StudentOutputs
from kd_det.heads.capture import measure_student
from kd_det.losses import DistillTerm
from kd_det.registry import build_detector
from kd_det.taps import Features, Taps
from kd_det.teachers import probe_levels
from kd_det.teachers.guide import Guide, Reading, build_guide
from kd_det.teachers.peers import Peer
from kd_det.teachers.teacher import FrozenDetector

ENCODERS = 'backbone', 'neck'  # what these put out is read of a branch that shares them, too


def build_student(config: dict) -> nn.Module:
    """Builds the plain detector that ``model.student`` stands for.

    Raises:
        ConfigurationError: It is no detector.
    """
    check_student(config, 'model.student')
    return build_detector(extract_plain_detector(config))


def build_guides(teacher: dict | Sequence[dict], learners: int) -> list[Guide]:
    """Builds the guides that ``model.teacher`` names; none of them loads anything.

    Args:
        teacher: One or several; without a ``type`` a frozen detector.
        learners: How many there are, without those that guides stand for.

    Raises:
        ArgumentError: There is no such kind, one lacks its config, an argument does not fit, or there is no such
            learner.
    """
    guides = []
    for index, config in enumerate(list_guide_configs(teacher)):
        with at_guide(teacher, index):
            guides.append(build_guide(config) if 'type' in config else FrozenDetector(config))
    number = learners + sum(guide.stands_for_learner for guide in guides)
    for index, guide in enumerate(guides):
        beyond = [each for each in guide.reads_learners if each >= number]
        if beyond:
            with at_guide(teacher, index):
                refuse('learner', beyond[0], f'an index below {number}, the number of learners: the student and '
                       'model.peers')
    if not guides and learners == 1:
        refuse('model.teacher', [], 'at least one teacher')
    return guides


def at_guide(teacher: dict | Sequence[dict], index: int) -> AbstractContextManager[None]:
    """Says of an argument that is refused within which guide it belongs to."""
    return at('model.teacher' if isinstance(teacher, dict) else f'model.teacher[{index}]')


def list_guide_configs(teacher: dict | Sequence[dict]) -> list[dict]:
    """Lists the configs of the guides that ``model.teacher`` names."""
    return [teacher] if isinstance(teacher, dict) else list(teacher)


def check_terms_are_given(distill: dict | None, peers: int | Sequence[dict]) -> None:
    """Refuses a distillation that names no terms, not even ``{}``; learners beside each other need none."""
    if distill is None and not peers:
        refuse('model.distill', None, 'terms by name', 'They may be left out beside model.peers.')


def build_terms(distill: dict[str, dict], teachers: int,
                learners: int = 1) -> tuple[dict[str, Schedule], dict[str, DistillTerm]]:
    """Builds the terms whose weight is not 0 throughout, and the schedules of their weights.

    Args:
        distill: Name -> term, with its weight, and the learner that learns by it.
        teachers: How many teachers there are.
        learners: How many learners there are.

    Raises:
        ConfigurationError: A term can not be built; the message says which and why.
    """
    schedules, terms = {}, {}
    for name, config in distill.items():
        where = f'model.distill.{name}'
        if 'loss' in name:
            raise ArgumentError(where, "a term's name may not contain 'loss', which mmengine takes for a loss to add; "
                                       f"the term is logged as 'loss_{name}' by itself. Rename it.")
        if '.' in name or hasattr(nn.ModuleDict, name):
            raise ArgumentError(where, 'a term is a module of this name, which PyTorch does not take. Rename it.')
        if not isinstance(config, dict) or 'type' not in config:
            refuse(where, config, "a dict with a 'type', such as dict(type='FGD', tap='neck')")
        arguments = copy.deepcopy(dict(config))
        with at(where), _explained(config):
            with at('weight'):
                schedule = build_schedule(arguments.pop('weight', 1.0))
            learner = arguments.pop('learner', 0)
            if isinstance(learner, bool) or learner not in range(learners):
                refuse('learner', learner, f'an index below {learners}, the number of learners: the student and '
                       'model.peers')
            with preserved_randomness() if schedule.is_zero else nullcontext():  # it is built to be checked
                term = build_own(MODELS, arguments)
            if not isinstance(term, DistillTerm):
                refuse('type', config['type'], f'a distillation term, which {type(term).__name__} is not')
            check_teacher_index(term.teacher_index, teachers)
            term.learner_index = learner
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
    """The taps and the readers of heads of one learner: what its terms ask for, and the guides that are made of it.

    Args:
        learner: The plain detector.
        terms: Its terms by name.
        readings: What guides read of it.

    Attributes:
        gradient_taps: For each term the paths where its gradient is measured: those that it taps, or the neck's, or
            without a neck the backbone's, for a term that reads heads alone.
        student_taps: The taps.
        student_heads: The readers of its heads.
        student_levels: Levels of each tap.

    Raises:
        ConfigurationError: A term can not read what it asks for; the message says which and why.
    """

    def __init__(self, learner: nn.Module, terms: dict[str, DistillTerm], readings: Sequence[Reading] = ()) -> None:
        last = 'neck' if getattr(learner, 'neck', None) is not None else 'backbone'
        self.gradient_taps = {name: term.student_taps or (last, ) for name, term in terms.items()}
        read = (path for reading in readings for path in reading.taps)
        self.student_taps = Taps(learner, chain(*self.gradient_taps.values(), read))
        self.student_levels = probe_levels(learner, self.student_taps) if self.student_taps.paths else {}
        for name, term in terms.items():
            with _naming(name):
                measure_student(learner, term.student_heads)
        heads = (head for term in terms.values() for head in term.student_heads)
        read = (head for reading in readings for head in reading.heads if head != ROI_HEAD)
        self.student_heads = StudentHeads(learner, dict.fromkeys(chain(heads, read)))

    @contextmanager
    def capture(self) -> Iterator[tuple[dict[str, Features], StudentOutputs]]:
        """Reads one step of the learner.

        Yields:
            Features by path and outputs by head; both are filled when the block ends.
        """
        with self.student_taps.capture() as features, self.student_heads.capture() as outputs:
            yield features, outputs


class GuideConnections:
    """What the terms read of each guide, and in which form they will have it. Each term is told its form here.

    Args:
        guides: The guides; none is loaded.
        terms: The terms of all learners, by name.
        learners: The plain detectors, the student first.

    Attributes:
        readings: For each guide what terms read of it.
        levels: For each guide the levels of each of its taps.
        of_learners: Of each learner, its connections.

    Raises:
        ConfigurationError: A term can not read what it asks for; the message says which and why.
    """

    def __init__(self, guides: Sequence[Guide], terms: dict[str, DistillTerm], learners: Sequence[nn.Module]) -> None:
        by_guide = [[term for term in terms.values() if term.teacher_index == index] for index in range(len(guides))]
        self.readings = [Reading(tuple(dict.fromkeys(path for term in taught for path in term.teacher_taps)),
                                 tuple(dict.fromkeys(head for term in taught for head in term.teacher_heads)))
                         for taught in by_guide]
        for name, term in terms.items():
            with _naming(name):
                guide = guides[term.teacher_index]
                _check_is_its_own(term, learners[term.learner_index])
                for index in (term.learner_index, *guide.reads_learners):
                    _check_branches(learners[index])
                guide.check(Reading(term.teacher_taps, term.teacher_heads))
                if isinstance(guide, Peer) and guide.learner == term.learner_index:
                    refuse('teacher', term.teacher_index, f'another guide for learner {guide.learner}',
                           'This one is itself, of which it learns nothing.')
        self.of_learners = [
            Connections(learner, {name: term for name, term in terms.items() if term.learner_index == index},
                        [Reading((*reading.taps, *guide.learner_taps), reading.heads)
                         for guide, reading in zip(guides, self.readings) if index in guide.reads_learners])
            for index, learner in enumerate(learners)]
        levels = [each.student_levels for each in self.of_learners]
        forms = []
        for index, (guide, reading) in enumerate(zip(guides, self.readings)):
            with at(f'model.teacher[{index}]' if len(guides) > 1 else 'model.teacher'):
                forms.append(guide.probe(reading, learners, levels))
        self.levels = [form.levels for form in forms]
        for name, term in terms.items():
            form, learner = forms[term.teacher_index], term.learner_index
            with _naming(name):
                heads = measure_student(learners[learner], term.student_heads)
                term.connect({**levels[learner], **heads},  # type: ignore[dict-item]  # a request equals its name
                             {**form.levels, **form.heads})  # type: ignore[dict-item]


def _check_is_its_own(term: DistillTerm, learner: nn.Module) -> None:
    """Refuses a term of a branch that reads within a part which is the student's, see ``share``."""
    for path in (*term.student_taps, *term.student_heads):
        part, _, within = path.partition('.')
        if getattr(getattr(learner, part, None), 'stands_for_students', False) and (within or part not in ENCODERS):
            refuse('learner', term.learner_index, f"0, for '{path}' lies in a part that is the student's",
                   'Or take it out of model.share.')


def _check_branches(learner: nn.Module) -> None:
    """Refuses a learner that makes several images of each as it trains."""
    if isinstance(learner, TridentFasterRCNN):
        raise HeadError(f'A {type(learner).__name__} passes each image through several branches as it trains, and has '
                        'the features and predictions of each where a teacher has one. Take a detector without '
                        'branches as the student, a FasterRCNN; a TridentNet can teach.')


@contextmanager
def _naming(term: str) -> Iterator[None]:
    """Says of what goes wrong which term it is."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(f'model.distill.{term}: {error}') from error
