"""Images and maps as data URIs, small ones."""
from __future__ import annotations

import base64
import io

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

LONGEST_SIDE = 480  # of an image, in pixels
MOST_CELLS = 64  # of a map, along its longer side
COLOURS = 16  # of a map: its PNG takes half a byte for each cell
JPEG_QUALITY = 80


def image_uri(image: np.ndarray) -> str:
    """An image as a JPEG, no larger than :data:`LONGEST_SIDE`.

    Args:
        image: (H, W), or (H, W, C) blue first. Of 2 channels the first is shown, of more than 3 the first three; what is
            no uint8 is stretched from its smallest to its largest finite value.
    """
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., 2::-1] if image.shape[2] > 2 else image[..., [0, 0, 0]]
    if image.dtype != np.uint8:
        finite = image[np.isfinite(image)] if image.dtype.kind == 'f' else image
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        stretched = (np.nan_to_num(image.astype(float), nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1)
        image = (stretched * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return _uri(picture, 'JPEG', quality=JPEG_QUALITY, optimize=True)


def map_uri(cells: np.ndarray) -> str:
    """A map as a PNG of one pixel for each cell, in inferno's colours from its smallest to its largest value.

    Args:
        cells: (h, w); where a side has more cells than :data:`MOST_CELLS`, the mean over neighbours is shown.
    """
    height, width = cells.shape
    if max(height, width) > MOST_CELLS:
        scale = MOST_CELLS / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        cells = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(cells)[None], size)[0].numpy()
    span = np.ptp(cells)
    shares = (cells - cells.min()) / (span if span > 0 else 1)
    image = Image.fromarray((shares * (COLOURS - 1)).round().astype(np.uint8)).convert('P')
    palette = colormaps['inferno'](np.linspace(0, 1, COLOURS))[:, :3]
    image.putpalette((palette * 255).round().astype(np.uint8).ravel().tolist())
    return _uri(image, 'PNG', optimize=True, bits=4)


def _uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'
