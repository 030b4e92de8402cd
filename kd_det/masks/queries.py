"""A mask from what the queries of a DETR detect."""
from __future__ import annotations

from typing import Tuple

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.functional.masks import region_foreground
from kd_det.functional.queries import corners
from kd_det.heads import QUERIES_OF
from kd_det.masks.base import CellMask


@MODELS.register_module()
class QueryConfidence(CellMask):
    """Where the queries of a teacher see objects: at each cell the largest score of a query whose box covers it.

    FRS (arXiv 2111.00674) weighs features by what the teacher's dense head sees; this does it by the last decoder layer
    of a DETR, which says itself how far an object reaches. It needs no ground truth.

    Args:
        head: The teacher's.
        top_k: Number of queries that count, the surest.

    Example:
        >>> dict(type='FeatureImitation', tap='encoder', mask='QueryConfidence', normalizer='mask')
    """

    def __init__(self, head: str = 'bbox_head', top_k: int = 100) -> None:
        super().__init__()
        self.head, self.top_k = head + QUERIES_OF, top_k

    @property
    def teacher_heads(self) -> Tuple[str, ...]:
        return (self.head, )

    def cells(self, level: ComparedLevel) -> Tensor:
        context = level.context
        last = context.teacher_outputs[level.teacher_index][self.head].last(1)
        scores, surest = last.scores()[0].topk(min(self.top_k, last.boxes.shape[2]))
        boxes = corners(last.boxes[0]).gather(1, surest.unsqueeze(-1).expand(-1, -1, 4)) / 1000
        sizes = boxes.new_tensor([[width, height] * 2 for height, width in context.image_shapes])
        images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(scores.shape[1]).unsqueeze(1)
        rois = torch.cat([images, (boxes.clamp(0, 1) * sizes.unsqueeze(1)).flatten(0, 1)], 1)
        return region_foreground(rois, scores.flatten(), len(boxes), context.batch_shape, level.shape) * level.valid
