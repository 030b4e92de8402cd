"""Before training: can the teacher detect anything on this data, as it will be fed?"""
from __future__ import annotations

import copy
from typing import Dict, List, Optional

from mmengine.dataset import pseudo_collate
from mmengine.dist import get_rank, get_world_size
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from kd_det.configuration import ConfigurationError
from kd_det.randomness import preserved_randomness
from mmdet.registry import DATASETS
from kd_det.teachers import Teacher, TeacherError

LIKELY_CAUSES = """Likely causes:
  - the checkpoint was trained on other classes, or on the same in another order;
  - the teacher's config is not the one that the checkpoint was trained with (normalisation, channel order, head);
  - the validation annotations do not belong to the images;
  - the teacher is not trained yet.
Look at its boxes with `kd-det test TEACHER_CONFIG CHECKPOINT --show-dir DIR`. To train all the same, set
default_hooks.distill.preflight=None, or lower its min_map."""


def number_of_classes(model: nn.Module) -> Optional[int]:
    """The number of classes that a detector tells apart, or None where its head does not say."""
    head = getattr(model, 'roi_head', None) or getattr(model, 'bbox_head', None)
    head = getattr(head, 'bbox_head', head)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return getattr(head, 'num_classes', None)


def check_classes(teacher: Teacher, classes: int) -> None:
    """Raises:
        TeacherError: The teacher's number of classes is not that of the data.
    """
    known = number_of_classes(teacher.model)
    if known is not None and known != classes:
        raise TeacherError(f'The teacher tells {known} classes apart, but the data has {classes}. Give a teacher that was '
                           "trained on this data's classes; to learn from its features alone, set "
                           'default_hooks.distill.preflight=None.')


def evaluate_teacher(runner: Runner, teacher: Teacher, images: int) -> Optional[Dict[str, float]]:
    """Evaluates the teacher on the first validation images, fed with the student's preprocessed batches as in training.

    Args:
        runner: Holds the validation data and metric (``val_dataloader``, ``val_evaluator``) and the student.
        teacher: The teacher.
        images: At most this many images.

    Returns:
        The metrics, the same on every rank; None where the config has no validation data.

    Raises:
        TeacherError: See :func:`check_classes`.
        ConfigurationError: The validation data is empty.
    """
    loader, evaluator = runner.cfg.get('val_dataloader'), runner.cfg.get('val_evaluator')
    if not loader or not evaluator:
        return None
    preprocess = (runner.model.module if hasattr(runner.model, 'module') else runner.model).data_preprocessor
    with preserved_randomness():
        dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
        if len(dataset) == 0:
            raise ConfigurationError('The validation data is empty: check val_dataloader.dataset (ann_file, data_prefix, '
                                     'data_root).')
        check_classes(teacher, len(dataset.metainfo['classes']))
        count = min(images, len(dataset))
        evaluator = runner.build_evaluator(copy.deepcopy(evaluator))
        evaluator.dataset_meta = dataset.metainfo
        for metric in evaluator.metrics:
            if hasattr(metric, 'img_ids'):  # or CocoMetric counts every image of the file as missed
                metric.img_ids = [dataset.get_data_info(index)['img_id'] for index in range(count)]
        share = DataLoader(_rank_share(dataset, count), batch_size=loader.get('batch_size') or 1, collate_fn=pseudo_collate)
        for batch in share:
            data = preprocess(batch, False)
            evaluator.process(data_samples=teacher.predict(data['inputs'], data['data_samples']), data_batch=batch)
        return evaluator.evaluate(count)


def _rank_share(dataset: Dataset, count: int) -> Subset:
    """Every rank's images, equally many (the first ones again if need be), in the order in which mmengine collects."""
    world = get_world_size()
    indices: List[int] = [index % count for index in range(-(-count // world) * world)]
    return Subset(dataset, indices[get_rank()::world])


def mean_average_precision(metrics: Dict[str, float]) -> Optional[float]:
    """The box mAP among metrics by name (``coco/bbox_mAP``, ``pascal_voc/mAP``), or None."""
    return next((value for name, value in metrics.items() if name.endswith(('bbox_mAP', '/mAP'))), None)


def require_skill(metrics: Dict[str, float], minimum: float, images: int) -> None:
    """Raises:
        TeacherError: The teacher's mAP is below ``minimum``.
    """
    # CocoMetric reports nothing at all where nothing was detected.
    skill = mean_average_precision(metrics) if metrics else 0.0
    if skill is not None and skill < minimum:
        raise TeacherError(f'Pre-flight: on up to {images} validation images the teacher reaches {skill:.3f} mAP, under the '
                           f'minimum of {minimum:.3f}. A student would learn noise.\n{LIKELY_CAUSES}')
