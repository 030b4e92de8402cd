"""Before training: can the teacher detect anything on this data, as it will be fed?"""
from __future__ import annotations

import copy
from typing import Dict, List, NamedTuple, Optional, Sequence

from mmengine.dataset import pseudo_collate
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset, Subset

from kd_det.classes import ClassMatch, match_classes, number_of_classes
from kd_det.configuration import ConfigurationError
from kd_det.randomness import preserved_randomness
from mmdet.registry import DATASETS
from kd_det.teachers import Teacher, TeacherError

LIKELY_CAUSES = """Likely causes:
  - the checkpoint was trained on other classes, or on the same in another order, and does not name them
    (teacher.classes=[…] names them, by label);
  - the teacher's config is not the one that the checkpoint was trained with (normalisation, channel order, head);
  - the validation annotations do not belong to the images, or have no boxes (`kd-det doctor CONFIG` tells);
  - the teacher is not trained yet.
Look at its boxes with `kd-det test TEACHER_CONFIG CHECKPOINT --show-dir DIR`. To train all the same, set
default_hooks.distill.preflight=None, or lower its min_map."""


def classes_on(teacher: Teacher, classes: Sequence[str]) -> Optional[ClassMatch]:
    """Matches the teacher's classes with those of the data; None where its names are not known, but their number fits.

    Raises:
        TeacherError: The teacher's names are not known, and their number is not that of the data.
        ConfigurationError: No class is shared.
    """
    known = number_of_classes(teacher.model)
    if teacher.classes is None and known not in (None, len(classes)):
        raise TeacherError(f'The teacher tells {known} classes apart, but the data has {len(classes)}, and neither the '
                           "checkpoint nor the config names the teacher's. Name them, by label, with "
                           'teacher.classes=[…]; or give a teacher of these classes; to learn from its features alone, '
                           'set default_hooks.distill.preflight=None.')
    return None if teacher.classes is None else match_classes(classes, teacher.classes)


class Skill(NamedTuple):
    """What a teacher reaches on validation images.

    Attributes:
        metrics: By name, over all classes of the data.
        shared: The share of these classes that the teacher knows.
    """
    metrics: Dict[str, float]
    shared: float


def evaluate_teacher(runner: Runner, teacher: Teacher, images: int) -> Optional[Skill]:
    """Evaluates the teacher on the first validation images, fed with the student's preprocessed batches as in training.

    Its detections count with the labels that their names have in the data; those of other classes are left out.

    Args:
        runner: Holds the validation data and metric (``val_dataloader``, ``val_evaluator``) and the student.
        teacher: The teacher.
        images: At most this many images.

    Returns:
        The teacher's skill, the same on every rank; None where the config has no validation data.

    Raises:
        TeacherError: See :func:`classes_on`.
        ConfigurationError: The validation data is empty.
    """
    loader, evaluator = runner.cfg.get('val_dataloader'), runner.cfg.get('val_evaluator')
    if not loader or not evaluator:
        return None
    preprocess = (runner.model.module if hasattr(runner.model, 'module') else runner.model).data_preprocessor
    with preserved_randomness():
        dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
        if len(dataset) == 0:
            raise ConfigurationError('The validation data is empty: check val_dataloader.dataset (ann_file, '
                                     'data_prefix, data_root).')
        match = classes_on(teacher, dataset.metainfo['classes'])
        count = min(images, len(dataset))
        evaluator = runner.build_evaluator(copy.deepcopy(evaluator))
        evaluator.dataset_meta = dataset.metainfo
        for metric in evaluator.metrics:
            if hasattr(metric, 'img_ids'):  # or CocoMetric counts every image of the file as missed
                metric.img_ids = [dataset.get_data_info(index)['img_id'] for index in range(count)]
        share = DataLoader(_rank_share(dataset, count), batch_size=loader.get('batch_size') or 1,
                           collate_fn=pseudo_collate)
        for batch in share:
            data = preprocess(batch, False)
            samples = teacher.predict(data['inputs'], data['data_samples'])
            for sample in samples if match else ():
                sample.pred_instances = match.translated(sample.pred_instances)
            evaluator.process(data_samples=samples, data_batch=batch)
        return Skill(evaluator.evaluate(count), len(match.of_student) / len(match.student) if match else 1.0)


def _rank_share(dataset: Dataset, count: int) -> Subset:
    """Every rank's images, equally many (the first ones again if need be), in the order in which mmengine collects."""
    world = get_world_size()
    indices: List[int] = [index % count for index in range(-(-count // world) * world)]
    return Subset(dataset, indices[get_rank()::world])


def mean_average_precision(metrics: Dict[str, float]) -> Optional[float]:
    """The box mAP among metrics by name (``coco/bbox_mAP``, ``pascal_voc/mAP``), or None."""
    return next((value for name, value in metrics.items() if name.endswith(('bbox_mAP', '/mAP'))), None)


def require_skill(skill: Skill, minimum: float, images: int) -> None:
    """Raises:
        TeacherError: The teacher's mAP is below ``minimum``, of which classes that it does not know are not demanded.
    """
    minimum = minimum * skill.shared
    # CocoMetric reports nothing at all where nothing was detected.
    reached = mean_average_precision(skill.metrics) if skill.metrics else 0.0
    if reached is not None and reached < minimum:
        raise TeacherError(f'Pre-flight: on up to {images} validation images the teacher reaches {reached:.3f} mAP, '
                           f'under the minimum of {minimum:.3f}. A student would learn noise.\n{LIKELY_CAUSES}')
