"""Measures the fidelity of a trained student, on validation or training images."""
from __future__ import annotations

import copy
from typing import Dict

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from torch.utils.data import DataLoader

from kd_det.classes import label_names, metainfo_of
from kd_det.configuration import leaf_datasets, student_model
from kd_det.evaluation.fidelity import FidelityMetric
from kd_det.scopes import build_detector, scope_of, within_scope
from kd_det.teachers import load_strictly

SPLITS = ('val', 'train')


def measure_fidelity(config: Config, checkpoint: str, teacher: dict, split: str = 'val', **options) -> Dict[str, float]:
    """Compares a trained student with its teacher.

    Args:
        config: The student's, or that of its distillation.
        checkpoint: The trained student.
        teacher: ``config`` and ``checkpoint``.
        split: ``'val'``, or ``'train'``: the training images, prepared as for validation, without augmentation. Of data
            sets that are joined the first counts.
        options: Of :class:`~kd_det.evaluation.FidelityMetric`.

    Returns:
        The metric's numbers.
    """
    with within_scope(scope_of(config)):
        detector = build_detector(student_model(config))
        dataset = DATASETS.build(_prepared_as_for_validation(config, split))
    load_strictly(detector, checkpoint, role='student')
    detector.to(get_device()).eval()
    metric = FidelityMetric(teacher, **options)
    metric.attach(detector)
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = dict(metainfo_of(dataset), classes=label_names(dataset))
    batch_size = config.val_dataloader.get('batch_size') or 1
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=pseudo_collate):
        evaluator.process(data_samples=detector.val_step(batch), data_batch=batch)
    return {name.split('/')[-1]: value for name, value in evaluator.evaluate(len(dataset)).items()}


def _prepared_as_for_validation(config: Config, split: str) -> dict:
    """A data set of the config, with the pipeline of its validation; training images that are filtered out stay so."""
    validation = leaf_datasets(config.val_dataloader.dataset)[0]
    dataset = validation if split == 'val' else leaf_datasets(config.train_dataloader.dataset)[0]
    return copy.deepcopy(dict(dataset, pipeline=validation['pipeline']))
