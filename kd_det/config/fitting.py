"""Which methods fit a student and a teacher, what they have gained where that was measured, and what they cost."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config

from kd_det.config.choices import DETECTOR_FAMILIES
from kd_det.config.composition import NO_METHOD, distillation_config, find_model_family, fit_methods
from kd_det.config.detectors import DETECTORS, HeadClasses, find_head_classes
from kd_det.config.methods import MEASURED, available_methods, describe_method, find_files
from kd_det.registry import get_scope, within_scope

# By the variant of a benchmark.
TWINS = dict(inherit='a student that inherits and learns by no term', none='the plain student')


@dataclass(frozen=True)
class FittingMethod:
    """A method that fits.

    Attributes:
        name: As ``kd-det distill --method`` takes it.
        idea: What it compares; None where its files do not state it.
        gain: Points of mAP beside :attr:`Fitting.twin`, with the ends of its 95 % interval; None where it was not
            measured.
        cost: Time of its terms and of what they run of the teacher, in units of the student's own training step.
    """
    name: str
    idea: str | None
    gain: tuple[float, float, float] | None
    cost: float | None


@dataclass(frozen=True)
class Fitting:
    """What fits.

    Attributes:
        methods: First what has gained most; after those that were measured the others, by name.
        others: Why others do not fit, by name.
        measured: The kind of detector that the gains were measured on, of
            :data:`~kd_det.config.choices.DETECTOR_FAMILIES`; None where no kind of its family was.
        is_own: Whether that is the student's own kind, or another of its family.
        twin: The student that the gains are beside; None where no kind was measured.
    """
    methods: tuple[FittingMethod, ...]
    others: dict[str, str]
    measured: str | None
    is_own: bool
    twin: str | None

    @property
    def caption(self) -> str:
        """Where the numbers come from."""
        cost = ("Cost: a step's time beyond the student's, in units of that, measured on this kind, or else on another "
                'that the method serves.')
        if self.measured is None:
            return f'No detector of this family was measured. {cost}'
        whose = 'of this kind' if self.is_own else 'of this family'
        return (f'Gain: beside {self.twin}, by a {self.measured}, {whose}, slim and briefly trained on generated '
                f'images: docs/results.md. {cost}')


def find_fitting(student: str | Config, teacher: str | None = None, methods: Sequence[str] = ()) -> Fitting:
    """Finds the methods that fit a student.

    Args:
        student: See :func:`~kd_det.config.composition.distillation_config`.
        teacher: Config of the teacher, whose heads and levels they must fit, too; its weights are not needed.
        methods: Names or files to try; all that go by their names by default.

    Raises:
        ConfigurationError: The student is a distillation, or holds detectors but is none; or there is no such method.
        FileNotFoundError: There is no such file.
        TeacherError: The teacher's config holds no model.
    """
    for name in methods:
        find_files(name)  # told at once, not as one that does not fit
    config = distillation_config(student, teacher, None, NO_METHOD, inherit=())
    if teacher is not None:
        config.model.teacher.update(checkpoint=None, random_teacher=True)
    with within_scope(get_scope(config)):
        fits = list(fit_methods(config.model, methods or available_methods()))
        family, heads = find_model_family(config.model.student), find_head_classes(config.model.student)
    stored = json.loads(MEASURED.read_text(encoding='utf-8'))
    kind = find_kind(heads)
    measured = kind if kind in stored['gains'] else next(
        (each for each in stored['gains'] if DETECTOR_FAMILIES[each] == family), None)
    gains = stored['gains'].get(measured, {})
    found = [FittingMethod(fit.name, describe_method(fit.name, find_files(fit.name)).idea,
                           _read_gain(gains.get(fit.name)), _find_cost(stored['costs'], fit.name, (kind, measured)))
             for fit in fits if not fit.problem]
    found.sort(key=lambda each: (each.gain is None, -each.gain[0] if each.gain else 0, each.name))
    return Fitting(tuple(found), {fit.name: fit.problem for fit in fits if fit.problem}, measured, measured == kind,
                   TWINS.get(stored['twins'].get(measured)))


def _read_gain(stored: Any) -> tuple[float, float, float] | None:
    return None if stored is None else tuple(stored)


def _find_cost(costs: dict[str, dict[str, float]], method: str, kinds: Sequence[str | None]) -> float | None:
    """What a method costs on the first of these kinds of detectors on which it was measured, or else on any."""
    measured = {kind: of_methods[method] for kind, of_methods in costs.items() if method in of_methods}
    return next((measured[kind] for kind in (*kinds, *measured) if kind in measured), None)


def find_kind(heads: HeadClasses) -> str | None:
    """The kind of detectors, of :data:`~kd_det.config.choices.DETECTOR_FAMILIES`, that has these very heads."""
    return next((kind for kind, its_heads in DETECTORS.items() if its_heads == heads), None)
