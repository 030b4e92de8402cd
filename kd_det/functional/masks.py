"""Where to look: weights over the cells or the channels of a feature map.

Cell masks are (N, H, W), channel masks (N, C). Boxes are one ``(n, 4)`` tensor per image, ``x1, y1, x2, y2`` in pixels
of the padded batch; ``n`` may be 0. Attentions are differentiable, because the student's is also compared with the
teacher's; the functions that use them as weights detach them. All other masks carry no gradient.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, log2

import torch
from torch import Tensor

from kd_det.functional.painting import paint_rectangles, paint_runs

# Elements of the largest (boxes, cells) table that masks made of box-to-prediction overlaps keep at once.
_OVERLAP_BUDGET = 2**24


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
    corners, image = _concatenate(boxes)
    if image_shapes is None:
        height, width = batch_shape
    else:
        shapes = torch.tensor([tuple(shape[:2]) for shape in image_shapes], dtype=corners.dtype)
        height, width = shapes.to(corners.device, non_blocking=True)[image].unbind(1)
    x1, y1, x2, y2 = corners.unbind(-1)
    left, right = (x1 * feature_shape[1] / width).floor(), (x2 * feature_shape[1] / width).ceil()
    top, bottom = (y1 * feature_shape[0] / height).floor(), (y2 * feature_shape[0] / height).ceil()
    if weighting == 'binary':
        weight = torch.ones_like(left)
    else:
        weight = 1 / (bottom + 1 - top).clamp(min=1) / (right + 1 - left).clamp(min=1)
    return paint_rectangles(left, top, right, bottom, weight, image, len(boxes), feature_shape)


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


def spatial_attention(feature: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """How strongly each cell responds: H·W · softmax over cells of mean_c |F| / T (FGD, FKD).

    Args:
        feature: (N, C, H, W).
        temperature: T; the smaller, the sharper.
        valid: (N, H, W) bool; the softmax runs over these cells alone, their number replaces H·W, others get 0.

    Returns:
        (N, H, W); each image has mean 1 over its (valid) cells.
    """
    response = feature.abs().mean(1) / temperature
    count = response.shape[1] * response.shape[2] if valid is None else valid.sum((1, 2), keepdim=True)
    return count * spatial_softmax(response, valid)


def channel_attention(feature: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """How strongly each channel responds: C · softmax over channels of mean_hw |F| / T (FGD, FKD).

    Args:
        feature: (N, C, H, W).
        temperature: T; the smaller, the sharper.
        valid: (N, H, W) bool; the mean runs over these cells alone.

    Returns:
        (N, C); each image has mean 1 over its channels, or 0 if none of its cells is valid.
    """
    if valid is None:
        response = feature.abs().mean((2, 3))
        return feature.shape[1] * (response / temperature).softmax(1)
    count = valid.sum((1, 2))[:, None]
    response = (feature.abs() * valid[:, None]).sum((2, 3)) / count.clamp(min=1)
    return feature.shape[1] * (response / temperature).softmax(1) * (count > 0)


def spatial_softmax(logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """Softmax over the cells of each map, or over its valid cells alone, where the others get 0.

    Args:
        logits: (N, H, W).
        valid: (N, H, W) bool.

    Returns:
        (N, H, W); each image sums to 1, or to 0 if none of its cells is valid.
    """
    if valid is None:
        return logits.flatten(1).softmax(1).view_as(logits)
    # A finite floor: a softmax over -inf alone, the image that is all padding, would be nan.
    floored = logits.masked_fill(~valid, torch.finfo(logits.dtype).min)
    return floored.flatten(1).softmax(1).view_as(logits) * valid


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
    corners, _ = _concatenate(boxes)
    size = (corners[:, 2:] - corners[:, :2] + 1).clamp(min=0).prod(1).sqrt()
    level = (size / finest_scale + 1e-6).log2().floor().clamp(0, num_levels - 1).long()
    return list(level.split([len(image_boxes) for image_boxes in boxes]))


@torch.no_grad()
def level_foreground(
    boxes: Sequence[Tensor],
    levels: Sequence[Tensor],
    stride: int,
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
    corners, image = _concatenate(boxes)
    level = round(log2(stride / 4)) if level is None else level
    belongs = _on_level(levels, level, corners.device)
    size = corners.new_tensor([feature_shape[1], feature_shape[0]])
    first = (corners[:, :2] / stride).trunc().clamp(min=0)
    stop = torch.minimum((corners[:, 2:] / stride).trunc(), size)
    empty = (first >= stop).any(1, keepdim=True)
    first = torch.where(empty, torch.minimum(first, size - 1), first)
    last = torch.where(empty, first, stop - 1)
    weight = belongs.to(corners.dtype)
    return paint_rectangles(*first.unbind(1), *last.unbind(1), weight, image, len(boxes), feature_shape)


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
        RuntimeError: The priors are no such grid. (On a GPU an assertion of the device, for the host does not wait.)
    """
    corners, image = _concatenate(boxes)
    belongs = _on_level(levels, level, corners.device)
    grid = priors.to(corners).view(*feature_shape, -1, 4)
    torch._assert_async(_is_shifted(grid), 'priors: expected the same boxes at each cell, shifted with columns and rows.')
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
    cells = rois.new_tensor([feature_shape[1], feature_shape[0]])
    scale = cells / rois.new_tensor([batch_shape[1], batch_shape[0]])
    first = (rois[:, 1:3] * scale).floor()
    last = torch.maximum((rois[:, 3:] * scale).ceil() - 1, first)  # a region without area is on one cell
    return paint_rectangles(*first.unbind(1), *last.unbind(1), values, rois[:, 0].long(), num_images, feature_shape)


