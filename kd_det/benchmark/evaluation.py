"""The evaluation of boxes by a faster library, where it is installed."""
from __future__ import annotations

from importlib.util import find_spec


def use_fast_coco_evaluation() -> bool:
    """Lets MMDetection's CocoMetric evaluate with faster-coco-eval, whose numbers are those of pycocotools.

    Returns:
        Whether it is installed.
    """
    if find_spec('faster_coco_eval') is None:
        return False
    from faster_coco_eval import COCOeval_faster
    from mmdet.evaluation.metrics import coco_metric
    coco_metric.COCOeval = COCOeval_faster
    return True
