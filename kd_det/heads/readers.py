"""Readers turn the raw maps of dense heads into one form; which head is read by which, and how another is added."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cache
from inspect import unwrap
from types import CodeType
from typing import Any, NamedTuple, TypeVar

import torch
from mmdet.models.roi_heads import BaseRoIHead, CascadeRoIHead, MultiInstanceRoIHead, StandardRoIHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, MlvlPointGenerator
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from kd_det.functional.boxes import constant
from kd_det.heads.decoders import has_box_queries
from kd_det.heads.dense import DenseOutputs, Stride, find_activation, read_strides
from kd_det.heads.queries import QUERY_HEADS, predicts_queries
from kd_det.heads.request import HEAD_PARTS, ROI_HEAD, HeadError, HeadRequest
from kd_det.taps import Features

Maps = Sequence[Tensor]  # (N, channels, H, W), one per level

FORWARDS = ('forward', 'forward_single')  # the methods that decide which maps a head puts out


class DenseForm(NamedTuple):
    """What a dense head's outputs are of, which is known before it runs.

    Attributes:
        head: Its class.
        encoding: What its regressions say, in words; those of other words say something else.
        is_of_centres: Whether they depend on where its priors lie, and not on how large they are.
        priors: Stride -> (A, 4) x1, y1, x2, y2 of the priors of that level's first cell, in pixels; of a head of points
            the square of one stride around the point.
        parts: See :class:`DenseReader`.
        tells_targets: Whether it is known to what its positive priors regress, see :class:`DenseOutputs`.
        predicts_centerness: Whether a box quality is predicted beside the classes.
        activation: ``'sigmoid'`` or ``'softmax'``: what turns logits of classes into probabilities.
        bins: Of the distribution over each distance; 0 where none is predicted.
    """
    head: str
    encoding: str
    is_of_centres: bool
    priors: Mapping[Stride, Tensor]
    parts: frozenset[str]
    tells_targets: bool
    predicts_centerness: bool
    activation: str
    bins: int


class DenseReader:
    """How one family of dense heads is read. Each family has a subclass, which :func:`reads` registers.

    Attributes:
        parts: What heads of the family have beside classes and boxes: those parts of a dense head that a
            :class:`~kd_det.heads.HeadRequest` may name.
        assigning_method: Of a family that tells its positives, the name of the head's method that finds them.
        towers: Of a family that has them, the names of the head's towers for classes and for boxes.
        has_tower_of_each_level: Whether these are lists of towers, one for each level, and not one for all.
        is_of_centres: See :class:`DenseForm`.
        predicts_centerness: The same.
    """

    parts: frozenset[str] = frozenset()
    assigning_method = ''
    towers = ('cls_convs', 'reg_convs')
    has_tower_of_each_level = False
    is_of_centres = False
    predicts_centerness = False

    def describe(self, head: Any) -> DenseForm:
        """Tells what a head's outputs are of."""
        levels = _generate_priors(head, [(1, 1)] * head.prior_generator.num_levels, torch.device('cpu'))
        priors = dict(zip(read_strides(head.prior_generator.strides), _prior_boxes(head, levels)))
        return DenseForm(type(head).__name__, self.name_encoding(head), self.is_of_centres, priors, self.parts,
                         self.tells_targets(head), self.predicts_centerness, find_activation(head),
                         head.reg_max + 1 if 'distributions' in self.parts else 0)

    def name_encoding(self, head: Any) -> str:
        """Names what the regressions of :meth:`assemble` say, with all settings of the head on which that depends."""
        return f'as a {type(self).__name__} reads them'

    def tells_targets(self, head: Any) -> bool:
        """Whether :meth:`read_targets` tells any."""
        return False

    def read(self, head: Any, *maps: Any) -> DenseOutputs:
        """Reads what the head's forward returned.

        Args:
            head: The head, in the mode (train or eval) in which it made the maps.
            maps: One argument for each kind of maps that the forward returned: (N, channels, H, W) per level.
        """
        raise NotImplementedError

    def decode(self, head: Any, priors: Tensor, encoded: Tensor) -> Tensor:
        """Makes boxes of regressions, as the head itself does.

        Args:
            head: The head.
            priors: (n, 4): anchors x1, y1, x2, y2; of a head of points x, y and the level's stride in width and height.
            encoded: (n, 4), see :meth:`assemble`.

        Returns:
            (n, 4) of x1, y1, x2, y2 in pixels of the padded batch.
        """
        raise NotImplementedError

    def read_positives(self, head: Any, returned: Sequence[Any], images: int) -> Tensor:
        """Tells which priors the head assigned to boxes.

        Args:
            head: The head.
            returned: What each call of :attr:`assigning_method` returned in this step.
            images: N.

        Returns:
            (N, priors of all levels) of bool.
        """
        raise NotImplementedError

    def read_ignored(self, returned: Sequence[Any], images: int) -> Tensor | None:
        """Tells which priors count nothing in the head's own loss: they were given neither to a box nor to background.

        Args:
            returned: What each call of :attr:`assigning_method` returned in this step.
            images: N.

        Returns:
            (N, priors of all levels) of bool; None where it is not told, or none is.
        """
        return None

    def read_targets(self, head: Any, returned: Sequence[Any], dense: DenseOutputs) -> Tensor | None:
        """Tells to what the assigned priors are regressed.

        Args:
            head: The head.
            returned: What each call of :attr:`assigning_method` returned in this step.
            dense: The outputs of the same step, with the positives.

        Returns:
            (N, priors of all levels, 4) in the units of the outputs, 0 for other priors; None where it is not told.
        """
        return None

    def with_parts(self, parts: Iterable[str]) -> DenseReader:
        """The same reader, for heads that have these parts alone."""
        reader = copy(self)
        reader.parts = frozenset(parts)
        return reader

    def assemble(self, head: Any, class_maps: Maps, regressions: Features, *, encoded: Features | None = None,
                 logits: Features | None = None, activation: str | None = None,
                 **others: Features | None) -> DenseOutputs:
        """Puts the one form of outputs together.

        Args:
            head: The head.
            class_maps: (N, A·K, H, W) per level, K with the background of a softmax head.
            regressions: (N, H·W·A, 4) per level, in the units of :class:`~kd_det.heads.DenseOutputs`.
            encoded: What :meth:`decode` is given, in the same shape, where that is not the regressions themselves.
            logits: (N, H·W·A, K) per level; by default those in the class maps.
            activation: By default what the head says of its classes.
            **others: Further fields of the outputs.
        """
        shapes, device = tuple((each.shape[-2], each.shape[-1]) for each in class_maps), class_maps[0].device

        def decode_levels(chosen: Features | None = None) -> Features:
            levels = zip(_generate_priors(head, shapes, device), regressions if encoded is None else encoded,
                         chosen or [None] * len(shapes))
            return tuple(self._decode_level(head, *level) for level in levels)

        return DenseOutputs(
            logits=order_by_prior(class_maps, head.cls_out_channels) if logits is None else logits,
            activation=activation or find_activation(head),
            regressions=regressions,
            shapes=shapes,
            strides=read_strides(head.prior_generator.strides),
            decode=decode_levels,
            generate_priors=lambda: _prior_boxes(head, _generate_priors(head, shapes, device)),
            **others)

    def _decode_level(self, head: Any, priors: Tensor, encoded: Tensor, chosen: Tensor | None) -> Tensor:
        """(N, H·W·A, 4) regressions of one level, or of k (N, k) chosen ones, as boxes; its priors are (H·W·A, 4)."""
        if chosen is None:
            priors = priors.repeat(encoded.shape[0], 1)
        else:
            priors = priors[chosen.flatten()]
            encoded = encoded.gather(1, chosen.unsqueeze(-1).expand(-1, -1, encoded.shape[-1]))
        return get_box_tensor(self.decode(head, priors, encoded.flatten(0, 1))).view_as(encoded)