@torch.no_grad()
def prediction_difference(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """Where the two detectors disagree: mean over classes of (p_t - p_s)² (PFI, arXiv 2112.04840).

    Args:
        student_probs: (N, classes, ...) class probabilities of the student, of cells (H, W) or of regions ().
        teacher_probs: (N, classes, ...) class probabilities of the teacher.

    Returns:
        (N, ...).
    """
    return (teacher_probs - student_probs).square().mean(1)


@torch.no_grad()
def teacher_confidence(teacher_probs: Tensor) -> Tensor:
    """The richness of a cell: its largest class probability (FRS, arXiv 2111.00674).

    Args:
        teacher_probs: (N, classes, H, W) class probabilities of the teacher.

    Returns:
        (N, H, W).
    """
    return teacher_probs.amax(1)


@torch.no_grad()
def prediction_quality(
    probabilities: Tensor,
    predictions: Tensor,
    points: Tensor,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    xi: float = 0.8,
    top_k: int = 30,
    cells: Tensor | None = None,
) -> Tensor:
    """The cells from which the teacher detects each box best (PGD, arXiv 2203.05469).

    The quality of a cell inside a box is p(class)^(1 - ξ) · IoU(prediction, box)^ξ, of its best prediction. The
    ``top_k`` best cells of a box, over all levels, get the height of the Gaussian fitted to their positions (1 at its
    mean), all other cells 0. Where boxes meet, the largest value counts.

    Args:
        probabilities: (N, Q, classes) class probabilities of the teacher, for all levels.
        predictions: (N, Q, 4) its decoded boxes in pixels.
        points: (P, 2) the cells' centres (x, y) in pixels.
        boxes: One (n, 4) tensor of ground truth per image.
        labels: One (n,) tensor of classes per image; a box of a class that the teacher does not have gives nothing.
        xi: ξ, the share of localisation in the quality.
        top_k: Number of cells per box.
        cells: (Q,) long, the cell of each prediction; by default there is one for each, and Q = P.

    Returns:
        (N, P) in [0, 1].
    """
    corners, image = _concatenate(boxes)
    label = torch.cat(list(labels)).to(corners.device)
    known = (label >= 0) & (label < probabilities.shape[-1])
    label = torch.where(known, label, 0)
    importance = corners.new_zeros(len(boxes) * len(points))
    centres = points.to(corners)
    for part in _chunks(len(corners), 4 * predictions.shape[1]):
        box = corners[part, None]
        overlap = _iou(box, predictions[image[part]].to(corners))
        probability = probabilities.transpose(1, 2)[image[part], label[part]].to(corners)
        inside = ((centres >= box[..., :2]) & (centres <= box[..., 2:])).all(-1) & known[part, None]
        quality = probability**(1 - xi) * overlap**xi
        if cells is not None:
            quality = quality.new_zeros(inside.shape).scatter_reduce(1, cells.expand_as(quality), quality, 'amax')
        best, cell = (quality * inside).topk(min(top_k, len(points)), dim=1)
        weight = _gaussian_height(points[cell], best > 0).to(corners)
        importance.scatter_reduce_(0, (image[part, None] * len(points) + cell).flatten(), weight.flatten(), 'amax')
    return importance.view(len(boxes), len(points))


@torch.no_grad()
def valuable_region(
    priors: Sequence[Tensor],
    boxes: Sequence[Tensor],
    gamma: float = 0.25,
    top_k: int = 9,
) -> Tensor:
    """How valuable the priors around those that an adaptive assigner gives to boxes are (VLR of LD, arXiv 2102.12252).

    A prior is valuable to a box where γ·α ≤ DIoU(prior, box) < α, and as much as the two overlap. α is the box's
    threshold of ATSS (arXiv 1912.02424): mean + standard deviation of the IoU over the candidates, on each level the ``top_k`` priors nearest to the box.

    Args:
        priors: One (P, 4) tensor per level, pixels.
        boxes: One (n, 4) tensor of ground truth per image.
        gamma: γ.
        top_k: Candidates of each level.

    Returns:
        (N, ΣP) in [0, 1]: the largest IoU of the prior with a box to which it is valuable, 0 where there is none.
    """
    corners, image = _concatenate(boxes)
    sizes = [len(level) for level in priors]
    every = torch.cat(list(priors)).to(corners)
    values = corners.new_zeros(len(boxes), len(every))
    for part in _chunks(len(corners), 4 * len(every)):
        box = corners[part, None]
        distance = (_centre(box) - _centre(every)).square().sum(-1)
        hull = torch.maximum(box[..., 2:], every[:, 2:]) - torch.minimum(box[..., :2], every[:, :2])
        overlap = _iou(box, every)
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


def _gaussian_height(points: Tensor, chosen: Tensor) -> Tensor:
    """exp(-½ d' Σ⁻¹ d) of the points (B, K, 2) under the Gaussian fitted to the chosen ones (B, K); 0 for the rest."""
    points = points.double()
    share = chosen.double() / chosen.sum(1, keepdim=True).clamp(min=1)
    x, y = (points - (share[..., None] * points).sum(1, keepdim=True)).unbind(-1)
    xx, xy, yy = ((share * product).sum(1, keepdim=True) for product in (x * x, x * y, y * y))
    # Points on a line have a singular covariance: double precision leaves room for a ridge too small to matter.
    ridge = 1e-9 * (1 + xx + yy)
    xx, yy = xx + ridge, yy + ridge
    distance = (yy * x * x - 2 * xy * x * y + xx * y * y) / (xx * yy - xy * xy)
    return (-0.5 * distance).exp() * chosen


def _concatenate(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All boxes of the batch as (B, 4) float32 and the image that each belongs to as (B,) long."""
    corners = torch.cat([image_boxes.reshape(-1, 4) for image_boxes in boxes]).float()
    # Counts are known to the host: made there, the index needs no synchronisation.
    counts = torch.tensor([len(image_boxes) for image_boxes in boxes])
    image = torch.arange(len(boxes)).repeat_interleave(counts)
    return corners, image.to(corners.device, non_blocking=True)


def _on_level(levels: Sequence[Tensor], level: int, device: torch.device) -> Tensor:
    assigned = torch.cat(list(levels)).to(device)
    return assigned if assigned.dtype == torch.bool else assigned == level


def _is_shifted(priors: Tensor) -> Tensor:
    """Whether priors (H, W, A, 4) are those of the first cell, shifted right with the column and down with the row."""
    right = priors[:1, :, :1, :1] - priors[:1, :1, :1, :1]
    down = priors[:, :1, :1, 1:2] - priors[:1, :1, :1, 1:2]
    shift = torch.cat(torch.broadcast_tensors(right, down), -1).repeat(1, 1, 1, 2)
    in_order = (right.diff(dim=1) >= 0).all() & (down.diff(dim=0) >= 0).all()
    return in_order & torch.isclose(priors, priors[:1, :1] + shift, rtol=0, atol=1e-2).all()


def _chunks(count: int, width: int) -> Iterator[slice]:
    """Cuts ``count`` rows of ``width`` elements into slices that stay within the overlap budget."""
    step = max(1, _OVERLAP_BUDGET // max(1, width))
    return (slice(start, start + step) for start in range(0, count, step))


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes (..., 4) that broadcast against each other."""
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (a, b))
    return overlap / (area_a + area_b - overlap).clamp(min=1e-6)
