"""Average precision of each class, and precision over recall, by pycocotools."""
from __future__ import annotations

import io
from contextlib import redirect_stdout
from typing import Dict, List, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.report.validation import Detection, LabelledImage

CURVES = {'50': 0, '75': 5}  # IoU in percent -> index among COCO's thresholds
ALL_AREAS, MOST_DETECTIONS = 0, -1


def ground_truth(images: Sequence[LabelledImage], classes: Sequence[str]) -> COCO:
    """The ground truth as pycocotools takes it; image and class are named by index, the latter from 1 on."""
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


def evaluate(truth: COCO, detections: Sequence[Sequence[Detection]]) -> Dict[str, object]:
    """Evaluates the boxes that a detector found on all images.

    Args:
        truth: See :func:`ground_truth`.
        detections: For each image, in the order of the ground truth.

    Returns:
        ``per_class``: AP of each class, 0 to 1, None where there is no object of it; ``precision``: by IoU in percent
        the precision at recalls 0, 0.01 … 1, mean over the classes that have objects.
    """
    found = [dict(image_id=index, category_id=int(label) + 1, bbox=[x1, y1, x2 - x1, y2 - y1], score=score)
             for index, each in enumerate(detections) for x1, y1, x2, y2, label, score in each]
    with redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(found) if found else _nothing(truth), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval['precision'][..., ALL_AREAS, MOST_DETECTIONS]  # (IoU, recall, class); -1: no objects
    per_class: List[Optional[float]] = [float(each.mean()) if each.min() > -1 else None
                                        for each in np.moveaxis(precision, 2, 0)]
    present = precision[:, :, [value is not None for value in per_class]]
    curves = {name: present[index].mean(-1).tolist() if present.size else [] for name, index in CURVES.items()}
    return dict(per_class=per_class, precision=curves)


def _nothing(truth: COCO) -> COCO:
    """The results of a detector that finds nothing, which ``loadRes`` does not take."""
    empty = COCO()
    empty.dataset = dict(truth.dataset, annotations=[])
    empty.createIndex()
    return empty
