"""The outputs of heads, in one form: the student's read from its own forward, the teacher's by running its heads."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count, takewhile
from typing import Any, NamedTuple

from torch import Tensor, nn

from kd_det.heads.decoders import QueryDecoder, encode, find_family, read_decoder
from kd_det.heads.dense import DenseOutputs
from kd_det.heads.queries import QueryOutputs, read_queries
from kd_det.heads.readers import DenseForm, check_head, check_sampling, find_reader, read_dense
from kd_det.heads.request import HEADS, KINDS, ROI_HEAD, HeadRequest, Remaining
from kd_det.heads.roi import RoIOutputs, find_stages, read_sampled, run_roi_head
from kd_det.heads.towers import (
    Readings,
    TeacherTowers,
    TowerFeatures,
    TowerMoments,
    TowerWidths,
    measure_moments,
    read_towers,
    record_towers,
    tower_widths,
)
from kd_det.taps import Call, Features, Taps, record_calls

# By request: DenseOutputs, QueryOutputs, QueryDecoder, RoIOutputs or TowerFeatures; who reads them knows which it
# asked for.
StudentOutputs = dict[str, Any]
# The same, but TeacherTowers for towers, and of a RoI head a tuple with the RoIOutputs of each of its stages.
TeacherOutputs = dict[str, Any]
HeadForm = TowerWidths | DenseForm  # of what is asked of a head


class TeacherForward(NamedTuple):
    """What there is of a teacher's forward before its heads run.

    Attributes:
        model: The teacher, in eval mode.
        features: What its neck puts out.
        student: The student's outputs; its RoI head's hold the regions for the teacher's.
        samples: mmdet's data samples with the shapes of images and batch, which DETRs ask for; without ground truth.
        cut: Cuts a map of a batch that was padded for the teacher back to the student's.
    """
    model: Any
    features: Features
    student: StudentOutputs
    samples: Sequence[Any] = ()
    cut: Callable[[Tensor], Tensor] = lambda level: level


class OutputKind:
    """One kind of outputs: how the student's are read in its own loss, and the teacher's had by running its head.

    Attributes:
        is_tapped: Whether the student's are read from what its head's own forward returns.
    """

    is_tapped = False

    def record(self, head: Any) -> AbstractContextManager[Any]:
        """Records what the student's loss computes of it while the block runs, beside the head's forward."""
        raise NotImplementedError

    def read(self, head: Any, maps: tuple[Features, ...], recorded: Any) -> Any:
        """Makes the student's outputs.

        Args:
            head: The head.
            maps: What its forward returned, kind by kind, level by level; of a kind that :attr:`is_tapped`.
            recorded: What :meth:`record` yielded.
        """
        raise NotImplementedError

    def watch(self, head: Any) -> AbstractContextManager[Any]:
        """Records what the teacher's other heads and kinds compute of it while they run."""
        return nullcontext()

    def run(self, head: Any, forward: TeacherForward, watched: Any) -> Any:
        """Makes the teacher's outputs.

        Args:
            head: The head.
            forward: What there is before it runs.
            watched: What :meth:`watch` yielded.
        """
        raise NotImplementedError


class DenseKind(OutputKind):
    """The maps of a dense head, as :class:`~kd_det.heads.DenseOutputs`, and what its assigner made of the priors."""

    is_tapped = True

    def record(self, head: Any) -> AbstractContextManager[Sequence[Call]]:
        reader = find_reader(type(head))
        return record_calls(head, reader.assigning_method) if 'positives' in reader.parts else nullcontext(())

    def read(self, head: Any, maps: tuple[Features, ...], recorded: Sequence[Call]) -> DenseOutputs:
        return read_dense(head, maps, [call.returned for call in recorded])

    def run(self, head: Any, forward: TeacherForward, watched: None) -> DenseOutputs:
        return read_dense(head, [tuple(map(forward.cut, maps)) for maps in head(forward.features)])


class QueryKind(OutputKind):
    """The queries of a DETR's head, as :class:`~kd_det.heads.QueryOutputs`, and what its matcher made of them."""

    is_tapped = True

    def record(self, head: Any) -> AbstractContextManager[Sequence[Call]]:
        return record_calls(head.assigner, 'assign')

    def read(self, head: Any, maps: tuple[Features, ...], recorded: Sequence[Call]) -> QueryOutputs:
        (logits, ), (boxes, ) = maps  # each one tensor of all decoder layers
        return read_queries(head, logits, boxes, [call.returned for call in recorded])

    def run(self, head: Any, forward: TeacherForward, watched: None) -> QueryOutputs:
        logits, boxes = head(**forward.model.forward_transformer(forward.features, forward.samples))
        return read_queries(head, logits, boxes)


