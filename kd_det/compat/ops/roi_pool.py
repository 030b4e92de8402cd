"""RoIPool (arXiv 1504.08083) with mmcv's bins."""

import torch
from torch import Tensor

from .precision import at_least_float32


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor, pooled_height: int,
                     pooled_width: int, spatial_scale: float) -> None:
    """Writes the maximum of each bin, 0 where a bin is empty.

    mmcv divides the unrounded box, torchvision the rounded one, so their bins differ. A bin of mmcv is itself a box of
    whole cells, which torchvision pools exactly.

    Args:
        input: (N, C, H, W).
        rois: (K, 5) as image index, x1, y1, x2, y2 (the last pixels inside the box).
        output: (K, C, pooled_height, pooled_width), written.
        argmax: like ``output``, int32, written: the flat cell of each maximum, -1 for an empty bin.
        spatial_scale: feature cells per pixel of ``rois``.
    """
    input, rois = at_least_float32(input, rois)
    height, width = input.shape[2:]
    x1, x2 = _bin_edges(rois[:, 1], rois[:, 3], spatial_scale, pooled_width, width)
    y1, y2 = _bin_edges(rois[:, 2], rois[:, 4], spatial_scale, pooled_height, height)

    bins = torch.stack(torch.broadcast_tensors(rois[:, 0, None, None], x1[:, None, :], y1[:, :, None],
                                               x2[:, None, :] - 1, y2[:, :, None] - 1), dim=-1)
    empty = ((bins[..., 3] < bins[..., 1]) | (bins[..., 4] < bins[..., 2])).unsqueeze(1)
    maximum, position = torch.ops.torchvision.roi_pool(input, bins.reshape(-1, 5), 1.0, 1, 1)

    def per_roi(values: Tensor) -> Tensor:  # (K * bins, C, 1, 1) -> (K, C, pooled_height, pooled_width)
        return values.view(-1, pooled_height, pooled_width, input.shape[1]).permute(0, 3, 1, 2)

    output.copy_(per_roi(maximum).masked_fill(empty, 0))
    argmax.copy_(per_roi(position).masked_fill(empty, -1))


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor, pooled_height: int,
                      pooled_width: int, spatial_scale: float) -> None:
    """Writes ``grad_input``, (N, C, H, W); the other arguments are those of :func:`roi_pool_forward`."""
    grad_output, rois = at_least_float32(grad_output, rois)
    grad_input.copy_(torch.ops.torchvision._roi_pool_backward(grad_output, rois, argmax, spatial_scale, pooled_height,
                                                              pooled_width, *grad_input.shape))


def _bin_edges(start: Tensor, end: Tensor, scale: float, bins: int, cells: int) -> tuple[Tensor, Tensor]:
    """First cell and one past the last cell of each bin of each box, (K, bins) twice, within [0, cells]."""
    start, end = start[:, None] * scale, (end[:, None] + 1) * scale
    size = (end - start) / bins
    index = torch.arange(bins, device=start.device)
    first, stop = (index * size + start).floor(), ((index + 1) * size + start).ceil()
    stop = torch.where(size > 0, stop, first)  # a malformed box is empty
    return first.clamp(0, cells), stop.clamp(0, cells)
