"""What the trained detectors show on the validation images: their accuracy, their boxes, and where they look."""
from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence

from mmengine.config import Config
from pycocotools.coco import COCO

from kd_det.classes import ClassMatch, match_classes, number_of_classes
from kd_det.compat import load_checkpoint
from kd_det.configuration import ConfigurationError, is_distillation
from kd_det.diagnosis.reading import read_image
from kd_det.report.accuracy import evaluate, ground_truth
from kd_det.report.caching import cached, stamp
from kd_det.report.looks import attention_maps, mask_maps, mask_title
from kd_det.report.pictures import image_uri
from kd_det.report.studies import Study, TrainedRun
from kd_det.report.validation import Detection, Validation, build_detector, detect
from kd_det.teachers import TeacherError, read_model_config
from kd_det.teachers.class_names import teacher_classes

SHOWN_FROM = 0.05  # score of a box
TEACHER = 'teacher'


@dataclass
class Seen:
    """What was seen.

    Attributes:
        accuracies: Variant -> seed -> accuracy, see :func:`~kd_det.report.accuracy.evaluate`.
        images: The shown images with ground truth and, by variant, the boxes of its first seed.
        maps: Variant -> title -> levels, for each shown image; of its first seed.
        notes: What is missing.
    """
    accuracies: Dict[str, Dict[int, dict]] = field(default_factory=dict)
    images: List[dict] = field(default_factory=list)
    maps: Dict[str, List[dict]] = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)


def look(study: Study, validation: Validation, shown: Sequence[int], teacher: Optional[dict],
         say: Callable[[str], None]) -> Seen:
    """Runs the checkpoints of a study, and its teacher, on the validation images.

    Args:
        study: The study.
        validation: Its validation data.
        shown: Indices of the images to show.
        teacher: ``config`` and ``checkpoint``, if there is one.
        say: Told what is being done.
    """
    truth, seen = ground_truth(validation.images, validation.classes), Seen()
    for index in shown:
        image = validation.images[index]
        boxes = [[*box, label] for box, label, ignored in zip(image.boxes, image.labels, image.ignored) if not ignored]
        seen.images.append(dict(name=Path(image.file).name, width=image.width, height=image.height,
                                source=image_uri(read_image(validation.dataset, index)), truth=boxes, boxes={}))
    has_teacher = teacher is not None and Path(str(teacher['checkpoint'])).is_file()
    if has_teacher:
        say(f'{study.name}: {TEACHER}')
        _add(seen, TEACHER, [_teacher_run(study, teacher)], validation, truth, shown, teacher)
    elif teacher is not None:
        seen.notes.append(f"Teacher and masks are not shown, for there is no checkpoint '{teacher['checkpoint']}' "
                          '(--teacher-checkpoint tells where it is).')
    for variant, runs in study.variants.items():
        trained = [run for run in runs if run.checkpoint is not None]
        if len(trained) < len(runs):
            seen.notes.append(f'{variant}: {len(runs) - len(trained)} of {len(runs)} checkpoints are missing.')
        if trained:
            say(f'{study.name}: {variant}, {len(trained)} run{"s" * (len(trained) > 1)}')
            _add(seen, variant, trained, validation, truth, shown)
            if has_teacher and is_distillation(trained[0].config):
                _add_masks(seen, trained[0], teacher, validation, shown)
    return seen


def _teacher_run(study: Study, teacher: dict) -> TrainedRun:
    """The teacher, as if it were a run; what is found out of it is kept in the folder of the study."""
    folder = study.runs[0].folder if study.results is None else study.runs[0].folder.parents[1]
    config = Config(dict(model=read_model_config(teacher['config'])))
    return TrainedRun(TEACHER, 0, folder / TEACHER, config, Path(teacher['checkpoint']), [])


