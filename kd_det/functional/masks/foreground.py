"""Cells that boxes or regions cover, the other ones, and those of padding; and how they are painted.

Many rectangles, or runs of cells, are painted onto a map without a loop over them, and where they
are many without a table of cells × boxes.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from kd_det.functional.boxes import concatenate, constant

TABLE = 2**21  # elements of a table of cells × rectangles, 8 MB in float32, up to which it is faster than without

@torch.no_grad()
def box_foreground(
    boxes: Sequence[Tensor],
    batch_shape: tuple[int, int],
    feature_shape: tuple[int, int],
    weighting: str = 'binary',
    image_shapes: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Marks the cells that ground-truth boxes cover, as FGD does (arXiv 2111.11837).

    A box covers the cells from ``floor(x1)`` to ``ceil(x2)`` inclusive, in units of cells, clipped to the map; its area
    is counted in those cells before clipping. Time and memory are linear in cells and boxes, up to logarithms.

    Args:
        boxes: One (n, 4) tensor per image, pixels of the padded batch.
        batch_shape: (h, w) of the padded batch in pixels.
        feature_shape: (H, W) of the feature map in cells.
        weighting: ``'binary'`` gives 1 to every covered cell, ``'inverse_area'`` the largest 1 / area of the boxes
            that cover it.
        image_shapes: The ``img_shape`` mapping of the released FGD code: boxes are scaled by each image's own
            (h, w, ...) instead of the batch's, which stretches them on a padded batch. For parity only.

    Returns:
        (N, H, W) float32.

    Raises:
        ValueError: An unknown ``weighting``.
    """
    if weighting not in ('binary', 'inverse_area'):
        raise ValueError(f"weighting={weighting!r}: expected 'binary' or 'inverse_area'.")
    corners, image = concatenate(boxes)
    height: float | Tensor
    width: float | Tensor
    height, width = batch_shape
    if image_shapes is not None:
        height, width = constant([tuple(shape[:2]) for shape in image_shapes], corners)[image].unbind(1)
    x1, y1, x2, y2 = corners.unbind(1)
    left, right = (x1 * feature_shape[1] / width).floor(), (x2 * feature_shape[1] / width).ceil()
    top, bottom = (y1 * feature_shape[0] / height).floor(), (y2 * feature_shape[0] / height).ceil()
    weight = torch.ones_like(left)
    if weighting == 'inverse_area':
        weight = weight / (bottom + 1 - top).clamp(min=1) / (right + 1 - left).clamp(min=1)
    first, last = torch.stack([left, top], 1), torch.stack([right, bottom], 1)
    return paint_rectangles(first, last, weight, image, len(boxes), feature_shape)


@torch.no_grad()
def valid_cells(
    image_shapes: Sequence[Sequence[int]],
    batch_shape: tuple[int, int],
    feature_shape: tuple[int, int],
    device: torch.device | str | None = None,
) -> Tensor:
    """Marks the cells that hold a pixel of the image, as opposed to the batch's padding alone.

    Args:
        image_shapes: (h, w, ...) of each image in pixels, before padding.
        batch_shape: (h, w) of the padded batch in pixels.
        feature_shape: (H, W) of the feature map in cells.
        device: Where the mask goes.

    Returns:
        (N, H, W) bool.
    """
    shapes = torch.tensor([tuple(shape[:2]) for shape in image_shapes], dtype=torch.long).reshape(-1, 2)
    # Cell i begins at pixel i * h / H; integers keep the comparison exact.
    rows, columns = (
        torch.arange(cells) * pixels < shapes[:, dim, None] * cells
        for dim, (cells, pixels) in enumerate(zip(feature_shape, batch_shape)))
    return (rows[:, :, None] & columns[:, None, :]).to(device, non_blocking=True)


@torch.no_grad()
def normalized_background(foreground: Tensor, valid: Tensor | None = None) -> Tensor:
    """The background of FGD: 1 where the foreground is 0, divided by the number of such cells in the image.

    Args:
        foreground: (N, H, W), 0 outside of the boxes.
        valid: (N, H, W) bool; cells of padding are neither background nor counted.

    Returns:
        (N, H, W) in the foreground's dtype; each image sums to 1, or to 0 if it has no background.
    """
    background = foreground == 0
    if valid is not None:
        background = background & valid
    background = background.to(foreground.dtype)
    return background / background.sum((1, 2), keepdim=True).clamp(min=1)


@torch.no_grad()
def region_foreground(
    rois: Tensor,
    values: Tensor,
    num_images: int,
    batch_shape: tuple[int, int],
    feature_shape: tuple[int, int],
) -> Tensor:
    """Spreads one value per region over the cells that the region overlaps; where several do, the largest counts.

    Time and memory are linear in cells and regions, up to logarithms.

    Args:
        rois: (R, 5) index of the image and x1, y1, x2, y2 in pixels of the padded batch.
        values: (R,) at least 0.
        num_images: N.
        batch_shape: (h, w) of the padded batch in pixels.
        feature_shape: (H, W) of the feature map in cells.

    Returns:
        (N, H, W); 0 where no region is.
    """
    rois = rois.float()
    scale = constant([feature_shape[1] / batch_shape[1], feature_shape[0] / batch_shape[0]], rois)
    first = (rois[:, 1:3] * scale).floor()
    last = torch.maximum((rois[:, 3:] * scale).ceil() - 1, first)  # a region without area is on one cell
    return paint_rectangles(first, last, values, rois[:, 0].long(), num_images, feature_shape)


