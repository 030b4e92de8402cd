"""Where student and teacher are compared: registered modules over :mod:`kd_det.functional.masks`; they combine.

Every module of this package is imported, and each registered class is a name of the package: a new mask is a new file.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from kd_det.masks.base import CellMask, Mask, Weighting, build_mask
from kd_det.registry import import_registered

_registered = import_registered(__name__)
globals().update(_registered)

__all__ = ['CellMask', 'Mask', 'Weighting', 'build_mask', *_registered]

if TYPE_CHECKING:  # editors know these classes from their own modules, such as kd_det.masks.boxes

    def __getattr__(name: str) -> type[Mask]:
        ...
