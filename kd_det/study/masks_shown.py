"""Where the terms look: their masks and attentions over the images of a batch."""
from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_det.context import ComparedLevel
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.functional.masks import channel_attention, spatial_attention
from kd_det.heads.dense import Stride
from kd_det.losses import FGD, FKD, AttentionImitation, FeatureTerm
from kd_det.masks import Mask
from kd_det.study.inspection import InspectedStep
from kd_det.study.pictures import draw_channels, draw_maps, save_figure

MOST_IMAGES = 4  # of a batch
TEMPERATURE = 0.5  # of the attentions of a term that has none itself


class Look(NamedTuple):
    """Where a term looks on one level: the weights of the cells, (N, H, W), and of the channels, (N, C)."""
    stride: Stride
    cells: Tensor | None
    channels: Tensor | None


@torch.no_grad()
def draw_step(distiller: DetectionDistiller, step: InspectedStep, folder: Path) -> list[Path]:
    """Draws every mask and attention of the terms, all levels of one in a picture, one picture for each image.

    Args:
        distiller: The distiller.
        step: What was seen.
        folder: Where to save; made if there is anything to save.

    Returns:
        The files: ``<image>_<term>_<mask or attention>.png``, with ``_channels`` for weights of channels. None where no
        term compares features level by level.
    """
    files: list[Path] = []
    images = restored_images(step.inputs[:MOST_IMAGES], distiller.data_preprocessor)
    for index, (image, boxes) in enumerate(zip(images, step.observation.context.boxes)):
        image = mmcv.imshow_bboxes(image, boxes.cpu().numpy(), colors='green', show=False)
        for name, levels in step.levels.items():
            for title, looks in _looks(distiller.terms[name], levels):
                for figure, suffix in _figures(image, looks, index):
                    folder.mkdir(parents=True, exist_ok=True)
                    files.append(folder / re.sub(r'[^\w.@+=,-]', '_', f'{index}_{name}_{title}{suffix}.png'))
                    save_figure(figure, files[-1], dpi=100)
    return files


def restored_images(inputs: Tensor, preprocessor: nn.Module) -> list[np.ndarray]:
    """The images as they were before normalisation, padding included.

    Gray ones are gray in colour, too; of other channels than three the first three are shown, or the first alone where
    there are two. What its pipeline has normalised, so that it no longer lies within 0 to 255, or all of it within 0 to
    1, is stretched over the colours.

    Args:
        inputs: (N, C, H, W), preprocessed.
        preprocessor: The detector's data preprocessor.

    Returns:
        (H, W, 3) uint8 each, red first.
    """
    images = inputs.float()
    if getattr(preprocessor, '_enable_normalize', False):
        images = images * preprocessor.std + preprocessor.mean
    images = images[:, :3 if images.shape[1] >= 3 else 1].expand(-1, 3, -1, -1)
    if not getattr(preprocessor, '_channel_conversion', False):  # images are loaded blue first
        images = images.flip(1)
    low, high = images.min(), images.max()
    if low < -1 or high > 256 or high <= 1:  # a little may be lost in restoring
        images = (images - low) * (255 / (high - low).clamp(min=1e-6))
    return list(images.clamp(0, 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy())


def _looks(term: FeatureTerm, levels: list[ComparedLevel]) -> Iterator[tuple[str, list[Look]]]:
    """The masks of a term, and the attentions of the two features that it compares."""
    yield from mask_looks(term, levels)
    temperature = term.temperature if isinstance(term, (FGD, FKD, AttentionImitation)) else TEMPERATURE
    attends_to_channels = isinstance(term, (FGD, AttentionImitation))
    for side in ('student', 'teacher'):
        features = [getattr(level, side) for level in levels]
        yield f'attention_{side}', [
            Look(level.stride, spatial_attention(feature, temperature, level.valid),
                 channel_attention(feature, temperature, level.valid) if attends_to_channels else None)
            for level, feature in zip(levels, features)]


def mask_looks(term: FeatureTerm, levels: list[ComparedLevel]) -> Iterator[tuple[str, list[Look]]]:
    """The masks of a term by name, parts of combined masks too."""
    for path, module in term.named_modules():
        if isinstance(module, Mask):
            yield f"{path.replace('.', '_')}_{type(module).__name__}", [_mask_look(module, level) for level in levels]


def _mask_look(mask: Mask, level: ComparedLevel) -> Look:
    weightings = mask(level)
    cells = [each.factor * each.cells for each in weightings if each.cells is not None]
    channels = [each.factor * each.channels for each in weightings if each.channels is not None]
    return Look(level.stride, sum(cells) if cells else None, sum(channels) if channels else None)


def _figures(image: np.ndarray, looks: list[Look], index: int) -> Iterator[tuple[Figure, str]]:
    """The pictures of one mask or attention on one image, each with the end of its file's name."""
    cells = {look.stride: look.cells[index].cpu().numpy() for look in looks if look.cells is not None}
    channels = {f'stride {look.stride}': look.channels[index].cpu().numpy() for look in looks
                if look.channels is not None}
    if cells:
        yield draw_maps(image, {_title(stride, each): each for stride, each in cells.items()}, columns=3), ''
    if channels:
        yield draw_channels(channels), '_channels'


def _title(stride: Stride, cells: np.ndarray) -> str:
    return f'stride {stride}: ' + (f'{cells.min():.2g} to {cells.max():.2g}' if cells.any() else '0 in all cells')
