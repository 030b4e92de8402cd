"""Gets the outputs of heads: a student's from its own loss, a teacher's by running it."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import ContextManager, Dict, Iterable, Iterator, List, Sequence, Tuple, Union

from torch import nn

from kd_det.heads.dense import DenseOutputs
from kd_det.heads.errors import HeadError
from kd_det.heads.readers import find_reader, read_dense
from kd_det.heads.recording import Call, recorded_calls
from kd_det.heads.requirements import HEADS, ROI_HEAD, TOWERS_OF, check_head
from kd_det.heads.roi import RoIOutputs, read_sampled, run_roi_head, stages_of
from kd_det.heads.towers import TeacherTowers, TowerFeatures, read_towers, recorded_towers
from kd_det.taps import Levels, Taps

StudentOutputs = Dict[str, Union[DenseOutputs, RoIOutputs, TowerFeatures]]
# Of a teacher's RoI head there is one for each of its stages.
TeacherOutputs = Dict[str, Union[DenseOutputs, Tuple[RoIOutputs, ...], TeacherTowers]]


def find_head(model: nn.Module, name: str) -> nn.Module:
    """Returns a detector's head.

    Args:
        model: The detector.
        name: ``'bbox_head'`` of one-stage detectors, ``'rpn_head'`` and ``'roi_head'`` of two-stage detectors; after it
            perhaps what else it must have, see :func:`~kd_det.heads.requirements.check_head`.

    Raises:
        HeadError: The detector has no such head, or its outputs can not be read.
    """
    present = {each: type(getattr(model, each)) for each in HEADS if isinstance(getattr(model, each, None), nn.Module)}
    check_head(type(model).__name__, present, name)
    head = getattr(model, name.partition('.')[0])
    if name == ROI_HEAD:
        stages_of(head)
    return head


class StudentHeads:
    """Reads the outputs of some heads of a student from the forward that its own loss makes, with their gradient.

    Args:
        model: The student.
        names: See :func:`find_head`.

    Raises:
        HeadError: See :func:`find_head`.

    Example:
        >>> heads = StudentHeads(student, ['rpn_head'])
        >>> with heads.capture() as outputs:
        ...     losses = student.loss(images, data_samples)
        >>> outputs['rpn_head'].logits
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.heads = {name: find_head(model, name) for name in names}
        self.towers = [name for name in self.heads if name.endswith(TOWERS_OF)]
        self.dense = [name for name in self.heads if name in HEADS and name != ROI_HEAD]
        self.taps = Taps(model, self.dense, grouped=True)

    @contextmanager
    def capture(self) -> Iterator[StudentOutputs]:
        """Reads one step.

        Yields:
            A dict that is filled when the block ends: name -> outputs.
        """
        outputs: StudentOutputs = {}
        with ExitStack() as stack:
            maps = stack.enter_context(self.taps.capture())
            assignments = {name: stack.enter_context(_recorded_assignments(self.heads[name])) for name in self.dense}
            towers = {name: stack.enter_context(recorded_towers(self.heads[name])) for name in self.towers}
            stages = stages_of(self.heads[ROI_HEAD]) if ROI_HEAD in self.heads else []
            sampled = [stack.enter_context(recorded_calls(stage, 'loss_and_target')) for stage in stages]
            yield outputs
        for name in self.dense:
            outputs[name] = read_dense(self.heads[name], maps[name], [call.returned for call in assignments[name]])
        for name in self.towers:
            outputs[name] = read_towers(towers[name])
        if stages:
            outputs[ROI_HEAD] = read_sampled(stages, sampled)


def _recorded_assignments(head: nn.Module) -> ContextManager[List[Call]]:
    assignment = find_reader(head).assignment
    return nullcontext([]) if assignment is None else recorded_calls(head, assignment.method)


def run_heads(model: nn.Module, names: Sequence[str], features: Levels, student: StudentOutputs) -> TeacherOutputs:
    """Runs some heads of a teacher on its own features.

    Args:
        model: The teacher, in eval mode.
        names: See :func:`find_head`.
        features: What its neck puts out.
        student: The student's outputs; its RoI head's hold the regions for the teacher's.

    Raises:
        HeadError: See :func:`find_head`.
    """
    outputs: TeacherOutputs = {}
    for name in names:
        head = find_head(model, name)
        if name == ROI_HEAD:
            outputs[name] = run_roi_head(head, features, student[ROI_HEAD].regions)
        elif name.endswith(TOWERS_OF):
            outputs[name] = TeacherTowers(head)
        elif name in HEADS:
            outputs[name] = read_dense(head, head(features))
    return outputs
