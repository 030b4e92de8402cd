"""Before training: can the teacher detect anything on this data, as it will be fed, and by the names it goes by?"""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.ops import box_iou

from kd_det.checks.data import check_labels
from kd_det.compat.process import preserved_randomness
from kd_det.config.classes import ClassMatch, Names, find_label_names, match_classes
from kd_det.config.files import ConfigurationError
from kd_det.teachers import Guide, Teacher, TeacherError

LIKELY_CAUSES = """Likely causes:
  - the checkpoint was trained on other classes, or on the same in another order, and does not name them
    (teacher.classes=[…] names them, by label);
  - the teacher's config is not the one that the checkpoint was trained with (normalisation, channel order, head);
  - the validation annotations do not belong to the images, or have no boxes (`kd-det doctor CONFIG` tells);
  - the teacher is not trained yet.
Look at its boxes with `kd-det test TEACHER_CONFIG CHECKPOINT --show-dir DIR`. To train all the same, set
default_hooks.distill.preflight=None, or lower its min_map."""

MAP = 'coco/bbox_mAP'
SURE = 0.25  # score from which a box says what the teacher takes an object for
OVERLAP = 0.5  # IoU from which a box lies on an object
FEW = 3  # objects that show that a name is wrong, beside other wrong names,
MANY = 10  # and by themselves
CLEARLY = 4  # times as many objects
MOST_SHOWN = 8  # classes of a confusion


class Skill(NamedTuple):
    """What a teacher reaches on validation images.

    Attributes:
        metrics: By name, over all classes of the data.
        names: What the data's labels mean.
        match: The classes that the teacher shares with the data; None where its names are not known and labels are
            taken to mean the same to both.
        votes: (teacher's labels, data's labels) of how many objects of the data, the second, have as their most
            confident box, if there is a confident one, one that the teacher calls the first.
    """
    metrics: dict[str, float]
    names: Names
    match: ClassMatch | None
    votes: Tensor

    @property
    def shared(self) -> float:
        """The share of the data's classes that the teacher knows."""
        return len(self.match.of_student) / len(self.match.student) if self.match else 1.0


def evaluate_teacher(runner: Runner, teacher: Guide, images: int,
                     outfile_prefix: str | None = None) -> Skill | None:
    """Evaluates the teacher on validation images, fed with the student's preprocessed batches as in training.

    Its boxes are measured by COCO's metric against the boxes of the data set itself, whatever the config evaluates the
    student by, such as masks that the teacher does not have. They count with the labels that their names have in the
    data; those of other classes are left out.

    Args:
        runner: Holds the validation data (``val_dataloader``) and the student.
        teacher: The teacher.
        images: At most this many images: the first, or, where these have no boxes, the first that have.
        outfile_prefix: Of the files in which boxes and ground truth are left, see mmdet's ``CocoMetric``; None: none.

    Returns:
        The teacher's skill, the same on every rank; None where the config has no validation data.

    Raises:
        TeacherError: See :func:`classes_on`; or the teacher's features are not finite.
        ConfigurationError: The validation data is empty, has no boxes, or does not name its classes.
        DiagnosisError: Its labels mean something else than its metainfo says.
    """
    loader = runner.cfg.get('val_dataloader')
    if not loader:
        return None
    preprocess = (runner.model.module if hasattr(runner.model, 'module') else runner.model).data_preprocessor
    with preserved_randomness():
        dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
        check_labels(dict(val=dataset))
        indices = labelled_images(dataset, images)
        names = find_label_names(dataset)
        if names is None:
            raise ConfigurationError('The validation data does not name its classes: write metainfo=dict(classes=(…)) '
                                     'in val_dataloader.dataset.')
        match = classes_on(teacher, names)
        metric = Evaluator([CocoMetric(metric='bbox', outfile_prefix=outfile_prefix)])
        metric.dataset_meta = dict(classes=names)
        votes = torch.zeros(teacher.num_classes or len(teacher.classes or names), len(names),
                            dtype=torch.long)
        share = _share_of_rank(len(indices))
        images_of_rank = Subset(dataset, [indices[place % len(indices)] for place in share])
        places = iter(share)
        broken = torch.zeros(())  # batches of which a feature was not finite
        for batch in DataLoader(images_of_rank, batch_size=loader.get('batch_size') or 1, collate_fn=pseudo_collate):
            data = preprocess(batch, False)
            predicted = _predict(teacher, data['inputs'], data['data_samples'])
            broken += not all(each.isfinite() for each in teacher.feature_sums)
            for sample in predicted:
                place = next(places)
                objects = dataset.get_data_info(indices[place % len(indices)]).get('instances') or ()
                found = plain_boxes(sample.pred_instances)
                if place < len(indices):
                    votes += count_votes(found, *_truth(objects), *votes.shape)
                found = found if match is None else match.translate(found)
                metric.process([dict(img_id=place % len(indices), ori_shape=sample.ori_shape[:2],
                                     pred_instances=found, instances=[plain_object(each) for each in objects])])
        all_reduce(votes)
        all_reduce(broken)
        if broken:
            raise TeacherError(f"Pre-flight: the teacher's features of validation images are not finite, in "
                               f'{int(broken)} batches. {teacher.advise_on_overflow()}')
        return Skill(metric.evaluate(len(indices)), names, match, votes)


