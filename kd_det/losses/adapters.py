"""What trains beside the student so that features can be compared: adapters of the channels, and blocks of the methods.

None of it is part of the student: it is gone at inference.
"""
from __future__ import annotations

from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from kd_det.config.arguments import declared
from kd_det.functional.focal_global import context_pool
from kd_det.functional.relations import non_local

ChannelAdapter = Literal['auto', 'none', 'conv1x1', 'conv3x3']


@declared
def build_adapter(kind: ChannelAdapter, student_channels: int, teacher_channels: int,
                  bias: bool = True) -> nn.Module:
    """Makes the layer that a student's feature passes before it is compared.

    Args:
        kind: ``'auto'``: a 1×1 convolution where the channels differ, else nothing; ``'none'``: the channels must
            agree; ``'conv1x1'``, ``'conv3x3'``: always a convolution.
        student_channels: C of the student's (N, C, H, W).
        teacher_channels: C of the teacher's.
        bias: Whether a convolution has one. Where each channel is normalised behind it, it would learn nothing.

    Returns:
        A module (N, C, H, W) -> (N, C', H, W), with the teacher's channels.

    Raises:
        ValueError: Unknown kind, or ``'none'`` between different widths.

    Example:
        >>> build_adapter('auto', 16, 32), build_adapter('auto', 32, 32)
        (Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1)), Identity())
    """
    if kind == 'none' and student_channels != teacher_channels:
        raise ValueError(f"adapter='none' needs equal channels, but the student has {student_channels} and the teacher "
                         f"{teacher_channels}: use adapter='conv1x1'.")
    if kind == 'none' or (kind == 'auto' and student_channels == teacher_channels):
        return nn.Identity()
    kernel = 3 if kind == 'conv3x3' else 1
    return nn.Conv2d(student_channels, teacher_channels, kernel, padding=kernel // 2, bias=bias)


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


class GlobalContext(nn.Module):
    """Adds to every cell what the whole image says: ``G(x) = x + mlp(Σ_hw softmax_hw(conv1x1(x)) · x)``.

    Of GCNet (arXiv 1904.11492), as FGD (arXiv 2111.11837) uses it to compare relations; mlp is C -> C/2, LayerNorm,
    ReLU, C/2 -> C. The last layer starts at zero, so that the block starts as the identity.

    Args:
        channels: C of the features; the hidden layer has half as many.

    Shape:
        (N, C, H, W) -> (N, C, H, W)
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.norm = nn.LayerNorm([hidden, 1, 1])
        self.expand = nn.Conv2d(hidden, channels, 1)
        nn.init.kaiming_normal_(self.attend.weight, mode='fan_in')
        for parameter in (self.attend.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(cast(Tensor, parameter))

    def forward(self, feature: Tensor, valid: Tensor | None = None) -> Tensor:
        """Adds its context to the feature.

        Args:
            feature: (N, C, H, W).
            valid: (N, H, W) of bool; the other cells (padding) are not looked at. All cells by default.
        """
        return feature + self.transform(context_pool(feature, self.attend(feature), valid))

    def transform(self, pooled: Tensor) -> Tensor:
        """The mlp: what is added to every cell, from the pooled vector; both (N, C, 1, 1)."""
        # Of one cell convolutions are matrix products, and some three times faster as such on the CPU.
        hidden = F.linear(pooled.flatten(1), self.reduce.weight.flatten(1), self.reduce.bias)
        hidden = F.layer_norm(hidden, hidden.shape[1:], self.norm.weight.flatten(), self.norm.bias.flatten(),
                              self.norm.eps)
        return F.linear(hidden.relu(), self.expand.weight.flatten(1), self.expand.bias)[:, :, None, None]

    def attention_weight(self) -> Tensor:
        """(C,), by which the logits are made. The softmax over the cells does not see the bias, whose gradient is 0."""
        return self.attend.weight.flatten() + 0 * cast(Tensor, self.attend.bias)


class NonLocal(nn.Module):
    """Adds to every cell what it gathers from all others: ``R(x) = x + BN(conv1x1(query(x)·Σ key(x)·value(x)))``.

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
        return feature + self._normalize(self.expand(gathered))

    def _normalize(self, gathered: Tensor) -> Tensor:
        """BatchNorm; by its running statistics where a channel has a single value, which has no deviation."""
        norm = self.norm
        if gathered.numel() > gathered.shape[1]:
            return cast(Tensor, norm(gathered))
        return F.batch_norm(gathered, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
