"""Boxes and priors of a pyramid: a box's level, the cells that it or its anchors mark there, its valuable priors."""
from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2

import torch
from torch import Tensor

from kd_det.functional.boxes import concatenate, constant, iou, slices
from kd_det.functional.masks.foreground import paint_rectangles, paint_runs


@torch.no_grad()
def assign_levels(boxes: Sequence[Tensor], num_levels: int, finest_scale: float = 56) -> list[Tensor]:
    """The pyramid level of each box by its size, floor(log2(sqrt(area) / finest_scale)), as DeFeat (arXiv 2103.14475).

    Args:
        boxes: One (n, 4) tensor per image; the area counts both end pixels, (x2 - x1 + 1)·(y2 - y1 + 1).
        num_levels: Number of levels; larger and smaller boxes go to the last and the first.
        finest_scale: Boxes up to twice this size, in pixels, belong to the first level.

    Returns:
        One (n,) long tensor per image.
    """
    corners, _ = concatenate(boxes)
    size = (corners[:, 2:] - corners[:, :2] + 1).clamp(min=0).prod(1).sqrt()
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
    torch._assert_async(_is_grid(grid), 'priors: expected the same boxes at each cell, shifted with columns and rows.')
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
        distance = (_centre(box) - _centre(every)).square().sum(-1)
        hull = torch.maximum(box[..., 2:], every[:, 2:]) - torch.minimum(box[..., :2], every[:, :2])
        overlap = iou(box, every)
        candidates = torch.cat([
            here.gather(1, there.topk(min(top_k, size), dim=1, largest=False)[1])
            for here, there, size in zip(overlap.split(sizes, 1), distance.split(sizes, 1), sizes)], 1)
        threshold = (candidates.mean(1) + candidates.std(1))[:, None]
        proximity = overlap - distance / hull.square().sum(-1).clamp(min=1e-6)
        valuable = (proximity >= gamma * threshold) & (proximity < threshold)
        values.scatter_reduce_(0, image[part, None].expand_as(overlap), overlap * valuable, 'amax')
    return values


def _centre(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2
