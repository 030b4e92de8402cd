"""The non-local block with which FKD reads the relations between the cells of a feature."""
from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.functional.relations import non_local


class NonLocal(nn.Module):
    """Adds to every cell what it gathers from all others: ``x + norm(expand(non_local(query(x), key(x), value(x))))``.

    The dot-product form of Non-local Neural Networks (arXiv 1711.07971), as in FKD (ICLR 2021, openreview uKhGRvM8QNH):
    keys and values are max-pooled, and BatchNorm starts at 0, so that the block starts as the identity.

    Args:
        channels: C of the features; the embeddings have C / ``reduction``.
        pool: Cells per side of the pooling window; a smaller map is pooled whole.
        reduction: See ``channels``.

    Shape:
        (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int, pool: int = 4, reduction: int = 4) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.pool = pool
        self.query, self.key, self.value = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.expand = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, feature: Tensor) -> Tensor:
        window = [min(self.pool, side) for side in feature.shape[2:]]
        gathered = non_local(self.query(feature), F.max_pool2d(self.key(feature), window),
                             F.max_pool2d(self.value(feature), window))
        return feature + self._normalized(self.expand(gathered))

    def _normalized(self, gathered: Tensor) -> Tensor:
        """BatchNorm; by its running statistics where a channel has a single value, which has no deviation."""
        if gathered.numel() > gathered.shape[1]:
            return self.norm(gathered)
        norm = self.norm
        return F.batch_norm(gathered, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
