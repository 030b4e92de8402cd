"""Which box is which: detections of two detectors, and detections and ground truth."""
from __future__ import annotations

from typing import Tuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_iou

TIE = 1e-3  # less than any difference of overlaps that matters


def match_detections(boxes: Tensor, labels: Tensor, other_boxes: Tensor, other_labels: Tensor,
                     min_iou: float = 0.5) -> Tuple[Tensor, Tensor, Tensor]:
    """Pairs the boxes of two detectors one to one so that their overlaps sum up to the most, whatever their classes.

    Args:
        boxes: (n, 4) as x1, y1, x2, y2.
        labels: (n,); they decide only between partners that overlap alike, as a detector has several boxes of unlike
            classes at one place.
        other_boxes: (m, 4).
        other_labels: (m,).
        min_iou: Pairs that overlap less are none.

    Returns:
        (p,) indices of the first, (p,) indices of the second, and (p,) their IoU.
    """
    overlap = box_iou(boxes.double(), other_boxes.double())
    preferred = overlap + TIE * (labels[:, None] == other_labels[None])
    gain = torch.where(overlap >= min_iou, preferred, torch.zeros_like(overlap))
    rows, columns = map(torch.from_numpy, linear_sum_assignment(gain.numpy(), maximize=True))
    paired = gain[rows, columns] > 0
    rows, columns = rows[paired], columns[paired]
    return rows, columns, overlap[rows, columns]


def true_positives(boxes: Tensor, scores: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor,
                   min_iou: float = 0.5) -> Tensor:
    """Tells which detections are correct, as COCO does: by falling score, each takes the object of its class that it
    overlaps most and that is still free.

    Args:
        boxes: (n, 4).
        scores: (n,).
        labels: (n,).
        true_boxes: (m, 4).
        true_labels: (m,).
        min_iou: Of a detection and its object.

    Returns:
        (n,) of bool.
    """
    overlap = box_iou(boxes.double(), true_boxes.double()).numpy()
    overlap[labels.numpy()[:, None] != true_labels.numpy()[None]] = 0
    correct = np.zeros(len(boxes), dtype=bool)
    for index in np.argsort(-scores.numpy(), kind='stable') if len(true_boxes) else ():
        best = overlap[index].argmax()
        if overlap[index, best] >= min_iou:
            correct[index] = True
            overlap[:, best] = 0
    return torch.from_numpy(correct)
