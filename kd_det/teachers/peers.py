"""Guides that are made of the learners themselves: another one of the same step, and the student's moving average."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt
from mmdet.registry import MODELS
from mmengine.model import ExponentialMovingAverage
from torch import Tensor, nn

from kd_det.config.arguments import ArgumentError, Index, declared
from kd_det.heads import ROI_HEAD, HeadError, HeadRequest, StudentOutputs, TeacherOutputs
from kd_det.heads.capture import HeadForm, measure_heads
from kd_det.heads.decoders import evaluating
from kd_det.heads.roi import run_roi_head
from kd_det.taps import Features
from kd_det.teachers.engine import Engine, take_from_first_rank
from kd_det.teachers.guide import Guide, GuideForm, LearnerStep, Reading, ReadLevels, Shape
from kd_det.teachers.teacher import Teacher


@MODELS.register_module()
class Peer(Guide):
    """Another learner of the same step, as it is before the step (Deep Mutual Learning, Zhang et al., CVPR 2018).

    Its features and outputs are those of its own training forward, without gradient; only its RoI head runs again, on
    the regions that the learner sampled who learns from it, in eval mode, so that no statistics move.

    Args:
        learner: Its index: 0 is the student, 1 the first of ``model.peers``.

    Raises:
        ArgumentError: An argument does not fit.
    """
    has_student_labels = offers_features = offers_heads = True

    @declared
    def __init__(self, learner: Index = 1) -> None:
        self.learner, self.reads_learners = learner, (learner, )

    @property
    def described(self) -> str:
        return f'learner {self.learner}'

    def check(self, reading: Reading) -> None:
        for request in map(HeadRequest.parse, reading.heads):
            if request.part == 'towers':
                raise HeadError(f"it puts its features into the towers of '{request.head}', which of a peer learn in "
                                'the same step. Take a frozen teacher, or a term that compares outputs.')

    def probe(self, reading: Reading, learners: Sequence[nn.Module],
              levels: Sequence[Mapping[str, Any]]) -> GuideForm:
        forms: dict[HeadRequest, HeadForm] = {}
        for head in reading.heads:
            try:
                forms.update(measure_heads(learners[self.learner], [head]))
            except HeadError as error:
                raise ArgumentError('learner', f'a term reads its {head}. {error}') from error
        return GuideForm({path: levels[self.learner][path] for path in reading.taps}, forms)

    def observe(self, images: Tensor, image_shapes: Sequence[Shape], heads: Sequence[str] = (),
                student: StudentOutputs | None = None, taps: Sequence[str] | None = None,
                levels: ReadLevels | None = None,
                learners: Sequence[LearnerStep] = ()) -> tuple[dict[str, Features], TeacherOutputs]:
        own = learners[self.learner]
        features = {path: tuple(level.detach() for level in own.features[path]) for path in taps or ()}
        return features, {request: read_outputs(own, request, student)
                          for request in map(HeadRequest.parse, heads) if request in own.outputs or request == ROI_HEAD}


def read_outputs(learner: LearnerStep, request: HeadRequest, student: StudentOutputs | None) -> Any:
    """What a learner's head put out in this step, without gradient; of a RoI head, for the regions of another."""
    if request != ROI_HEAD:
        return learner.outputs[request].detach()
    neck = tuple(level.detach() for level in learner.neck)
    with torch.no_grad(), evaluating(learner.model.roi_head):
        return run_roi_head(learner.model.roi_head, neck, (student or {})[ROI_HEAD].regions)


@MODELS.register_module()
class Average(Guide):
    """The moving average of the student's weights: a teacher that the student makes of itself.

    For self-distillation, and as a mean teacher on images without labels (Tarvainen and Valpola, arXiv 1703.01780):
    ``pseudo_labels`` of a guide of this kind. It starts as the student's copy when the first step begins. Of a student
    that is trained for integers its averaged weights and what it reads are rounded as the student's are, by the
    student's ranges. On several ranks the statistics are those of the first, which a checkpoint holds.

    Args:
        momentum: m of average ← (1 − m)·average + m·student after each step, of the weights and of the statistics of
            batch normalisation.

    Raises:
        ArgumentError: An argument does not fit.
    """
    has_student_labels = offers_features = offers_heads = detects = True
    reads_learners = (0, )

    @declared
    def __init__(self, momentum: Annotated[float, Gt(0), Lt(1)] = 0.001) -> None:
        self.momentum = momentum

    def probe(self, reading: Reading, learners: Sequence[nn.Module],
              levels: Sequence[Mapping[str, Any]]) -> GuideForm:
        return GuideForm({path: levels[0][path] for path in reading.taps}, measure_heads(learners[0], reading.heads))

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> AveragedStudent:
        return AveragedStudent(learners[0], self.momentum, reading)


class AveragedStudent(Teacher):
    """An :class:`Average` at work.

    Args:
        student: The student; its weights are read after each step.
        momentum: See :class:`Average`.
        reading: What is read of it.
    """
    has_student_labels = True

    def __init__(self, student: nn.Module, momentum: float, reading: Reading) -> None:
        self.student = student
        self.average = ExponentialMovingAverage(student, momentum, update_buffers=True)
        self.model = self.average.module
        for module in self.model.modules():  # those of the student's taps
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        quantizer = getattr(self.model, 'quantizer', None)
        if quantizer is not None:  # a copy of the student's, which would find ranges of its own, and nothing saves them
            quantizer.follow(student.quantizer)
        self.engine = Engine(fuse=False, channels_last=False)
        self._digests = None
        self._prepare(reading.taps, reading.heads, student.data_preprocessor)

    def start_engine(self) -> None:
        if not self.average.steps:
            self.average.update_parameters(self.student)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> AveragedStudent:
        super()._apply(function)
        self.average.avg_parameters = self.model.state_dict()  # which mmengine has read once, before they moved
        return self

    def before_training(self) -> None:
        self.start_engine()  # in a step whose images do not ask for it a rank would be a step behind the others

    def after_step(self) -> None:
        self.average.update_parameters(self.student)
        # Each rank's student has statistics of its own images, and goes on from the first one's when it is resumed.
        take_from_first_rank(buffer for buffer in self.model.buffers() if buffer.is_floating_point())

    def fingerprint(self) -> str:
        return ''

    def state_dict(self) -> dict[str, Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.average.load_state_dict(state)
