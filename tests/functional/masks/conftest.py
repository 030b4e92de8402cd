"""Boxes, and the overlap of two of them, for masks of boxes."""
import pytest
import torch

BATCH = (96, 160)


@pytest.fixture
def random_boxes():
    """Makes boxes from thin to large; ``outside`` is how far, in image sizes, they may leave the image."""

    def make(count: int, seed: int, outside: float = 0.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        size = torch.tensor([BATCH[1], BATCH[0]], dtype=torch.float)
        first, second = ((torch.rand(count, 2, generator=generator) * (1 + 2 * outside) - outside) * size
                         for _ in range(2))
        extent = torch.rand(count, 1, generator=generator)**2
        second = first + (second - first) * extent
        return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], 1)

    return make


@pytest.fixture
def loop_iou():
    """IoU of two boxes, numbers all."""

    def iou(a, b) -> float:
        overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)

    return iou
