"""The cells that boxes or regions cover, and the cells around them."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.functional.masks.boxes import concatenate
from kd_det.functional.masks.painting import paint_rectangles


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
