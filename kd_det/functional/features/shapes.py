"""Only features of one shape can be compared."""
from __future__ import annotations

from torch import Tensor


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Raises a ValueError, with what to do, where two features differ in shape."""
    if student.shape != teacher.shape:
        raise ValueError(f'student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have one shape: '
                         'adapt the channels and pair the levels by stride.')
