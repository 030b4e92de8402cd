"""How right a guide is on each image: by a detector's own loss, or by where its boxes lie; without gradient."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from mmdet.structures import DetDataSample
from mmdet.utils import dist_utils
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torchvision.ops import box_iou

from kd_det.compat.process import preserved_randomness
from kd_det.config.detectors import TeacherError
from kd_det.teachers.bridge import explain_size_mismatch
from kd_det.teachers.joining import replaced
from kd_det.teachers.teacher import Teacher

OVERLAP = 0.5  # IoU from which a box lies on an object
LEAST = 0.05  # probability that is given to what a guide did not find
NOT_TRAINED = _BatchNorm, _InstanceNorm, _DropoutNd, nn.MultiheadAttention  # these too: all that would draw or learn
SUREST = 5  # boxes of an image whose mean score says how sure a guide is


class BoxJudgement(NamedTuple):
    """How a guide's boxes lie on the ground truth, image by image.

    Attributes:
        losses: (N,), see :func:`judge_boxes`.
        scores: (N,): the mean of the five highest scores of each image, 0 for boxes that it has not.
    """
    losses: Tensor
    scores: Tensor


@contextmanager
def alone() -> Iterator[None]:
    """Within, losses of MMDetection are those of this rank's images alone: none of their normalisers is averaged."""
    with mock.patch.object(dist_utils, 'dist', SimpleNamespace(is_available=lambda: False)):
        yield


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Within, a detector computes what it does in training, but its normalisation layers learn no statistics.

    Some heads put out in training alone what their losses read.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = not isinstance(module, NOT_TRAINED) and type(module).__name__ != 'DropPath'
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def sum_losses(losses: dict) -> Tensor:
    """The sum of a detector's losses, a scalar in float32; what is only for the log is left out."""
    found = [each for name, value in losses.items() if 'loss' in name
             for each in (value if isinstance(value, (list, tuple)) else [value])]
    return torch.stack([each.float().mean() for each in found]).sum()


def make_own_sample(sample: DetDataSample, labels: Tensor | None, images: Tensor, scale: float = 1.0) -> DetDataSample:
    """The ground truth of an image as another detector is trained on it.

    Args:
        sample: mmdet's data sample; it stays as it is.
        labels: (n,), its boxes' classes as that detector counts them, -1 for one that it does not know; those of the
            sample by default.
        images: (N, C, H, W), as the detector is given them.
        scale: Of these images to those that the sample is of.
    """
    truth = sample.gt_instances
    if labels is not None:
        truth = truth[labels >= 0]
        truth.labels = labels[labels >= 0]
    own = DetDataSample(metainfo=dict(sample.metainfo, batch_input_shape=tuple(images.shape[-2:])), gt_instances=truth)
    if 'ignored_instances' in sample:
        own.ignored_instances = sample.ignored_instances
    if scale != 1:
        own.set_metainfo({name: tuple(round(side * scale) for side in sample.metainfo[name][:2])
                          for name in ('img_shape', 'pad_shape') if name in sample.metainfo})
        own.gt_instances = _enlarge(own.gt_instances, scale)
        if 'ignored_instances' in own:
            own.ignored_instances = _enlarge(own.ignored_instances, scale)
    return own


def _enlarge(instances: InstanceData, scale: float) -> InstanceData:
    """The same objects in an image so many times as large."""
    larger = InstanceData(**dict(instances.items()))
    larger.bboxes = getattr(instances.bboxes, 'tensor', instances.bboxes) * scale
    if 'masks' in instances:
        larger.masks = instances.masks.resize(tuple(round(side * scale) for side in (instances.masks.height,
                                                                                     instances.masks.width)))
    return larger


@torch.no_grad()
def measure_losses(teacher: Teacher, images: Tensor, samples: Sequence[DetDataSample],
                   labels: Sequence[Tensor] | None = None) -> Tensor:
    """The loss of a frozen detector on each image, as it was trained, but with its moving statistics.

    Backbone and neck run once on the batch, the heads once for each image, for their losses are divided by numbers of
    the whole batch. What their samplers draw moves no generator.

    Args:
        teacher: The detector.
        images: (N, C, H, W), preprocessed for the student.
        samples: mmdet's data samples with the ground truth; they stay as they are.
        labels: (n,) of each image: its boxes' classes as the teacher counts them, -1 for one that it does not know;
            those of the samples by default.

    Returns:
        (N,).
    """
    model, found = teacher.model, []
    own_images = teacher.bridge(images, [tuple(sample.img_shape[:2]) for sample in samples])
    teacher.start_engine()
    with preserved_randomness(), alone(), in_training(model), explain_size_mismatch(own_images.shape[-2:]):
        levels = model.extract_feat(own_images)
        for row, sample in enumerate(samples):
            own = make_own_sample(sample, None if labels is None else labels[row], own_images, teacher.scale)
            selected = tuple(level[row:row + 1] for level in levels)
            try:
                with replaced(model, 'extract_feat', lambda *args, selected=selected, **kwargs: selected):
                    found.append(sum_losses(model.loss(own_images[row:row + 1], [own])))
            except (TypeError, AttributeError, KeyError) as error:
                raise TeacherError(f'A {type(model).__name__} can not compute its own loss on the ground truth of this '
                                   f'data ({error}), as one that learns masks where there are none. Judge it by its '
                                   "boxes: policy=dict(type='Confidence', by='boxes').") from error
    return torch.stack(found)


@torch.no_grad()
def judge_boxes(found: Sequence[InstanceData], boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> BoxJudgement:
    """The cross-entropy of a guide's boxes: how surely it finds what is there, and nothing else.

    For each object −log p, p the highest score of a box of its class that overlaps it by an IoU of 0.5 or more, and at
    least 0.05; for each box that overlaps no object of its class so far −log(1 − score); their sum over the number of
    objects, at least 1. All guides are measured alike, whatever they were trained by.

    Args:
        found: ``bboxes``, ``scores`` and ``labels`` of each image, in the student's labels.
        boxes: (n, 4) of each image: the ground truth.
        labels: (n,) of each image.
    """
    losses, scores = [], []
    for each, truth, classes in zip(found, boxes, labels):
        own = getattr(each.bboxes, 'tensor', each.bboxes).float()
        score = each.scores.float()
        hits = (box_iou(own, truth.float()) >= OVERLAP) & (each.labels[:, None] == classes)  # (boxes, objects)
        padded = torch.cat([hits, hits.new_zeros(1, len(truth))])  # amax wants one row
        best = (padded * torch.cat([score, score.new_zeros(1)])[:, None]).amax(0)
        missed = -best.clamp(min=LEAST, max=1).log()
        false = -(1 - score.clamp(max=1 - LEAST)).log() * ~hits.any(1)
        losses.append((missed.sum() + false.sum()) / max(len(truth), 1))
        scores.append(score.topk(min(SUREST, len(score))).values.sum() / SUREST)
    return BoxJudgement(torch.stack(losses), torch.stack(scores))
