"""Connects the terms with what they read of the student and of the teachers."""
from __future__ import annotations

from contextlib import contextmanager
from typing import Dict, Iterator, Sequence, Tuple

from torch import nn

from kd_det.configuration import ConfigurationError
from kd_det.distillers.building import check_cached
from kd_det.heads import TOWERS_OF, StudentHeads, StudentOutputs, find_head
from kd_det.heads.towers import tower_widths
from kd_det.losses import DistillTerm
from kd_det.losses.base import Forms
from kd_det.taps import Levels, Taps
from kd_det.teachers import of_teacher, probe_config, probe_levels, probe_towers, read_model_config


def measured_taps(student: nn.Module, term: DistillTerm) -> Tuple[str, ...]:
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

    def __init__(self, student: nn.Module, teachers: Sequence[dict], terms: Dict[str, DistillTerm]) -> None:
        self.student_taps = Taps(student, (path for term in terms.values() for path in measured_taps(student, term)))
        self.student_levels = probe_levels(student, self.student_taps) if terms else {}
        of_teachers = [[term for term in terms.values() if term.teacher == index] for index in range(len(teachers))]
        self.teacher_taps = [[path for term in each for path in term.teacher_taps] for each in of_teachers]
        self.teacher_heads = [[head for term in each for head in term.teacher_heads] for each in of_teachers]
        self.teacher_levels = []
        for config, taps in zip(teachers, self.teacher_taps):
            with of_teacher(config['config']):
                self.teacher_levels.append(probe_config(read_model_config(config['config']), taps) if taps else {})
        for name, term in terms.items():
            try:
                check_cached(teachers[term.teacher], term.teacher_heads)
                term.connect(self._student_forms(student, term), self._teacher_forms(teachers[term.teacher], term))
            except ValueError as error:
                raise ConfigurationError(f'model.distill.{name}: {error}') from error
        self.student_heads = StudentHeads(student, (head for term in terms.values() for head in term.student_heads))

    @contextmanager
    def capture(self) -> Iterator[Tuple[Dict[str, Levels], StudentOutputs]]:
        """Reads one step of the student.

        Yields:
            Features by path and outputs by head; both are filled when the block ends.
        """
        with self.student_taps.capture() as features, self.student_heads.capture() as outputs:
            yield features, outputs

    def _student_forms(self, student: nn.Module, term: DistillTerm) -> Forms:
        heads = {name: find_head(student, name) for name in term.student_heads}
        towers = {name: tower_widths(head) for name, head in heads.items() if name.endswith(TOWERS_OF)}
        return {**self.student_levels, **towers}

    def _teacher_forms(self, teacher: dict, term: DistillTerm) -> Forms:
        return {**self.teacher_levels[term.teacher], **probe_towers(teacher['config'], term.teacher_heads)}
