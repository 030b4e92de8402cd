"""What flows back through a tensor that stays as it is."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):

    @staticmethod
    def forward(context: Any, values: Tensor, shares: Tensor) -> Tensor:
        context.save_for_backward(shares)
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shares, = context.saved_tensors
        return gradient * shares.to(gradient.dtype), None


def scale_gradient(values: Tensor, shares: Tensor, dim: int = 0) -> Tensor:
    """The values as they are, whose gradient is multiplied by a share for each index of a dimension.

    Args:
        values: Of any shape.
        shares: (n,), as long as that dimension.
        dim: The dimension.

    Example:
        >>> values = torch.ones(2, 3, requires_grad=True)
        >>> scale_gradient(values, torch.tensor([0.0, 0.5])).sum().backward()
        >>> values.grad[:, 0]
        tensor([0.0000, 0.5000])
    """
    if not values.requires_grad:
        return values
    scaled: Tensor = _ScaleGradient.apply(values, shares.detach().view(-1, *[1] * (values.dim() - 1 - dim)))
    return scaled
