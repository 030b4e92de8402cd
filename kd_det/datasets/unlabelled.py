"""Marks the images of a data set as unlabelled."""
from __future__ import annotations

import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.structures import InstanceData

from kd_det.configuration import ConfigurationError

UNLABELLED = 'unlabelled'  # in the metainfo of a data sample


@TRANSFORMS.register_module()
class Unlabelled(BaseTransform):
    """Says of an image that nobody knows what it shows: the last step of a pipeline, after ``PackDetInputs``.

    The distiller learns from such an image what the terms teach without boxes, and from the boxes that the teacher
    finds, with ``pseudo_labels``; the student's own loss does not take it for background. Boxes that the image has are
    dropped. A data set without annotations needs ``filter_cfg=dict(filter_empty_gt=False)``, or its images are passed
    over.

    Raises:
        ConfigurationError: It stands before ``PackDetInputs``.

    Example:
        >>> dict(type='CocoDataset', ann_file='unlabelled.json', filter_cfg=dict(filter_empty_gt=False),
        ...      pipeline=[*train_pipeline, dict(type='Unlabelled')])
    """

    def transform(self, results: dict) -> dict:
        if 'data_samples' not in results:
            raise ConfigurationError("The transform 'Unlabelled' marks what PackDetInputs has packed: make it the "
                                     'last step of the pipeline.')
        sample = results['data_samples']
        truth = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        if 'masks' in sample.gt_instances:
            truth.masks = sample.gt_instances.masks[:0]
        sample.set_metainfo({UNLABELLED: True})
        sample.gt_instances, sample.ignored_instances = truth, truth.clone()
        return results
