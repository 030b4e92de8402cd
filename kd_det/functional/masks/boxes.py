"""The boxes of a batch in one tensor, and tables of their overlaps."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of the largest (boxes, predictions) table that is kept at once.
_TABLE_BUDGET = 2**24


def concatenate(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All boxes of the batch as (B, 4) float32 and the image that each belongs to as (B,) long."""
    corners = torch.cat([image_boxes.reshape(-1, 4) for image_boxes in boxes]).float()
    # Counts are known to the host: made there, the index needs no synchronisation.
    counts = torch.tensor([len(image_boxes) for image_boxes in boxes])
    image = torch.arange(len(boxes)).repeat_interleave(counts)
    return corners, image.to(corners.device, non_blocking=True)


def slices(count: int, width: int) -> Iterator[slice]:
    """Cuts ``count`` rows of ``width`` elements into slices that stay within the budget."""
    step = max(1, _TABLE_BUDGET // max(1, width))
    return (slice(start, start + step) for start in range(0, count, step))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (..., 4) that broadcast against each other."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    return overlap / (area_a + area_b - overlap).clamp(min=1e-6)