def _predict(teacher: Guide, images: Tensor, samples: list) -> list:
    """Detects, in the coordinates of the original images."""
    if isinstance(teacher, Teacher):
        return teacher.predict(images, samples)
    for sample, found in zip(samples, teacher.detect(images, samples)):
        found.bboxes = found.bboxes / found.bboxes.new_tensor(sample.metainfo.get('scale_factor', (1, 1))).repeat(2)
        sample.pred_instances = found
    return samples


def classes_on(teacher: Guide, classes: Sequence[str]) -> ClassMatch | None:
    """Matches the teacher's classes with those of the data; None where its names are not known, but their number fits.

    Raises:
        TeacherError: The teacher's names are not known, and their number is not that of the data.
        ConfigurationError: No class is shared.
    """
    known = teacher.num_classes
    if teacher.classes is None and known not in (None, len(classes)):
        raise TeacherError(f'The teacher tells {known} classes apart, but the data has {len(classes)}, and neither the '
                           "checkpoint nor the config names the teacher's. Name them, by label, with "
                           'teacher.classes=[…]; or give a teacher of these classes; to learn from its features alone, '
                           'set default_hooks.distill.preflight=None.')
    if teacher.classes is None:
        return None
    try:
        return match_classes(classes, teacher.classes)
    except ConfigurationError as error:
        raise ConfigurationError(f'{error} To learn from its features alone, set default_hooks.distill.preflight=None.'
                                 ) from None


def labelled_images(dataset: Any, most: int) -> list[int]:
    """The first images of a data set, or, where none of these has a box, the first that have.

    Raises:
        ConfigurationError: It is empty, or has no box.
    """

    def has_boxes(index: int) -> bool:
        return any(not each.get('ignore_flag') for each in dataset.get_data_info(index).get('instances') or ())

    first = range(min(most, len(dataset)))
    if any(map(has_boxes, first)):
        return list(first)
    later = [index for index in range(len(first), len(dataset)) if has_boxes(index)][:most]
    if not later:
        raise ConfigurationError(f"The validation data {'has no boxes' if len(dataset) else 'is empty'}: check "
                                 'val_dataloader.dataset (ann_file, data_prefix, data_root, metainfo). To train '
                                 'without looking at the teacher, set default_hooks.distill.preflight=None.')
    return later


def count_votes(found: InstanceData, boxes: Tensor, labels: Tensor, teachers: int, students: int) -> Tensor:
    """Counts what a teacher takes the objects of an image for: each by its most confident box that lies on it.

    Args:
        found: Its detections: ``bboxes``, ``scores`` and its own ``labels``.
        boxes: (n, 4) of the ground truth, in the same coordinates.
        labels: (n,) of the ground truth.
        teachers: How many classes the teacher has.
        students: How many classes the data has.

    Returns:
        (teachers, students) of int64.
    """
    if not len(found) or not len(boxes):
        return torch.zeros(teachers, students, dtype=torch.long)
    scores = found.scores[:, None].where(box_iou(found.bboxes, boxes) >= OVERLAP, torch.tensor(-1.0))
    best, which = scores.max(0)
    pairs = found.labels[which] * students + labels
    return torch.bincount(pairs[best >= SURE], minlength=teachers * students).view(teachers, students)


