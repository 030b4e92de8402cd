"""Which classes each teacher shares with the student, and what of a step is restricted to them."""
from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.config.classes import ClassMatch, count_classes, match_classes
from kd_det.config.files import ConfigurationError
from kd_det.context import DistillContext
from kd_det.heads import ROI_HEAD, DenseOutputs, HeadRequest, QueryDecoder, QueryOutputs, TeacherTowers
from kd_det.teachers import Guide

CLASSLESS_HEAD = 'rpn_head'  # it tells objects from background, whatever the classes


def has_classes(name: str) -> bool:
    """Whether what is read of a head, see :class:`~kd_det.heads.HeadRequest`, depends on the class."""
    return HeadRequest.parse(name).head != CLASSLESS_HEAD


class ClassSets:
    """Which classes each teacher shares with the student. A teacher that was not matched has the student's.

    Args:
        student: The student.

    Attributes:
        matches: By the teacher's index.
    """

    def __init__(self, student: nn.Module) -> None:
        self.student_count = count_classes(student)
        self.matches: dict[int, ClassMatch] = {}

    def match(self, student: Sequence[str] | None, teachers: Sequence[Guide], read: Container[int],
              inherited: Sequence[str] = ()) -> list[str]:
        """Matches the teachers' classes with the student's by name, where both are known.

        Args:
            student: Names of the classes in the student's training data, by label, or None. Where the student's head
                has another number of classes its labels are not those of the data, and the names count as unknown.
            teachers: The teachers.
            read: Indices of those whose outputs by class are read; another may share no class.
            inherited: The parts of the student that started from the first teacher.

        Returns:
            What was found, one report for each guide that has labels which are not the student's anyway.

        Raises:
            ConfigurationError: A teacher whose classes are read shares none with the student.
        """
        if student is not None and self.student_count not in (None, len(student)):
            student = None
        self.matches, reports = {}, []
        for index, teacher in enumerate(teachers):
            if teacher.has_student_labels or not (teacher.offers_heads or teacher.detects):
                continue
            try:
                report = self._match(index, student, teacher.classes)
            except ConfigurationError:
                if index in read:
                    raise
                report = "the teacher shares none with the student, and none of its outputs by class is read."
            if teacher.mixes_labels and index in self.matches and not self.matches[index].is_identity:
                raise ConfigurationError(f'model.teacher: guide {index} joins the student\'s outputs with those of a '
                                         'detector of other classes, or in another order. Take a guide for each: '
                                         f'{report}')
            wrong = [part for part in inherited if part in ('bbox_head', 'roi_head')]
            if wrong and index == 0 and index in self.matches and not self.matches[index].is_identity:
                report += (f' The outputs by class that {wrong[0]} inherited are in the order of the teacher: inherit '
                           'less.')
            reports.append(f'Classes of teacher {index}: {report}' if len(teachers) > 1 else f'Classes: {report}')
        return reports

    def _match(self, index: int, student: Sequence[str] | None, teacher: Sequence[str] | None) -> str:
        if student is None or teacher is None:
            return (f"the {'student' if student is None else 'teacher'}'s names are not known; labels are taken "
                    'to mean the same to both.')
        self.matches[index] = match_classes(student, teacher)
        return self.matches[index].report()

    def restrict_context(self, context: DistillContext, teacher_index: int) -> DistillContext:
        """The step as the terms of one teacher see it, see :func:`restrict_to_shared_classes`."""
        match = self.matches.get(teacher_index)
        if match is None or match.is_identity:
            return context
        return restrict_to_shared_classes(context, teacher_index, match)

    def convert_labels(self, labels: Sequence[Tensor], teacher_index: int) -> list[Tensor]:
        """Labels as the terms of one teacher see them: indices among the shared classes, -1 for the others."""
        match = self.matches.get(teacher_index)
        return list(labels) if match is None or match.is_identity else [match.index_shared(each) for each in labels]

    def find_own_labels(self, labels: Sequence[Tensor], teacher_index: int) -> list[Tensor] | None:
        """Labels as one teacher itself counts its classes, -1 for those that it lacks; None where they are the same."""
        match = self.matches.get(teacher_index)
        return None if match is None or match.is_identity else [match.find_own(each) for each in labels]

    def translate(self, detections: list[InstanceData], teacher_index: int, teacher: Guide) -> list[InstanceData]:
        """Gives a teacher's detections the student's labels.

        Args:
            detections: Of the teacher, one for each image.
            teacher_index: Which of the teachers it is.
            teacher: The teacher.

        Raises:
            ConfigurationError: It has another number of classes than the student, and the names are not known.
        """
        if teacher_index in self.matches:
            return [self.matches[teacher_index].translate(each) for each in detections]
        counts = teacher.num_classes, self.student_count
        if None not in counts and counts[0] != counts[1]:
            raise ConfigurationError(f'The teacher tells {counts[0]} classes apart, the student {counts[1]}, and '
                                     "which are the same is not known. Name the teacher's, by label, with "
                                     'teacher.classes=[…].')
        return detections


def restrict_to_shared_classes(context: DistillContext, teacher_index: int, match: ClassMatch) -> DistillContext:
    """Makes the step as the terms of one teacher see it: outputs and labels of the shared classes alone.

    Each side's logits, class probabilities and regressions by class are those of the shared classes, in the student's
    order. The background of softmax heads stands for "none of these". Labels are indices among the shared classes;
    boxes of other classes keep their place, labelled -1, and regions sampled for such boxes are left out.

    Args:
        context: The step.
        teacher_index: Which of the teachers it is.
        match: The classes that it shares with the student.
    """
    student = _restrict_outputs(context.student_outputs, match.of_student)
    taught = _restrict_outputs(context.teacher_outputs[teacher_index], match.of_teacher)
    if ROI_HEAD in student:
        regions = student[ROI_HEAD].regions
        background, shared = regions.labels == len(match.student), len(match.of_student)
        labels = match.index_shared(regions.labels.masked_fill(background, 0)).masked_fill(background, shared)
        regions, kept = regions._replace(labels=labels).select(labels >= 0), labels >= 0
        student[ROI_HEAD] = student[ROI_HEAD].restrict(match.of_student, regions, kept)
        if ROI_HEAD in taught:
            taught[ROI_HEAD] = tuple(each.restrict(match.of_teacher, regions, kept) for each in taught[ROI_HEAD])
    teachers = list(context.teacher_outputs)
    teachers[teacher_index] = taught
    return replace(context, student_outputs=student, teacher_outputs=teachers,
                   labels=[match.index_shared(labels) for labels in context.labels])


def _restrict_outputs(outputs: dict[str, Any], classes: Sequence[int]) -> dict[str, Any]:
    """Restricts the outputs of dense heads, and of queries and what makes them; the others stay as they are."""
    of_classes = DenseOutputs, QueryDecoder, QueryOutputs, TeacherTowers
    return {name: each.restrict(classes) if isinstance(each, of_classes) and has_classes(name) else each
            for name, each in outputs.items()}