READERS: dict[type[nn.Module], DenseReader] = {}

ReaderClass = TypeVar('ReaderClass', bound=type[DenseReader])


def reads(*heads: type[nn.Module]) -> Callable[[ReaderClass], ReaderClass]:
    """Registers a reader for some classes of dense heads, and for those derived from them.

    Args:
        heads: The classes.

    Example:
        A head whose forward returns the maps of RetinaNet's the other way round:

        >>> from mmdet.models.dense_heads import RetinaHead
        >>> from kd_det.heads.families import AnchorReader
        >>> class BoxesFirstHead(RetinaHead):
        ...     def forward(self, features):
        ...         return super().forward(features)[::-1]
        >>> @reads(BoxesFirstHead)
        ... class BoxesFirstReader(AnchorReader):
        ...     def read(self, head, deltas, logits):
        ...         return super().read(head, logits, deltas)
    """

    def register(reader: ReaderClass) -> ReaderClass:
        READERS.update(dict.fromkeys(heads, reader()))
        return reader

    return register


def reads_like(head: type[nn.Module], like: type[nn.Module], parts: Iterable[str] = ()) -> None:
    """Declares that a head of your own is read like another.

    A head that is derived from a known one is read as that one, unless it overrides ``forward`` or ``forward_single``:
    what it then puts out nobody can tell from outside, and read wrongly it would be distilled wrongly. Here you vouch
    for it, or for a head that is derived from none. Its forward has to return the same kinds of maps, in the same order
    and units, in train mode and in eval mode, and it needs the attributes that decode them (``prior_generator``,
    ``bbox_coder``, …; of a DETR's head ``loss_cls`` and ``assigner``). Declare it beside the class, in a module that
    the config names in ``custom_imports``.

    Args:
        head: Your head.
        like: A dense head, or the head of a DETR, that can be read.
        parts: What else of a dense head is the same, though yours computes it by methods of its own. ``'positives'``:
            its ``get_targets`` (of YOLOX ``_get_targets_single``) returns what the other's does. ``'towers'``: its
            ``cls_convs`` and ``reg_convs`` (of YOLOX those of each level) are the first that a level passes. Where
            yours inherits the other's methods they are known to be the same; all else is refused, as terms that need it
            are told.

    Raises:
        HeadError: The other head can not be read, or has no such part; or yours has no such method.

    Example:
        >>> from mmdet.models.dense_heads import FCOSHead
        >>> class ScaledHead(FCOSHead):
        ...     def forward(self, features):
        ...         return super().forward(tuple(2 * level for level in features))
        >>> reads_like(ScaledHead, FCOSHead)
        >>> type(find_reader(ScaledHead)).__name__, sorted(find_reader(ScaledHead).parts)
        ('FCOSReader', ['positives'])
    """
    if issubclass(like, BaseRoIHead):
        raise HeadError('Only dense heads and heads of DETRs are declared. A RoI head is read if it is derived from '
                        'StandardRoIHead or CascadeRoIHead.')
    of_queries, named = predicts_queries(like), set(parts)
    reader = DenseReader() if of_queries else find_reader(like)
    unknown, method = named - reader.parts, reader.assigning_method
    if unknown:
        raise HeadError(f"parts={sorted(named)}: a {like.__name__} has no {' and no '.join(sorted(unknown))} that can "
                        f"be read; it has {', '.join(sorted(reader.parts)) or 'none of them'}.")
    if 'positives' in named and not hasattr(head, method):
        raise HeadError(f"parts={sorted(named)}: a {head.__name__} has no method '{method}', where a {like.__name__} "
                        'assigns priors to boxes.')
    if of_queries:
        QUERY_HEADS.add(head)
        return
    inherited = {'distributions'}  # they are among the maps
    inherited |= {'positives'} if _inherits(head, like, method) and calls(head, 'loss', method) else set()
    inherited |= {'towers'} if _inherits(head, like, *FORWARDS) else set()
    READERS[head] = reader.with_parts(reader.parts & (named | inherited))


