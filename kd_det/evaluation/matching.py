"""Which box is which: detections of two detectors, and detections and ground truth."""
from __future__ import annotations

from typing import Tuple

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def class_overlaps(boxes: InstanceData, others: InstanceData, mode: str = 'iou') -> Tensor:
    """How much boxes overlap others of their class.

    Args:
        boxes: n ``bboxes`` as x1, y1, x2, y2, with their ``labels``.
        others: m of them.
        mode: ``'iou'``, or ``'iof'``: the intersection's share of the first box, as COCO measures it on crowds.

    Returns:
        (n, m); 0 between boxes of unlike classes.
    """
    overlaps = bbox_overlaps(boxes.bboxes.double(), others.bboxes.double(), mode)
    return overlaps * (boxes.labels[:, None] == others.labels)


def match_boxes(overlaps: Tensor, min_iou: float = 0.5) -> Tuple[Tensor, Tensor]:
    """Pairs boxes one to one so that their overlaps sum up to the most.

    Args:
        overlaps: (n, m).
        min_iou: Pairs that overlap less are none.

    Returns:
        (p,) indices of the rows and (p,) indices of the columns.
    """
    gain = torch.where(overlaps >= min_iou, overlaps, torch.zeros_like(overlaps))
    rows, columns = map(torch.from_numpy, linear_sum_assignment(gain.numpy(), maximize=True))
    paired = gain[rows, columns] > 0
    return rows[paired], columns[paired]


def true_positives(overlaps: Tensor, scores: Tensor, min_iou: float = 0.5) -> Tensor:
    """Tells which detections are correct, as COCO does: by falling score, each takes the object of its class that it
    overlaps most and that is still free.

    Args:
        overlaps: (n, m) of detections and objects, see :func:`class_overlaps`.
        scores: (n,) of the detections.
        min_iou: Of a detection and its object.

    Returns:
        (n,) of bool.
    """
    free = overlaps.numpy().copy()
    correct = np.zeros(len(free), dtype=bool)
    for index in np.argsort(-scores.numpy(), kind='stable') if free.shape[1] else ():
        best = free[index].argmax()
        if free[index, best] >= min_iou:
            correct[index] = True
            free[:, best] = 0
    return torch.from_numpy(correct)
