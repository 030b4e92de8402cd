"""Boxes and priors of a pyramid: a box's level, the cells that it or its anchors mark there, its valuable priors."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, inf, log2, prod

import torch
from torch import Tensor

from kd_det.functional.blocks import map_rows
from kd_det.functional.boxes import concatenate, constant, iou, slices
from kd_det.functional.masks.foreground import list_cells, paint_rectangles, paint_runs

NO_GRID = 'priors: expected the same boxes at each cell, shifted with columns and rows.'
ROUNDING = 0.01  # pixels, more than positions within an image are rounded by


@torch.no_grad()
def assign_levels(boxes: Sequence[Tensor], num_levels: int, finest_scale: float = 56,
                  pixel: float = 1) -> list[Tensor]:
    """The pyramid level of each box by its size, floor(log2(sqrt(area) / finest_scale)), as DeFeat (arXiv 2103.14475).

    Args:
        boxes: One (n, 4) tensor per image.
        num_levels: Number of levels; larger and smaller boxes go to the last and the first.
        finest_scale: Boxes up to twice this size, in pixels, belong to the first level.
        pixel: What a side is longer than x2 - x1: 1 where both end pixels count, as in DeFeat; 0 as mmdet's RoI heads
            count.

    Returns:
        One (n,) long tensor per image.
    """
    corners, _ = concatenate(boxes)
    size = (corners[:, 2:] - corners[:, :2] + pixel).clamp(min=0).prod(1).sqrt()
    level = (size / finest_scale + 1e-6).log2().floor().clamp(0, num_levels - 1).long()
    return list(level.split([len(image_boxes) for image_boxes in boxes]))


@torch.no_grad()
def level_foreground(
    boxes: Sequence[Tensor],
    levels: Sequence[Tensor],
    stride: float,
    feature_shape: tuple[int, int],
    level: int | None = None,
) -> Tensor:
    """Marks on one pyramid level the cells of the boxes that belong to it (DeFeat, arXiv 2103.14475).

    A box covers the cells from ``int(x1 / stride)`` up to, not including, ``int(x2 / stride)``; one that would cover
    none marks the cell of its top left corner.

    Args:
        boxes: One (n, 4) tensor per image, pixels of the padded batch.
        levels: One (n,) tensor per image: the level of each box, see :func:`assign_levels`; or, as bool, whether the
            box belongs to this level.
        stride: Pixels per cell of this level.
        feature_shape: (H, W) of the feature map in cells.
        level: Index of this level; by default that of ``stride`` in a pyramid whose finest stride is 4.

    Returns:
        (N, H, W) float32 of 0 and 1.
    """
    corners, image = concatenate(boxes)
    level = round(log2(stride / 4)) if level is None else level
    belongs = _on_level(levels, level, corners.device)
    size = constant([feature_shape[1], feature_shape[0]], corners)
    first = (corners[:, :2] / stride).trunc().clamp(min=0)
    stop = torch.minimum((corners[:, 2:] / stride).trunc(), size)
    empty = (first >= stop).any(1, keepdim=True)
    first = torch.where(empty, torch.minimum(first, size - 1), first)
    last = torch.where(empty, first, stop - 1)
    weight = belongs.to(corners.dtype)
    return paint_rectangles(first, last, weight, image, len(boxes), feature_shape)


@torch.no_grad()
def near_anchor_foreground(
    boxes: Sequence[Tensor],
    levels: Sequence[Tensor],
    level: int,
    priors: Tensor,
    feature_shape: tuple[int, int],
    phi: float = 0.5,
) -> Tensor:
    """Marks the cells with an anchor that overlaps a box well (FGFI, arXiv 1906.03609).

    A cell is on where one of its anchors has an IoU with a box of this level above ``phi`` times the best IoU that the
    box has with any anchor of this level.

    The anchors of one shape overlap a box by a width that depends on the column alone, times a height that depends on
    the row alone, and their IoU grows with this product. So the best is found where both are largest, and in each row
    the anchors that are near enough to it are one run of columns. Time and memory are linear in the cells, and in
    boxes · shapes · (H + W): there is no table of boxes and cells.

    Args:
        boxes: One (n, 4) tensor per image, pixels of the padded batch.
        levels: One (n,) tensor per image: the level of each box, see :func:`assign_levels`; or, as bool, whether the
            box belongs to this level.
        level: Index of this level.
        priors: (H·W·A, 4) anchors of this level, those of one cell together, cells row by row: A boxes, shifted right
            from column to column and down from row to row.
        feature_shape: (H, W) of the feature map in cells.
        phi: Share of the best IoU that an anchor must exceed, at least 0 and less than 1.

    Returns:
        (N, H, W) float32 of 0 and 1.

    Raises:
        RuntimeError: The priors are no such grid. (On a GPU an assertion of the device.)
    """
    corners, image = concatenate(boxes)
    belongs = _on_level(levels, level, corners.device)
    grid = priors.to(corners).view(*feature_shape, -1, 4)
    # Like assert, but the host does not wait for a GPU's answer.
    torch._assert_async(_is_grid(grid), NO_GRID)
    left, _, right, _ = grid[0].permute(2, 1, 0).contiguous()  # (A, W) each
    _, top, _, bottom = grid[:, 0].permute(2, 1, 0).contiguous()  # (A, H)
    x1, y1, x2, y2 = (side[None, :, None] for side in corners.unbind(1))
    width, height = right[:, :1, None] - left[:, :1, None], bottom[:, :1, None] - top[:, :1, None]
    across = (torch.minimum(right[:, None], x2) - torch.maximum(left[:, None], x1)).clamp(min=0)  # (A, B, W)
    down = (torch.minimum(bottom[:, None], y2) - torch.maximum(top[:, None], y1)).clamp(min=0)  # (A, B, H)

    areas = width * height + (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    overlap = across.amax(2, keepdim=True) * down.amax(2, keepdim=True)
    limit = phi * (overlap / (areas - overlap).clamp(min=1e-6)).amax(0)
    # IoU > limit, solved for the overlap, and that for its width.
    least = limit * areas / (1 + limit) / down
    possible = (least < torch.minimum(width, x2 - x1)) & belongs[:, None]  # nan, where no overlap is enough, is not
    least = least.masked_fill(~possible, inf)
    first = torch.searchsorted(right, (x1 + least).flatten(1), right=True)
    stop = torch.searchsorted(left, (x2 - least).flatten(1))
    return paint_runs(first.view_as(least), stop.view_as(least), image, len(boxes), feature_shape[1])


def _on_level(levels: Sequence[Tensor], level: int, device: torch.device) -> Tensor:
    assigned = torch.cat(list(levels)).to(device)
    return assigned if assigned.dtype == torch.bool else assigned == level


def _is_grid(priors: Tensor) -> Tensor:
    """Whether priors (H, W, A, 4) are those of the first cell, shifted right with the column and down with the row."""
    right = priors[:1, :, :1, :1] - priors[:1, :1, :1, :1]
    down = priors[:, :1, :1, 1:2] - priors[:1, :1, :1, 1:2]
    shift = torch.cat(torch.broadcast_tensors(right, down), -1).repeat(1, 1, 1, 2)
    in_order = (right.diff(dim=1) >= 0).all() & (down.diff(dim=0) >= 0).all()
    return in_order & torch.isclose(priors, priors[:1, :1] + shift, rtol=0, atol=1e-2).all()


@torch.no_grad()
def valuable_region(
    priors: Sequence[Tensor],
    boxes: Sequence[Tensor],
    gamma: float = 0.25,
    top_k: int = 9,
) -> Tensor:
    """How valuable the priors around those that an adaptive assigner gives to boxes are (VLR of LD, arXiv 2102.12252).

    A prior is valuable to a box where γ·α ≤ DIoU(prior, box) < α, and as much as the two overlap. α is the box's
    threshold of ATSS (arXiv 1912.02424): mean + standard deviation of the IoU over the candidates, on each level the
    ``top_k`` priors nearest to the box.

    Args:
        priors: One (P, 4) tensor per level, pixels.
        boxes: One (n, 4) tensor of ground truth per image.
        gamma: γ.
        top_k: Candidates of each level.

    Returns:
        (N, ΣP) in [0, 1]: the largest IoU of the prior with a box to which it is valuable, 0 where there is none.
    """
    corners, image = concatenate(boxes)
    sizes = [len(level) for level in priors]
    every = torch.cat(list(priors)).to(corners)
    values = corners.new_zeros(len(boxes), len(every))
    for part in slices(len(corners), 4 * len(every)):
        box = corners[part, None]
        distance, overlap = _square_distance(box, every), iou(box, every)
        candidates = torch.cat([
            here.gather(1, there.topk(min(top_k, size), dim=1, largest=False)[1])
            for here, there, size in zip(overlap.split(sizes, 1), distance.split(sizes, 1), sizes)], 1)
        value = _find_value(box, every, overlap, distance, _adaptive_threshold(candidates)[:, None], gamma)
        values.scatter_reduce_(0, image[part, None].expand_as(overlap), value, 'amax')
    return values


@torch.no_grad()
def valuable_region_of_grids(
    priors: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    boxes: Sequence[Tensor],
    gamma: float = 0.25,
    top_k: int = 9,
) -> Tensor:
    """:func:`valuable_region` of priors that are grids, which looks at those near a box alone.

    The candidates of a box lie in the columns and the rows that are nearest to its centre. What is valuable to it has
    at least γ·α as IoU, for DIoU is no more than that: of the anchors of one shape a window of columns and rows.
    Time and memory are linear in the priors and in what is looked at. All that is computed of a prior and a box is
    computed as in the table, so values are the same to the bit; only which of several candidates at the same distance
    counts is left open, here as there.

    For the CPU: how many priors the windows hold, a GPU would have to tell the host; and memory that is enough whatever
    the boxes are has room for each prior beside each box, which is the table.

    Args:
        priors: One (H·W·A, 4) tensor per level, pixels, those of one cell together, cells row by row: A boxes, shifted
            evenly right from column to column and down from row to row.
        shapes: (H, W) of each level in cells.
        boxes: One (n, 4) tensor of ground truth per image.
        gamma: γ, at least 0.
        top_k: Candidates of each level.

    Returns:
        (N, ΣH·W·A) in [0, 1], see :func:`valuable_region`.

    Raises:
        RuntimeError: The priors are no such grids.
    """
    corners, image = concatenate(boxes)
    grids = [level.to(corners).view(*shape, -1, 4) for level, shape in zip(priors, shapes)]
    torch._assert_async(torch.stack([_is_grid(grid) for grid in grids]).all(), NO_GRID)
    values, start = corners.new_zeros(len(boxes), sum(map(len, priors))), 0
    if not len(corners):
        return values
    candidates = torch.cat([map_rows(partial(_overlap_nearest, grid=grid, top_k=top_k), corners,
                                     width=_count_nearest(grid, top_k)) for grid in grids], 1)
    threshold = _adaptive_threshold(candidates)
    for grid in grids:
        every = grid.flatten(0, 2)
        box, prior = _list_overlapping(corners, grid, threshold, gamma)

        def value(box: Tensor, prior: Tensor, every: Tensor = every) -> Tensor:
            of_box, of_prior = corners[box], every[prior]
            return _find_value(of_box, of_prior, iou(of_box, of_prior), _square_distance(of_box, of_prior),
                               threshold[box], gamma)

        place = image[box] * values.shape[1] + start + prior
        values.view(-1).scatter_reduce_(0, place, map_rows(value, box, prior, width=16), 'amax')
        start += len(every)
    return values


def _adaptive_threshold(candidates: Tensor) -> Tensor:
    """α of ATSS, (B,), of the IoU of each box's candidates, (B, K)."""
    return candidates.mean(1) + candidates.std(1)