class DecoderKind(OutputKind):
    """A DETR's decoder, to be run on other queries, as :class:`~kd_det.heads.decoders.QueryDecoder`.

    Args:
        model: The detector whose it is.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def record(self, head: Any) -> AbstractContextManager[Sequence[Call]]:
        return record_calls(self.model, 'forward_decoder')

    def read(self, head: Any, maps: tuple[Features, ...], recorded: Sequence[Call]) -> QueryDecoder:
        return read_decoder(self.model, recorded[0].arguments)

    def watch(self, head: Any) -> AbstractContextManager[Sequence[Call]]:
        return record_calls(self.model, 'forward_decoder')

    def run(self, head: Any, forward: TeacherForward, watched: Sequence[Call]) -> QueryDecoder:
        given = watched[0].arguments if watched else encode(self.model, forward.features, forward.samples)
        return read_decoder(self.model, given).detach()


class TowerKind(OutputKind):
    """The features within a dense head: of a student to be read, of a teacher to be put in their place.

    Args:
        remaining: At which depth, see :class:`~kd_det.heads.HeadRequest`.
    """

    def __init__(self, remaining: Remaining) -> None:
        self.remaining = remaining

    def record(self, head: Any) -> AbstractContextManager[Readings]:
        return record_towers(head, self.remaining)

    def read(self, head: Any, maps: tuple[Features, ...], recorded: Readings) -> TowerFeatures:
        return read_towers(recorded)

    def watch(self, head: Any) -> AbstractContextManager[Readings]:
        return record_towers(head, self.remaining)

    def run(self, head: Any, forward: TeacherForward, watched: Readings) -> TeacherTowers:
        return TeacherTowers(head, self.remaining, measure_moments(read_towers(watched), forward.samples))


class RoIKind(OutputKind):
    """What a RoI head says of the regions that the student samples, as :class:`~kd_det.heads.RoIOutputs`."""

    @contextmanager
    def record(self, head: Any) -> Iterator[list[list[Call]]]:
        with ExitStack() as stack:
            yield [stack.enter_context(record_calls(stage, 'loss_and_target')) for stage in find_stages(head)]

    def read(self, head: Any, maps: tuple[Features, ...], recorded: list[list[Call]]) -> RoIOutputs:
        return read_sampled(find_stages(head), recorded)

    def run(self, head: Any, forward: TeacherForward, watched: None) -> tuple[RoIOutputs, ...]:
        return run_roi_head(head, forward.features, forward.student[ROI_HEAD].regions)


PARTS = {'': DenseKind(), 'queries': QueryKind()}  # by part of the request
ROI_KIND = RoIKind()


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
        find_stages(head)
    if request.part == 'decoder':
        find_family(type(model))
    return head


def measure_student(model: nn.Module, names: Iterable[str]) -> dict[HeadRequest, HeadForm]:
    """:func:`measure_heads` of a detector whose heads are read in its own loss.

    Raises:
        HeadError: The same, or what its RoI head samples can not be read there.
    """
    forms, requests = measure_heads(model, names), map(HeadRequest.parse, names)
    if ROI_HEAD in requests:
        check_sampling(type(getattr(model, ROI_HEAD)))
    return forms


def measure_heads(model: nn.Module, names: Iterable[str]) -> dict[HeadRequest, HeadForm]:
    """Finds the form of a detector's heads: the widths of towers, and what the outputs of dense heads are of.

    Args:
        model: The detector.
        names: See :class:`~kd_det.heads.HeadRequest`; those of other parts are checked, and have none.

    Raises:
        HeadError: See :func:`find_head`.
    """
    heads = {request: find_head(model, request) for request in map(HeadRequest.parse, names)}
    forms = {request: measure_head(head, request) for request, head in heads.items()}
    return {request: form for request, form in forms.items() if form is not None}


def measure_head(head: Any, request: HeadRequest) -> HeadForm | None:
    """The form of a head that can be read, as far as there is one of what is asked of it."""
    if request.part == 'towers':
        return tower_widths(head)
    if request.part or request == ROI_HEAD or not hasattr(getattr(head, 'prior_generator', None), 'num_levels'):
        return None
    return find_reader(type(head)).describe(head)


def _find_kinds(model: nn.Module, names: Iterable[str]) -> dict[HeadRequest, tuple[OutputKind, nn.Module]]:
    """Finds the heads that are asked for, and how they are read; those of which nothing is read are only checked."""
    found: dict[HeadRequest, tuple[OutputKind, nn.Module]] = {}
    for request in map(HeadRequest.parse, names):
        head = find_head(model, request)
        kind = (ROI_KIND if request == ROI_HEAD else
                TowerKind(request.remaining) if request.part == 'towers' else
                DecoderKind(model) if request.part == 'decoder' else PARTS.get(request.part))
        if kind is not None:
            found[request] = kind, head
    return found


class StudentHeads:
    """Reads the outputs of some heads of a student from the forward that its own loss makes, with their gradient.

    Args:
        model: The student.
        names: See :class:`~kd_det.heads.HeadRequest`.

    Raises:
        HeadError: See :func:`find_head`.

    Example:
        .. code-block:: python

            heads = StudentHeads(student, ['rpn_head'])
            with heads.capture() as outputs:
                losses = student.loss(images, data_samples)
            outputs['rpn_head'].logits
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.kinds = _find_kinds(model, names)
        tapped = (request.head for request, (kind, _) in self.kinds.items() if kind.is_tapped)
        self.taps = Taps(model, tapped, grouped=True)

    @contextmanager
    def capture(self) -> Iterator[StudentOutputs]:
        """Reads one step.

        Yields:
            A dict that is filled when the block ends: request -> outputs.
        """
        outputs: StudentOutputs = {}
        with ExitStack() as stack:
            maps = stack.enter_context(self.taps.capture())
            recorded = {request: stack.enter_context(kind.record(head)) for request, (kind, head) in self.kinds.items()}
            yield outputs
        for request, (kind, head) in self.kinds.items():
            outputs[request] = kind.read(head, maps.get(request.head, ()), recorded[request])


