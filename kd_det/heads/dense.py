"""What a dense head says about one batch, in one form for all heads."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from kd_det.functional.gradients import scale_gradient
from kd_det.functional.logits import (
    cell_probabilities,
    class_probabilities,
    joint_logits,
    largest_probability,
    restricted_logits,
)
from kd_det.heads.request import KINDS, HeadError
from kd_det.taps import Features

Stride = int | float


def read_strides(strides: Iterable[Stride | Sequence[Stride]]) -> tuple[Stride, ...]:
    """The strides by which levels are told apart, from those of a prior generator or of its config.

    Args:
        strides: In pixels, each a number, or a pair of width and height, of which the width's counts.

    Returns:
        Whole numbers as ``int``, so that 8, 8.0 and (8, 8) are the same level.

    Example:
        >>> read_strides([8, 16.0, (32, 32), 10.5])
        (8, 16, 32, 10.5)
    """
    widths = (float(stride[0] if isinstance(stride, Sequence) else stride) for stride in strides)
    return tuple(int(width) if width.is_integer() else width for width in widths)


def find_activation(head: Any) -> str:
    """``'sigmoid'`` or ``'softmax'``: what turns a dense head's logits of classes into probabilities."""
    return 'sigmoid' if getattr(head, 'use_sigmoid_cls', True) else 'softmax'


