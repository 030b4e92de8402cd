"""The decoders of DETRs whose queries start from boxes, to be run on boxes of somebody else's choice."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from mmdet.models.dense_heads import DABDETRHead, DeformableDETRHead
from mmdet.models.detectors import DABDETR, DINO, DeformableDETR
from torch import Tensor, nn

from kd_det.functional.boxes import constant
from kd_det.heads.queries import QueryOutputs, predicts_queries, read_queries
from kd_det.heads.request import HEAD_PARTS, HeadError

Given = dict[str, Any]  # what a decoder is given beside its queries and the memory, by the names of forward_decoder


class BoxQueries(NamedTuple):
    """Q queries that start from boxes, the same for every detector.

    Attributes:
        boxes: (N, Q, 4) centre x, centre y, width and height, as shares of the image without its padding, above 0 and
            below 1.
        labels: (N, Q) class indices.
        hidden: (N, Q, Q) of bool: whether the first query may not attend to the second.
    """
    boxes: Tensor
    labels: Tensor
    hidden: Tensor


@dataclass
class QueryDecoder:
    """The decoder and the head of a DETR, with what its encoder has made of the images of one step.

    Attributes:
        memory: (N, tokens, C), what the encoder put out.
        model: The detector.
        given: What its decoder is given beside queries and memory, see :func:`read_decoder`.
        num_labels: How many classes the detector has.
        activation: ``'sigmoid'`` or ``'softmax'``: what turns logits into probabilities.
        classes: The classes whose predictions count, by the detector's label; all by default.
        shares: (N,) by which the gradient of each image is multiplied; 1 by default.
        learns: Whether a gradient reaches memory and decoder.
    """
    memory: Tensor
    model: Any = field(repr=False)
    given: Given = field(repr=False)
    num_labels: int
    activation: str
    classes: tuple[int, ...] | None = None
    shares: Tensor | None = None
    learns: bool = True

    @property
    def num_classes(self) -> int:
        return self.num_labels if self.classes is None else len(self.classes)

    def detach(self) -> QueryDecoder:
        """The same without gradient."""
        return replace(self, memory=self.memory.detach(), learns=False)

    def weigh(self, shares: Tensor) -> QueryDecoder:
        """The same with the gradient of each image times its share, (N,)."""
        return replace(self, shares=shares if self.shares is None else shares * self.shares)

    def restrict(self, classes: Sequence[int]) -> QueryDecoder:
        """The same for some classes alone, in this order; labels of queries are then indices among them."""
        return replace(self, classes=tuple(classes))

    def run(self, queries: BoxQueries) -> QueryOutputs:
        """What the detector predicts from these queries.

        Its decoder runs in eval mode: dropout would draw numbers, and blur what is compared.
        """
        if self.classes is not None:
            queries = queries._replace(labels=constant(self.classes, queries.labels)[queries.labels])
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            outputs = self.decode(queries)
        outputs = outputs if self.classes is None else outputs.restrict(self.classes)
        return outputs if self.shares is None else outputs.weigh(self.shares)

    def decode(self, queries: BoxQueries) -> QueryOutputs:
        """The predictions for queries whose labels are the detector's own."""
        model = self.model
        dtype = next(model.decoder.parameters()).dtype  # a student's memory may come from under autocast
        given = {name: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each
                 for name, each in self.given.items()}
        hidden = queries.hidden.repeat_interleave(model.decoder.layers[0].self_attn.num_heads, 0)
        with evaluating(model.decoder):
            states, references = find_family(type(model))(
                model, self.memory.to(dtype), given, queries._replace(boxes=queries.boxes.to(dtype)), hidden)
        return read_queries(model.bbox_head, *model.bbox_head(states, references))


def has_box_queries(head: type[nn.Module]) -> bool:
    """Whether the queries of a class of heads may start from boxes; the detector decides, see :func:`find_family`."""
    return predicts_queries(head) and issubclass(head, (DABDETRHead, DeformableDETRHead))


def find_family(detector: type[nn.Module]) -> Callable[[Any, Tensor, Given, BoxQueries, Tensor], tuple[Any, Any]]:
    """How the decoder of a class of detectors is run on boxes.

    Subclasses are run like the known ones, unless they override what makes queries or runs the decoder.

    Raises:
        HeadError: It is none whose queries start from boxes.
    """
    for ancestor in detector.__mro__:
        if ancestor in FAMILIES:
            return FAMILIES[ancestor]
        if {'pre_decoder', 'forward_decoder', 'forward_transformer'} & vars(ancestor).keys():
            break
    raise HeadError(f"A {detector.__name__} {HEAD_PARTS['decoder']}.")


