"""Batch normalisation over all ranks: what mmcv's ``MMSyncBN`` computes between its exchanges, in float32."""
from torch import Tensor

from .precision import at_least_float32


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Writes ``mean``, (C,), of ``input``, (N, C, cells)."""
    mean.copy_(at_least_float32(input)[0].mean(dim=(0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Writes ``var``, (C,), the mean square of ``input``, (N, C, cells), about ``mean``."""
    input, mean = at_least_float32(input, mean)
    var.copy_((input - mean[:, None]).square().mean(dim=(0, 2)))


def sync_bn_forward_output(input: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor,
                           running_mean: Tensor, running_var: Tensor, norm: Tensor, std: Tensor, output: Tensor,
                           eps: float, momentum: float, group_size: int) -> None:
    """Writes what the layer puts out and keeps.

    Args:
        input: (N, C, cells).
        mean, var: (C,), of all ranks.
        weight, bias: (C,); or None.
        running_mean, running_var: (C,), moved by ``momentum``; the variance without bias. Or None.
        norm: as ``input``, written: normalised, for the backward pass.
        std: (C,), written.
        output: as ``input``, written: ``norm`` times ``weight`` plus ``bias``.
        momentum: a number, or a tensor of one.
        group_size: how many ranks there are, of as many images each.
    """
    std.copy_((var + eps).sqrt())
    norm.copy_((at_least_float32(input)[0] - mean[:, None]) / std[:, None])
    output.copy_(norm if weight is None else norm * weight[:, None] + bias[:, None])
    if running_mean is not None:
        count = input.shape[0] * input.shape[2] * group_size
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var * (count / max(count - 1, 1)))


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Writes ``grad_weight`` and ``grad_bias``, (C,)."""
    grad_output, norm = at_least_float32(grad_output, norm)
    grad_weight.copy_((grad_output * norm).sum(dim=(0, 2)))
    grad_bias.copy_(grad_output.sum(dim=(0, 2)))


def sync_bn_backward_data(grad_output: Tensor, weight: Tensor, grad_weight: Tensor, grad_bias: Tensor, norm: Tensor,
                          std: Tensor, grad_input: Tensor) -> None:
    """Writes ``grad_input``, (N, C, cells); ``grad_weight`` and ``grad_bias`` are the means over the ranks."""
    grad_output, norm = at_least_float32(grad_output, norm)
    count = grad_output.shape[0] * grad_output.shape[2]
    common = (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_((weight / std)[:, None] * (grad_output - common))
