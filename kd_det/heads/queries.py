"""What the head of a DETR says about one batch: its queries, and the boxes that its own matcher gave them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from mmdet.models.dense_heads import ConditionalDETRHead, DABDETRHead, DeformableDETRHead, DETRHead, DINOHead
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.functional.boxes import constant
from kd_det.functional.gradients import scale_gradient
from kd_det.functional.logits import restricted_logits
from kd_det.functional.queries import match_queries, query_cost
from kd_det.heads.request import HeadError

# Subclasses too, unless they bring a forward of their own, as DDQ and Grounding DINO do; reads_like adds to them.
QUERY_HEADS: set[type[nn.Module]] = {ConditionalDETRHead, DABDETRHead, DETRHead, DINOHead, DeformableDETRHead}

BoxCost = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[int, int]], Tensor]


@dataclass
class QueryOutputs:
    """The outputs of a DETR's head for one batch, the same in train and eval mode, in float32, layer by layer.

    Of D decoder layers, N images and Q queries; K is the number of classes. A softmax head has one more logit, the
    background's, as the last. The denoising queries of DINO are left out.

    Attributes:
        logits: (D, N, Q, K) class logits.
        boxes: (D, N, Q, 4) centre x, centre y, width and height, as shares of the image without its padding.
        activation: ``'sigmoid'`` or ``'softmax'``: what turns logits into probabilities.
        assigned: (D, N, Q) long: the index of the ground-truth box to which the head's own matcher assigned the query
            in this step; -1 for none. Of a student alone.
        box_cost: Makes the (n, m) costs by which this matcher assigns queries to boxes, from their logits (n, K) and
            boxes (n, 4), the ground truth (m, 4) in pixels with its labels (m,), and the image's height and width. Of a
            student alone.
    """
    logits: Tensor
    boxes: Tensor
    activation: str
    assigned: Tensor | None = None
    box_cost: BoxCost | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        return int(self.logits.shape[-1]) - (self.activation == 'softmax')

    def detach(self) -> QueryOutputs:
        """The same without gradient."""
        return replace(self, logits=self.logits.detach(), boxes=self.boxes.detach())

    def weigh(self, shares: Tensor) -> QueryOutputs:
        """The same with the gradient of each image times its share, (N,)."""
        return replace(self, logits=scale_gradient(self.logits, shares, dim=1),
                       boxes=scale_gradient(self.boxes, shares, dim=1))

    def restrict(self, classes: Sequence[int]) -> QueryOutputs:
        """The same of some classes alone, in this order, see :func:`~kd_det.functional.logits.restricted_logits`."""
        return replace(self, logits=restricted_logits(self.logits, classes, self.activation == 'softmax'))

    def last(self, layers: int) -> QueryOutputs:
        """The same of the last decoder layers alone."""
        return replace(self, logits=self.logits[-layers:], boxes=self.boxes[-layers:],
                       assigned=None if self.assigned is None else self.assigned[-layers:])

    def select(self, indices: Tensor) -> QueryOutputs:
        """The queries of these indices, (D, N, chosen), in this order."""

        def gather(values: Tensor) -> Tensor:
            return values.gather(2, indices.unsqueeze(-1).expand(*indices.shape, values.shape[-1]))

        return replace(self, logits=gather(self.logits), boxes=gather(self.boxes))

    def scores(self) -> Tensor:
        """(D, N, Q): how sure the head is of an object, the largest class probability; without background."""
        if self.activation == 'sigmoid':
            return self.logits.sigmoid().amax(-1)
        return self.logits.softmax(-1)[..., :-1].amax(-1)


def predicts_queries(head: type[nn.Module]) -> bool:
    """Whether the outputs of a class of heads can be read as queries."""
    for ancestor in head.__mro__:
        if ancestor in QUERY_HEADS:
            return True
        if 'forward' in vars(ancestor):
            return False
    return False


def read_queries(head: Any, logits: Tensor, boxes: Tensor, assignments: Sequence[Any] = ()) -> QueryOutputs:
    """Reads the raw outputs of a DETR's head.

    Args:
        head: The head.
        logits: (D, N, queries, K) as its forward returned them.
        boxes: (D, N, queries, 4).
        assignments: What its assigner returned in the same step, call by call: decoder layer by decoder layer and image
            by image. Later calls, for the encoder's proposals, do not count.

    Raises:
        HeadError: It assigned fewer times, or by an assigner without costs.
    """
    outputs = QueryOutputs(logits.float(), boxes.float(), 'sigmoid' if head.loss_cls.use_sigmoid else 'softmax')
    if not assignments:
        return outputs
    layers, images = logits.shape[:2]
    if len(assignments) < layers * images or not hasattr(head.assigner, 'match_costs'):
        raise HeadError(f'A {type(head.assigner).__name__} made {len(assignments)} assignments for {layers} decoder '
                        f'layers and {images} images: only a HungarianAssigner, which makes one for each, can be read.')
    assigned = torch.stack([each.gt_inds for each in assignments[:layers * images]]).unflatten(0, (layers, images)) - 1
    matched = assigned.shape[-1]  # denoising queries, which come first, are not
    return replace(outputs, logits=outputs.logits[:, :, -matched:], boxes=outputs.boxes[:, :, -matched:],
                   assigned=assigned, box_cost=_make_box_cost(head.assigner.match_costs))


def _make_box_cost(match_costs: Sequence[Callable[..., Tensor]]) -> BoxCost:
    """The sum of a matcher's costs, see ``box_cost`` of :class:`QueryOutputs`."""

    @torch.no_grad()
    def cost(logits: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, image_shape: tuple[int, int]) -> Tensor:
        height, width = image_shape
        pixels = bbox_cxcywh_to_xyxy(boxes) * constant([width, height, width, height], boxes)
        queries = InstanceData(scores=logits, bboxes=pixels)
        objects = InstanceData(bboxes=truth, labels=labels)
        costs = (match_cost(pred_instances=queries, gt_instances=objects, img_meta=dict(img_shape=image_shape))
                 for match_cost in match_costs)
        return reduce(torch.add, costs)

    return cost


