"""Whether a file finds what the detector finds, image by image and in mAP."""
from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import nn

from kd_det.checks.preflight import plain_object
from kd_det.config import ConfigurationError
from kd_det.deploy.graph import DetectorGraph
from kd_det.deploy.runtime import Detections, ExportedDetector, ModelInfo

Predict = Callable[[np.ndarray], Detections]  # of (N, channels, H, W) images


class Tolerance(NamedTuple):
    """By how much a file may differ from the detector.

    Attributes:
        pixels: A side of a box.
        score: A score.
        points: COCO's mAP.
        unmatched: The share of boxes without a counterpart: rounding keeps or suppresses some whose overlap is just at
            the threshold.
        reach: By how many times the first two a counterpart may differ and still be one, to be found fault with.
        least: Boxes of lower scores do not count.
    """
    pixels: float
    score: float
    points: float
    unmatched: float
    reach: float
    least: float


# Half precision has three digits, and boxes of low scores move by many pixels.
# An integer that falls on the other side of a rounding moves all after it: of those mAP alone is compared.
TOLERANCES = dict(float32=Tolerance(0.05, 1e-3, 0.1, 0.005, 20, 0), float16=Tolerance(2.0, 2e-2, 0.5, 0.05, 1, 0.1),
                  int8=Tolerance(np.inf, np.inf, 1.0, np.inf, 1, 0.1))


@dataclass(frozen=True)
class Example:
    """An image to compare on.

    Attributes:
        image: (height, width, channels) of uint8, in the file's order of channels, as the test pipeline makes it.
        scale: By which the pipeline multiplied the width and the height of the photograph.
        shape: Height and width of the photograph.
        objects: Its objects as the data has them; None of noise.
    """
    image: np.ndarray
    scale: tuple[float, float] = (1.0, 1.0)
    shape: tuple[int, int] = (0, 0)
    objects: Sequence[dict] | None = None


@dataclass(frozen=True)
class Comparison:
    """How a file agrees with the detector on the same images.

    Attributes:
        images: How many were compared.
        real: Whether they are validation images, else noise.
        boxes: How many the detector found on them.
        unmatched: How many of those the file does not have, or has with another label.
        box_error: The largest difference of a side of the others, in pixels of the file's input.
        score_error: The largest difference of a score.
        expected_map: The detector's COCO mAP on these images, in points; None of noise, or without objects.
        map: The file's.
    """
    images: int
    real: bool
    boxes: int
    unmatched: int
    box_error: float
    score_error: float
    expected_map: float | None
    map: float | None

    @property
    def loss_of_map(self) -> float:
        """By how many points the file's mAP differs from the detector's; 0 where it was not measured."""
        return 0.0 if self.map is None or self.expected_map is None else abs(self.expected_map - self.map)

    def rows(self) -> list[tuple[str, str]]:
        """The rows of a table."""
        rows = [('compared on', f"{self.images} {'validation images' if self.real else 'images of noise'}, "
                 f'{self.boxes} boxes'),
                ('largest difference', f'{self.box_error:.2g} px, scores {self.score_error:.2g}; '
                 f'{self.unmatched} boxes without a counterpart')]
        if self.map is not None:
            rows.append(('mAP', f'{self.map:.2f}, of the detector {self.expected_map:.2f}'))
        return rows

    def require_agreement(self, info: ModelInfo) -> None:
        """Checks that the differences are no more than rounding makes.

        Raises:
            ConfigurationError: They are more; the message says which.
        """
        pixels, score, points, share, *_ = TOLERANCES[info.precision]
        faults = [
            f'{self.box_error:.3g} px between boxes, above {pixels}' if self.box_error > pixels else '',
            f'{self.score_error:.3g} between scores, above {score}' if self.score_error > score else '',
            f'{self.unmatched} of {self.boxes} boxes without a counterpart' if self.unmatched > share * self.boxes
            else '',
            f'mAP {self.map:.2f} in place of {self.expected_map:.2f}' if self.loss_of_map > points + 1e-6 else '']
        if any(faults):
            raise ConfigurationError(f'The exported {info.detector} does not find what the detector finds, so that no '
                                     f"file is kept: {'; '.join(filter(None, faults))}, on {self.images} "
                                     f"{'validation images' if self.real else 'images of noise'}.")


