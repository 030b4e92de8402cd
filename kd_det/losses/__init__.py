"""The distillation terms: registered modules over :mod:`kd_det.functional`.

Every module of this package is imported, and each registered class is a name of the package: a new term is a new file.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

from kd_det.losses.base import DistillTerm, FeatureTerm
from kd_det.losses.outputs import DenseTerm, RoITerm
from kd_det.losses.queries import QueryTerm
from kd_det.registry import import_registered

_registered = import_registered(__name__)
globals().update(_registered)

__all__ = ['DenseTerm', 'DistillTerm', 'FeatureTerm', 'QueryTerm', 'RoITerm', *_registered]

if TYPE_CHECKING:  # editors know these classes from their own modules, such as kd_det.losses.fgd

    def __getattr__(name: str) -> type[DistillTerm]:
        ...
