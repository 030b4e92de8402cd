"""Weights of channels."""
from __future__ import annotations

from typing import Mapping

import numpy as np
from matplotlib.figure import Figure

from kd_det.visualization.text import literal


def draw_channels(weights: Mapping[str, np.ndarray]) -> Figure:
    """Draws the weights of channels, from the largest to the smallest, one line for each level.

    Args:
        weights: Title -> (C,).

    Returns:
        The figure.

    Raises:
        ValueError: If there is no level.
    """
    if not weights:
        raise ValueError('There is nothing to draw: expected at least one level with the weights of its channels.')
    figure = Figure(figsize=(5, 3.4), layout='constrained')
    axes = figure.subplots()
    for title, each in weights.items():
        axes.plot(np.arange(1, len(each) + 1), np.sort(each)[::-1], label=literal(title))
    axes.set(xlabel='channels, by weight', ylabel='weight', ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