def draw_images(dataset: Any | None, info: ModelInfo, count: int) -> list[Example]:
    """Takes images, evenly spread, through their data set's own pipeline; noise where there are none.

    That is where there are annotations alone, too: COCO's come in one archive, its images in one for each set.

    Args:
        dataset: See :func:`build_dataset`.
        info: Of the file.
        count: At most so many.
    """
    places = [] if dataset is None or not len(dataset) else np.unique(
        np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()
    examples: list[Example] = []
    for index in places:
        try:
            examples.append(read_example(dataset, index, info))
        except FileNotFoundError:
            if examples:  # of some images one lacks, which is for the user to look at
                raise
            break
    if examples:
        return examples
    noise = np.random.default_rng(0)
    size = info.size or (320, 416)
    return [Example(noise.integers(0, 256, (*size, len(info.mean)), np.uint8)) for _ in range(min(count, 4))]


def build_dataset(config: Config) -> Any | None:
    """Builds the config's validation data, else its test data; None where it has none, or its files are not here."""
    loader = config.get('val_dataloader') or config.get('test_dataloader')
    if not loader:
        return None
    try:
        with quiet():
            return DATASETS.build(dict(copy.deepcopy(loader['dataset']), test_mode=True))
    except FileNotFoundError:
        return None


def read_example(dataset: Any, index: int, info: ModelInfo) -> Example:
    """Reads one image of a data set through its pipeline."""
    packed = dataset[index]
    image, sample = packed['inputs'].permute(1, 2, 0).numpy(), packed['data_samples']
    if info.channels == 'rgb' and image.shape[2] == 3:  # pipelines read as OpenCV does
        image = image[..., ::-1]
    objects = [plain_object(each) for each in dataset.get_data_info(index).get('instances') or ()]
    scale = tuple(map(float, sample.get('scale_factor', (1.0, 1.0))))
    return Example(image, (scale[0], scale[1]), tuple(sample.ori_shape[:2]), objects)


def predict_with(detector: nn.Module, channels: str) -> Predict:
    """Makes a function of MMDetection's own prediction.

    Args:
        detector: The detector.
        channels: The order in which the images will come.
    """

    @torch.no_grad()
    def predict(images: np.ndarray) -> Detections:
        inputs = torch.from_numpy(images.copy())
        if channels == 'rgb' and inputs.shape[1] == 3:
            inputs = inputs.flip(1)  # preprocessors expect what OpenCV reads
        shape = tuple(inputs.shape[-2:])
        meta = dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0))
        samples = [DetDataSample(metainfo=meta) for _ in inputs]
        data = detector.data_preprocessor(dict(inputs=list(inputs), data_samples=samples), False)
        found = [sample.pred_instances for sample in detector(**data, mode='predict')]
        columns = [[getattr(each.bboxes, 'tensor', each.bboxes) for each in found], [each.scores for each in found],
                   [each.labels for each in found]]
        return Detections(*(nn.utils.rnn.pad_sequence(column, batch_first=True).cpu().numpy() for column in columns))

    return predict


def predict_with_graph(graph: DetectorGraph) -> Predict:
    """Makes a function of a graph, run by PyTorch."""

    @torch.no_grad()
    def predict(images: np.ndarray) -> Detections:
        return Detections(*(each.cpu().numpy() for each in graph(torch.from_numpy(images.copy()))))

    return predict