def wrong_names(skill: Skill) -> dict[int, int]:
    """The teacher's classes whose boxes lie on objects of another class than their name says.

    Either the names fit once they are read in another usual order, that of the data, turned round or shifted by one:
    twice as many objects of :data:`FEW` classes or more speak for that as for the names, and a third of all. Or by far
    most objects fit other names: in an assignment of names, several classes are each other than they are called and
    :data:`CLEARLY` times as many objects speak for that as for the names. Or a class by itself is another:
    most of its boxes lie on objects of the other class, most of these objects are taken for it, and hardly any for what
    they should be, which no class does that only looks like another; where the other name is wrong too, as in an
    exchange, few objects suffice.

    A weak teacher is none with wrong names. What it takes everything for is named rightly if the objects of that name
    are; of many classes with an object or two any assignment fits by chance; and a class that the data does not have,
    such as a car among vehicles, may lie on one that the teacher does not have.

    Returns:
        Teacher's label -> the data's label of the objects.
    """
    votes, match = skill.votes, skill.match
    own = dict(zip(match.of_teacher, match.of_student) if match else ((each, each) for each in range(len(skill.names))))
    right = agreement(votes, own)
    confirmed = {label for label, objects in own.items() if 2 * votes[label, objects] > votes[:, objects].sum()}
    for order in _usual_orders(own, *votes.shape):
        displaced = {label: other for label, other in order.items()
                     if votes[label, other] and own.get(label) != other and label not in confirmed}
        if len(displaced) >= FEW and agreement(votes, displaced) >= max(MANY, 2 * right, int(votes.sum()) / 3):
            return displaced
    other_names = {int(label): int(other) for label, other in zip(*linear_sum_assignment(votes.numpy(), maximize=True))
                   if votes[label, other] and own.get(label) != other and label not in confirmed
                   and (label in own or other in own.values())}
    clear = [int(votes[label, other]) for label, other in other_names.items()
             if votes[label, other] >= max(FEW, int(votes[label].max()), int(votes[:, other].max()))]
    if len(clear) > 1 and sum(clear) >= max(MANY, CLEARLY * right):
        return other_names
    found: dict[int, int] = {}
    for label in own.keys() - confirmed:
        taken, other = (int(each) for each in votes[label].max(0))
        rightly = votes[label, own[label]] + sum(votes[each, other] for each, of in own.items() if of == other)
        majority = 2 * taken > max(votes[label].sum(), votes[:, other].sum())
        if other != own[label] and other in own.values() and majority and taken >= max(FEW, CLEARLY * int(rightly)):
            found[label] = other
    moved = {own[label] for label in found}
    return {label: other for label, other in found.items()
            if votes[label, other] >= MANY or other in moved or own[label] in found.values()}


def _usual_orders(own: Mapping[int, int], teachers: int, students: int) -> list[dict[int, int]]:
    """By which orders names are mistaken for others: the data's label of each of the teacher's, under each of them."""
    shifted = [{label - step: objects for label, objects in own.items() if 0 <= label - step < teachers}
               for step in (1, -1)]
    turned = {teachers - 1 - label: objects for label, objects in own.items()}
    return [*shifted, turned, *([{label: label for label in range(students)}] if teachers == students else [])]


def agreement(votes: Tensor, names: Mapping[int, int]) -> int:
    """How many objects the teacher takes for what they are, if its labels (keys) are the data's labels (values)."""
    return sum(int(votes[label, other]) for label, other in names.items())


