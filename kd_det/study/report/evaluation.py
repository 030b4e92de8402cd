"""What the trained detectors show on the validation images: their accuracy, their boxes, and where they look."""
from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.structures import InstanceData
from pycocotools.coco import COCO
from torch import Tensor, nn

from kd_det.checks.image_reader import read_image
from kd_det.compat import CheckpointError, load_checkpoint
from kd_det.config import ConfigurationError
from kd_det.config.classes import ClassMatch, count_classes, match_classes
from kd_det.config.files import is_distillation
from kd_det.distillers import DetectionDistiller
from kd_det.functional.masks import spatial_attention, valid_cells
from kd_det.losses import FeatureTerm
from kd_det.registry import build_detector, get_scope, within_scope
from kd_det.study.maps import make_mask_maps, observe_comparisons
from kd_det.study.report.detections import (
    Detection,
    Validation,
    build_ground_truth,
    detect,
    evaluate_boxes,
    load_detector,
)
from kd_det.study.report.studies import Study, TrainedRun, identify_file, load_or_make
from kd_det.teachers import TeacherError, read_model_config
from kd_det.teachers.loading import find_class_names
from kd_det.training.hooks import CHECKPOINT_KEY
from kd_det.training.pictures import image_uri, map_uri

SHOWN_FROM = 0.05  # score of a box
TEACHER = 'teacher'


