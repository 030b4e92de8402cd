"""Masks from what dense heads predict; they need no ground truth."""
from __future__ import annotations

from typing import Dict, Tuple, Union

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.functional.masks import prediction_difference, teacher_confidence
from kd_det.heads import DenseOutputs, HeadError
from kd_det.masks.base import CellMask

ANCHOR_REDUCTIONS = ('max', 'mean')


class _PredictionMask(CellMask):
    """A mask from the class probabilities at each cell, of the head's level of the same stride.

    Args:
        head: ``'bbox_head'`` of one-stage detectors, or ``'rpn_head'``, whose only class is the object; or a dict with
            the keys ``student`` and ``teacher``.
        anchors: ``'max'`` or ``'mean'`` over the anchors of a cell.

    Raises:
        ValueError: Another word for ``anchors``.
    """

    def __init__(self, head: Union[str, Dict[str, str]] = 'bbox_head', anchors: str = 'max') -> None:
        super().__init__()
        if anchors not in ANCHOR_REDUCTIONS:
            raise ValueError(f"anchors='{anchors}': expected one of {', '.join(ANCHOR_REDUCTIONS)}.")
        heads = dict(student=head, teacher=head) if isinstance(head, str) else head
        self.student_head, self.teacher_head, self.anchors = heads['student'], heads['teacher'], anchors

    @property
    def teacher_heads(self) -> Tuple[str, ...]:
        return (self.teacher_head, )

    def teacher_probabilities(self, level: ComparedLevel) -> Tensor:
        """(N, classes, H, W)."""
        return self.probabilities(level, level.context.teacher_outputs[level.teacher_index][self.teacher_head])

    def probabilities(self, level: ComparedLevel, outputs: DenseOutputs) -> Tensor:
        """(N, classes, H, W) of that level.

        Raises:
            HeadError: The head has no such level.
        """
        index = outputs.level_of(level.stride)
        if outputs.shapes[index] != level.shape:
            raise HeadError(f'On the level of stride {level.stride} the features have {level.shape} cells but the head '
                            f'{outputs.shapes[index]}: a mask of predictions needs the features that the head sees.')
        return outputs.cell_probabilities(index, self.anchors).detach()


@MODELS.register_module()
class PredictionDifference(_PredictionMask):
    """Where the two detectors disagree: mean over classes of (p_t − p_s)² (PFI, Li et al., arXiv 2112.04840).

    It is made anew each step from the predictions of both, and fades as the student approaches the teacher.

    Args:
        class_agnostic: Compare the largest class probability alone: for heads that tell other classes apart, such as an
            RPN and a one-stage head.
        **kwargs: ``head`` (``'bbox_head'`` or ``'rpn_head'``, or a dict with the keys ``student`` and ``teacher``) and
            ``anchors`` (``'max'`` or ``'mean'`` over those of a cell).

    Example:
        >>> dict(type='FeatureImitation', mask=dict(type='PredictionDifference', head='rpn_head'), normalizer='cells')
    """

    def __init__(self, class_agnostic: bool = False, **kwargs) -> None:
        super().__init__(**kwargs)
        self.class_agnostic = class_agnostic

    @property
    def student_heads(self) -> Tuple[str, ...]:
        return (self.student_head, )

    def cells(self, level: ComparedLevel) -> Tensor:
        student = self.probabilities(level, level.context.student_outputs[self.student_head])
        teacher = self.teacher_probabilities(level)
        if self.class_agnostic:
            student, teacher = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
        if student.shape != teacher.shape:
            raise HeadError(f'The student tells {student.shape[1]} classes apart, the teacher {teacher.shape[1]}: give '
                            'a teacher of the same classes, or set class_agnostic=True.')
        return prediction_difference(student, teacher) * level.valid


@MODELS.register_module()
class TeacherConfidence(_PredictionMask):
    """Where the teacher sees an object: its largest class probability (feature richness, FRS, arXiv 2111.00674).

    Args:
        **kwargs: See :class:`PredictionDifference`; of ``head`` the teacher's counts.

    Example:
        >>> dict(type='FeatureImitation', mask='TeacherConfidence', normalizer='mask')
    """

    def cells(self, level: ComparedLevel) -> Tensor:
        return teacher_confidence(self.teacher_probabilities(level)) * level.valid
