"""The validation images with their ground truth, and what a detector finds on them."""
from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from kd_det.config import ConfigurationError
from kd_det.config.classes import find_label_names, get_metainfo
from kd_det.config.files import find_quantization, student_model
from kd_det.registry import build_detector, get_scope, within_scope
from kd_det.teachers import load_strictly
from kd_det.training.runs import restore_quantizer

CURVES = {'50': 0, '75': 5}  # IoU in percent -> index among COCO's thresholds
ALL_AREAS, MOST_DETECTIONS = 0, -1
LOADING = ('allow_missing', 'allow_unexpected', 'checkpoint_prefix')  # of a teacher, see load_strictly

Detection = list[float]  # x1, y1, x2, y2 in pixels of the original image, label, score


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
    boxes: list[list[float]]
    labels: list[int]
    ignored: list[bool]


class Validation(NamedTuple):
    """The validation data of a config: mmdet's data set, its classes and their colours, and the images."""
    dataset: torch.utils.data.Dataset
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    images: list[LabelledImage]


def load_validation(config: Config) -> Validation:
    """Builds the validation data.

    Raises:
        ConfigurationError: The config has none.
    """
    if not config.get('val_dataloader'):
        raise ConfigurationError(f"The config '{config.filename}' has no val_dataloader.")
    with redirect_stdout(io.StringIO()), within_scope(get_scope(config)):  # pycocotools writes
        dataset = DATASETS.build(copy.deepcopy(config.val_dataloader.dataset))
    classes = find_label_names(dataset)
    palette = get_metainfo(dataset).get('palette')
    if not isinstance(palette, (list, tuple)) or len(palette) < len(classes):
        palette = [_choose_colour(index, len(classes)) for index in range(len(classes))]
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    return Validation(dataset, classes, tuple(map(tuple, palette)), [_read_labels(info) for info in infos])


def _choose_colour(index: int, count: int) -> tuple[int, int, int]:
    """Chooses a colour of its own for each class."""
    from matplotlib.colors import hsv_to_rgb
    red, green, blue = hsv_to_rgb((index / count, 0.85, 0.9))
    return int(255 * red), int(255 * green), int(255 * blue)


def _read_labels(info: dict) -> LabelledImage:
    instances = info['instances']
    return LabelledImage(
        str(Path(info['img_path'])), info['height'], info['width'],
        [[float(side) for side in instance['bbox']] for instance in instances],
        [int(instance['bbox_label']) for instance in instances],
        [bool(instance.get('ignore_flag', 0)) for instance in instances])


def load_detector(config: Config, checkpoint: str, teacher: dict | None = None) -> nn.Module:
    """Loads the trained detector of a config, or the trained student of a distillation, ready to detect.

    Args:
        config: Its config.
        checkpoint: Its weights.
        teacher: Of a teacher its config within a distillation, which may say how its checkpoint is loaded.
    """
    with within_scope(get_scope(config)):
        detector = build_detector(student_model(config))
    told = {key: teacher[key] for key in LOADING if key in (teacher or {})}
    load_strictly(detector, checkpoint, role='student' if teacher is None else 'teacher', **told)
    detector.to(get_device()).eval()
    quantization = find_quantization(config)
    if quantization is not None:
        restore_quantizer(quantization, checkpoint, detector)
    return detector


@torch.no_grad()
def detect(detector: nn.Module, dataset: torch.utils.data.Dataset) -> list[list[Detection]]:
    """Runs a detector on each image of a data set, prepared as for validation."""
    return [_read_detections(detector.val_step(pseudo_collate([dataset[index]]))[0]) for index in range(len(dataset))]


def _read_detections(sample) -> list[Detection]:
    found = sample.pred_instances
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    return [[*(round(side, 3) for side in box), label, round(score, 6)]
            for box, label, score in zip(boxes.tolist(), found.labels.tolist(), found.scores.tolist())
            if all(map(math.isfinite, (*box, score)))]  # else it is nowhere: the student has diverged


def find_images(images: Sequence[LabelledImage], names: Sequence[str]) -> list[int]:
    """Finds the indices of the images of these names: the file, with its folders and its suffix or without.

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


def choose_evenly(count: int, wanted: int) -> Sequence[int]:
    """Chooses indices evenly spread over a data set: by no result."""
    wanted = min(count, wanted)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def build_ground_truth(images: Sequence[LabelledImage], classes: Sequence[str]) -> COCO:
    """Builds the ground truth as pycocotools takes it; image and class are named by index, the latter from 1 on."""
    annotations = []
    for index, image in enumerate(images):
        for (x1, y1, x2, y2), label, ignored in zip(image.boxes, image.labels, image.ignored):
            annotations.append(dict(id=len(annotations) + 1, image_id=index, category_id=label + 1,
                                    bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=int(ignored)))
    coco = COCO()
    coco.dataset = dict(
        images=[dict(id=index, height=image.height, width=image.width) for index, image in enumerate(images)],
        annotations=annotations,
        categories=[dict(id=label + 1, name=name) for label, name in enumerate(classes)])
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def evaluate_boxes(truth: COCO, detections: Sequence[Sequence[Detection]]) -> dict[str, object]:
    """Evaluates the boxes that a detector found on all images.

    Args:
        truth: See :func:`build_ground_truth`.
        detections: For each image, in the order of the ground truth.

    Returns:
        ``per_class``: AP of each class, 0 to 1, None where there is no object of it; ``precision``: by IoU in percent
        the precision at recalls 0, 0.01 … 1, mean over the classes that have objects.
    """
    found = [dict(image_id=index, category_id=int(label) + 1, bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
             for index, each in enumerate(detections) for x1, y1, x2, y2, label, score in each]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found) if found else _make_empty_results(truth), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval['precision'][..., ALL_AREAS, MOST_DETECTIONS]  # (IoU, recall, class); -1: no objects
    per_class: list[float | None] = [float(each.mean()) if each.min() > -1 else None
                                     for each in np.moveaxis(precision, 2, 0)]
    present = precision[:, :, [value is not None for value in per_class]]
    curves = {name: present[index].mean(-1).tolist() if present.size else [] for name, index in CURVES.items()}
    return dict(per_class=per_class, precision=curves)


def _make_empty_results(truth: COCO) -> COCO:
    """Makes the results of a detector that finds nothing, which ``loadRes`` does not take."""
    empty = COCO()
    empty.dataset = dict(truth.dataset, annotations=[])
    empty.createIndex()
    return empty
