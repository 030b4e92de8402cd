"""Where the terms of a distillation look: their masks and attentions as maps over the images of a batch."""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_det.context import ComparedLevel
from kd_det.distillers.detection_distiller import DetectionDistiller, Observation
from kd_det.functional.masks import channel_attention, spatial_attention
from kd_det.heads.dense import Stride
from kd_det.losses import FGD, FKD, AttentionImitation, DistillTerm, FeatureTerm
from kd_det.losses.base import Parts
from kd_det.losses.outputs import ComparedOutputs, DenseTerm
from kd_det.masks import Mask
from kd_det.taps import record_calls
from kd_det.training.pictures import draw_channels, draw_maps, save_figure

MAX_IMAGES = 4  # of a batch
TEMPERATURE = 0.5  # of the attentions of a term that has none itself


class LevelMap(NamedTuple):
    """Where a term looks on one level.

    Attributes:
        stride: Of the level, in pixels.
        cells: (N, H, W), weights of the cells; None where there are none.
        channels: (N, C), weights of the channels; None where there are none.
    """
    stride: Stride
    cells: Tensor | None
    channels: Tensor | None


class Comparison(NamedTuple):
    """What a term compared on one level, and the parts that this added to its value, scalars."""
    level: ComparedLevel | ComparedOutputs
    parts: Parts


def observe_comparisons(distiller: DetectionDistiller, data: dict) -> tuple[Observation, dict[str, list[Comparison]]]:
    """Observes a batch with all terms.

    Args:
        distiller: The distiller.
        data: A batch, preprocessed.

    Returns:
        What was observed; and, by the names of the terms that compare features or dense heads level by level, what they
        compared.
    """
    terms = [(name, term) for name, term in distiller.learners[0].terms.items()
             if isinstance(term, (FeatureTerm, DenseTerm))]
    with ExitStack() as stack:
        calls = {name: stack.enter_context(record_calls(term, 'compare')) for name, term in terms}
        divisors = {name: stack.enter_context(record_calls(term, '_divisors')) for name, term in terms
                    if isinstance(term, DenseTerm)}
        observation = distiller.observe(data['inputs'], data['data_samples'], distiller.terms)
    comparisons = {}
    for name, made in calls.items():
        by = [1.0] * len(made) if name not in divisors else [each for call in divisors[name] for each in call.returned]
        comparisons[name] = [
            Comparison(call.arguments['level'], {part: value / divisor for part, value in call.returned.items()})
            for call, divisor in zip(made, by)]
    return observation, comparisons


def make_mask_maps(term: FeatureTerm, levels: Sequence[ComparedLevel]) -> Iterator[tuple[str, list[LevelMap]]]:
    """Yields the masks of a term by name, parts of combined masks too, each with its map on every level."""
    for path, module in term.named_modules():
        if isinstance(module, Mask):
            yield f"{path.replace('.', '_')}_{type(module).__name__}", [_make_mask_map(module, each) for each in levels]


@torch.no_grad()
def draw_comparisons(distiller: DetectionDistiller, inputs: Tensor, boxes: Sequence[Tensor],
                     comparisons: dict[str, list[Comparison]], folder: Path, force: bool = True) -> list[Path]:
    """Draws every mask and attention of the terms, all levels of one in a picture, one picture for each image.

    Args:
        distiller: The distiller.
        inputs: (N, C, H, W), the preprocessed batch.
        boxes: Ground truth of each image, (n, 4), in pixels of the batch.
        comparisons: See :func:`observe_comparisons`.
        folder: Where to save; made if there is anything to save.
        force: See :func:`~kd_det.training.pictures.save_figure`.

    Returns:
        The files: ``<image>_<term>_<mask or attention>.png``, with ``_channels`` for weights of channels. None where no
        term compares features level by level.
    """
    files: list[Path] = []
    images = restore_images(inputs[:MAX_IMAGES], distiller.data_preprocessor)
    for index, (image, of_image) in enumerate(zip(images, boxes)):
        image = mmcv.imshow_bboxes(image, of_image.cpu().numpy(), colors='green', show=False)
        for name, compared in comparisons.items():
            for title, maps in _make_maps(distiller.terms[name], [each.level for each in compared]):
                for figure, suffix in _draw_figures(image, maps, index):
                    folder.mkdir(parents=True, exist_ok=True)
                    files.append(folder / re.sub(r'[^\w.@+=,-]', '_', f'{index}_{name}_{title}{suffix}.png'))
                    save_figure(figure, files[-1], force, dpi=100)
    return files


def restore_images(inputs: Tensor, preprocessor: nn.Module) -> list[np.ndarray]:
    """Returns the images as they were before normalisation, padding included.

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


def _make_maps(term: DistillTerm, levels: Sequence[ComparedLevel]) -> Iterator[tuple[str, list[LevelMap]]]:
    """Yields the masks of a term, and the attentions of the two features that it compares; nothing of one of heads."""
    if not isinstance(term, FeatureTerm):
        return
    yield from make_mask_maps(term, levels)
    temperature = term.temperature if isinstance(term, (FGD, FKD, AttentionImitation)) else TEMPERATURE
    attends_to_channels = isinstance(term, (FGD, AttentionImitation))
    for side in ('student', 'teacher'):
        features = [getattr(level, side) for level in levels]
        yield f'attention_{side}', [
            LevelMap(level.stride, spatial_attention(feature, temperature, level.valid),
                     channel_attention(feature, temperature, level.valid) if attends_to_channels else None)
            for level, feature in zip(levels, features)]


def _make_mask_map(mask: Mask, level: ComparedLevel) -> LevelMap:
    weightings = mask(level)
    cells = [each.factor * each.cells for each in weightings if each.cells is not None]
    channels = [each.factor * each.channels for each in weightings if each.channels is not None]
    return LevelMap(level.stride, sum(cells) if cells else None, sum(channels) if channels else None)


def _draw_figures(image: np.ndarray, maps: list[LevelMap], index: int) -> Iterator[tuple[Figure, str]]:
    """Yields the pictures of one mask or attention on one image, each with the end of its file's name."""
    cells = {each.stride: each.cells[index].cpu().numpy() for each in maps if each.cells is not None}
    channels = {f'stride {each.stride}': each.channels[index].cpu().numpy() for each in maps
                if each.channels is not None}
    if cells:
        titles = {stride: f'{values.min():.2g} to {values.max():.2g}' if values.any() else '0 in all cells'
                  for stride, values in cells.items()}
        yield draw_maps(image, {f'stride {stride}: {titles[stride]}': values for stride, values in cells.items()},
                        columns=3), ''
    if channels:
        yield draw_channels(channels), '_channels'
