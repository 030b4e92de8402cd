"""Class distributions of student and teacher at the teacher's boxes, and their divergence."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from kd_det.functional.fidelity import bernoulli_kl, softmax_kl
from kd_det.functional.logits import restricted_logits
from kd_det.heads import ROI_HEAD, DenseOutputs, HeadError, Regions, find_head, read_dense
from kd_det.heads.roi import at_stage, run_roi_head
from kd_det.taps import Features


class ClassDistributions(NamedTuple):
    """What one detector says about K classes at n boxes.

    Attributes:
        probabilities: (n, K) of each class.
        logits: (n, K + 1) of a softmax over the classes and, as the last, the background, which is all that is none of
            them; None of a sigmoid head, which decides on each class by itself.
    """
    probabilities: Tensor
    logits: Tensor | None


def find_classifying_head(detector: nn.Module) -> str:
    """Finds the name of the head that gives the classes; ``''`` if it can not be read."""
    for name in (ROI_HEAD, 'bbox_head'):
        if isinstance(getattr(detector, name, None), nn.Module):
            try:
                find_head(detector, name)
            except HeadError:
                return ''
            return name
    return ''


def class_distributions(detector: nn.Module, features: Features, boxes: Sequence[Tensor], shapes: Sequence,
                        classes: Sequence[int] | None = None) -> ClassDistributions:
    """Reads a detector at some boxes.

    A RoI head is run on the boxes (of a cascade: the mean of its stages' logits counts). Of a dense head one prior
    stands for each box, see :func:`select_priors`.

    Args:
        detector: In eval mode; one with a :func:`find_classifying_head`.
        features: What its neck puts out.
        boxes: (n, 4) of each image, in pixels of the padded batch.
        shapes: Height and width of each image.
        classes: The detector's labels of the classes to read, whose order the result has; all by default.

    Returns:
        Of the boxes of all images, one after another.
    """
    head = find_classifying_head(detector)
    if head == ROI_HEAD:
        rois = bbox2roi(boxes)
        unknown = rois.new_zeros(len(rois), dtype=torch.long)
        regions = Regions(rois, unknown, rois[:, 1:], rois[:, 1:], unknown)
        logits = at_stage(run_roi_head(detector.roi_head, features, regions), 'mean').logits
        logits = logits if classes is None else restricted_logits(logits, classes, background=True)
        return ClassDistributions(logits.softmax(1)[:, :-1], logits)
    dense = read_dense(detector.bbox_head, detector.bbox_head(features))
    dense = dense if classes is None else dense.restrict(classes)
    chosen = [select_priors(dense, image, *each) for image, each in enumerate(zip(boxes, shapes))]

    def at_boxes(levels: Features) -> Tensor:
        return torch.cat([torch.cat([level[image] for level in levels])[index] for image, index in enumerate(chosen)])

    probabilities = at_boxes([dense.probabilities(level) for level in range(len(dense.logits))])
    return ClassDistributions(probabilities, at_boxes(dense.logits) if dense.activation == 'softmax' else None)


def class_kl(student: ClassDistributions, teacher: ClassDistributions) -> Tensor:
    """KL(teacher ‖ student) of the classes at each box, in nats.

    Of two softmax heads it is that of the distributions over classes and background. Otherwise every class is a yes-no
    distribution, and their KL are summed: of a sigmoid head by its score, of a softmax head by the probability of the
    class against all the rest.

    Args:
        student: Of K classes at n boxes.
        teacher: Of the same.

    Returns:
        (n,).
    """
    if student.logits is not None and teacher.logits is not None:
        return softmax_kl(teacher.logits, student.logits)
    return bernoulli_kl(teacher.probabilities, student.probabilities)


def select_priors(dense: DenseOutputs, image: int, boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Selects for each box the prior that stands for it: that with the largest product of score and IoU with the box.

    Args:
        dense: A head's outputs.
        image: Index of the image.
        boxes: (n, 4).
        shape: Height and width of the image, to which decoded boxes are clipped, as detections are.

    Returns:
        (n,) indices into the priors of all levels, one after another.
    """
    decoded = clip_boxes_to_image(torch.cat([level[image] for level in dense.boxes]), tuple(shape))
    scores = torch.cat([dense.scores(level)[image] for level in range(len(dense.logits))])
    return (box_iou(boxes, decoded) * scores).argmax(1) if len(boxes) else boxes.new_zeros(0, dtype=torch.long)