def _add(seen: Seen, variant: str, runs: List[TrainedRun], validation: Validation, truth: COCO,
         shown: Sequence[int], teacher: Optional[dict] = None) -> None:
    """Adds the accuracies of a variant, and boxes and attention of its first run; the classes of a teacher by name."""
    first = build_detector(runs[0].config, str(runs[0].checkpoint), teacher)
    count, match = number_of_classes(first), None
    try:
        match = _shared_classes(teacher, count, validation.classes) if teacher else None
    except (ConfigurationError, TeacherError) as error:
        seen.notes.append(f'The {variant} is not shown: {error}')
        return
    if match is None and count not in (None, len(validation.classes)):
        seen.notes.append(f'{variant} knows other classes than the validation data: its boxes can not be compared.')
        return
    if match is not None:
        seen.notes.append(f"Classes: {match.report('what is shown of it')}")
    if match is None or len(match.of_student) == len(validation.classes):  # AP of classes that it lacks would be 0
        seen.accuracies[variant] = {}
    for run in runs:
        data = [stamp(run.checkpoint), [image._asdict() for image in validation.images]]
        detections = cached(run.folder, 'detections', data, lambda: detect(
            first if run is runs[0] else build_detector(run.config, str(run.checkpoint)), validation.dataset))
        if match is not None:
            detections, data = [_translated(each, match) for each in detections], [*data, match.of_teacher]
        if variant in seen.accuracies:
            seen.accuracies[variant][run.seed] = cached(run.folder, 'accuracy', data,
                                                        lambda: evaluate(truth, detections))
        if run is runs[0]:
            for image, index in zip(seen.images, shown):
                image['boxes'][variant] = [[*(round(side, 1) for side in box[:4]), box[4], round(box[5], 3)]
                                           for box in detections[index] if box[5] >= SHOWN_FROM]
            attention = cached(run.folder, 'attention', _cause(run, validation, shown),
                               lambda: attention_maps(first, validation, shown))
            seen.maps[variant] = [dict(attention=levels) for levels in attention]


def _add_masks(seen: Seen, run: TrainedRun, teacher: dict, validation: Validation, shown: Sequence[int]) -> None:
    """Adds the masks of a run's terms to its maps."""
    config = copy.deepcopy(run.config)
    if isinstance(config.model.teacher, dict):
        config.model.teacher.update(teacher)
    cause = [stamp(Path(teacher['checkpoint'])), *_cause(run, validation, shown)]
    try:
        masks = cached(run.folder, 'masks', cause, lambda: mask_maps(config, str(run.checkpoint), validation, shown))
    except Exception as error:  # of any of the many methods; a page without its masks is better than none
        seen.notes.append(f'{run.variant}: its masks are missing: {type(error).__name__}: {error}')
        return
    for maps, of_image in zip(seen.maps.get(run.variant, ()), masks):
        maps.update({mask_title(name): levels for name, levels in of_image.items()})


def _shared_classes(teacher: dict, count: Optional[int], classes: Sequence[str]) -> Optional[ClassMatch]:
    """How a teacher's classes fit those of the data, by their names; None if its names are not known, or are those.

    Args:
        teacher: ``config`` and ``checkpoint``, perhaps ``classes``.
        count: How many classes it tells apart.
        classes: Names of the data's classes, by label.

    Raises:
        ConfigurationError: They share none.
        TeacherError: The teacher names more or fewer classes than it has.
    """
    meta = load_checkpoint(teacher['checkpoint']).get('meta') or {}
    names = teacher_classes(count, teacher.get('classes', ()), meta, teacher['config'])
    match = match_classes(classes, names) if names else None
    return None if match is None or match.is_identity else match


def _translated(detections: Sequence[Detection], match: ClassMatch) -> List[Detection]:
    """A teacher's detections with the labels of the data, without those of classes that the data lacks."""
    labels = dict(zip(match.of_teacher, match.of_student))
    return [[*box, labels[label], score] for *box, label, score in detections if label in labels]


def _cause(run: TrainedRun, validation: Validation, shown: Sequence[int]) -> list:
    """What the maps of a run follow from."""
    return [stamp(run.checkpoint), [validation.images[index]._asdict() for index in shown]]
