"""Non-maximum suppression, hard and soft (Soft-NMS, arXiv 1704.04503), and the groups that it forms."""

import numpy as np
import torch
import torchvision
from torch import Tensor

from .precision import at_least_float32

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes to keep, by descending score.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: a box is dropped if its IoU with a kept one is above this.
        offset: 0, or 1 where x2 and y2 are the last pixels inside the box.
    """
    boxes, scores = at_least_float32(boxes, scores)
    if offset:
        boxes = torch.cat([boxes[:, :2], boxes[:, 2:] + offset], dim=1)
    # mmcv compares in float32: an IoU equal to the threshold must not exceed it by the threshold's rounding.
    return torchvision.ops.nms(boxes, scores, float(np.float32(iou_threshold)))


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float, min_score: float,
            method: int, offset: int) -> Tensor:
    """Decays the scores of boxes that overlap a better one. On the CPU, as in mmcv.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2.
        scores: (N,).
        dets: (N, 5), written: the first K rows are the remaining boxes with their decayed scores.
        iou_threshold: from this IoU on, the naive and linear methods act.
        sigma: width of the Gaussian method.
        min_score: boxes that decay below are dropped.
        method: 0 naive (score 0), 1 linear (score x (1 - IoU)), 2 Gaussian (score x exp(-IoU^2 / sigma)).
        offset: as in :func:`nms`.

    Returns:
        (K,) indices of the remaining boxes, in the order in which they were chosen.
    """
    boxes, scores = at_least_float32(boxes, scores)
    x1, y1, x2, y2 = boxes.unbind(1)
    # One row a box, so that a box moves with its score, area and index: x1, y1, x2, y2, score, area.
    rows = torch.stack([x1, y1, x2, y2, scores, (x2 - x1 + offset) * (y2 - y1 + offset)], dim=1)
    indices = torch.arange(len(rows))

    chosen = 0
    while chosen < len(rows):
        best = chosen + int(rows[chosen:, 4].argmax())
        rows[[chosen, best]] = rows[[best, chosen]]
        indices[[chosen, best]] = indices[[best, chosen]]
        dets[chosen] = rows[chosen, :5].to(dets.dtype)

        candidates = rows[chosen + 1:]
        candidates[:, 4] *= _decay(_iou(rows[chosen], candidates, offset), iou_threshold, sigma, method)
        order = _compact(candidates[:, 4] >= min_score) + chosen + 1
        chosen += 1
        rows = torch.cat([rows[:chosen], rows[order]])
        indices = torch.cat([indices[:chosen], indices[order]])
    return indices


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Groups of boxes that suppress each other, by descending score of their best. On the CPU, as in mmcv.

    Args:
        dets: (N, 5) as x1, y1, x2, y2, score.
        iou_threshold: from this IoU with the best on, a box belongs to its group; no box belongs to two.

    Returns:
        Each group's indices, by descending score.
    """
    dets, = at_least_float32(dets)
    x1, y1, x2, y2, scores = dets.unbind(1)
    rows = torch.stack([x1, y1, x2, y2, scores, (x2 - x1) * (y2 - y1)], dim=1)
    remaining = scores.argsort(descending=True, stable=True)
    groups = []
    while len(remaining):
        best, others = remaining[0], remaining[1:]
        belongs = _iou(rows[best], rows[others], offset=0) >= np.float32(iou_threshold)
        groups.append([int(best), *others[belongs].tolist()])
        remaining = others[~belongs]
    return groups


def _iou(box: Tensor, others: Tensor, offset: int) -> Tensor:
    width = (torch.minimum(box[2], others[:, 2]) - torch.maximum(box[0], others[:, 0]) + offset).clamp(min=0)
    height = (torch.minimum(box[3], others[:, 3]) - torch.maximum(box[1], others[:, 1]) + offset).clamp(min=0)
    intersection = width * height
    return intersection / (box[5] + others[:, 5] - intersection)


def _decay(iou: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == GAUSSIAN:
        return torch.exp(-(iou * iou) / sigma)
    overlaps = iou >= np.float32(iou_threshold)
    return torch.where(overlaps, 1 - iou if method == LINEAR else torch.zeros_like(iou), torch.ones_like(iou))


def _compact(alive: Tensor) -> Tensor:
    """Positions of the alive entries, the last ones moved into the gaps: mmcv's order, which decides between ties."""
    count = int(alive.sum())
    positions = torch.arange(count)
    positions[~alive[:count]] = alive[count:].nonzero().squeeze(1).flip(0) + count
    return positions
