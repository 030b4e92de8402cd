"""Masks and attentions over the image that they look at."""
from __future__ import annotations

from typing import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from kd_det.visualization.text import literal


def overlay_map(image: np.ndarray, cells: np.ndarray, opacity: float = 0.65, colours: str = 'inferno') -> np.ndarray:
    """Lays a map of cells over an image: each pixel takes the colour of the cell that covers it.

    Args:
        image: (H, W, 3) uint8.
        cells: (h, w) finite values; they are stretched over the colours from smallest to largest, and a map that is the
            same everywhere takes the lowest colour.
        opacity: Of the map, 0 to 1.
        colours: Name of a matplotlib colour map.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: If ``cells`` is not a map of finite values.
    """
    if cells.ndim != 2 or not np.isfinite(cells).all():
        raise ValueError(f'expected a map of (h, w) finite values, got {cells.shape} with '
                         f'{np.count_nonzero(~np.isfinite(cells))} that are not finite')
    span = np.ptp(cells)
    values = (cells - cells.min()) / (span if span > 0 else 1)
    rows, columns = (np.arange(pixels) * count // pixels for pixels, count in zip(image.shape[:2], cells.shape))
    colour = colormaps[colours](values)[..., :3][rows[:, None], columns] * 255
    return (image * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def draw_maps(image: np.ndarray, maps: Mapping[str, np.ndarray], columns: int = 4) -> Figure:
    """Draws an image, then each map over it.

    Args:
        image: (H, W, 3) uint8, red first.
        maps: Title -> (h, w) map, see :func:`overlay_map`.
        columns: Panels in a row.

    Returns:
        The figure.
    """
    panels = {'image': image, **{title: overlay_map(image, cells) for title, cells in maps.items()}}
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    height, width = image.shape[:2]
    figure = Figure(figsize=(3.0 * columns, (3.0 * height / width + 0.3) * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, panel) in zip(grid, panels.items()):
        axes.imshow(panel, interpolation='nearest')
        axes.set_title(literal(title), fontsize=10)
    for axes in grid:
        axes.set_axis_off()
    return figure
