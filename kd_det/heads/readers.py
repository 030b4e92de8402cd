"""What can be wrong with a head."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RetinaSepBNHead,
    RPNHead,
    RTMDetHead,
    RTMDetSepBNHead,
    SSDHead,
    YOLOFHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, MlvlPointGenerator
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from kd_det.heads.dense import DenseOutputs, Stride
from kd_det.heads.queries import has_queries
from kd_det.heads.request import PARTS, ROI_HEAD, HeadError, HeadRequest
from kd_det.taps import Features


def check_head(detector: str, heads: Mapping[str, type[nn.Module]], name: str) -> None:
    """Checks that a detector has a head, and that what is asked of it can be read.

    Args:
        detector: Its name, for the message.
        heads: The classes of its heads, those of :data:`~kd_det.heads.request.HEADS` that it has.
        name: See :class:`~kd_det.heads.HeadRequest`.

    Raises:
        HeadError: The head is absent, its outputs can not be read, or it does not have that part.
    """
    request = HeadRequest.parse(name)
    if request.head not in heads:
        raise HeadError(f"A {detector} has no '{request.head}'; it has {', '.join(heads) or 'none that can be read'}.")
    head, part = heads[request.head], request.part
    if request.head == ROI_HEAD:
        if not issubclass(head, (StandardRoIHead, CascadeRoIHead)):
            raise HeadError(f'The outputs of a {head.__name__} can not be read: only those of StandardRoIHead, '
                            'CascadeRoIHead and heads derived from them.')
        has = not part
    elif has_queries(head):
        if part != 'queries':
            raise HeadError(f'A {head.__name__} predicts queries, nothing cell by cell as a dense head does.')
        has = True
    elif part == 'queries':
        has = False
    else:
        reader = reader_of(head)
        has = {'': True, 'towers': reader.towers, 'positives': reader.assignment is not None,
               'distributions': reader.distributions}[part]
    if not has:
        raise HeadError(f'A {head.__name__} {PARTS[part]}.')


Maps = Sequence[Tensor]
Decoder = Callable[[Tensor, Tensor], Tensor]  # priors and regressions, (n, 4) each, to boxes


def called_strides(strides: Iterable[Stride | Sequence[Stride]]) -> tuple[Stride, ...]:
    """The strides by which levels are called, from those of a prior generator or of its config.

    Args:
        strides: In pixels, each a number, or a pair of width and height, of which the width's counts.

    Returns:
        Whole numbers as ``int``, so that 8, 8.0 and (8, 8) are the same level.
    """
    widths = (stride[0] if isinstance(stride, (tuple, list)) else stride for stride in strides)
    return tuple(int(width) if width == int(width) else float(width) for width in widths)


class Assignment(NamedTuple):
    """Where a family of heads assigns its priors to boxes.

    Attributes:
        method: The method of the head that does.
        positives: Makes (N, priors of all levels) of bool from the head, what each call of the method returned, and N.
        targets: Makes (N, priors of all levels, 4) regressions to the assigned boxes, in the units of
            :class:`~kd_det.heads.DenseOutputs`, from the head, what each call of the method returned, and the outputs;
            None where it does not tell them.
    """
    method: str
    positives: Callable[[nn.Module, Sequence, int], Tensor]
    targets: Callable[[nn.Module, Sequence, DenseOutputs], Tensor] | None = None


class Reader(NamedTuple):
    """How one family of heads is read.

    Attributes:
        read: Turns head and raw outputs into :class:`~kd_det.heads.DenseOutputs`.
        assignment: Where its positive priors are found; None where they are not.
        towers: All levels share its ``cls_convs`` and ``reg_convs``, stacks of layers before those that predict.
        distributions: It predicts distributions over the distance to each side.
    """
    read: Callable[..., DenseOutputs]
    assignment: Assignment | None = None
    towers: bool = False
    distributions: bool = False


READERS: dict[type[nn.Module], Reader] = {}


def reads(*heads: type[nn.Module], assignment: Assignment | None = None, towers: bool = False,
          distributions: bool = False) -> Callable:
    """Registers a reader for some head classes.

    Args:
        heads: The classes.
        assignment: See :class:`Reader`.
        towers: See :class:`Reader`.
        distributions: See :class:`Reader`.

    Example:
        >>> @reads(MyHead)
        ... def read_my_head(head, class_maps, box_maps): ...
    """

    def register(read: Callable[..., DenseOutputs]) -> Callable[..., DenseOutputs]:
        READERS.update({head: Reader(read, assignment, towers, distributions) for head in heads})
        return read

    return register


def find_reader(head: nn.Module) -> Reader:
    """Returns the reader of a dense head.

    Raises:
        HeadError: There is none.
    """
    return reader_of(type(head))


def reader_of(head: type[nn.Module]) -> Reader:
    """Returns the reader of a class of dense heads.

    Raises:
        HeadError: There is none.
    """
    overridden = set()
    for ancestor in head.__mro__:
        if ancestor in READERS and not overridden & {'forward', 'forward_single'}:
            reader = READERS[ancestor]
            assigns_otherwise = reader.assignment and reader.assignment.method in overridden
            return reader._replace(assignment=None) if assigns_otherwise else reader
        overridden.update(vars(ancestor))
    known = ', '.join(sorted(each.__name__ for each in READERS))
    raise HeadError(f'The outputs of a {head.__name__} can not be read. Known are {known} and their subclasses '
                    'without a forward of their own; kd_det.heads.reads registers a reader for another head.')


def read_dense(head: nn.Module, outputs: Sequence[Maps], assignments: Sequence = ()) -> DenseOutputs:
    """Reads the raw outputs of a dense head.

    Args:
        head: The head, in the mode (train or eval) in which it made the outputs.
        outputs: What its forward returned: maps of (N, channels, H, W) by kind, then by level.
        assignments: What its :class:`Assignment` method returned in the same step, call by call.

    Raises:
        HeadError: The head is of no known family.
    """
    reader = find_reader(head)
    dense = reader.read(head, *outputs)
    if assignments:
        positives = reader.assignment.positives(head, assignments, len(dense.logits[0]))
        sizes = [level.shape[1] for level in dense.logits]
        dense.assigned = positives.split(sizes, 1)
        if reader.assignment.targets is not None and isinstance(head.bbox_coder, DeltaXYWHBBoxCoder):
            dense.targets = reader.assignment.targets(head, assignments, dense).split(sizes, 1)
    return dense


def _labels_at(place: int, targets_at: int | None = None) -> Assignment:
    """For heads whose ``get_targets`` returns labels, perhaps deltas too, by level, at these places of a tuple."""

    def positives(head: nn.Module, returned: Sequence[tuple], images: int) -> Tensor:
        labels = torch.cat([level.reshape(images, -1) for level in returned[-1][place]], 1)
        return (labels >= 0) & (labels < head.num_classes)

    def targets(head: nn.Module, returned: Sequence[tuple], dense: DenseOutputs) -> Tensor:
        assigned = torch.cat(dense.assigned, 1)
        deltas = torch.cat([level.reshape(len(assigned), -1, 4) for level in returned[-1][targets_at]], 1).float()
        if head.reg_decoded_bbox:  # the targets are boxes; priors without one become their own target
            priors = torch.cat(dense.priors).expand_as(deltas)
            boxes = torch.where(assigned.unsqueeze(-1), deltas, priors)
            deltas = head.bbox_coder.encode(priors.flatten(0, 1), boxes.flatten(0, 1)).view_as(deltas)
        return _without_normalization(head.bbox_coder, deltas) * assigned.unsqueeze(-1)

    return Assignment('get_targets', positives, None if targets_at is None else targets)


def _yolox_positives(head: nn.Module, returned: Sequence[tuple], images: int) -> Tensor:
    return torch.stack([foreground for foreground, *_ in returned]).bool()


def _yolov3_positives(head: nn.Module, returned: Sequence[tuple], images: int) -> Tensor:
    targets, _ = returned[-1]  # by level, (N, priors, attributes), of which the fifth is objectness
    return torch.cat([level[..., 4] for level in targets], 1) > 0


# ---------------------------------------------------------------------------------------------------- the families


@reads(YOLOFHead, assignment=_labels_at(0))
@reads(RetinaSepBNHead, SSDHead, RPNHead, assignment=_labels_at(0, targets_at=2))
@reads(RetinaHead, assignment=_labels_at(0, targets_at=2), towers=True)
@reads(ATSSHead, assignment=_labels_at(1, targets_at=3), towers=True)
def _read_anchors(head: nn.Module, logits: Maps, deltas: Maps, centerness: Maps | None = None) -> DenseOutputs:
    deltas, coder = _by_prior(deltas, 4), head.bbox_coder
    regressions = deltas
    if isinstance(coder, DeltaXYWHBBoxCoder):
        regressions = tuple(_without_normalization(coder, each) for each in deltas)
    return _outputs(head, logits, regressions, coder.decode, encoded=deltas, centerness=_scalars(centerness))


@reads(GFLHead, assignment=_labels_at(1), towers=True, distributions=True)
def _read_distributions(head: nn.Module, logits: Maps, distributions: Maps) -> DenseOutputs:
    bins = head.reg_max + 1
    distributions = tuple(each.unflatten(-1, (4, bins)) for each in _by_prior(distributions, 4 * bins))
    distances = tuple(head.integral(each).view(each.shape[:3]) * stride
                      for each, stride in zip(distributions, _strides(head)))
    return _outputs(head, logits, distances,
                    lambda priors, distances: head.bbox_coder.decode(head.anchor_center(priors), distances),
                    distributions=distributions)


@reads(RTMDetHead, assignment=_labels_at(1), towers=True)
@reads(RTMDetSepBNHead, assignment=_labels_at(1))
def _read_rtmdet(head: nn.Module, logits: Maps, distances: Maps) -> DenseOutputs:
    return _outputs(head, logits, _by_prior(distances, 4), _from_points(head))


@reads(FCOSHead, assignment=_labels_at(0), towers=True)
def _read_fcos(head: nn.Module, logits: Maps, distances: Maps, centerness: Maps) -> DenseOutputs:
    distances = _by_prior(distances, 4)
    if head.norm_on_bbox and head.training:  # in units of the stride; in eval mode the head multiplies by it
        distances = tuple(each * stride for each, stride in zip(distances, _strides(head)))
    return _outputs(head, logits, distances, _from_points(head), centerness=_scalars(centerness))


@reads(YOLOXHead, assignment=Assignment('_get_targets_single', _yolox_positives))
def _read_yolox(head: nn.Module, logits: Maps, regressions: Maps, objectness: Maps) -> DenseOutputs:
    return _outputs(head, logits, _by_prior(regressions, 4), head._bbox_decode, objectness=_scalars(objectness))


@reads(YOLOV3Head, assignment=Assignment('get_targets', _yolov3_positives))
def _read_yolov3(head: nn.Module, maps: Maps) -> DenseOutputs:
    predictions = _by_prior(maps, head.num_attrib)
    # The coder takes the place of the centre within its cell, 0 to 1, and a stride to multiply it by.
    shift_in_pixels = tuple(torch.cat([(each[..., :2].sigmoid() - 0.5) * stride, each[..., 2:4]], -1)
                            for each, stride in zip(predictions, _strides(head)))
    return _outputs(head, maps, shift_in_pixels,
                    lambda priors, shift: head.bbox_coder.decode(priors, shift + shift.new_tensor([0.5, 0.5, 0, 0]), 1),
                    logits=tuple(each[..., 5:] for each in predictions), activation='sigmoid',
                    objectness=tuple(each[..., 4] for each in predictions))


# ---------------------------------------------------------------------------------------------------- what they share


def _outputs(head: nn.Module,
             class_maps: Maps,
             regressions: Features,
             decode: Decoder,
             encoded: Features | None = None,
             logits: Features | None = None,
             activation: str | None = None,
             **others: Features | None) -> DenseOutputs:
    """Puts the form together; ``encoded`` is what ``decode`` takes, where that is not the regressions themselves."""
    shapes = tuple(tuple(each.shape[-2:]) for each in class_maps)
    encoded = regressions if encoded is None else encoded

    def own_priors() -> list[Tensor]:
        options = dict(dtype=torch.float32, device=class_maps[0].device)
        if _has_points(head):
            options['with_stride'] = True
        return [get_box_tensor(each) for each in head.prior_generator.grid_priors(shapes, **options)]

    def boxes() -> Features:
        return tuple(get_box_tensor(decode(priors.repeat(len(level), 1), level.flatten(0, 1))).view_as(level)
                     for priors, level in zip(own_priors(), encoded))

    def priors() -> Features:
        if not _has_points(head):
            return tuple(own_priors())
        points_and_strides = [each.chunk(2, 1) for each in own_priors()]
        return tuple(torch.cat([point - stride / 2, point + stride / 2], 1) for point, stride in points_and_strides)

    return DenseOutputs(
        logits=_by_prior(class_maps, head.cls_out_channels) if logits is None else logits,
        activation=activation or ('sigmoid' if head.use_sigmoid_cls else 'softmax'),
        regressions=regressions,
        shapes=shapes,
        strides=_strides(head),
        decode=boxes,
        generate_priors=priors,
        **others)


def _by_prior(maps: Maps, values: int) -> Features:
    """(N, A·values, H, W) maps as (N, H·W·A, values), in float32."""
    return tuple(each.float().permute(0, 2, 3, 1).reshape(len(each), -1, values) for each in maps)


def _without_normalization(coder: DeltaXYWHBBoxCoder, deltas: Tensor) -> Tensor:
    return deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)


def _scalars(maps: Maps | None) -> Features | None:
    return None if maps is None else tuple(each.squeeze(-1) for each in _by_prior(maps, 1))


def _strides(head: nn.Module) -> tuple[Stride, ...]:
    return called_strides(head.prior_generator.strides)


def _has_points(head: nn.Module) -> bool:
    return isinstance(head.prior_generator, MlvlPointGenerator)


def _from_points(head: nn.Module) -> Decoder:
    return lambda priors, distances: head.bbox_coder.decode(priors[:, :2], distances)
