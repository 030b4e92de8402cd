"""The outputs of heads, in one form: the student's read from its own forward, the teacher's by running its heads."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count, takewhile
from typing import Any, NamedTuple

from torch import Tensor, nn

from kd_det.heads.dense import DenseOutputs
from kd_det.heads.queries import QueryOutputs, read_queries
from kd_det.heads.readers import check_head, find_reader, read_dense
from kd_det.heads.request import HEADS, ROI_HEAD, HeadRequest
from kd_det.heads.roi import RoIOutputs, read_sampled, run_roi_head, stages_of
from kd_det.heads.towers import TeacherTowers, TowerFeatures, read_towers, record_towers
from kd_det.taps import Features, Taps, record_calls


def can_be_kept(name: str) -> bool:
    """Whether what a term reads of a head depends on the image alone, and is made of maps.

    Args:
        name: See :class:`~kd_det.heads.HeadRequest`.
    """
    request = HeadRequest.parse(name)
    return request.head != ROI_HEAD and request.part != 'queries'


@contextmanager
def record_maps(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Features]]:
    """Records what the forwards of a teacher's dense heads return while the block runs.

    Args:
        model: The teacher.
        names: See :class:`~kd_det.heads.HeadRequest`; those that :func:`can_be_kept`.

    Yields:
        A dict that is filled when the block ends: ``'bbox_head/0'`` -> the first kind of maps of this head, one of
        (N, C, H, W) per level.
    """
    maps: dict[str, Features] = {}
    with ExitStack() as stack:
        calls = {request: stack.enter_context(record_calls(getattr(model, request.head), 'forward'))
                 for request in map(HeadRequest.parse, names) if not request.part}
        yield maps
    for name, (call, ) in calls.items():
        maps.update({f'{name}/{kind}': tuple(levels) for kind, levels in enumerate(call.returned)})


def read_maps(model: nn.Module, names: Sequence[str], maps: dict[str, Features]) -> dict:
    """Makes the outputs of a teacher's heads from what :func:`record_maps` recorded in this or another step."""
    outputs = {}
    for request in map(HeadRequest.parse, names):
        head = getattr(model, request.head)
        if not request.part:
            present = takewhile(maps.__contains__, (f'{request}/{kind}' for kind in count()))
            outputs[request] = read_dense(head, [maps[each] for each in present])
        elif request.part == 'towers':
            outputs[request] = TeacherTowers(head)
    return outputs


StudentOutputs = dict[str, DenseOutputs | QueryOutputs | RoIOutputs | TowerFeatures]
# Of a teacher's RoI head there is one for each of its stages.
TeacherOutputs = dict[str, DenseOutputs | QueryOutputs | tuple[RoIOutputs, ...] | TeacherTowers]


class TeacherForward(NamedTuple):
    """What there is of a teacher's forward before its heads run.

    Attributes:
        model: The teacher, in eval mode.
        features: What its neck puts out.
        student: The student's outputs; its RoI head's hold the regions for the teacher's.
        samples: mmdet's data samples with the shapes of images and batch, which DETRs ask for; without ground truth.
        cut: Cuts a map of a batch that was padded for the teacher back to the student's.
    """
    model: nn.Module
    features: Features
    student: StudentOutputs
    samples: Sequence = ()
    cut: Callable[[Tensor], Tensor] = lambda level: level


class Kind(NamedTuple):
    """How one kind of outputs is had.

    Attributes:
        record: Records what the student's loss computes of it beside the head's own forward, from the head.
        read: Makes the outputs of a student, from the head, what its forward returned, and what was recorded.
        run: Makes the outputs of a teacher, from the head and the forward.
        tapped: Whether the head's own forward is read.
    """
    record: Callable[[nn.Module], AbstractContextManager]
    read: Callable[[nn.Module, tuple[Features, ...], Any], Any]
    run: Callable[[nn.Module, TeacherForward], Any]
    tapped: bool = False


