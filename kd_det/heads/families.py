"""The known families of dense heads: what each puts out, and how it is read."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from torch import Tensor

from kd_det.functional.boxes import constant
from kd_det.heads.dense import DenseOutputs, read_strides
from kd_det.heads.readers import DenseReader, Maps, order_by_prior, reads, remove_normalization
from kd_det.taps import Features


class TargetsReader(DenseReader):
    """Of heads whose ``get_targets`` returns lists by level, at fixed places of a tuple.

    Attributes:
        labels_at: The place of the labels.
        weights_at: The place of the weights of the classes; None where all priors have the same.
        targets_at: The place of the regressions; None where they are in other units than those of the outputs.
    """

    parts = frozenset({'positives'})
    assigning_method = 'get_targets'
    labels_at = 0
    weights_at: int | None = None
    targets_at: int | None = None

    def tells_targets(self, head: Any) -> bool:
        return self.targets_at is not None and isinstance(head.bbox_coder, DeltaXYWHBBoxCoder)

    def read_positives(self, head: Any, returned: Sequence[Any], images: int) -> Tensor:
        labels = torch.cat([level.reshape(images, -1) for level in returned[-1][self.labels_at]], 1)
        return (labels >= 0) & (labels < head.num_classes)

    def read_ignored(self, returned: Sequence[Any], images: int) -> Tensor | None:
        if self.weights_at is None:
            return None
        return torch.cat([level.reshape(images, -1) for level in returned[-1][self.weights_at]], 1) == 0

    def read_targets(self, head: Any, returned: Sequence[Any], dense: DenseOutputs) -> Tensor | None:
        if dense.assigned is None or not self.tells_targets(head):
            return None
        assigned = torch.cat(dense.assigned, 1)
        deltas = torch.cat([level.reshape(len(assigned), -1, 4) for level in returned[-1][self.targets_at]], 1).float()
        if head.reg_decoded_bbox:  # the targets are boxes; priors without one become their own target
            priors = torch.cat(dense.priors).expand_as(deltas)
            boxes = torch.where(assigned.unsqueeze(-1), deltas, priors)
            deltas = head.bbox_coder.encode(priors.flatten(0, 1), boxes.flatten(0, 1)).view_as(deltas)
        return remove_normalization(head.bbox_coder, deltas) * assigned.unsqueeze(-1)


@reads(RetinaSepBNHead, SSDHead, RPNHead)
class AnchorReader(TargetsReader):
    """Of heads with anchors, whose maps are classes, deltas, and perhaps centerness."""

    weights_at: int | None = 1
    targets_at: int | None = 2

    def name_encoding(self, head: Any) -> str:
        coder = head.bbox_coder
        if isinstance(coder, DeltaXYWHBBoxCoder):  # its normalisation is taken away
            return 'shifts and scales of anchors'
        settings = (f'{name}={value}' for name, value in sorted(vars(coder).items()) if not name.startswith('_'))
        return f'{type(coder).__name__}({", ".join(settings)})'

    def read(self, head: Any, logits: Maps, deltas: Maps, centerness: Maps | None = None) -> DenseOutputs:
        encoded = regressions = order_by_prior(deltas, 4)
        if isinstance(head.bbox_coder, DeltaXYWHBBoxCoder):
            regressions = tuple(remove_normalization(head.bbox_coder, each) for each in encoded)
        return self.assemble(head, logits, regressions, encoded=encoded,
                             centerness=None if centerness is None else _order_scalars(centerness))

    def decode(self, head: Any, priors: Tensor, encoded: Tensor) -> Tensor:
        return head.bbox_coder.decode(priors, encoded)


@reads(YOLOFHead)
class YOLOFReader(AnchorReader):
    """Of YOLOF: its only level's labels are one tensor, and its targets those of the positives alone."""

    weights_at = targets_at = None

    def read_positives(self, head: Any, returned: Sequence[Any], images: int) -> Tensor:
        labels = returned[-1][self.labels_at]  # (N, priors)
        return (labels >= 0) & (labels < head.num_classes)


@reads(RetinaHead)
class RetinaReader(AnchorReader):
    """Of RetinaNet, whose levels share their towers."""

    parts = frozenset({'positives', 'towers'})


@reads(ATSSHead)
class ATSSReader(RetinaReader):
    """Of ATSS, whose ``get_targets`` returns the anchors first."""

    labels_at, weights_at, targets_at = 1, 2, 3
    predicts_centerness = True


class DistanceReader(TargetsReader):
    """Of heads that regress the distances from the centres of their priors to the four sides."""

    is_of_centres = True

    def name_encoding(self, head: Any) -> str:
        return 'distances to the four sides'


