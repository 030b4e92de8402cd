"""Student channels -> teacher channels."""
from __future__ import annotations

from torch import nn

CHANNEL_ADAPTERS = ('auto', 'none', 'conv1x1', 'conv3x3')


def build_adapter(kind: str, student_channels: int, teacher_channels: int) -> nn.Module:
    """Makes the layer that a student's feature passes before it is compared.

    Args:
        kind: ``'auto'``: a 1×1 convolution where the channels differ, else nothing; ``'none'``: the channels must
            agree; ``'conv1x1'``, ``'conv3x3'``: always a convolution.
        student_channels: C of the student's (N, C, H, W).
        teacher_channels: C of the teacher's.

    Raises:
        ValueError: Unknown kind, or ``'none'`` between different widths.
    """
    if kind not in CHANNEL_ADAPTERS:
        raise ValueError(f"adapter='{kind}': expected one of {', '.join(CHANNEL_ADAPTERS)}.")
    if kind == 'none' and student_channels != teacher_channels:
        raise ValueError(f"adapter='none' needs equal channels, but the student has {student_channels} and the teacher "
                         f"{teacher_channels}: use adapter='conv1x1'.")
    if kind == 'none' or (kind == 'auto' and student_channels == teacher_channels):
        return nn.Identity()
    kernel = 3 if kind == 'conv3x3' else 1
    return nn.Conv2d(student_channels, teacher_channels, kernel, padding=kernel // 2)
