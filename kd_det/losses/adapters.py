"""The global context block of FGD's relation part."""
from __future__ import annotations

from typing import Optional

from torch import Tensor, nn
from torch.nn.functional import linear

from kd_det.functional.features import context_pool


class GlobalContext(nn.Module):
    """Adds to every cell what the whole image says: ``x + mlp(Σ_hw softmax_hw(conv1x1(x)) · x)``.

    Of GCNet (arXiv 1904.11492), as FGD (arXiv 2111.11837) uses it to compare relations. The last layer starts at zero,
    so that the block starts as the identity.

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
        nn.init.zeros_(self.attend.bias)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, feature: Tensor, valid: Optional[Tensor] = None) -> Tensor:
        """Args:
            feature: (N, C, H, W).
            valid: (N, H, W) of bool; the other cells (padding) are not looked at. All cells by default.
        """
        return feature + self.addition(context_pool(feature, self.attend(feature), valid))

    def addition(self, context: Tensor) -> Tensor:
        """What every cell gets, from the context vector; both (N, C, 1, 1)."""
        hidden = _at_one_cell(self.reduce, context)
        return _at_one_cell(self.expand, self.norm(hidden).relu())

    def attention_weight(self) -> Tensor:
        """(C,), of which the logits are made. The softmax over the cells does not see the bias, whose gradient is 0."""
        return self.attend.weight.flatten() + 0 * self.attend.bias


def _at_one_cell(conv: nn.Conv2d, context: Tensor) -> Tensor:
    """A 1 × 1 convolution of (N, C, 1, 1), as the matrix product that it is: some three times faster on the CPU."""
    return linear(context.flatten(1), conv.weight.flatten(1), conv.bias)[:, :, None, None]