def join_queries(outputs: Sequence[QueryOutputs], shares: Tensor) -> QueryOutputs:
    """The weighted mean of each of the first's queries and the query of every other that is paired with it.

    A query stands for another object in each detector. So, decoder layer by layer, the others' queries are paired with
    the first's as costs least in all, by classes and boxes (:func:`~kd_det.functional.queries.query_cost`); one that
    has no partner, where another has fewer, stays as the first has it.

    Args:
        outputs: Of each detector.
        shares: (N, detectors).

    Raises:
        HeadError: They tell other classes apart.
    """
    layers = min(len(each.logits) for each in outputs)
    first, *others = (each.last(layers) for each in outputs)
    if any((each.activation, each.num_classes) != (first.activation, first.num_classes) for each in others):
        raise HeadError('Detectors that tell other classes apart have no mean.')
    joined = [first]
    for other in others:
        cost = query_cost(*(each.flatten(0, 1) for each in (first.logits, other.logits, first.boxes, other.boxes)),
                          activation=first.activation)
        problems, queries, partners = cost.shape
        everyone = torch.arange(partners, device=cost.device).expand(problems, -1)
        nobody = cost.new_full((problems, queries), -1, dtype=torch.long)
        paired = match_queries(cost, everyone, cost.new_zeros(problems, partners, 0), [0] * problems, nobody)
        paired = paired.view(first.logits.shape[:3])
        chosen, found = other.select(paired.clamp(min=0)), (paired >= 0).unsqueeze(-1)
        joined.append(replace(chosen, logits=chosen.logits.where(found, first.logits),
                              boxes=chosen.boxes.where(found, first.boxes)))
    weights = shares.unbind(1)
    return replace(first, **{name: sum(weight.view(1, -1, 1, 1) * getattr(each, name)
                                       for weight, each in zip(weights, joined)) for name in ('logits', 'boxes')})
