"""What a step is told of the objects in its images, and the student's own loss where it is told nothing of some."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from kd_det.config.files import ConfigurationError
from kd_det.context import Progress
from kd_det.datasets import UNLABELLED
from kd_det.distillers.building import reason
from kd_det.distillers.weights import Losses, Weight, WeightConfig, build_weight, scaled
from kd_det.taps import Features


class Supervision(NamedTuple):
    """The ground truth of one batch, from people or from a teacher.

    Attributes:
        samples: mmdet's data samples with ``gt_instances``, one for each image.
        labelled: Whether it is known what an image shows, so that what is no object is background.
        log: What is only for the log, by name.
    """
    samples: list[DetDataSample]
    labelled: tuple[bool, ...]
    log: dict[str, Tensor] = {}

    @property
    def boxes(self) -> list[Tensor]:
        """(n, 4) of each image."""
        return [boxes_of(sample) for sample in self.samples]

    @property
    def labels(self) -> list[Tensor]:
        """(n,) of each image."""
        return [sample.gt_instances.labels for sample in self.samples]


def given(samples: Sequence[DetDataSample]) -> Supervision:
    """What the data itself says, see :class:`~kd_det.datasets.Unlabelled`."""
    return Supervision(list(samples), tuple(not sample.metainfo.get(UNLABELLED, False) for sample in samples))


def boxes_of(sample: DetDataSample) -> Tensor:
    """(n, 4) of an image's ground truth, whether it is a tensor or one of mmdet's box types."""
    boxes = sample.gt_instances.bboxes
    return getattr(boxes, 'tensor', boxes).detach()


def labelled_losses(student: nn.Module, inputs: Tensor, features: Features, supervision: Supervision,
                    of_all: Losses) -> Losses:
    """The student's own losses on the labelled images of a batch.

    They are those of plain training on these images alone. Backbone and neck have seen the whole batch and are not run
    again.

    Args:
        student: The student.
        inputs: (N, 3, H, W), the whole batch.
        features: What its ``extract_feat`` made of it.
        supervision: What is known of the batch.
        of_all: The losses as if unlabelled images were background: without any labelled image 0 times these, so that
            every weight has a gradient, for which data-parallel training waits.
    """
    rows = [row for row, labelled in enumerate(supervision.labelled) if labelled]
    if not rows:
        return scaled(of_all, 0.0)
    with _given_features(student, tuple(level[rows] for level in features)):
        return dict(student.loss(inputs[rows], [supervision.samples[row] for row in rows]))


@contextmanager
def _given_features(model: nn.Module, features: Features) -> Iterator[None]:
    """Lets a detector take these features for those of any images while the block runs."""
    model.extract_feat = lambda *args, **kwargs: features  # on the instance, before the class's
    try:
        yield
    finally:
        del model.extract_feat


MODES = ('join', 'replace')
IMAGES = ('all', 'unlabelled')
BY_SCORE = 'score'
SMALLEST = 1.0  # pixels a side; of a box without area losses are infinite, and heads clip some to nothing


class PseudoLabels:
    """The boxes that a teacher is sure of join the ground truth, or take its place.

    The teacher detects on the student's batch, in its coordinates. The student's own loss and all terms see the same
    boxes. An unlabelled image where the teacher is sure of nothing stays unlabelled.

    **Weights of boxes.** Heads of MMDetection know no weight of a ground-truth box: a box is assigned to priors, or it
    is not. So in each step a box of weight w is drawn with probability w. What the student minimises is then the
    expected loss, object with probability w and background with 1 − w: it serves every head, and without bias. A box is
    drawn anew in each step; a weight of 1 draws nothing.

    Students with masks can not be taught so, for a box has no mask.

    Args:
        score: Smallest score of a box.
        iou: In mode ``'join'`` a box is dropped that overlaps a ground-truth box of any class by more: there the ground
            truth is right.
        nms_iou: The weaker of two boxes of a class is dropped that overlap by more, within each image, after the
            teacher's own suppression (its ``test_cfg``).
        mode: ``'join'``, or ``'replace'``, which keeps no ground truth.
        images: ``'all'``, or those that are ``'unlabelled'`` alone, see :class:`~kd_det.datasets.Unlabelled`.
        weight: Of each box, in [0, 1]: ``'score'``, a number, or a schedule; while it is 0 the teacher does not detect.
        teacher: Index of the teacher.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> dict(score=0.5, iou=0.5, mode='join', weight=dict(type='Warmup', value=1.0, epochs=1))
    """

    def __init__(self, score: float = 0.5, iou: float = 0.5, nms_iou: float = 0.5, mode: str = 'join',
                 images: str = 'all', weight: str | WeightConfig = 1.0, teacher: int = 0) -> None:
        if mode not in MODES or images not in IMAGES:
            raise ValueError(f"mode='{mode}', images='{images}': expected one of {', '.join(MODES)}, and one of "
                             f"{', '.join(IMAGES)}.")
        if not all(0 <= each <= 1 for each in (score, iou, nms_iou)):
            raise ValueError(f'score={score}, iou={iou}, nms_iou={nms_iou}: expected numbers from 0 to 1.')
        self.by_score = weight == BY_SCORE
        self.weight: Weight = build_weight(1.0 if self.by_score else weight)
        if self.weight.balance is not None or not 0 <= self.weight.full <= 1:
            raise ValueError(f"weight={weight!r}: expected 'score', or a number from 0 to 1 or a schedule of one, for "
                             'it is the probability with which a box counts in a step.')
        self.score, self.iou, self.nms_iou, self.teacher_index = score, iou, nms_iou, teacher
        self.replaces, self.only_unlabelled = mode == 'replace', images == 'unlabelled'

    def wants(self, supervision: Supervision, progress: Progress) -> bool:
        """Whether the teacher has to detect in this step."""
        return self.weight(progress) > 0 and not (self.only_unlabelled and all(supervision.labelled))

    def __call__(self, supervision: Supervision, detections: list[InstanceData], progress: Progress) -> Supervision:
        """Joins a teacher's detections with what is known; nothing that it is given changes.

        Args:
            supervision: What the data says.
            detections: Of the teacher, one for each image, with the student's labels.
            progress: Where the training stands.
        """
        samples, labelled, counts = [], [], []
        for sample, is_labelled, found in zip(supervision.samples, supervision.labelled, detections):
            if self.only_unlabelled and is_labelled:
                found = found[:0]
            elif self.replaces:
                sample, is_labelled = _with_truth(sample, sample.gt_instances[:0]), False
            found = self.confident(found, boxes_of(sample))
            drawn = found[self._drawn(found.scores, progress)]
            labelled.append(is_labelled or len(found) > 0)
            counts.append(len(drawn))
            samples.append(_joined(sample, drawn) if len(drawn) else sample)
        count = torch.tensor(float(sum(counts)) / len(counts))
        return Supervision(samples, tuple(labelled), {**supervision.log, 'distill/pseudo_boxes': count})

    def confident(self, found: InstanceData, truth: Tensor) -> InstanceData:
        """Those detections of an image that may become ground truth beside its boxes, (n, 4)."""
        sides = found.bboxes[:, 2:] - found.bboxes[:, :2]
        found = found[(found.scores >= self.score) & (sides >= SMALLEST).all(1)]
        boxes = found.bboxes.float()
        found = found[batched_nms(boxes, found.scores.float(), found.labels, self.nms_iou)]
        if len(truth) and len(found):
            found = found[box_iou(found.bboxes.float(), truth.float()).amax(1) <= self.iou]
        return found

    def _drawn(self, scores: Tensor, progress: Progress) -> Tensor:
        weight = self.weight(progress)
        if weight == 1 and not self.by_score:
            return torch.ones_like(scores, dtype=torch.bool)
        return torch.rand_like(scores) < (scores if self.by_score else weight)


def build_pseudo_labels(config: dict | None, student: nn.Module, teachers: Sequence[dict]) -> PseudoLabels | None:
    """Builds what the distiller's ``pseudo_labels`` says; None for none.

    Raises:
        ConfigurationError: An argument is wrong, there is no such teacher or it can not be asked on one rank alone, or
            the student learns masks.
    """
    if config is None:
        return None
    try:
        pseudo_labels = PseudoLabels(**config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f'model.pseudo_labels: {reason(error, PseudoLabels)}') from error
    if not 0 <= pseudo_labels.teacher_index < len(teachers):
        raise ConfigurationError(f'model.pseudo_labels: teacher={pseudo_labels.teacher_index}, but there are {len(teachers)} '
                                 'teachers, counted from 0.')
    if pseudo_labels.only_unlabelled and teachers[pseudo_labels.teacher_index].get('shard'):
        raise ConfigurationError("model.pseudo_labels: images='unlabelled' asks the teacher on those ranks alone whose "
                                 "batch has such images, which one with shard=True can not serve. Take images='all', "
                                 'or leave the teacher whole.')
    if getattr(student, 'with_mask', False):
        raise ConfigurationError(f"model.pseudo_labels: the student, a {type(student).__name__}, learns the masks of "
                                 'its boxes, and pseudo-labels have none. Take a student without masks, or leave them '
                                 'out: terms learn from unlabelled images without them.')
    return pseudo_labels


def _joined(sample: DetDataSample, found: InstanceData) -> DetDataSample:
    boxes, labels = boxes_of(sample), sample.gt_instances.labels
    return _with_truth(sample, InstanceData(bboxes=torch.cat([boxes, found.bboxes.to(boxes)]),
                                            labels=torch.cat([labels, found.labels.to(labels)])))


def _with_truth(sample: DetDataSample, truth: InstanceData) -> DetDataSample:
    """A data sample of the same image with other ground truth."""
    other = sample.new()
    other.gt_instances = truth
    return other
