"""Normalisers that count the whole batch of data-parallel training."""
from __future__ import annotations

import torch
from mmdet.utils import reduce_mean
from torch import Tensor


def rank_share(mask: Tensor) -> Tensor:
    """ΣM of this rank over its mean across ranks; 1 in a single process.

    Data-parallel training averages the ranks. Losses over their own rank's ΣM, each times its share, average to what
    one process finds over the ΣM of the whole batch, however unevenly the boxes are spread. Every rank must call this.

    Args:
        mask: (N, H, W), or any other shape.

    Returns:
        Scalar, 0 where no rank has any.
    """
    total = mask.sum()
    return total / reduce_mean(total).clamp(min=torch.finfo(total.dtype).tiny)
