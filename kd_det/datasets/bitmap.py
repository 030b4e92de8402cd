"""Write images whose bytes depend on nothing but their pixels."""
from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def write_bitmap(path: str | Path, image: np.ndarray) -> None:
    """Writes an uncompressed 24-bit Windows bitmap, which every image reader understands.

    PNG and JPEG files depend on the version of the compressor that wrote them; a bitmap does not.

    Args:
        path: File to write.
        image: (H, W, 3) uint8 pixels, red first.

    Raises:
        ValueError: If ``image`` is not an (H, W, 3) uint8 array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f'expected (H, W, 3) uint8 pixels, got {image.shape} of {image.dtype}')
    height, width = image.shape[:2]
    row_bytes = (3 * width + 3) // 4 * 4
    rows = np.zeros((height, row_bytes), np.uint8)
    rows[:, :3 * width] = image[::-1, :, ::-1].reshape(height, -1)
    offset = 14 + 40
    header = struct.pack('<2sIHHI', b'BM', offset + rows.size, 0, 0, offset)
    header += struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, rows.size, 0, 0, 0, 0)
    Path(path).write_bytes(header + rows.tobytes())
