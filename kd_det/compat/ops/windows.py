"""Two operators that read a window around each cell.

CARAFE (arXiv 1905.02188) upsamples with a kernel of its own for every output cell; masked convolution computes chosen
cells only, by which guided anchoring (arXiv 1901.03278) predicts.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


def carafe_forward(features: Tensor, masks: Tensor, rfeatures: Tensor, routput: Tensor, rmasks: Tensor,
                   output: Tensor, kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Writes ``output``, (N, C, H * scale_factor, W * scale_factor).

    An output cell is the weighted sum of the ``kernel_size`` x ``kernel_size`` feature cells around the one it lies in;
    cells beyond the border count 0.

    Args:
        features: (N, C, H, W).
        masks: (N, group_size * kernel_size^2, H * scale_factor, W * scale_factor), the kernels; a group of
            C / group_size channels shares one.
        rfeatures: written for the backward pass: the features as (N, H, W, C).
        routput, rmasks: buffers of mmcv's kernels, not used.
    """
    n, c, h, w = features.shape
    rfeatures.resize_(n, h, w, c).copy_(features.permute(0, 2, 3, 1))
    features, masks = at_least_float32(features, masks)
    padded, kernels = _split(features, masks, kernel_size, group_size, scale_factor)
    total = padded.new_zeros(n, group_size, c // group_size, h, scale_factor, w, scale_factor)
    for cell, y, x in _kernel_cells(kernel_size):
        total.addcmul_(padded[..., y:y + h, :, x:x + w, :], kernels[:, :, cell, None])
    output.copy_(total.view_as(output))


def carafe_backward(top_grad: Tensor, rfeatures: Tensor, masks: Tensor, rtop_grad: Tensor, rbottom_grad_hs: Tensor,
                    rbottom_grad: Tensor, rmask_grad: Tensor, bottom_grad: Tensor, mask_grad: Tensor,
                    kernel_size: int, group_size: int, scale_factor: int) -> None:
    """Writes ``bottom_grad``, like the features, and ``mask_grad``, like ``masks``; the buffers are not used."""
    n, h, w, c = rfeatures.shape
    features, masks, top_grad = at_least_float32(rfeatures.permute(0, 3, 1, 2), masks, top_grad)
    padded, kernels = _split(features, masks, kernel_size, group_size, scale_factor)
    grad_output = top_grad.reshape(n, group_size, c // group_size, h, scale_factor, w, scale_factor)
    grad_padded, grad_kernels = padded.new_zeros(padded.shape), kernels.new_empty(kernels.shape)
    for cell, y, x in _kernel_cells(kernel_size):
        window = (..., slice(y, y + h), slice(None), slice(x, x + w), slice(None))
        grad_padded[window] += (grad_output * kernels[:, :, cell, None]).sum(dim=(-3, -1), keepdim=True)
        grad_kernels[:, :, cell] = (grad_output * padded[window]).sum(dim=2)
    border = kernel_size // 2
    grad_features = grad_padded[..., border:border + h, 0, border:border + w, 0]
    bottom_grad.copy_(grad_features.reshape(n, c, h, w))
    mask_grad.copy_(grad_kernels.view_as(mask_grad))


def masked_im2col_forward(im: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, col: Tensor, kernel_h: int,
                          kernel_w: int, pad_h: int, pad_w: int) -> None:
    """Writes ``col``, (C * kernel_h * kernel_w, K): what a kernel of stride 1 covers at each of K output cells.

    There is no backward pass, in mmcv neither.

    Args:
        im: (1, C, H, W); beyond its padding, too, it counts 0.
        mask_h_idx, mask_w_idx: (K,), row and column of each output cell.
    """
    _, channels, height, width = im.shape
    rows = mask_h_idx[:, None] - pad_h + torch.arange(kernel_h, device=im.device)
    columns = mask_w_idx[:, None] - pad_w + torch.arange(kernel_w, device=im.device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    cells = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    covered = im[0].flatten(1)[:, cells].masked_fill(~inside, 0)  # (C, K, kernel_h, kernel_w)
    col.copy_(covered.permute(0, 2, 3, 1).reshape(channels * kernel_h * kernel_w, -1))


def masked_col2im_forward(col: Tensor, mask_h_idx: Tensor, mask_w_idx: Tensor, im: Tensor, height: int, width: int,
                          channels: int) -> None:
    """Writes the K columns of ``col``, (channels, K), to their cells of ``im``, (1, channels, height, width)."""
    im[0][:, mask_h_idx, mask_w_idx] = col.to(im.dtype)


def _split(features: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    """Padded features (N, groups, C / groups, H', 1, W', 1) and kernels (N, groups, cells, H, scale, W, scale)."""
    n, c, h, w = features.shape
    padded = F.pad(features, [kernel_size // 2] * 4).unflatten(1, (groups, c // groups))
    return (padded.unsqueeze(-2).unsqueeze(-1),
            masks.reshape(n, groups, kernel_size**2, h, scale, w, scale))


def _kernel_cells(kernel_size: int) -> Iterator[tuple[int, int, int]]:
    """Index, row and column of each cell of a kernel."""
    return ((cell, *divmod(cell, kernel_size)) for cell in range(kernel_size**2))
