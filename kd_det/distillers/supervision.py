"""What a step is told of the objects in its images: ground truth, pseudo-labels, or nothing; and the losses from it."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from mmdet.structures import DetDataSample
from mmengine.dist import all_reduce, get_world_size
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from kd_det.config import ConfigurationError
from kd_det.config.arguments import Index, Share, at, check_arguments, declared, refuse
from kd_det.config.detectors import read_model_config
from kd_det.config.files import get_type_name
from kd_det.context import Progress
from kd_det.datasets import UNLABELLED, drop_detections
from kd_det.distillers.schedules import Schedule, ScheduleConfig, build_schedule
from kd_det.taps import Features
from kd_det.teachers.detections import Detections, insert_detections
from kd_det.teachers.guide import Guide
from kd_det.teachers.joining import replaced
from kd_det.teachers.teacher import FrozenDetector

Losses = dict[str, Tensor | list[Tensor]]  # of a step by name; those with 'loss' in it are summed, the others logged

BY_SCORE = 'score'
MIN_SIDE = 1.0  # pixels; of a box without area losses are infinite, and heads clip some to nothing


class Supervision(NamedTuple):
    """The ground truth of one batch, from people or from a teacher.

    Attributes:
        samples: mmdet's data samples with ``gt_instances``, one for each image.
        labelled: Whether it is known what an image shows, so that what is no object is background.
        log: What is only for the log, by name.
    """
    samples: list[DetDataSample]
    labelled: tuple[bool, ...]
    log: dict[str, Tensor]

    @property
    def boxes(self) -> list[Tensor]:
        """(n, 4) of each image."""
        return [get_boxes(sample) for sample in self.samples]

    @property
    def labelled_rows(self) -> list[int]:
        """Which of the images are labelled."""
        return [row for row, is_known in enumerate(self.labelled) if is_known]

    @property
    def labels(self) -> list[Tensor]:
        """(n,) of each image."""
        return [sample.gt_instances.labels for sample in self.samples]


def read_supervision(samples: Sequence[DetDataSample]) -> Supervision:
    """Reads what the data itself says, see :class:`~kd_det.datasets.Unlabelled`, without the boxes of a file."""
    return Supervision([drop_detections(sample) for sample in samples],
                       tuple(not sample.metainfo.get(UNLABELLED, False) for sample in samples), {})


def get_boxes(sample: DetDataSample) -> Tensor:
    """The boxes of an image's ground truth, (n, 4), whether they are a tensor or one of mmdet's box types."""
    boxes = sample.gt_instances.bboxes
    return getattr(boxes, 'tensor', boxes).detach()


def is_so_on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether something is so on one of the ranks at least, by which all of them do the same."""
    if get_world_size() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    all_reduce(flags, 'max')
    return bool(flags)


def compute_labelled_losses(student: nn.Module, inputs: Tensor, features: Features, supervision: Supervision,
                            losses: Losses) -> Losses:
    """Computes the student's own losses on the labelled images of a batch.

    They are those of plain training on these images alone. Backbone and neck have seen the whole batch and are not run
    again. Without any labelled image they are 0 times those of all images, so that every weight has a gradient, for
    which data-parallel training waits, and the head asks the other ranks as often as theirs ask it.

    Args:
        student: The student.
        inputs: (N, 3, H, W), the whole batch.
        features: What its ``extract_feat`` made of it.
        supervision: What is known of the batch.
        losses: Those of all images, as if unlabelled ones were background.
    """
    if not any(supervision.labelled) and get_world_size() == 1:
        return scale_losses(losses, 0.0)
    rows = supervision.labelled_rows or list(range(len(inputs)))
    selected = tuple(level[rows] for level in features)
    with replaced(student, 'extract_feat', lambda *args, **kwargs: selected):
        losses = dict(student.loss(inputs[rows], [supervision.samples[row] for row in rows]))
    return scale_losses(losses, float(any(supervision.labelled)))