@dataclass
class DenseOutputs:
    """The outputs of one dense head for one batch, the same in train and eval mode, in float32, level by level.

    On each level a row of a tensor is one prior; the A priors of a cell follow one another, cells row by row. K is the
    number of classes; a softmax head has one more logit, the background's, as the last.

    Attributes:
        logits: (N, H·W·A, K) class logits.
        activation: ``'sigmoid'`` or ``'softmax'``: what turns them into probabilities.
        regressions: (N, H·W·A, 4) box regressions, in the same units for all heads of a kind. Heads with anchors and
            deltas: shift of the centre in anchor widths and heights, logarithm of the scale. Heads that regress the
            distances to the four sides: pixels. YOLOX and YOLOv3: as the head puts them out.
        shapes: Height and width of the level, in cells.
        strides: Of the level, in pixels.
        decode: Makes :attr:`boxes`; given (N, k) indices of priors for each level, (N, k, 4) boxes of those alone.
        generate_priors: Makes :attr:`priors`.
        objectness: (N, H·W·A) logits; class logits are then conditional on an object, as in YOLOX and YOLOv3.
        centerness: (N, H·W·A) logits of the predicted box quality, as in FCOS and ATSS; trained on positive priors.
        distributions: (N, H·W·A, 4, bins) logits of the distance to each side, as in GFL.
        assigned: (N, H·W·A) of bool, the priors that the head's own assigner gave to a box in this step. Of a student
            alone, and where its family's reader finds them.
        ignored: (N, H·W·A) of bool, the priors that count nothing in the head's own loss, which its assigner gave to no
            box and not to the background. Of a student alone, and where there can be any.
        targets: (N, H·W·A, 4) the regressions of assigned priors to their boxes, in the units of :attr:`regressions`; 0
            for other priors. Of a student with anchors and deltas alone.
    """
    logits: Features
    activation: str
    regressions: Features
    shapes: tuple[tuple[int, int], ...]
    strides: tuple[Stride, ...]
    decode: Callable[..., Features] = field(repr=False)
    generate_priors: Callable[[], Features] = field(repr=False)
    objectness: Features | None = None
    centerness: Features | None = None
    distributions: Features | None = None
    assigned: Features | None = None
    ignored: Features | None = None
    targets: Features | None = None

    @classmethod
    def of_boxes(cls, logits: Tensor, boxes: Tensor, shape: tuple[int, int], stride: Stride = 8,
                 activation: str = 'sigmoid', positives: Tensor | None = None, **others: Any) -> DenseOutputs:
        """The outputs of one level with one prior a cell, its square, from plain tensors: for examples and tests.

        Args:
            logits: (N, H·W, K) class logits.
            boxes: (N, H·W, 4) boxes x1, y1, x2, y2 in pixels, which are the regressions too.
            shape: H and W.
            stride: In pixels.
            activation: ``'sigmoid'`` or ``'softmax'``.
            positives: (N, H·W) of bool, the priors that the head assigned to boxes, if it tells.
            **others: Other attributes, such as ``objectness``; each a tuple of the only level.

        Example:
            >>> import torch
            >>> outputs = DenseOutputs.of_boxes(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), shape=(1, 2))
            >>> outputs.priors[0]
            tensor([[ 0.,  0.,  8.,  8.],
                    [ 8.,  0., 16.,  8.]])
        """
        corners = torch.cartesian_prod(*(torch.arange(cells, device=boxes.device) for cells in shape))
        corners = stride * corners.flip(1).to(boxes.dtype)
        priors = torch.cat([corners, corners + stride], 1)
        return cls((logits, ), activation, (boxes, ), (shape, ), (stride, ), lambda: (boxes, ), lambda: (priors, ),
                   assigned=None if positives is None else (positives, ), **others)

    @cached_property
    def boxes(self) -> Features:
        """(N, H·W·A, 4) boxes x1, y1, x2, y2 in pixels of the padded batch, not clipped; decoded when first read."""
        return self.decode()

    @cached_property
    def priors(self) -> Features:
        """(H·W·A, 4) anchors x1, y1, x2, y2; for a head of points the square of one stride around the point."""
        return self.generate_priors()

    @property
    def num_classes(self) -> int:
        return int(self.logits[0].shape[-1]) - (self.activation == 'softmax')

    def detach(self) -> DenseOutputs:
        """The same without gradient, boxes included."""
        tensors = {name: tuple(level.detach() for level in levels)
                   for name in ('logits', 'regressions', 'objectness', 'centerness', 'distributions', 'targets')
                   if (levels := getattr(self, name)) is not None}
        decode = self.decode
        return replace(self, **tensors, decode=lambda *chosen: tuple(level.detach() for level in decode(*chosen)))

    def weigh(self, shares: Tensor) -> DenseOutputs:
        """The same with the gradient of each image times its share, (N,), boxes included."""
        tensors = {name: tuple(scale_gradient(level, shares) for level in levels)
                   for name in ('logits', 'regressions', 'objectness', 'centerness', 'distributions')
                   if (levels := getattr(self, name)) is not None}
        decode = self.decode
        return replace(self, **tensors,
                       decode=lambda *chosen: tuple(scale_gradient(level, shares) for level in decode(*chosen)))

    def keep(self, kinds: Collection[str]) -> DenseOutputs:
        """The same, of other kinds than these (:data:`~kd_det.heads.request.KINDS`) without values: on no device.

        The size of these is still told; to compute with them is an error.
        """
        unread = [name for kind, names in KINDS.items() if kind not in kinds for name in names]
        forms = {name: tuple(level.to('meta') for level in levels)
                 for name in unread if (levels := getattr(self, name)) is not None}
        return replace(self, **forms, decode=self.decode if 'boxes' in kinds else _refuse_to_decode)

    def restrict(self, classes: Sequence[int]) -> DenseOutputs:
        """The same of some classes alone, in this order, see :func:`~kd_det.functional.logits.restricted_logits`."""
        background = self.activation == 'softmax'
        return replace(self, logits=tuple(restricted_logits(each, classes, background) for each in self.logits))

    def join_objectness(self) -> DenseOutputs:
        """The same as a head without objectness says it: each class logit is that of the class and an object at once.

        Boxes are decoded once for both.
        """
        if self.objectness is None:
            return self
        return replace(self, logits=tuple(map(joint_logits, self.logits, self.objectness)), objectness=None,
                       decode=lambda *chosen: self.decode(*chosen) if chosen else self.boxes)

    def level_of(self, stride: Stride) -> int:
        """The index of the level of that stride.

        Raises:
            HeadError: There is none.
        """
        if stride not in self.strides:
            raise HeadError(f'The head has no level of stride {stride}; its strides are {list(self.strides)}.')
        return self.strides.index(stride)

    def probabilities(self, level: int) -> Tensor:
        """(N, H·W·A, K) class probabilities, times that of an object where the head predicts it; without background."""
        objectness = None if self.objectness is None else self.objectness[level]
        return class_probabilities(self.logits[level], self.activation, objectness)

    def largest_probabilities(self, level: int) -> Tensor:
        """(N, H·W·A): the largest of :meth:`probabilities`, without gradient."""
        largest = largest_probability(self.logits[level], self.activation, background=False)
        return largest if self.objectness is None else largest * self.objectness[level].detach().sigmoid()

    def scores(self, level: int) -> Tensor:
        """(N, H·W·A): how sure the head is of an object there, without gradient.

        It is the largest class probability times the box quality.
        """
        scores = self.largest_probabilities(level)
        return scores if self.centerness is None else scores * self.centerness[level].detach().sigmoid()

    def cell_probabilities(self, level: int, reduction: str = 'max') -> Tensor:
        """Class probabilities of the cells.

        Args:
            level: Its index.
            reduction: ``'max'`` or ``'mean'`` over the priors of a cell.

        Returns:
            (N, K, H, W).
        """
        logits, objectness = (each and each[level].unflatten(1, (*self.shapes[level], -1))
                              for each in (self.logits, self.objectness))
        return cell_probabilities(cast(Tensor, logits), self.activation, objectness, reduction).permute(0, 3, 1, 2)

    def cells(self, level: int) -> tuple[Tensor, Tensor | None]:
        """(N·H·W, A, K) class logits and, if the head predicts it, (N·H·W, A) objectness, without gradient."""
        count = len(self.logits[level]) * self.shapes[level][0] * self.shapes[level][1]
        objectness = None if self.objectness is None else self.objectness[level].detach().reshape(count, -1)
        return self.logits[level].detach().reshape(count, -1, self.logits[level].shape[-1]), objectness

    def positives(self, level: int) -> Tensor:
        """(N, H·W·A) of bool: the priors that the head's own assigner gave to a ground-truth box.

        Raises:
            HeadError: Its assignment can not be read.
        """
        if self.assigned is None:
            raise HeadError('Which priors are positive is not known for this head: it does not assign them in the way '
                            "of its family. Choose a form without them, such as normalizer='confidence' (of CrossKD "
                            'also centerness_weight=0).')
        return self.assigned[level]


def _refuse_to_decode(*chosen: Tensor) -> Features:
    raise HeadError("The boxes of this head were not kept, for no term that reads it names them: add 'boxes' to the "
                    'kinds of its request.')