def require_names(skill: Skill, teacher: Guide) -> None:
    """Ends a run whose teacher's classes have other names than it says.

    Raises:
        TeacherError: Boxes of the teacher lie on objects of other classes than their names say, see
            :func:`wrong_names`; the message shows the confusion and names the classes anew.
    """
    wrong = wrong_names(skill)
    if not wrong:
        return
    names = teacher.classes or skill.names
    shown = sorted(sorted(wrong, key=lambda label: -skill.votes[label, wrong[label]])[:MOST_SHOWN])
    columns = sorted({wrong[label] for label in shown})
    rows = [('', *(skill.names[other] for other in columns))]
    rows += [(names[label], *(str(int(skill.votes[label, other])) for other in columns)) for label in shown]
    line = _right_names(skill, names, wrong)
    raise TeacherError(
        "Pre-flight: the teacher's boxes lie on objects of other classes than its names say. By its most confident box "
        f'it takes objects of the validation data (columns) for (rows):{_table(rows)}\n'
        'Its checkpoint or config names the classes in another order than its head has learnt, as where '
        'metainfo.classes and the annotation file of its training disagree. Name them by label'
        + (f': by its boxes teacher.classes={line!r}' if line else ' with teacher.classes=[…]')
        + '; to train all the same, set default_hooks.distill.preflight=None.')


def require_skill(skill: Skill, minimum: float, images: int) -> None:
    """Ends a run whose teacher can not detect.

    Raises:
        TeacherError: The teacher's mAP is below ``minimum``, of which classes that it does not know are not demanded.
    """
    # CocoMetric reports nothing at all where nothing was detected.
    reached, minimum = skill.metrics.get(MAP, 0.0), minimum * skill.shared
    if reached < minimum:
        raise TeacherError(f'Pre-flight: on up to {images} validation images the teacher reaches {reached:.3f} mAP, '
                           f'under the minimum of {minimum:.3f}. A student would learn noise.\n{LIKELY_CAUSES}')


def _share_of_rank(count: int) -> list[int]:
    """The places of a rank's images, equally many on each, in the order in which mmengine collects.

    Those beyond ``count`` stand for the first ones once more.
    """
    world = get_world_size()
    return list(range(get_rank(), -(-count // world) * world, world))


def _truth(objects: Sequence[dict]) -> tuple[Tensor, Tensor]:
    """Boxes, (n, 4), and labels, (n,), of the objects of an image that are to be found."""
    counted = [each for each in objects if not each.get('ignore_flag')]
    return (torch.tensor([list(each['bbox']) for each in counted], dtype=torch.float32).view(-1, 4),
            torch.tensor([each['bbox_label'] for each in counted], dtype=torch.long))


def plain_object(instance: dict) -> dict:
    """What a metric of boxes reads of an object."""
    return dict(bbox=list(map(float, instance['bbox'])), bbox_label=int(instance['bbox_label']),
                ignore_flag=int(instance.get('ignore_flag', 0)))


def plain_boxes(found: InstanceData) -> InstanceData:
    """What a metric of boxes reads of detections, on the CPU."""
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    return InstanceData(bboxes=boxes.float().cpu(), scores=found.scores.float().cpu(), labels=found.labels.cpu())


def _right_names(skill: Skill, names: Sequence[str], wrong: dict[int, int]) -> list[str] | None:
    """All names of the teacher as its boxes tell them.

    They are those of some usual order that fits what it takes objects for, or its own with the wrong ones exchanged;
    None where that leaves some open.
    """
    labels = {name: label for label, name in enumerate(skill.names)}
    exchanged = [skill.names[wrong[label]] if label in wrong else name for label, name in enumerate(names)]
    orders = [exchanged, list(skill.names), sorted(names), list(names[::-1]), [*names[1:], names[0]],
              [names[-1], *names[:-1]]]
    fitting = {label: other for label, other in enumerate(skill.votes.argmax(1).tolist()) if skill.votes[label].any()}
    for order in orders:
        named = {label: labels[name] for label, name in enumerate(order) if name in labels}
        if len(set(order)) == len(order) == len(names) and \
                agreement(skill.votes, named) >= 0.9 * agreement(skill.votes, fitting):
            return order
    return None


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ''.join('\n    ' + '  '.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