def scale_losses(losses: Losses, weight: float) -> Losses:
    """Multiplies the student's own losses by a weight; what is only for the log stays as it is."""
    if weight == 1:
        return losses
    return {name: value if 'loss' not in name else
            [weight * each for each in value] if isinstance(value, list) else weight * value
            for name, value in losses.items()}


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
        ArgumentError: An argument does not fit.

    Example:
        >>> labels = PseudoLabels(score=0.5, mode='join', weight=dict(type='Warmup', value=1.0, epochs=2))
        >>> labels.schedule(Progress(epoch=1.0))
        0.5
    """

    @declared
    def __init__(self, score: Share = 0.5, iou: Share = 0.5, nms_iou: Share = 0.5,
                 mode: Literal['join', 'replace'] = 'join', images: Literal['all', 'unlabelled'] = 'all',
                 weight: Literal['score'] | ScheduleConfig = 1.0, teacher: Index = 0) -> None:
        self.by_score = weight == BY_SCORE
        with at('weight'):
            self.schedule: Schedule = build_schedule(1.0 if self.by_score else weight)
        if self.schedule.balance is not None or self.schedule.full > 1:
            refuse('weight', weight, 'score, a number from 0 to 1, or a schedule of one',
                   'It is the probability with which a box counts in a step.')
        self.score, self.iou, self.nms_iou, self.teacher_index = score, iou, nms_iou, teacher
        self.replaces, self.only_unlabelled = mode == 'replace', images == 'unlabelled'

    def is_due(self, supervision: Supervision, progress: Progress) -> bool:
        """Whether the teacher has to detect in this step."""
        return self.schedule(progress) > 0 and not (self.only_unlabelled and all(supervision.labelled))

    def __call__(self, supervision: Supervision, detections: list[InstanceData], progress: Progress) -> Supervision:
        """Joins a teacher's detections with what is known; nothing that it is given changes.

        Args:
            supervision: What the data says.
            detections: Of the teacher, one for each image, with the student's labels.
            progress: Where the training stands.
        """
        samples, labelled, counts = [], [], []
        for sample, is_labelled, detected in zip(supervision.samples, supervision.labelled, detections):
            if self.only_unlabelled and is_labelled:
                detected = detected[:0]
            elif self.replaces:
                sample, is_labelled = _replace_truth(sample, sample.gt_instances[:0]), False
            boxes, labels = get_boxes(sample), sample.gt_instances.labels
            confident = self.select_confident(detected, boxes)
            drawn = confident[self._draw(confident.scores, progress)]
            labelled.append(is_labelled or len(confident) > 0)
            counts.append(len(drawn))
            if len(drawn):
                sample = _replace_truth(sample, InstanceData(bboxes=torch.cat([boxes, drawn.bboxes.to(boxes)]),
                                                             labels=torch.cat([labels, drawn.labels.to(labels)])))
            samples.append(sample)
        count = torch.tensor(float(sum(counts)) / len(counts))
        return Supervision(samples, tuple(labelled), {**supervision.log, 'distill/pseudo_boxes': count})

    def select_confident(self, detected: InstanceData, truth: Tensor) -> InstanceData:
        """Selects the detections of an image that may become ground truth beside its boxes, (n, 4)."""
        sides = detected.bboxes[:, 2:] - detected.bboxes[:, :2]
        kept = detected[(detected.scores >= self.score) & (sides >= MIN_SIDE).all(1)]
        kept = kept[batched_nms(kept.bboxes.float(), kept.scores.float(), kept.labels, self.nms_iou)]
        if len(truth) and len(kept):
            kept = kept[box_iou(kept.bboxes.float(), truth.float()).amax(1) <= self.iou]
        return kept

    def _draw(self, scores: Tensor, progress: Progress) -> Tensor:
        weight = self.schedule(progress)
        if weight == 1 and not self.by_score:
            return torch.ones_like(scores, dtype=torch.bool)
        return torch.rand_like(scores) < (scores if self.by_score else weight)


def build_pseudo_labels(config: dict | None, student: nn.Module,
                        guides: Sequence[Guide | None]) -> PseudoLabels | None:
    """Builds what the distiller's ``pseudo_labels`` says; None for none.

    Raises:
        ConfigurationError: An argument is wrong, there is no such teacher or it can not be asked on one rank alone, or
            the student learns masks; or a guide is of boxes alone, and they do not come from it.
    """
    if config is None:
        _require_use(guides)
        return None
    with at('model.pseudo_labels'):
        check_arguments(PseudoLabels, config)
        pseudo_labels = PseudoLabels(**config)
        check_teacher_index(pseudo_labels.teacher_index, len(guides))
        _require_use(guides, pseudo_labels.teacher_index)
        guide = guides[pseudo_labels.teacher_index]
        if guide is not None and not guide.detects:
            refuse('teacher', pseudo_labels.teacher_index, 'the index of a guide that detects',
                   f'It is that of {guide.described}.')
        if isinstance(guide, FrozenDetector):
            model = read_model_config(guide.config['config'])
            if 'language_model' in model:
                raise ConfigurationError(f'model.pseudo_labels: the teacher, a {get_type_name(model)}, is asked by '
                                         'words, which no batch has. Let it detect beforehand, and give its boxes as '
                                         "a file: model.teacher=dict(type='Detections', file=…).")
    if pseudo_labels.only_unlabelled and getattr(guide, 'config', {}).get('shard'):
        raise ConfigurationError("model.pseudo_labels: images='unlabelled' asks the teacher on those ranks alone whose "
                                 "batch has such images, which one with shard=True can not serve. Take images='all', "
                                 'or leave the teacher whole.')
    if getattr(student, 'with_mask', False):
        raise ConfigurationError(f"model.pseudo_labels: the student, a {type(student).__name__}, learns the masks of "
                                 'its boxes, and pseudo-labels have none. Take a student without masks, or leave them '
                                 'out: terms learn from unlabelled images without them.')
    return pseudo_labels


def _require_use(guides: Sequence[Guide | None], used: int | None = None) -> None:
    """Refuses boxes of a file from which no pseudo-labels come, for they are of no other use."""
    for index, guide in enumerate(guides):
        if isinstance(guide, Detections) and index != used:
            raise ConfigurationError(f"Nothing learns from the boxes of '{guide.file}': set model.pseudo_labels="
                                     f'dict(teacher={index}), or leave that guide out.')


def bring_detections(pseudo_labels: PseudoLabels | None, guides: Sequence[Guide], dataset: Any,
                     hooks: Sequence[Any] = ()) -> bool:
    """Lets the images of the training data bring the boxes of a file, where pseudo-labels come from one.

    Args:
        pseudo_labels: Of the distiller.
        guides: The started guides.
        dataset: The training data, see :func:`~kd_det.teachers.detections.insert_detections`.
        hooks: Of the run.

    Returns:
        Whether they do now, so that loader workers which run already have to start anew.

    Raises:
        ConfigurationError: A pipeline can not carry boxes.
        TeacherError: The boxes are of other images.
    """
    guide = None if pseudo_labels is None else guides[pseudo_labels.teacher_index]
    if not isinstance(guide, Detections) or pseudo_labels.schedule.is_zero:
        return False
    insert_detections(dataset, guide, pseudo_labels.score, hooks)
    return True


def check_teacher_index(index: int, teachers: int) -> None:
    """Refuses the index of a teacher that there is not."""
    if index >= teachers:
        refuse('teacher', index, f"an index below {teachers}, the number of teachers")


def _replace_truth(sample: DetDataSample, truth: InstanceData) -> DetDataSample:
    """Makes a data sample of the same image with other ground truth."""
    other = sample.new()
    other.gt_instances = truth
    return other
