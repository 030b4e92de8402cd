"""The input bridge: one preprocessed batch, re-expressed as another detector expects it, and its features cropped."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from kd_det.config.detectors import TeacherError

Shape = tuple[int, int]

LUMINANCE = (0.114, 0.587, 0.299)  # of blue, green and red (ITU-R BT.601): by which OpenCV reads a colour file as gray
LARGEST_STRIDE = 128  # of a pyramid, in pixels: a batch of multiples of it suits every neck
SIZE_MISMATCH = re.compile('[Ss]izes? of tensor')  # begins what PyTorch says of maps that do not fit each other


class InputBridge(nn.Module):
    """Turns the student's preprocessed batch into what the teacher's own preprocessing would have made of it.

    Scale and flip are the student's for both. Mean, standard deviation and channel order are exchanged where they
    differ, the cells outside each image get the teacher's padding value, and the batch is padded at its right and
    bottom to multiples of the teacher's ``pad_size_divisor``. Where nothing differs it passes through untouched.

    Where one detector takes gray images and the other colour images, the teacher sees what its own loader would have
    made of the same file: the gray value three times, or the luminance of the colours. Other numbers of channels have
    no such meaning and must be equal.

    With a ``scale`` the teacher sees the same images larger, or smaller, than the student does.

    Args:
        student: The student's data preprocessor (mmdet's ``DetDataPreprocessor``, mmengine's ``ImgDataPreprocessor``).
        teacher: The teacher's.
        channels: Of the images that the teacher takes; as many as it is given where that is not known.
        scale: Of the teacher's images to the student's.

    Raises:
        TeacherError: The two normalise different numbers of channels, neither of them 1.
    """
    scale: Tensor
    shift: Tensor
    mean: Tensor
    std: Tensor
    student_mean: Tensor
    student_std: Tensor
    luminance: Tensor
    pad_value: Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module, channels: int | None = None,
                 scale: float = 1.0) -> None:
        super().__init__()
        self.image_scale = scale
        (student_mean, student_std), (mean, std) = _read_normalization(student), _read_normalization(teacher)
        self.channels = channels or (len(mean) if len(mean) > 1 else None)
        self.swap_channels = _is_swapping_channels(student) != _is_swapping_channels(teacher)
        if self.swap_channels:  # the student's statistics, in the teacher's channel order
            student_mean, student_std = student_mean.flip(0), student_std.flip(0)
        if 1 not in (len(student_mean), len(mean)) and len(student_mean) != len(mean):
            raise TeacherError(f"The student's data_preprocessor normalises {len(student_mean)} channels, the "
                               f"teacher's {len(mean)}: a teacher has to see the kind of images that the student sees.")
        self.divisor, pad_value = int(getattr(teacher, 'pad_size_divisor', 1) or 1), _read_pad_value(teacher)
        self.same_normalization = _are_equal(student_mean, mean) and _are_equal(student_std, std)
        self.same_padding = _are_equal(_read_pad_value(student), pad_value)
        luminance = torch.tensor(LUMINANCE if not _is_swapping_channels(teacher) else LUMINANCE[::-1])
        for name, values in dict(scale=student_std / std, shift=(student_mean - mean) / std, mean=mean, std=std,
                                 student_mean=student_mean, student_std=student_std, luminance=luminance,
                                 pad_value=pad_value).items():
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    @property
    def is_identity(self) -> bool:
        """Whether both detectors see the same numbers, where both take images of as many channels."""
        return self.same_normalization and self.same_padding and not self.swap_channels

    def forward(self, images: Tensor, image_shapes: Sequence[Shape]) -> Tensor:
        """Re-expresses one batch.

        Args:
            images: (N, C, H, W), as the student's preprocessor made it.
            image_shapes: Height and width of each image within the batch; the rest is padding.

        Returns:
            (N, C', H', W'), as the teacher expects it; H' and W' are the next multiples of its ``pad_size_divisor``
            from H and W on, or from what these are at its scale.

        Raises:
            TeacherError: The teacher takes images of another number of channels.
        """
        if self.image_scale != 1:
            images = F.interpolate(images, self.find_size(images.shape[-2:]), mode='bilinear', antialias=True)
            image_shapes = list(map(self.find_size, image_shapes))
        same_channels = self.channels in (None, images.shape[1])
        below, right = (-side % self.divisor for side in images.shape[-2:])
        if self.is_identity and same_channels and not below and not right:
            return images
        images = F.pad(self._convert(images), (0, right, 0, below))
        height, width = images.shape[-2:]
        rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
        shapes = torch.tensor(image_shapes).to(images.device, non_blocking=True)
        inside = (rows < shapes[:, :1])[:, None, :, None] & (columns < shapes[:, 1:2])[:, None, None, :]
        return torch.where(inside, images, self.pad_value.to(images.dtype))

    def find_size(self, shape: Sequence[int]) -> Shape:
        """Height and width, in the teacher's pixels, of what has these in the student's."""
        height, width = (max(1, round(side * self.image_scale)) for side in shape[:2])
        return height, width

    @contextmanager
    def describe(self, samples: Sequence[DetDataSample], batch_shape: Sequence[int]) -> Iterator[None]:
        """Lets data samples of the student's batch be of the teacher's within the block; the batch's shape they keep.

        Args:
            samples: With their ``img_shape``, and where boxes are to be scaled back ``scale_factor``.
            batch_shape: Height and width of the teacher's batch.
        """
        before = [{name: sample.metainfo[name] for name in ('img_shape', 'scale_factor') if name in sample.metainfo}
                  for sample in samples]
        for sample, known in zip(samples, before):
            sample.set_metainfo(dict(batch_input_shape=tuple(batch_shape)))
            if self.image_scale != 1:
                factors = dict(scale_factor=tuple(factor * self.image_scale for factor in known['scale_factor'])
                               ) if 'scale_factor' in known else {}
                sample.set_metainfo(dict(factors, img_shape=self.find_size(known['img_shape'])))
        try:
            yield
        finally:
            for sample, known in zip(samples, before):
                sample.set_metainfo(known)

    def _convert(self, images: Tensor) -> Tensor:
        """Converts images to the teacher's channels and normalisation, whatever is in the padding."""
        channels, wanted = images.shape[1], self.channels or images.shape[1]
        if self.swap_channels and channels == 3:
            images = images.flip(1)
        if (channels, wanted) == (3, 1):
            gray = ((images * self.student_std + self.student_mean) * self.luminance).sum(1, keepdim=True)
            return (gray - self.mean) / self.std
        if channels != wanted and (channels, wanted) != (1, 3):
            raise TeacherError(f'The student is given images of {_format_count(channels)}, and the teacher takes '
                               f'images of {_format_count(wanted)}: only between gray and colour images is it known '
                               'what the other would see. Take a teacher of as many channels (backbone.in_channels) as '
                               'the student.')
        images = images if self.same_normalization else images * self.scale + self.shift
        return images.expand(-1, wanted, -1, -1)


def crop_to_batch(level: Tensor, padded: Shape, batch_shape: Shape) -> Tensor:
    """Crops a level to the cells that lie in the student's batch.

    Args:
        level: (N, C, h, w), of the batch as the teacher sees it.
        padded: Height and width of that batch, in pixels.
        batch_shape: Height and width of the student's.

    Returns:
        (N, C, ⌈h·H/H'⌉, ⌈w·W/W'⌉).
    """
    rows, columns = (-(-cells * kept // whole) for cells, kept, whole in zip(level.shape[-2:], batch_shape, padded))
    return level if (rows, columns) == level.shape[-2:] else level[..., :rows, :columns].contiguous()


@contextmanager
def explain_size_mismatch(batch_shape: Shape) -> Iterator[None]:
    """Says what to do where the levels of a teacher's pyramid do not fit each other in the block.

    Args:
        batch_shape: Height and width of the batch that the teacher is given.

    Raises:
        TeacherError: They do not.
    """
    try:
        yield
    except RuntimeError as error:
        if not SIZE_MISMATCH.search(str(error)) or not any(side % LARGEST_STRIDE for side in batch_shape):
            raise
        raise TeacherError(f'The teacher can not be run on a batch of {batch_shape[0]} × {batch_shape[1]} pixels, for '
                           f'the levels of its pyramid do not fit each other there ({error}). Set '
                           "data_preprocessor.pad_size_divisor=32 in the teacher's config, or the largest stride of "
                           'its pyramid: the batch is then padded for the teacher.') from error


def _read_normalization(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Reads mean and standard deviation, each (C,) in the channels' order after preprocessing, or (1,) for all."""
    mean: Tensor | None = getattr(preprocessor, 'mean', None)
    if mean is None or not getattr(preprocessor, '_enable_normalize', True):
        return torch.zeros(1), torch.ones(1)
    return mean.detach().float().cpu().flatten(), preprocessor.std.detach().float().cpu().flatten()


def _is_swapping_channels(preprocessor: nn.Module) -> bool:
    """Whether the preprocessor reverses the channels of the loaded (BGR) image."""
    return bool(getattr(preprocessor, '_channel_conversion', False))


def _read_pad_value(preprocessor: nn.Module) -> Tensor:
    """(1,), or (C,) of a preprocessor that pads each channel with its own value."""
    return torch.as_tensor(getattr(preprocessor, 'pad_value', 0), dtype=torch.float32).cpu().reshape(-1)


def _are_equal(values: Tensor, others: Tensor) -> bool:
    """Whether (C,) or (1,) are the same for every channel."""
    comparable = len(values) == len(others) or 1 in (len(values), len(others))
    return comparable and bool((values == others).all())


def _format_count(channels: int) -> str:
    return '1 channel' if channels == 1 else f'{channels} channels'
