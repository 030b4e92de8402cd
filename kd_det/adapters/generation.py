"""The block with which MGD completes a feature."""
from __future__ import annotations

from torch import nn


class GenerationBlock(nn.Sequential):
    """3×3 convolution – ReLU – 3×3 convolution: restores cells from those around them (MGD, arXiv 2205.01529).

    Args:
        channels: C of the features.

    Shape:
        (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))