def run_heads(names: Iterable[str], forward: TeacherForward) -> TeacherOutputs:
    """Runs some heads of a teacher.

    Args:
        names: See :class:`~kd_det.heads.HeadRequest`.
        forward: What there is before they run.

    Returns:
        Request -> outputs, without the requests that only demand what a head must tell.

    Raises:
        HeadError: See :func:`find_head`.
    """
    kinds = _find_kinds(forward.model, names)
    with ExitStack() as stack:
        watched = {request: stack.enter_context(kind.watch(head)) for request, (kind, head) in kinds.items()}
        # These last: what passes towers, and what an encoder puts out, is known when the head has run.
        order = sorted(kinds, key=lambda request: request.part in ('towers', 'decoder'))
        return {request: _keep_read(request, kinds[request][0].run(kinds[request][1], forward, watched[request]))
                for request in order}


def _keep_read(request: HeadRequest, outputs: Any) -> Any:
    """Lets go of what a request does not read."""
    if isinstance(outputs, DenseOutputs) and len(request.kinds) < len(KINDS):
        return outputs.keep(request.kinds)
    return outputs


# ----------------------------------------------------------------------------------- what a cache keeps of a teacher


def can_be_kept(name: str) -> bool:
    """Whether what a term reads of a head depends on the image alone, and is made of maps.

    Args:
        name: See :class:`~kd_det.heads.HeadRequest`.
    """
    request = HeadRequest.parse(name)
    return request.head != ROI_HEAD and request.part not in ('queries', 'decoder')


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


def list_moments(outputs: TeacherOutputs) -> dict[str, Features]:
    """What is kept of a teacher's towers, in the form of :func:`record_maps`."""
    return {f'{name}/{tower}': moments for name, each in outputs.items() if isinstance(each, TeacherTowers)
            for tower, moments in enumerate(each.moments)}


def read_maps(model: nn.Module, names: Sequence[str], maps: dict[str, Features]) -> TeacherOutputs:
    """Makes the outputs of a teacher's heads.

    Args:
        model: The teacher.
        names: See :class:`~kd_det.heads.HeadRequest`.
        maps: What :func:`record_maps` and :func:`list_moments` gave in this or another step.
    """
    outputs: TeacherOutputs = {}
    for request in map(HeadRequest.parse, names):
        head = getattr(model, request.head)
        present = [maps[each] for each in takewhile(maps.__contains__, (f'{request}/{kind}' for kind in count()))]
        if not request.part:
            outputs[request] = _keep_read(request, read_dense(head, present))
        elif request.part == 'towers':
            outputs[request] = TeacherTowers(head, request.remaining, TowerMoments(*present))
    return outputs