def _inherits(head: type[nn.Module], like: type[nn.Module], *methods: str) -> bool:
    """Whether a head has the other's own methods."""
    return all(getattr(head, method, None) is getattr(like, method, None) for method in methods)


@cache
def calls(kind: type, method: str, wanted: str, apart: tuple[str, ...] = ()) -> bool:
    """Whether a method of a class leads to a call of that name, through the class's own methods and its ancestors'.

    Args:
        kind: The class.
        method: Of it.
        wanted: The name, of a method of anything.
        apart: Methods through which it does not count.

    Example:
        >>> from mmdet.models.dense_heads import FreeAnchorRetinaHead, RetinaHead
        >>> calls(RetinaHead, 'loss', 'get_targets'), calls(FreeAnchorRetinaHead, 'loss', 'get_targets')
        (True, False)
    """
    seen, waiting = set(apart), [method]
    while waiting:
        name = waiting.pop()
        for ancestor in () if name in seen else kind.__mro__:
            function = vars(ancestor).get(name)
            if function is None:
                continue
            code = getattr(unwrap(getattr(function, '__func__', function)), '__code__', None)
            names = set(_list_names(code))
            if wanted in names or (code is None and callable(function)):  # of what is not Python's it is not known
                return True
            waiting.extend(names)
            if names.isdisjoint(('super', name)):  # it leaves the ancestors' out
                break
        seen.add(name)
    return False