def compare(model: ExportedDetector, expected: Predict, examples: Sequence[Example]) -> Comparison:
    """Runs a file and the detector on the same images; what of their boxes lies outside does not count.

    Args:
        model: The file.
        expected: The detector.
        examples: The images.
    """
    limits = TOLERANCES[model.info.precision]
    boxes, unmatched, box_error, score_error = 0, 0, 0.0, 0.0
    pairs: list[tuple[Detections, Detections]] = []
    for example in examples:
        image, scale = model.fit(example.image)
        height, width = image.shape[-2:]
        of_model, of_detector = (found._replace(boxes=found.boxes.clip(0, [width, height, width, height]))
                                 for found in (model(image), expected(image.astype(model.info.dtype))))
        rows = match(of_model, of_detector, limits)
        boxes, unmatched = boxes + len(rows), unmatched + int((rows < 0).sum())
        here = rows >= 0
        if here.any():
            places = np.flatnonzero(of_detector.scores[0] > limits.least)[:len(rows)][here]
            errors = [float(np.abs(ours[0][rows[here]] - theirs[0][places]).max())
                      for ours, theirs in zip(of_model[:2], of_detector[:2])]
            box_error, score_error = max(box_error, errors[0]), max(score_error, errors[1])
        factor = np.array(example.scale * 2, np.float32) * scale
        pairs.append((of_model._replace(boxes=of_model.boxes / factor),
                      of_detector._replace(boxes=of_detector.boxes / factor)))
    real = all(example.objects is not None for example in examples)
    found, wanted = (measure_map(examples, [pair[index] for pair in pairs], len(model.info.classes))
                     for index in range(2)) if real else (None, None)
    return Comparison(len(examples), real, boxes, unmatched, box_error, score_error, wanted, found)


def match(found: Detections, expected: Detections, limits: Tolerance) -> np.ndarray:
    """Pairs what was found on one image with what was expected: the nearest box of the same label.

    Args:
        found: Of one image.
        expected: Of the same; those beyond as many as can be found do not count.
        limits: How far apart a pair may be.

    Returns:
        For each expected box that counts the index of the found one, or -1.
    """
    real = np.flatnonzero(expected.scores[0] > limits.least)[:found.scores.shape[1]]
    free, rows = found.scores[0] > 0, np.full(len(real), -1)
    for row, place in enumerate(real):
        distance = np.abs(found.boxes[0] - expected.boxes[0][place]).max(1)
        gap = np.abs(found.scores[0] - expected.scores[0][place])
        fits = (free & (found.labels[0] == expected.labels[0][place]) & (distance <= limits.reach * limits.pixels)
                & (gap <= limits.reach * limits.score))
        if fits.any():
            rows[row] = np.where(fits, distance, np.inf).argmin()
            free[rows[row]] = False
    return rows


def measure_map(examples: Sequence[Example], found: Sequence[Detections], classes: int) -> float | None:
    """COCO's mAP in points, of boxes in pixels of the photographs; None without objects."""
    if not any(example.objects for example in examples):
        return None
    if not any((each.scores[0] > 0).any() for each in found):
        return 0.0  # of nothing the metric makes none
    metric = Evaluator([CocoMetric(metric='bbox')])
    metric.dataset_meta = dict(classes=tuple(map(str, range(classes))))
    for index, (example, each) in enumerate(zip(examples, found)):
        kept = each.scores[0] > 0
        instances = InstanceData(bboxes=torch.from_numpy(each.boxes[0][kept]),
                                 scores=torch.from_numpy(each.scores[0][kept]),
                                 labels=torch.from_numpy(each.labels[0][kept]))
        metric.process([dict(img_id=index, ori_shape=example.shape, pred_instances=instances,
                             instances=list(example.objects or ()))])
    with quiet():
        return 100 * metric.evaluate(len(examples))['coco/bbox_mAP']


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what exporters, quantisers and metrics tell of their progress off the screen."""
    loggers = [logging.getLogger(), logging.getLogger('torch.onnx'), MMLogger.get_current_instance()]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter('ignore')
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
