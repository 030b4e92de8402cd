"""The validation images with their ground truth, and what a detector finds on them."""
from __future__ import annotations

import copy
import io
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from torch import nn

from kd_det.classes import label_names, metainfo_of
from kd_det.configuration import ConfigurationError, student_model
from kd_det.scopes import build_detector as build_model
from kd_det.scopes import scope_of, within_scope
from kd_det.teachers import load_strictly

LOADING = ('allow_missing', 'allow_unexpected', 'checkpoint_prefix')  # of a teacher, see load_strictly

Detection = List[float]  # x1, y1, x2, y2 in pixels of the original image, label, score


class LabelledImage(NamedTuple):
    """An image and its ground truth.

    Attributes:
        file: The image.
        height: In pixels, as ``width``.
        width: In pixels.
        boxes: x1, y1, x2, y2 in pixels.
        labels: One for each box.
        ignored: Whether a box is a crowd, which is neither to be found nor wrong to find.
    """
    file: str
    height: int
    width: int
    boxes: List[List[float]]
    labels: List[int]
    ignored: List[bool]


class Validation(NamedTuple):
    """The validation data of a config: mmdet's data set, its classes and their colours, and the images."""
    dataset: torch.utils.data.Dataset
    classes: Tuple[str, ...]
    palette: Tuple[Tuple[int, int, int], ...]
    images: List[LabelledImage]


def read_validation(config: Config) -> Validation:
    """Builds the validation data.

    Raises:
        ConfigurationError: The config has none.
    """
    if not config.get('val_dataloader'):
        raise ConfigurationError(f"The config '{config.filename}' has no val_dataloader.")
    with redirect_stdout(io.StringIO()), within_scope(scope_of(config)):  # pycocotools writes
        dataset = DATASETS.build(copy.deepcopy(config.val_dataloader.dataset))
    classes = label_names(dataset)
    palette = metainfo_of(dataset).get('palette')
    if not isinstance(palette, (list, tuple)) or len(palette) < len(classes):
        palette = [_colour(index, len(classes)) for index in range(len(classes))]
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    return Validation(dataset, classes, tuple(map(tuple, palette)), [_labelled(info) for info in infos])


def _colour(index: int, count: int) -> Tuple[int, int, int]:
    """A colour of its own for each class."""
    from matplotlib.colors import hsv_to_rgb
    return tuple(int(255 * channel) for channel in hsv_to_rgb((index / count, 0.85, 0.9)))


def _labelled(info: dict) -> LabelledImage:
    instances = info['instances']
    return LabelledImage(
        str(Path(info['img_path'])), info['height'], info['width'],
        [[float(side) for side in instance['bbox']] for instance in instances],
        [int(instance['bbox_label']) for instance in instances],
        [bool(instance.get('ignore_flag', 0)) for instance in instances])


def build_detector(config: Config, checkpoint: str, teacher: Optional[dict] = None) -> nn.Module:
    """The trained detector of a config, or the trained student of a distillation, ready to detect.

    Args:
        config: Its config.
        checkpoint: Its weights.
        teacher: Of a teacher its config within a distillation, which may say how its checkpoint is loaded.
    """
    with within_scope(scope_of(config)):
        detector = build_model(student_model(config))
    told = {key: teacher[key] for key in LOADING if key in (teacher or {})}
    load_strictly(detector, checkpoint, role='student' if teacher is None else 'teacher', **told)
    return detector.to(get_device()).eval()


@torch.no_grad()
def detect(detector: nn.Module, dataset: torch.utils.data.Dataset) -> List[List[Detection]]:
    """Runs a detector on each image of a data set, prepared as for validation."""
    return [_detections(detector.val_step(pseudo_collate([dataset[index]]))[0]) for index in range(len(dataset))]


def _detections(sample) -> List[Detection]:
    found = sample.pred_instances
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    return [[*(round(side, 3) for side in box), label, round(score, 6)]
            for box, label, score in zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist())
            if all(map(math.isfinite, (*box, score)))]  # else it is nowhere: the student has diverged


def chosen(images: Sequence[LabelledImage], names: Sequence[str]) -> List[int]:
    """Indices of the images of these names: the file, with its folders and its suffix or without.

    Raises:
        ConfigurationError: No image has a name, or several have.
    """
    found = []
    for name in names:
        parts = Path(name).parts
        fits = [index for index, image in enumerate(images) for file in [Path(image.file)]
                if parts in (file.parts[-len(parts):], (*file.parts[:-1], file.stem)[-len(parts):])]
        if len(fits) != 1:
            few = ', '.join(Path(image.file).name for image in images[:3])
            raise ConfigurationError(
                f'--show {name}: {len(fits)} of the {len(images)} validation images have that name. '
                + ('Name the folder too.' if fits else f'There are {few}, …'))
        found += fits
    return found


def evenly_spaced(count: int, wanted: int) -> Sequence[int]:
    """Indices spread over a data set: chosen by no result."""
    wanted = min(count, wanted)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]
