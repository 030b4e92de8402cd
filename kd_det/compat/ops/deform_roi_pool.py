"""Deformable RoI pooling (arXiv 1703.06211): RoIAlign whose bins are moved, each by an offset of its own."""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


class Samples(NamedTuple):
    """The M points that are read, those of a bin side by side; the bins are K * pooled_height * pooled_width."""
    bins: Tensor  # (M,), which bin
    starts: Tensor  # (bins,), the first point of each bin
    per_bin: Tensor  # (bins,), how many points
    y: Tensor  # (M,), in cells
    x: Tensor
    edges: tuple[Tensor, Tensor, Tensor, Tensor]  # (M,) each, the cells around a point: y low, y high, x low, x high
    corners: Tensor  # (M, 4), those cells as rows of (N * H * W, C): low low, low high, high low, high high in y, x
    weights: Tensor  # (M, 4), bilinear; 0 for a point beyond the border
    inside: Tensor  # (M,), the others


def deform_roi_pool_forward(input: Tensor, rois: Tensor, offset: Tensor, output: Tensor, pooled_height: int,
                            pooled_width: int, spatial_scale: float, sampling_ratio: int, gamma: float) -> None:
    """Writes the average of the bilinear samples in each bin.

    Args:
        input: (N, C, H, W).
        rois: (K, 5) as image index, x1, y1, x2, y2.
        offset: (K, 2, pooled_height, pooled_width), shifts in x and y, times ``gamma`` in sizes of the box; or empty.
        output: (K, C, pooled_height, pooled_width), written.
        spatial_scale: feature cells per pixel of ``rois``.
        sampling_ratio: samples a bin and axis; 0 adapts to the size of the box.
    """
    if not output.numel():
        return
    input, rois, offset = at_least_float32(input, rois, offset)
    samples = _sample(input, rois, offset, pooled_height, pooled_width, spatial_scale, sampling_ratio, gamma)
    pooled = _pool(_cells(input), samples.weights, samples)
    output.copy_(pooled.view(-1, pooled_height, pooled_width, input.shape[1]).permute(0, 3, 1, 2))


def deform_roi_pool_backward(grad_output: Tensor, input: Tensor, rois: Tensor, offset: Tensor, grad_input: Tensor,
                             grad_offset: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float,
                             sampling_ratio: int, gamma: float) -> None:
    """Writes ``grad_input`` and, where there are offsets, ``grad_offset``.

    The offsets' gradient is that of mmcv's kernel: for points between the border and the outermost cells it is not the
    derivative.
    """
    if not grad_output.numel():
        grad_input.zero_()
        return
    grad_output, input, rois, offset = at_least_float32(grad_output, input, rois, offset)
    samples = _sample(input, rois, offset, pooled_height, pooled_width, spatial_scale, sampling_ratio, gamma)
    cells, weights = _cells(input).detach().requires_grad_(), samples.weights.detach().requires_grad_()
    with torch.enable_grad():
        pooled = _pool(cells, weights, samples)
    grad_cells, slopes = torch.autograd.grad(pooled, (cells, weights), _cells(grad_output))
    n, c, h, w = input.shape
    grad_input.copy_(grad_cells.view(n, h, w, c).permute(0, 3, 1, 2))
    if not offset.numel():
        return

    # By a corner's weight, the gradient is the corner's value times that of the output, summed over the channels.
    low_low, low_high, high_low, high_high = slopes.masked_fill(~samples.inside[:, None], 0).unbind(1)
    y_low, y_high, x_low, x_high = samples.edges
    along_x = (high_high - high_low) * (samples.y - y_low) + (low_high - low_low) * (y_high - samples.y)
    along_y = (high_high - low_high) * (samples.x - x_low) + (high_low - low_low) * (x_high - samples.x)
    summed = slopes.new_zeros(2, len(samples.starts)).index_add_(1, samples.bins, torch.stack([along_x, along_y]))
    extent = gamma * spatial_scale * (rois[:, 3:5] - rois[:, 1:3])  # (K, 2), as x, y
    grad_offset.copy_(summed.view(2, -1, pooled_height, pooled_width).transpose(0, 1) * extent[:, :, None, None])


def _cells(feature: Tensor) -> Tensor:
    """(N, C, H, W) as (N * H * W, C)."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def _pool(cells: Tensor, weights: Tensor, samples: Samples) -> Tensor:
    """(bins, C): the average over each bin's points; 0 without one."""
    total = F.embedding_bag(samples.corners.flatten(), cells, samples.starts * 4, mode='sum',
                            per_sample_weights=weights.flatten())
    return total / samples.per_bin.clamp(min=1)[:, None]


def _sample(input: Tensor, rois: Tensor, offset: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float,
            sampling_ratio: int, gamma: float) -> Samples:
    """Where the bins of all boxes are read."""
    height, width = input.shape[2:]
    start = rois[:, 1:3] * spatial_scale - 0.5  # (K, 2), as x, y
    extent = rois[:, 3:5] * spatial_scale - 0.5 - start
    bin_size = extent / extent.new_tensor([pooled_width, pooled_height])
    grid = bin_size.float().ceil().clamp(min=0).long()  # points a bin and axis
    if sampling_ratio > 0:
        grid = torch.full_like(grid, sampling_ratio)

    # One row a bin, then one a point. The sums in mmcv's order: the last bit may decide which cell a point lies in.
    cell = torch.arange(pooled_height * pooled_width, device=input.device)
    cell_xy = torch.stack([cell % pooled_width, torch.div(cell, pooled_width, rounding_mode='floor')], dim=-1)
    corner = start[:, None]
    if offset.numel():
        corner = corner + gamma * extent[:, None] * offset.flatten(2).transpose(1, 2)
    corner = corner + cell_xy * bin_size[:, None]  # (K, cells, 2)
    per_bin = grid.prod(dim=1).repeat_interleave(len(cell))
    starts = per_bin.cumsum(0) - per_bin
    bins = torch.arange(len(per_bin), device=input.device).repeat_interleave(per_bin)
    box = torch.div(bins, len(cell), rounding_mode='floor')
    within = torch.arange(len(bins), device=input.device) - starts[bins]
    step = torch.stack([within % grid[box, 0], torch.div(within, grid[box, 0], rounding_mode='floor')], dim=-1) + 0.5
    x, y = (corner.flatten(0, 1)[bins] + step * bin_size[box] / grid[box]).unbind(-1)

    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y_low, y_high, y_share = _neighbours(y, height)
    x_low, x_high, x_share = _neighbours(x, width)
    image = rois[:, 0].long()[box] * height
    corners = torch.stack([(image + row) * width + column for row in (y_low, y_high) for column in (x_low, x_high)], 1)
    weights = torch.stack([high * wide for high in (1 - y_share, y_share) for wide in (1 - x_share, x_share)], 1)
    return Samples(bins, starts, per_bin, y, x, (y_low, y_high, x_low, x_high), corners,
                   weights.masked_fill(~inside[:, None], 0), inside)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The cells before and after each position, and the share of the latter; beyond the border, the last cell."""
    position = position.clamp(0, size - 1)
    low = position.long()
    return low, (low + 1).clamp(max=size - 1), position - low