def read_decoder(model: Any, arguments: Mapping[str, Any]) -> QueryDecoder:
    """Reads what a detector's decoder was given, so that it can be run on other queries.

    Args:
        model: The detector.
        arguments: Of its ``forward_decoder``; but for the memory those about queries are not needed.
    """
    given = {name: arguments[name] for name in GIVEN if name in arguments}
    head = model.bbox_head
    return QueryDecoder(arguments['memory'], model, given, head.num_classes,
                        'sigmoid' if head.loss_cls.use_sigmoid else 'softmax')


def encode(model: Any, features: Sequence[Tensor], samples: Sequence[Any]) -> Given:
    """Runs a detector's encoder, and no more; returns what :func:`read_decoder` reads.

    Args:
        model: The detector.
        features: What its neck put out, (N, C, H, W) level by level.
        samples: mmdet's data samples with the shapes of images and batch.
    """
    for_encoder, for_decoder = model.pre_transformer(features, samples)
    return {**for_decoder, **model.forward_encoder(**for_encoder)}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within, a module and all below it are in eval mode; then each is in the mode that it was in."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training


# ------------------------------------------------------------------------------------------------------ the families

GIVEN = ('memory_mask', 'memory_pos', 'spatial_shapes', 'level_start_index', 'valid_ratios')
OF_LEVELS = ('spatial_shapes', 'level_start_index', 'valid_ratios')  # of deformable attention


def _decode_dab(model: Any, memory: Tensor, given: Given, queries: BoxQueries, hidden: Tensor) -> tuple[Any, Any]:
    """DAB-DETR: a query is a box, and begins without content, or with one of several patterns, here their mean."""
    content = memory.new_zeros(*queries.labels.shape, model.embed_dims)
    if model.num_patterns:
        content = content + model.patterns.weight.mean(0)
    states, references = model.decoder(
        query=content, key=memory, query_pos=queries.boxes.logit()[..., :model.query_dim],
        key_pos=given['memory_pos'], key_padding_mask=given['memory_mask'], reg_branches=model.bbox_head.fc_reg,
        self_attn_masks=hidden)
    return states, references


def _decode_deformable(model: Any, memory: Tensor, given: Given, queries: BoxQueries,
                       hidden: Tensor) -> tuple[Any, Any]:
    """Deformable DETR: of two stages, a query is made of its box, as it is of the encoder's proposals.

    With one stage queries are learnt, and each tells the point where it starts. A box gets content and position of the
    query that starts nearest to its centre, and starts from the centre itself; what it is wide is not told.
    """
    boxes = queries.boxes
    if model.as_two_stage:
        made = model.pos_trans_norm(model.pos_trans_fc(model.get_proposal_pos_embed(boxes.logit())))
        position, content = made.split(model.embed_dims, -1)
    else:
        learnt, boxes = model.query_embedding.weight, boxes[..., :2]
        points = model.reference_points_fc(learnt[:, :model.embed_dims]).sigmoid()
        nearest = torch.cdist(boxes, points.detach().expand(len(boxes), -1, -1)).argmin(-1)
        position, content = learnt[nearest].split(model.embed_dims, -1)
    states, references = model.decoder(
        query=content, query_pos=position, value=memory, key_padding_mask=given['memory_mask'],
        reference_points=boxes, reg_branches=model.bbox_head.reg_branches if model.with_box_refine else None,
        self_attn_mask=hidden, **{name: given[name] for name in OF_LEVELS})
    return states, [boxes, *references]


def _decode_dino(model: Any, memory: Tensor, given: Given, queries: BoxQueries, hidden: Tensor) -> tuple[Any, Any]:
    """DINO: a query is a box with the embedding of a class, as those are that it learns to denoise."""
    states, references = model.decoder(
        query=model.dn_query_generator.label_embedding(queries.labels), value=memory,
        key_padding_mask=given['memory_mask'], self_attn_mask=hidden, reference_points=queries.boxes,
        reg_branches=model.bbox_head.reg_branches, **{name: given[name] for name in OF_LEVELS})
    return states, list(references)


FAMILIES = {DABDETR: _decode_dab, DeformableDETR: _decode_deformable, DINO: _decode_dino}
