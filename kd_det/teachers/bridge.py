"""The input bridge: one preprocessed batch, re-expressed as another detector expects it."""
from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn


class InputBridge(nn.Module):
    """Turns the student's preprocessed batch into what the teacher's own preprocessing would have made of it.

    Geometry (scale, flip, padding) is the student's for both. Mean, standard deviation and channel order are exchanged
    where they differ, and the cells outside each image get the teacher's padding value. Where nothing differs the batch
    passes through untouched.

    Args:
        student: The student's data preprocessor (mmdet's ``DetDataPreprocessor``, mmengine's ``ImgDataPreprocessor``).
        teacher: The teacher's.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        (student_mean, student_std), (mean, std) = _normalization(student), _normalization(teacher)
        self.swap_channels = _swaps_channels(student) != _swaps_channels(teacher)
        if self.swap_channels:  # the student's statistics, in the teacher's channel order
            student_mean, student_std = student_mean.flip(0), student_std.flip(0)
        self.pad_value = float(getattr(teacher, 'pad_value', 0))
        self.same_normalization = torch.equal(student_mean, mean) and torch.equal(student_std, std)
        self.same_padding = float(getattr(student, 'pad_value', 0)) == self.pad_value
        self.register_buffer('scale', (student_std / std).view(-1, 1, 1), persistent=False)
        self.register_buffer('shift', ((student_mean - mean) / std).view(-1, 1, 1), persistent=False)

    @property
    def is_identity(self) -> bool:
        """Whether both detectors see the same numbers."""
        return self.same_normalization and self.same_padding and not self.swap_channels

    def forward(self, images: Tensor, image_shapes: Sequence[Tuple[int, int]]) -> Tensor:
        """Re-expresses one batch.

        Args:
            images: (N, 3, H, W), as the student's preprocessor made it.
            image_shapes: Height and width of each image within the batch; the rest is padding.

        Returns:
            (N, 3, H, W), as the teacher expects it.
        """
        if self.is_identity:
            return images
        if self.swap_channels:
            images = images.flip(1)
        if not self.same_normalization:
            images = images * self.scale + self.shift
        height, width = images.shape[-2:]
        rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        shapes = torch.tensor(image_shapes).to(images.device, non_blocking=True)
        inside = (rows < shapes[:, :1])[:, None, :, None] & (columns < shapes[:, 1:])[:, None, None, :]
        return torch.where(inside, images, images.new_full((), self.pad_value))


def _normalization(preprocessor: nn.Module) -> Tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, each (3,), in the order of the channels after preprocessing."""
    mean: Optional[Tensor] = getattr(preprocessor, 'mean', None)
    if mean is None or not getattr(preprocessor, '_enable_normalize', True):
        return torch.zeros(3), torch.ones(3)
    return mean.detach().float().cpu().flatten(), preprocessor.std.detach().float().cpu().flatten()


def _swaps_channels(preprocessor: nn.Module) -> bool:
    """Whether the preprocessor reverses the channels of the loaded (BGR) image."""
    return bool(getattr(preprocessor, '_channel_conversion', False))
