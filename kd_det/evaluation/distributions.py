"""What student and teacher say about the classes at the teacher's boxes."""
from __future__ import annotations

from typing import List, Sequence

import torch
from mmdet.structures.bbox import bbox2roi
from torch import Tensor, nn
from torchvision.ops import box_iou, clip_boxes_to_image

from kd_det.functional.fidelity import bernoulli_kl, softmax_kl
from kd_det.heads import DenseOutputs, HeadError, Regions, find_head, read_dense
from kd_det.heads.roi import at_stage, run_roi_head
from kd_det.taps import Levels


def comparable_head(student: nn.Module, teacher: nn.Module) -> str:
    """The name of the classifying head that both have and that can be read; ``''`` if there is none."""
    for name in ('roi_head', 'bbox_head'):
        if all(isinstance(getattr(model, name, None), nn.Module) for model in (student, teacher)):
            try:
                heads = [find_head(model, name) for model in (student, teacher)]
            except HeadError:
                return ''
            if name == 'roi_head' or _activation_agrees(*heads):
                return name
    return ''


def _activation_agrees(student: nn.Module, teacher: nn.Module) -> bool:
    return getattr(student, 'use_sigmoid_cls', True) == getattr(teacher, 'use_sigmoid_cls', True)


def class_kl(head: str, student: nn.Module, teacher: nn.Module, student_features: Levels, teacher_features: Levels,
             boxes: Sequence[Tensor], shapes: Sequence) -> List[Tensor]:
    """KL(teacher ‖ student) of the class distributions at the teacher's boxes, in nats.

    RoI heads: both run on the teacher's boxes; a distribution over the classes and the background (of a cascade: from
    the mean of its stages' logits). Dense heads: each detector speaks by the one of its own priors for which IoU of its
    decoded box and the teacher's box, times score, is largest; heads with sigmoid give one yes-no distribution for every class,
    summed.

    Args:
        head: See :func:`comparable_head`.
        student: In eval mode.
        teacher: In eval mode.
        student_features: What the student's neck puts out.
        teacher_features: What the teacher's puts out.
        boxes: (n, 4) of each image, in pixels of the padded batch.
        shapes: Height and width of each image.

    Returns:
        (n,) of each image.
    """
    pairs = ((student, student_features), (teacher, teacher_features))
    counts = [len(each) for each in boxes]
    if head == 'roi_head':
        rois = bbox2roi(boxes)
        unknown = rois.new_zeros(len(rois), dtype=torch.long)
        regions = Regions(rois, unknown, rois[:, 1:], rois[:, 1:], unknown)
        logits = [at_stage(run_roi_head(model.roi_head, features, regions), 'mean').logits for model, features in pairs]
        return list(softmax_kl(logits[1], logits[0]).split(counts))
    outputs = [read_dense(model.bbox_head, model.bbox_head(features)) for model, features in pairs]
    divergences = []
    for image, (each, shape) in enumerate(zip(boxes, shapes)):
        chosen = [speaking_priors(dense, image, each, shape) for dense in outputs]
        if outputs[0].activation == 'softmax':
            of_student, of_teacher = (torch.cat([level[image] for level in dense.logits])[index]
                                      for dense, index in zip(outputs, chosen))
            divergences.append(softmax_kl(of_teacher, of_student))
        else:
            of_student, of_teacher = (_probabilities(dense, image)[index] for dense, index in zip(outputs, chosen))
            divergences.append(bernoulli_kl(of_teacher, of_student))
    return divergences


def speaking_priors(dense: DenseOutputs, image: int, boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """For each box the prior that speaks for it: the one with the largest product of score and IoU with the box.

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


def _probabilities(dense: DenseOutputs, image: int) -> Tensor:
    return torch.cat([dense.probabilities(level)[image] for level in range(len(dense.logits))])