def _find_value(box: Tensor, prior: Tensor, overlap: Tensor, distance: Tensor, threshold: Tensor,
                gamma: float) -> Tensor:
    """The IoU of boxes and priors, (..., 4) that broadcast, where the prior is valuable to the box, else 0."""
    hull = torch.maximum(box[..., 2:], prior[..., 2:]) - torch.minimum(box[..., :2], prior[..., :2])
    proximity = overlap - distance / hull.square().sum(-1).clamp(min=1e-6)
    return overlap * ((proximity >= gamma * threshold) & (proximity < threshold))


def _square_distance(box: Tensor, prior: Tensor) -> Tensor:
    """Of the centres of boxes (..., 4) that broadcast."""
    return (_centre(box) - _centre(prior)).square().sum(-1)


def _centre(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _overlap_nearest(corners: Tensor, grid: Tensor, top_k: int) -> Tensor:
    """(B, K) IoU of boxes (B, 4) with the ``top_k`` priors of a grid (H, W, A, 4) that are nearest to each.

    A prior with ``top_k`` columns or rows nearer than its own has as many priors before it. So they lie in half of
    ``top_k`` columns, rounded up, to either side of the box's centre, more to one side at the rim; and so with rows.
    """
    width, anchors = grid.shape[1:3]
    half, near = ceil(top_k / 2), []
    for line, place in zip((_centre(grid[0])[..., 0], _centre(grid[:, 0])[..., 1]), _centre(corners).unbind(1)):
        count = min(2 * half, len(line))
        first = torch.searchsorted(line.T.contiguous(), place.expand(anchors, -1).contiguous()) - half
        near.append(first.T.clamp(0, len(line) - count)[..., None] + torch.arange(count, device=line.device))
    columns, rows = near  # (B, A, at most 2 · half) each
    cells = rows[:, :, :, None] * width + columns[:, :, None, :]
    index = (cells * anchors + torch.arange(anchors, device=cells.device)[:, None, None]).flatten(1)
    every = grid.flatten(0, 2)
    distance = _square_distance(corners[:, None], every[index])
    nearest = index.gather(1, distance.topk(min(top_k, index.shape[1]), dim=1, largest=False)[1])
    return iou(corners[:, None], every[nearest])


def _count_nearest(grid: Tensor, top_k: int) -> int:
    """How many priors :func:`_overlap_nearest` looks at for a box."""
    return grid.shape[2] * prod(min(2 * ceil(top_k / 2), cells) for cells in grid.shape[:2])


def _list_overlapping(corners: Tensor, grid: Tensor, threshold: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Lists the priors of a grid (H, W, A, 4) that overlap a box by γ·α or more, and a few that do by less.

    Args:
        corners: (B, 4) boxes.
        grid: The priors.
        threshold: α, (B,).
        gamma: γ.

    Returns:
        (n,) indices of boxes, and (n,) of priors.
    """
    count, anchors = len(corners), grid.shape[2]
    (left, _, right, _), (_, top, _, bottom) = (line.permute(2, 1, 0).contiguous() for line in (grid[0], grid[:, 0]))
    size, box_size = grid[0, 0, :, None, 2:] - grid[0, 0, :, None, :2], corners[:, 2:] - corners[:, :2]
    both = torch.minimum(size, box_size)  # (A, B, 2) is as much as they can overlap in width and height
    limit = gamma * threshold
    # IoU ≥ limit, solved for the overlap; that for its width and height, less what may be rounding.
    overlap = limit / (1 + limit) * (size.prod(-1) + box_size.prod(-1))
    least = (overlap[..., None] / both.flip(-1) - ROUNDING).clamp(min=0)
    possible = (least <= both).all(-1) & (threshold > 0)  # a box that no candidate overlaps has no value for any
    windows = []
    for side, (before, after) in enumerate(((left, right), (top, bottom))):
        low, high, need = corners[:, side], corners[:, side + 2], least[..., side]
        windows.append((torch.searchsorted(after, low + need), torch.searchsorted(before, high - need, right=True)))
    first, stop = (torch.stack(each, -1).flatten(0, 1) for each in zip(*windows))
    window, cell = list_cells(first, torch.where(possible.view(-1, 1), stop, first), grid.shape[1])
    box, anchor = (torch.arange(each, device=cell.device) for each in (count, anchors))
    return box.repeat(anchors)[window], cell * anchors + anchor.repeat_interleave(count)[window]