@torch.no_grad()
def paint_rectangles(
    first: Tensor,
    last: Tensor,
    weight: Tensor,
    image: Tensor,
    num_images: int,
    feature_shape: tuple[int, int],
) -> Tensor:
    """At each cell the largest weight of the rectangles that cover it; 0 where none does.

    By a table of cells × rectangles while that is small, which takes few operators. Beyond it by a two-dimensional
    segment tree: each rectangle is a few aligned blocks whose sides are powers of two; their weights are scattered once
    and then handed down, size by size, to the single cells.

    Args:
        first: (B, 2) first column and row of each rectangle; what lies beyond the map is cut off.
        last: (B, 2) last column and row, inclusive.
        weight: (B,) at least 0.
        image: (B,) long, index of the image that the rectangle is on.
        num_images: N.
        feature_shape: (H, W) of the map in cells.

    Returns:
        (N, H, W) in the weight's dtype.
    """
    height, width = feature_shape
    if len(weight) * height * width <= TABLE:
        columns, rows = ((cells >= first[:, dim, None]) & (cells <= last[:, dim, None])
                         for dim, cells in enumerate(torch.arange(side, device=weight.device)
                                                     for side in (width, height)))
        table = (weight[:, None] * rows)[:, :, None] * columns[:, None]
        index = image[:, None].expand(-1, height * width)
        painted = weight.new_zeros(num_images, height * width).scatter_reduce_(0, index, table.flatten(1), 'amax')
        return painted.view(num_images, height, width)
    columns, in_columns, num_columns = _aligned_blocks(first[:, 0], last[:, 0], width)
    rows, in_rows, num_rows = _aligned_blocks(first[:, 1], last[:, 1], height)
    index = (image[:, None] * num_rows + rows)[:, :, None] * num_columns + columns[:, None, :]
    used = in_rows[:, :, None] & in_columns[:, None, :]
    blocks = weight.new_zeros(num_images * num_rows * num_columns)
    blocks.scatter_reduce_(0, index.flatten(), (weight[:, None, None] * used).flatten(), 'amax')
    blocks = _hand_down(blocks.view(num_images, num_rows, num_columns), width)
    return _hand_down(blocks.mT, height).mT.contiguous()


@torch.no_grad()
def paint_runs(first: Tensor, stop: Tensor, image: Tensor, num_images: int, width: int) -> Tensor:
    """1 at each cell that a run of cells covers, 0 at the others.

    Where a run begins the number of runs grows by 1, where it stops it falls; summed along the row, that is how many
    cover a cell.

    Args:
        first: (..., B, H) long, in each row the column where the run of a box begins, 0 to W.
        stop: (..., B, H) long, the column after its last one, 0 to W; the run is empty if this is not after ``first``.
        image: (B,) long, index of the image that the box is on.
        num_images: N.
        width: W, columns of the map.

    Returns:
        (N, H, W) float32 of 0 and 1.
    """
    height = first.shape[-1]
    rows = image[:, None] * height + torch.arange(height, device=image.device)
    changes = torch.zeros(num_images * height * (width + 1), dtype=torch.int32, device=first.device)
    for column, change in ((first, 1), (torch.maximum(first, stop), -1)):
        index = (rows * (width + 1) + column).flatten()
        changes.scatter_add_(0, index, changes.new_full((1, ), change).expand_as(index))
    covering = changes.view(num_images, height, width + 1).cumsum(2)[:, :, :width]
    return (covering > 0).float()


@torch.no_grad()
def list_cells(first: Tensor, stop: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The cells of windows, one window after another, row by row; how many they are, a GPU would have to tell the host.

    Args:
        first: (B, 2) long, first column and row of each window.
        stop: (B, 2) long, those after its last ones; the window is empty if either is not after ``first``.
        width: W, columns of the map.

    Returns:
        (n,) the index of each cell's window, and (n,) that of the cell, row · W + column.
    """
    columns, rows = (stop - first).clamp(min=0).unbind(1)
    counts = columns * rows
    window = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    order = torch.arange(len(window), device=counts.device) - (counts.cumsum(0) - counts)[window]
    row, column = first[window, 1] + order // columns[window], first[window, 0] + order % columns[window]
    return window, row * width + column


def _block_counts(length: int) -> list[int]:
    """How many aligned blocks of 1, 2, 4, ... cells cover a line of ``length`` cells, up to a single block."""
    return [ceil(length / 2**size) for size in range((length - 1).bit_length() + 1)]


def _aligned_blocks(first: Tensor, last: Tensor, length: int) -> tuple[Tensor, Tensor, int]:
    """Covers each interval ``first..last`` of a line exactly by aligned blocks, at most two of each size.

    Returns:
        Block indices (B, 2·sizes), whether each is in use (same shape), and the number of blocks of all sizes.
    """
    counts = _block_counts(length)
    size = torch.arange(len(counts), device=first.device)
    blocks_of = (length + (1 << size) - 1) >> size
    begin = first.clamp(0, length).long()[:, None]
    end = last.clamp(-1, length - 1).long()[:, None] + 1
    # What is left of the interval once blocks smaller than 2^size have been taken off both of its ends.
    begin, end = (begin + (1 << size) - 1) >> size, end >> size
    remains = begin < end
    used = torch.cat([remains & (begin % 2 == 1), remains & (end % 2 == 1)], 1)
    block = torch.stack([begin, end - 1], 1).clamp(min=0).minimum(blocks_of - 1) + blocks_of.cumsum(0) - blocks_of
    return block.flatten(1), used, sum(counts)


def _hand_down(blocks: Tensor, length: int) -> Tensor:
    """Gives each cell of the last dimension the largest weight of the blocks of all sizes that hold it."""
    covered: Tensor
    *finer, covered = blocks.split(_block_counts(length), dim=-1)
    for level in reversed(finer):
        covered = torch.maximum(level, covered.repeat_interleave(2, dim=-1)[..., :level.shape[-1]])
    return covered