def _list_names(code: CodeType | None) -> Iterator[str]:
    """The names of what some code looks up, the functions within it included."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _list_names(constant)


def find_reader(head: type[nn.Module]) -> DenseReader:
    """Returns the reader of a class of dense heads.

    It is that of the nearest known ancestor, if nothing between overrides what the maps are; without the positives if
    something overrides the ancestor's assignment, or its loss no longer asks for that.

    Raises:
        HeadError: There is none.
    """
    overridden: set[str] = set()
    for ancestor in head.__mro__:
        if ancestor in READERS and overridden.isdisjoint(FORWARDS):
            reader, method = READERS[ancestor], READERS[ancestor].assigning_method
            if method in overridden or (ancestor is not head and not calls(head, 'loss', method)):
                return reader.with_parts(reader.parts - {'positives'})
            return reader
        overridden.update(vars(ancestor))
    known = ', '.join(sorted(each.__name__ for each in READERS))
    nearest = next((ancestor.__name__ for ancestor in head.__mro__ if ancestor in READERS), 'FCOSHead')
    raise HeadError(f'The outputs of a {head.__name__} can not be read. Known are {known} and their subclasses '
                    'without a forward of their own. Where its forward returns what that of a known head does, say so '
                    f'beside your class, kd_det.heads.reads_like({head.__name__}, {nearest}); kd_det.heads.reads '
                    'registers a reader for another head.')


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
        if issubclass(head, MultiInstanceRoIHead):
            raise HeadError(f'A {head.__name__} predicts several objects of each region, which no term compares: '
                            'distil features, or its RPN.')
        has = not part
    elif predicts_queries(head):
        if part not in ('queries', 'decoder'):
            raise HeadError(f'A {head.__name__} predicts queries, nothing cell by cell as a dense head does.')
        has = part == 'queries' or has_box_queries(head)
    elif part in ('queries', 'decoder'):
        has = False
    else:
        reader = find_reader(head)
        has = not part or part in reader.parts
    if not has:
        raise HeadError(f'A {head.__name__} {HEAD_PARTS[part]}.')


def check_sampling(head: type[nn.Module]) -> None:
    """Checks that the regions which a student's RoI head samples can be read in its loss; a teacher is given them.

    Raises:
        HeadError: They can not.
    """
    if not calls(head, 'bbox_loss', 'loss_and_target', ('loss', )):  # that name is the box head's, too
        raise HeadError(f"What a student's {head.__name__} says of the regions that it samples can not be read: its "
                        "bbox_loss does not call its box head's loss_and_target, as those of StandardRoIHead and "
                        'CascadeRoIHead do. Distil features, or its RPN; as a teacher it can be read.')


def read_dense(head: nn.Module, outputs: Sequence[Maps], assignments: Sequence[Any] = ()) -> DenseOutputs:
    """Reads the raw outputs of a dense head.

    Args:
        head: The head, in the mode (train or eval) in which it made the outputs.
        outputs: What its forward returned: maps of (N, channels, H, W) by kind, then by level.
        assignments: What its reader's :attr:`~kd_det.heads.readers.DenseReader.assigning_method` returned in the same
            step, call by call.

    Raises:
        HeadError: The head is of no known family.
    """
    reader = find_reader(type(head))
    dense = reader.read(head, *outputs)
    if assignments:
        sizes = [level.shape[1] for level in dense.logits]
        dense.assigned = reader.read_positives(head, assignments, len(dense.logits[0])).split(sizes, 1)
        ignored = reader.read_ignored(assignments, len(dense.logits[0]))
        dense.ignored = None if ignored is None else ignored.split(sizes, 1)
        targets = reader.read_targets(head, assignments, dense)
        dense.targets = None if targets is None else targets.split(sizes, 1)
    return dense


def order_by_prior(maps: Maps, values: int) -> Features:
    """(N, A·values, H, W) maps as (N, H·W·A, values), in float32."""
    return tuple(each.float().permute(0, 2, 3, 1).reshape(each.shape[0], -1, values) for each in maps)


def remove_normalization(coder: DeltaXYWHBBoxCoder, deltas: Tensor) -> Tensor:
    """(…, 4) deltas without the means and standard deviations by which the head's own coder normalises them."""
    return deltas * constant(coder.stds, deltas) + constant(coder.means, deltas)


def _generate_priors(head: Any, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    """(H·W·A, 4) per level, as :meth:`DenseReader.decode` takes them."""
    options = dict(dtype=torch.float32, device=device)
    if isinstance(head.prior_generator, MlvlPointGenerator):
        options['with_stride'] = True
    return [get_box_tensor(each) for each in head.prior_generator.grid_priors(shapes, **options)]


def _prior_boxes(head: Any, priors: Sequence[Tensor]) -> Features:
    """Anchors as they are; of points the square of one stride around each."""
    if not isinstance(head.prior_generator, MlvlPointGenerator):
        return tuple(priors)
    points_and_strides = [each.chunk(2, 1) for each in priors]
    return tuple(torch.cat([point - stride / 2, point + stride / 2], 1) for point, stride in points_and_strides)