def find_head(model: nn.Module, name: str) -> nn.Module:
    """Returns a detector's head.

    Args:
        model: The detector.
        name: See :class:`~kd_det.heads.HeadRequest`.

    Raises:
        HeadError: The detector has no such head, or what is asked of it can not be read.
    """
    request = HeadRequest.parse(name)
    present = {each: type(getattr(model, each)) for each in HEADS if isinstance(getattr(model, each, None), nn.Module)}
    check_head(type(model).__name__, present, request)
    head = getattr(model, request.head)
    if request == ROI_HEAD:
        stages_of(head)
    return head


class StudentHeads:
    """Reads the outputs of some heads of a student from the forward that its own loss makes, with their gradient.

    Args:
        model: The student.
        names: See :class:`~kd_det.heads.HeadRequest`.

    Raises:
        HeadError: See :func:`find_head`.

    Example:
        >>> heads = StudentHeads(student, ['rpn_head'])
        >>> with heads.capture() as outputs:
        ...     losses = student.loss(images, data_samples)
        >>> outputs['rpn_head'].logits
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        heads = {request: find_head(model, request) for request in map(HeadRequest.parse, names)}
        self.heads = {request: head for request, head in heads.items() if _kind_of(request) is not None}
        self.taps = Taps(model, (request.head for request in self.heads if _kind_of(request).tapped), grouped=True)

    @contextmanager
    def capture(self) -> Iterator[StudentOutputs]:
        """Reads one step.

        Yields:
            A dict that is filled when the block ends: name -> outputs.
        """
        outputs: StudentOutputs = {}
        with ExitStack() as stack:
            maps = stack.enter_context(self.taps.capture())
            recorded = {request: stack.enter_context(_kind_of(request).record(head))
                        for request, head in self.heads.items()}
            yield outputs
        for request, head in self.heads.items():
            outputs[request] = _kind_of(request).read(head, maps.get(request.head), recorded[request])


def run_heads(names: Sequence[str], forward: TeacherForward) -> TeacherOutputs:
    """Runs some heads of a teacher.

    Args:
        names: See :class:`~kd_det.heads.HeadRequest`.
        forward: What there is before they run.

    Raises:
        HeadError: See :func:`find_head`.
    """
    heads = {request: find_head(forward.model, request) for request in map(HeadRequest.parse, names)}
    return {request: _kind_of(request).run(head, forward)
            for request, head in heads.items() if _kind_of(request) is not None}


# ---------------------------------------------------------------------------------------------------- the kinds


def _record_dense(head: nn.Module) -> AbstractContextManager:
    assignment = find_reader(head).assignment
    return nullcontext(()) if assignment is None else record_calls(head, assignment.method)


@contextmanager
def _record_stages(head: nn.Module) -> Iterator[list]:
    with ExitStack() as stack:
        yield [stack.enter_context(record_calls(stage, 'loss_and_target')) for stage in stages_of(head)]


def _run_queries(head: nn.Module, forward: TeacherForward) -> QueryOutputs:
    return read_queries(head, *head(**forward.model.forward_transformer(forward.features, forward.samples)))


DENSE = Kind(
    record=_record_dense,
    read=lambda head, maps, calls: read_dense(head, maps, [call.returned for call in calls]),
    run=lambda head, forward: read_dense(head, [tuple(map(forward.cut, maps)) for maps in head(forward.features)]),
    tapped=True)
QUERIES = Kind(
    record=lambda head: record_calls(head.assigner, 'assign'),
    read=lambda head, maps, calls: read_queries(head, *(layers for layers, in maps), [call.returned for call in calls]),
    run=_run_queries,
    tapped=True)
TOWERS = Kind(
    record=record_towers,
    read=lambda head, _, calls: read_towers(calls),
    run=lambda head, _: TeacherTowers(head))
ROIS = Kind(
    record=_record_stages,
    read=lambda head, _, calls: read_sampled(stages_of(head), calls),
    run=lambda head, forward: run_roi_head(head, forward.features, forward.student[ROI_HEAD].regions))

KINDS = {'': DENSE, 'towers': TOWERS, 'queries': QUERIES}  # by part


def _kind_of(request: HeadRequest) -> Kind | None:
    """The kind of outputs that a request is for; None for one that only demands what a head must have."""
    return ROIS if request == ROI_HEAD else KINDS.get(request.part)