@dataclass
class StudyEvaluation:
    """What the trained detectors of a study show on the validation images.

    Attributes:
        accuracies: Variant -> seed -> accuracy, see :func:`~kd_det.study.report.detections.evaluate_boxes`.
        images: The shown images with ground truth and, by variant, the boxes of its first seed.
        maps: Variant -> title -> levels, for each shown image; of its first seed.
        notes: What is missing.
    """
    accuracies: dict[str, dict[int, dict]] = field(default_factory=dict)
    images: list[dict] = field(default_factory=list)
    maps: dict[str, list[dict]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def evaluate_study(study: Study, validation: Validation, shown: Sequence[int], teacher: dict | None,
                   log: Callable[[str], None]) -> StudyEvaluation:
    """Runs the checkpoints of a study, and its teacher, on the validation images.

    Args:
        study: The study.
        validation: Its validation data.
        shown: Indices of the images to show.
        teacher: ``config`` and ``checkpoint``, if there is one.
        log: Given a line on what is being done.
    """
    truth, evaluation = build_ground_truth(validation.images, validation.classes), StudyEvaluation()
    for index in shown:
        image = validation.images[index]
        boxes = [[*box, label] for box, label, ignored in zip(image.boxes, image.labels, image.ignored) if not ignored]
        evaluation.images.append(dict(
            name=Path(image.file).name, width=image.width, height=image.height,
            source=image_uri(read_image(validation.dataset, index)), truth=boxes, boxes={}))
    has_teacher = teacher is not None and Path(str(teacher['checkpoint'])).is_file()
    if has_teacher:
        log(f'{study.name}: {TEACHER}')
        _evaluate_variant(evaluation, TEACHER, [_make_teacher_run(study, teacher)], validation, truth, shown, teacher)
    elif teacher is not None:
        evaluation.notes.append('Teacher and masks are not shown, for there is no checkpoint '
                                f"'{teacher['checkpoint']}' (--teacher-checkpoint tells where it is).")
    for variant, runs in study.variants.items():
        trained = [run for run in runs if run.checkpoint is not None]
        if len(trained) < len(runs):
            evaluation.notes.append(f'{variant}: {len(runs) - len(trained)} of {len(runs)} checkpoints are missing.')
        if trained:
            log(f'{study.name}: {variant}, {len(trained)} run{"s" * (len(trained) > 1)}')
            _evaluate_variant(evaluation, variant, trained, validation, truth, shown)
            if has_teacher and is_distillation(trained[0].config):
                _add_masks(evaluation, trained[0], teacher, validation, shown)
    return evaluation


def _make_teacher_run(study: Study, teacher: dict) -> TrainedRun:
    """The teacher, as if it were a run; what is found out of it is kept in the folder of the study."""
    folder = study.runs[0].folder if study.results is None else study.runs[0].folder.parents[1]
    config = Config(dict(model=read_model_config(teacher['config'])))
    return TrainedRun(TEACHER, 0, folder / TEACHER, config, Path(teacher['checkpoint']), [])


def _evaluate_variant(evaluation: StudyEvaluation, variant: str, runs: list[TrainedRun], validation: Validation,
                      truth: COCO, shown: Sequence[int], teacher: dict | None = None) -> None:
    """Adds the accuracies of a variant, and boxes and attention of its first run; the classes of a teacher by name."""
    first, runs = _load_first(evaluation, variant, runs, teacher)
    if first is None:
        return
    count, match = count_classes(first), None
    try:
        match = _match_classes(teacher, count, validation.classes) if teacher else None
    except (ConfigurationError, TeacherError) as error:
        evaluation.notes.append(f'The {variant} is not shown: {error}')
        return
    if match is None and count not in (None, len(validation.classes)):
        evaluation.notes.append(f'{variant} knows other classes than the validation data: its boxes can not be '
                                'compared.')
        return
    if match is not None:
        evaluation.notes.append(f"Classes: {match.report('what is shown of it')}")
    if match is None or len(match.of_student) == len(validation.classes):  # AP of classes that it lacks would be 0
        evaluation.accuracies[variant] = {}
    for run in runs:
        data: list[Any] = [identify_file(run.checkpoint), [image._asdict() for image in validation.images]]
        try:
            detections = load_or_make(run.folder, 'detections', data,
                                      partial(_detect, run, first if run is runs[0] else None, validation))
        except CheckpointError as error:
            evaluation.notes.append(_describe_unreadable(variant, run, error))
            continue
        if match is not None:
            detections, data = [_relabel(each, match) for each in detections], [*data, match.of_teacher]
        if variant in evaluation.accuracies:
            evaluation.accuracies[variant][run.seed] = load_or_make(run.folder, 'accuracy', data,
                                                                    partial(evaluate_boxes, truth, detections))
        if run is runs[0]:
            for image, index in zip(evaluation.images, shown):
                image['boxes'][variant] = [[*(round(side, 1) for side in box[:4]), box[4], round(box[5], 3)]
                                           for box in detections[index] if box[5] >= SHOWN_FROM]
            attention = load_or_make(run.folder, 'attention', _list_causes(run, validation, shown),
                                     partial(draw_attention, first, validation, shown))
            evaluation.maps[variant] = [dict(attention=levels) for levels in attention]


def _load_first(evaluation: StudyEvaluation, variant: str, runs: list[TrainedRun],
                teacher: dict | None) -> tuple[nn.Module | None, list[TrainedRun]]:
    """Loads the detector of the first run whose checkpoint can be read; returns the runs from that on."""
    for index, run in enumerate(runs):
        try:
            return load_detector(run.config, str(run.checkpoint), teacher), runs[index:]
        except (CheckpointError, TeacherError) as error:
            evaluation.notes.append(_describe_unreadable(variant, run, error))
    return None, []


def _describe_unreadable(variant: str, run: TrainedRun, error: Exception) -> str:
    return f"What the {variant if variant == TEACHER else f'{variant}, seed {run.seed},'} detects is not shown: {error}"


def _detect(run: TrainedRun, detector: nn.Module | None, validation: Validation) -> list[list[Detection]]:
    return detect(detector or load_detector(run.config, str(run.checkpoint)), validation.dataset)


def _add_masks(evaluation: StudyEvaluation, run: TrainedRun, teacher: dict, validation: Validation,
               shown: Sequence[int]) -> None:
    """Adds the masks of a run's terms to its maps."""
    config = copy.deepcopy(run.config)
    own = config.model.get('teacher')
    if isinstance(own, dict) and own.get('config') == teacher['config']:  # single trainings may have others each
        own.update(teacher)
    cause = [identify_file(Path(teacher['checkpoint'])), *_list_causes(run, validation, shown)]
    try:
        masks = load_or_make(run.folder, 'masks', cause,
                             partial(draw_masks, config, str(run.checkpoint), validation, shown))
    except Exception as error:  # of any of the many methods; a page without its masks is better than none
        evaluation.notes.append(f'{run.variant}: its masks are missing: {type(error).__name__}: {error}')
        return
    for maps, of_image in zip(evaluation.maps.get(run.variant, ()), masks):
        maps.update({describe_mask(name): levels for name, levels in of_image.items()})


def _match_classes(teacher: dict, count: int | None, classes: Sequence[str]) -> ClassMatch | None:
    """Matches a teacher's classes with those of the data, by name; None if its names are not known, or are those.

    Args:
        teacher: ``config`` and ``checkpoint``, perhaps ``classes``.
        count: How many classes it tells apart.
        classes: Names of the data's classes, by label.

    Raises:
        ConfigurationError: They share none.
        TeacherError: The teacher names more or fewer classes than it has.
    """
    meta = load_checkpoint(teacher['checkpoint']).get('meta') or {}
    names = find_class_names(count, teacher.get('classes', ()), meta, teacher['config'])
    match = match_classes(classes, names) if names else None
    return None if match is None or match.is_identity else match


def _relabel(detections: Sequence[Detection], match: ClassMatch) -> list[Detection]:
    """Gives a teacher's detections the labels of the data, without those of classes that the data lacks."""
    labels = dict(zip(match.of_teacher, match.of_student))
    return [[*box, labels[label], score] for *box, label, score in detections if label in labels]


def _list_causes(run: TrainedRun, validation: Validation, shown: Sequence[int]) -> list:
    """Lists what the maps of a run follow from."""
    return [identify_file(run.checkpoint), [validation.images[index]._asdict() for index in shown]]


TEMPERATURE = 0.5  # FGD's
Maps = dict[str, list[dict]]  # title -> one map for each level, see _draw_map


@torch.no_grad()
def draw_attention(detector: nn.Module, validation: Validation, indices: Sequence[int]) -> list[list[dict]]:
    """Draws the spatial attention of the neck's features, of each image and level.

    Args:
        detector: A trained detector.
        validation: The images.
        indices: Of the images to look at.
    """
    made = []
    for index in indices:
        data = detector.data_preprocessor(pseudo_collate([validation.dataset[index]]), False)
        inputs, sample = data['inputs'], data['data_samples'][0]
        levels = []
        for feature in detector.extract_feat(inputs):
            valid = valid_cells([sample.img_shape], inputs.shape[-2:], feature.shape[-2:], feature.device)
            stride = round(inputs.shape[-1] / feature.shape[-1])
            levels.append(_draw_map(stride, spatial_attention(feature.float(), TEMPERATURE, valid)[0], valid[0]))
        made.append(levels)
    return made


@torch.no_grad()
def draw_masks(config: Config, checkpoint: str, validation: Validation, indices: Sequence[int]) -> list[Maps]:
    """Draws the masks of the terms that compare features, of each image; on images without augmentation.

    Args:
        config: Of a distillation.
        checkpoint: What it has trained.
        validation: The images; their ground truth counts as it does in training.
        indices: Of the images to look at.
    """
    distiller = _load_distiller(config, checkpoint)
    shown = indices if distiller.terms else ()
    return [_draw_image_masks(distiller, _load_batch(validation, index)) for index in shown]


def _draw_image_masks(distiller: DetectionDistiller, batch: dict) -> Maps:
    data = distiller.data_preprocessor(batch, False)
    _, comparisons = observe_comparisons(distiller, data)
    pictures = {}
    for name, compared in comparisons.items():
        levels, term = [each.level for each in compared], distiller.terms[name]
        for title, maps in make_mask_maps(term, levels) if isinstance(term, FeatureTerm) else ():
            drawn = [_draw_map(each.stride, each.cells[0], level.valid[0]) for each, level in zip(maps, levels)
                     if each.cells is not None]
            if drawn:
                pictures[f'{name}: {title}'] = drawn
    return pictures


def describe_mask(name: str) -> str:
    """Names a mask in words: ``fgd, box foreground`` for ``fgd: foreground_BoxForeground``, its place and type."""
    term, _, mask = name.partition(': ')
    *place, kind = mask.split('_')
    kind = ' '.join(word if word == 'RoI' else word.lower() for word in re.split(r'(?<=[a-zI])(?=[A-Z][a-z])', kind))
    place = [word for word in place if word not in ('mask', 'masks', *kind.split())]
    return f'{term}, {kind}' + (f" ({' '.join(place)})" if place else '')


def _draw_map(stride: int, cells: Tensor, valid: Tensor) -> dict:
    """Draws a map without the padding.

    Returns:
        Its stride; how many cells are not finite, as those of a student that diverged; the smallest and the largest
        value of the others, and a picture of them, or None where there is none.
    """
    shown = cells[:int(valid.any(1).sum()), :int(valid.any(0).sum())].float().cpu().numpy()
    finite = np.isfinite(shown)
    made = dict(stride=stride, not_finite=int((~finite).sum()))
    if not finite.any():
        return dict(made, low=None, high=None, source=None)
    low, high = shown[finite].min(), shown[finite].max()
    clipped = np.nan_to_num(shown, nan=low, posinf=high, neginf=low)
    return dict(made, low=float(f'{low:.3g}'), high=float(f'{high:.3g}'), source=map_uri(clipped))


def _load_distiller(config: Config, checkpoint: str) -> DetectionDistiller:
    """Loads the distiller as it was at the end of its training."""
    with within_scope(get_scope(config)):
        distiller: DetectionDistiller = build_detector(config.model)
    loaded = load_checkpoint(checkpoint, map_location='cpu')
    distiller.load_state_dict(loaded['state_dict'])
    if CHECKPOINT_KEY in loaded:
        distiller.load_terms(loaded[CHECKPOINT_KEY]['terms'])
    distiller.build_teachers()
    return distiller.to(get_device()).eval()


def _load_batch(validation: Validation, index: int) -> dict:
    """Loads an image as training sees it: prepared for validation, with its boxes in pixels of what was prepared."""
    batch, image = pseudo_collate([validation.dataset[index]]), validation.images[index]
    sample = batch['data_samples'][0]
    scale = np.tile(sample.metainfo.get('scale_factor', (1.0, 1.0)), 2)
    kept = [position for position, ignored in enumerate(image.ignored) if not ignored]
    boxes = torch.tensor(np.array(image.boxes).reshape(-1, 4)[kept] * scale, dtype=torch.float32)
    height, width = sample.img_shape[:2]
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor(image.labels, dtype=torch.long)[kept],
        masks=BitmapMasks(np.zeros((len(kept), height, width), np.uint8), height, width))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return batch