@reads(GFLHead)
class GFLReader(DistanceReader):
    """Of GFL: it predicts distributions over the distances to the four sides, in strides."""

    parts = frozenset({'positives', 'towers', 'distributions'})
    labels_at, weights_at = 1, 2

    def read(self, head: Any, logits: Maps, distributions: Maps) -> DenseOutputs:
        bins = head.reg_max + 1
        by_side = tuple(each.view(each.shape[0], -1, 4, bins) for each in order_by_prior(distributions, 4 * bins))
        distances = tuple(head.integral(each).view(each.shape[0], -1, 4) * stride
                          for each, stride in zip(by_side, read_strides(head.prior_generator.strides)))
        return self.assemble(head, logits, distances, distributions=by_side)

    def decode(self, head: Any, priors: Tensor, encoded: Tensor) -> Tensor:
        return head.bbox_coder.decode(head.anchor_center(priors), encoded)


class PointReader(DistanceReader):
    """Of heads that regress the distances from points to the four sides, in pixels."""

    def decode(self, head: Any, priors: Tensor, encoded: Tensor) -> Tensor:
        return head.bbox_coder.decode(priors[:, :2], encoded)


@reads(RTMDetHead)
class RTMDetReader(PointReader):
    """Of RTMDet."""

    parts = frozenset({'positives', 'towers'})
    labels_at, weights_at = 1, 2

    def read(self, head: Any, logits: Maps, distances: Maps) -> DenseOutputs:
        return self.assemble(head, logits, order_by_prior(distances, 4))


@reads(RTMDetSepBNHead)
class RTMDetSepBNReader(RTMDetReader):
    """Of RTMDet with normalisation by level."""

    has_tower_of_each_level = True


@reads(FCOSHead)
class FCOSReader(PointReader):
    """Of FCOS, whose distances are in strides with ``norm_on_bbox``, in train mode alone."""

    parts = frozenset({'positives', 'towers'})
    predicts_centerness = True

    def read(self, head: Any, logits: Maps, distances: Maps, centerness: Maps) -> DenseOutputs:
        regressions = order_by_prior(distances, 4)
        if head.norm_on_bbox and head.training:  # in eval mode the head itself multiplies by the stride
            strides = read_strides(head.prior_generator.strides)
            regressions = tuple(each * stride for each, stride in zip(regressions, strides))
        return self.assemble(head, logits, regressions, centerness=_order_scalars(centerness))


@reads(YOLOXHead)
class YOLOXReader(DenseReader):
    """Of YOLOX, which assigns image by image."""

    parts = frozenset({'positives', 'towers'})
    assigning_method = '_get_targets_single'
    towers = ('multi_level_cls_convs', 'multi_level_reg_convs')
    has_tower_of_each_level = True
    is_of_centres = True

    def name_encoding(self, head: Any) -> str:
        return 'shifts in strides and logarithms of the size'

    def read(self, head: Any, logits: Maps, regressions: Maps, objectness: Maps) -> DenseOutputs:
        return self.assemble(head, logits, order_by_prior(regressions, 4), objectness=_order_scalars(objectness))

    def decode(self, head: Any, priors: Tensor, encoded: Tensor) -> Tensor:
        return head._bbox_decode(priors, encoded)

    def read_positives(self, head: Any, returned: Sequence[Any], images: int) -> Tensor:
        return torch.stack([foreground for foreground, *_ in returned]).bool()


@reads(YOLOV3Head)
class YOLOv3Reader(DenseReader):
    """Of YOLOv3, whose only maps hold box, objectness and classes one after the other."""

    parts = frozenset({'positives'})
    assigning_method = 'get_targets'

    def name_encoding(self, head: Any) -> str:
        return 'shifts in pixels and scales of anchors'

    def read(self, head: Any, maps: Maps) -> DenseOutputs:
        predictions = order_by_prior(maps, head.num_attrib)
        # The coder takes the place of the centre within its cell, 0 to 1, and a stride to multiply it by.
        shifts_in_pixels = tuple(torch.cat([(each[..., :2].sigmoid() - 0.5) * stride, each[..., 2:4]], -1)
                                 for each, stride in zip(predictions, read_strides(head.prior_generator.strides)))
        return self.assemble(head, maps, shifts_in_pixels, logits=tuple(each[..., 5:] for each in predictions),
                             activation='sigmoid', objectness=tuple(each[..., 4] for each in predictions))

    def decode(self, head: Any, priors: Tensor, encoded: Tensor) -> Tensor:
        return head.bbox_coder.decode(priors, encoded + constant([0.5, 0.5, 0, 0], encoded), 1)

    def read_positives(self, head: Any, returned: Sequence[Any], images: int) -> Tensor:
        targets, _ = returned[-1]  # by level, (N, priors, attributes), of which the fifth is objectness
        return torch.cat([level[..., 4] for level in targets], 1) > 0


def _order_scalars(maps: Maps) -> Features:
    """(N, A, H, W) maps as (N, H·W·A), in float32."""
    return tuple(each[..., 0] for each in order_by_prior(maps, 1))
