"""``FidelityMetric``: how closely a student follows its teacher, in what they detect and within."""
from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mmdet.registry import DATASETS, HOOKS, METRICS, MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.ops import box_iou, nms

from kd_det import __version__
from kd_det.compat.process import describe
from kd_det.compat.writing import write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Share, declared
from kd_det.config.classes import (
    ClassMatch,
    count_classes,
    find_label_names,
    get_first_metainfo,
    get_metainfo,
    match_classes,
)
from kd_det.config.files import find_quantization, list_leaf_datasets, load_config, student_model
from kd_det.functional.fidelity import Moments, expected_calibration_error, linear_cka, moments
from kd_det.functional.masks import valid_cells
from kd_det.heads.dense import Stride
from kd_det.registry import build_detector, get_scope, within_scope
from kd_det.study.distributions import class_distributions, class_kl, find_classifying_head
from kd_det.study.identity import hash_model, hash_weights
from kd_det.study.runs import check_shape, read_json
from kd_det.study.scheduling import CONFIG_FILE
from kd_det.taps import Taps
from kd_det.teachers import Teacher, load_strictly, probe_levels, read_model_config
from kd_det.training.finiteness import find_model
from kd_det.training.runs import restore_quantizer

Splits = dict[str, dict[str, float]]  # split -> number -> value
FIDELITY_FILE = 'fidelity.json'
NOTHING = dict(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))


@METRICS.register_module()
class FidelityMetric(BaseMetric):
    """Compares a student with its teacher on the images of a validation loop, beside CocoMetric.

    What the two detect is compared by itself. The distributions of classes and the features need the student's modules:
    :class:`~kd_det.study.fidelity.FidelityHook` shows them to the metric, in any run.

    Gives, under ``fidelity/`` and without numbers that nothing counts for, of *confident* boxes:

    - ``found``: the share of the teacher's that the student detects too: paired one to one within the class, with the
      largest sum of IoU;
    - ``teacher_iou``: mean IoU of these pairs;
    - ``teacher_errors``: the share of the teacher's that are wrong: they overlap no object of their class. A duplicate
      of a right box is no error, nor is a box that lies on an ignored region (a crowd) of its class;
    - ``copied_errors``: ``found`` among the wrong ones;
    - ``agreement``: how often the classes agree at the same place. Of either detector the surest box of each place
      counts (NMS regardless of class), and these are paired one to one, again regardless of class;
    - ``class_kl``: mean KL(teacher ‖ student) of the class distributions at the teacher's, in nats, see
      :mod:`~kd_det.study.distributions`;

    and ``student_ece`` and ``teacher_ece``, the calibration errors of both; and ``cka_<stride>``, the linear CKA of the
    neck's features over all cells.

    Classes are matched by name, where the names of both are known. Detections and ground truth of others do not count,
    and distributions are restricted to the shared ones; ``shared_classes`` tells how many these are, unless all are
    shared.

    Args:
        teacher: ``config`` and ``checkpoint``, perhaps ``classes``, as of :class:`~kd_det.teachers.Teacher`.
        confidence: Score from which on a box is confident.
        min_iou: IoU from which on boxes match and are at one place, and the share of a box from which on it lies on an
            ignored region.
        calibrated_from: Score from which on detections count for the calibration.
        bins: Of the calibration error.
        collect_device: Where the ranks' results are gathered, see mmengine's ``BaseMetric``.
        prefix: What the names of its numbers begin with; by default ``fidelity``.

    Raises:
        ArgumentError: An argument does not fit.
        TeacherError: See :class:`~kd_det.teachers.Teacher`.
        ConfigurationError: Student and teacher share no class; or they have not the same number of classes, and the
            names do not tell which are the same.
    """
    default_prefix = 'fidelity'

    @declared
    def __init__(self, teacher: dict[str, Any], confidence: Share = 0.3, min_iou: Share = 0.5,
                 calibrated_from: Share = 0.05, bins: Count = 15, collect_device: Literal['cpu', 'gpu'] = 'cpu',
                 prefix: str | None = None) -> None:
        super().__init__(collect_device, prefix)
        self.teacher_config = dict(teacher)
        self.confidence, self.min_iou = confidence, min_iou
        self.calibrated_from, self.bins = calibrated_from, bins
        self.teacher: Teacher | None = None
        self.student: nn.Module | None = None
        self.match: ClassMatch | None = None  # None while a label means the same to both
        self.similarity: dict[Stride, Moments] = {}  # stride -> sums

    @property
    def settings(self) -> dict:
        """What its numbers depend on beside student, teacher and data."""
        return dict(confidence=self.confidence, min_iou=self.min_iou, calibrated_from=self.calibrated_from,
                    bins=self.bins)

    def attach(self, student: nn.Module) -> None:
        """Shows the student's modules: a detector, or a distiller, whose student counts."""
        self.student = getattr(student, 'student', student)

    # ---------------------------------------------------------------------------------------------- image by image

    @torch.no_grad()
    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Compares one batch.

        Args:
            data_batch: As the data loader gives it.
            data_samples: The student's detections, and ground truth, both in pixels of the original images.
        """
        teacher = self._build_teacher()
        data = self._preprocessor(copy.deepcopy(data_batch), False)
        images, samples = data['inputs'], data['data_samples']
        boxes = teacher.to_like(images).detect(images, samples)
        boxes = boxes if self.match is None else [self.match.translate(each) for each in boxes]
        divergences = self._compare_modules(teacher, images, samples, boxes) if self.student is not None else None
        for index, (sample, of_teacher) in enumerate(zip(data_samples, boxes)):
            result = self._compare(sample, of_teacher.cpu())
            if divergences is not None:
                result['class_kl'] = divergences[index].cpu()
            self.results.append(result)

    def _build_teacher(self) -> Teacher:
        if self.teacher is None:
            model = read_model_config(self.teacher_config['config'])
            # Without the student's modules the teacher sees the images as its own preprocessing makes them.
            with within_scope(model.get('_scope_')):
                self._preprocessor = (MODELS.build(model['data_preprocessor']) if self.student is None
                                      else self.student.data_preprocessor)
            self.teacher = Teacher(**self.teacher_config, taps=(), student_preprocessor=self._preprocessor)
            self.match = self._match_classes(self.teacher)
            if self.student is None:
                print_log("FidelityMetric compares detections alone: custom_hooks=[dict(type='FidelityHook')] shows it "
                          "the student's modules for class_kl and cka.", 'current')
            else:
                self._classify = all(map(find_classifying_head, (self.student, self.teacher.model)))
                self._strides = [_find_strides(each) for each in (self.student, self.teacher.model)]
        return self.teacher

    def _match_classes(self, teacher: Teacher) -> ClassMatch | None:
        names = get_first_metainfo(self.dataset_meta).get('classes')
        mine = None if self.student is None else count_classes(self.student)
        if names and mine not in (None, len(names)):
            names = None  # the head's labels are then not those of the data
        if names and teacher.classes:
            match = match_classes(names, teacher.classes)
            if match.is_identity:
                return None
            print_log(f"FidelityMetric, classes: {match.report('the comparison')}", 'current')
            return match
        mine, theirs = mine or (len(names) if names else None), count_classes(teacher.model)
        if None not in (mine, theirs) and mine != theirs:
            whose, remedy = (('teacher', "name them, by label, with FidelityMetric's teacher=dict(classes=[…])")
                             if names else ('student', 'name them, by label, in the metainfo of the validation data'))
            raise ConfigurationError(f'FidelityMetric: the student has {mine} classes and the teacher {theirs}, '
                                     f"and which are the same is not known, for the {whose}'s names are not: {remedy}.")
        return None

    def _compare(self, sample: dict, teacher: InstanceData) -> dict:
        """The numbers of one image that add up to those of all."""
        student, truth, ignored = (self._read_shared_boxes(sample.get(key) or NOTHING)
                                   for key in ('pred_instances', 'gt_instances', 'ignored_instances'))
        teacher.bboxes = teacher.bboxes / teacher.bboxes.new_tensor(sample['scale_factor']).repeat(2)
        calibration = {}
        for name, each in (('student', student), ('teacher', teacher)):
            overlaps = class_overlaps(each, truth)
            correct = true_positives(overlaps, each.scores, self.min_iou)
            unjudged = (class_overlaps(each, ignored, 'iof') >= self.min_iou).any(1) & ~correct
            each.wrong = (overlaps < self.min_iou).all(1) & ~unjudged
            counted = (each.scores >= self.calibrated_from) & ~unjudged
            calibration[name] = (each.scores[counted], correct[counted])
        student, teacher = (each[each.scores >= self.confidence] for each in (student, teacher))
        overlaps = class_overlaps(teacher, student)
        pairs = match_boxes(overlaps, self.min_iou)
        found = torch.zeros(len(teacher), dtype=torch.bool)
        found[pairs[0]] = True
        of_student, of_teacher = (each[nms(each.bboxes, each.scores, self.min_iou)] for each in (student, teacher))
        places = match_boxes(box_iou(of_teacher.bboxes, of_student.bboxes), self.min_iou)
        return dict(found=found, wrong=teacher.wrong, overlaps=overlaps[pairs], calibration=calibration,
                    agree=of_teacher.labels[places[0]] == of_student.labels[places[1]])

    def _read_shared_boxes(self, instances: dict) -> InstanceData:
        """Reads the boxes of a sample that are of shared classes, onto the CPU; the teacher's are restricted by now."""
        read = InstanceData(**{name: get_box_tensor(instances[name]).cpu() for name in ('bboxes', 'labels', 'scores')
                               if name in instances})
        return read if self.match is None else read[self.match.index_shared(read.labels) >= 0]

    def _compare_modules(self, teacher: Teacher, images: Tensor, samples: Sequence[DetDataSample],
                         boxes: Sequence[InstanceData]) -> list[Tensor] | None:
        """Adds to the sums of the features, and gives the divergence of the classes at each image's confident boxes."""
        shapes = [sample.img_shape[:2] for sample in samples]
        mine = self.student.extract_feat(images)
        theirs = teacher.extract_feat(images, shapes)
        levels = [dict(zip(strides, features)) for strides, features in zip(self._strides, (mine, theirs))]
        for stride in set(levels[0]) & set(levels[1]):
            valid = valid_cells(shapes, images.shape[-2:], levels[0][stride].shape[-2:], images.device)
            sums = moments(*(each[stride].permute(0, 2, 3, 1)[valid] for each in levels))
            self.similarity[stride] = self.similarity[stride] + sums if stride in self.similarity else sums
        if not self._classify:
            return None
        confident = [each.bboxes[each.scores >= self.confidence] for each in boxes]
        of_student, of_teacher = (None, None) if self.match is None else (self.match.of_student, self.match.of_teacher)
        divergences = class_kl(class_distributions(self.student, mine, confident, shapes, of_student),
                               class_distributions(teacher.model, theirs, confident, shapes, of_teacher))
        return list(divergences.split([len(each) for each in confident]))

    # -------------------------------------------------------------------------------------------------- all images

    def evaluate(self, size: int) -> dict:
        """The numbers of all ranks; the same on each."""
        self._cka = {}
        for stride, sums in sorted(self.similarity.items()):
            for each in sums:
                all_reduce(each)
            self._cka[stride] = linear_cka(sums).item()
        self.similarity.clear()
        return super().evaluate(size)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """From the images of all ranks."""

        def join(name: str) -> Tensor:
            return torch.cat([result[name].double() for result in results])

        found, wrong = join('found'), join('wrong').bool()
        values = dict(found=found, copied_errors=found[wrong], teacher_errors=wrong.double(), agreement=join('agree'),
                      teacher_iou=join('overlaps'))
        if 'class_kl' in results[0]:
            values['class_kl'] = join('class_kl')
        metrics = {name: each.mean().item() for name, each in values.items() if len(each)}
        for name in ('student', 'teacher'):
            scores, correct = map(torch.cat, zip(*(result['calibration'][name] for result in results)))
            if len(scores):
                metrics[f'{name}_ece'] = expected_calibration_error(scores, correct, self.bins).item()
        metrics.update({f'cka_{stride}': value for stride, value in self._cka.items() if isfinite(value)})
        match = self.match
        if match is not None and not len(match.of_student) == len(match.student) == len(match.teacher):
            metrics['shared_classes'] = float(len(match.of_student))
        return metrics


@HOOKS.register_module()
class FidelityHook(Hook):
    """Shows the model of the run to every :class:`~kd_det.study.fidelity.FidelityMetric` of its evaluators.

    A metric of mmengine gets detections alone; with this hook ``class_kl`` and ``cka_<stride>`` are measured too, and
    classes are matched by what the labels of the data mean, see :func:`~kd_det.config.classes.read_label_names`.
    """

    def before_val(self, runner: Runner) -> None:
        _attach_model(runner, runner.val_loop)

    def before_test(self, runner: Runner) -> None:
        _attach_model(runner, runner.test_loop)


def measure_fidelity(config: str | Path | Config, checkpoint: str | Path, teacher: dict, split: str = 'val',
                     **options: Any) -> dict[str, float]:
    """Compares a trained student with its teacher.

    Args:
        config: The student's, or that of its distillation: a file, ``'package::folder/file.py'``, or a config.
        checkpoint: The trained student.
        teacher: ``config`` and ``checkpoint``.
        split: ``'val'``, or ``'train'``: the training images, prepared as for validation, without augmentation. Of data
            sets that are joined the first counts.
        options: Of :class:`~kd_det.study.fidelity.FidelityMetric`.

    Returns:
        The metric's numbers.
    """
    config = config if isinstance(config, Config) else load_config(config)
    with within_scope(get_scope(config)):
        detector = build_detector(student_model(config))
        dataset = DATASETS.build(_make_dataset_config(config, split))
    load_strictly(detector, str(checkpoint), role='student')
    detector.to(get_device()).eval()
    quantization = find_quantization(config)
    if quantization is not None:
        restore_quantizer(quantization, str(checkpoint), detector)
    metric = FidelityMetric(teacher, **options)
    metric.attach(detector)
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = dict(get_metainfo(dataset), classes=find_label_names(dataset))
    batch_size = config.val_dataloader.get('batch_size') or 1
    for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=pseudo_collate):
        evaluator.process(data_samples=detector.val_step(batch), data_batch=batch)
    return {name.split('/')[-1]: value for name, value in evaluator.evaluate(len(dataset)).items()}


def add_fidelity(entries: list[dict], root: Path, teacher: dict, splits: Sequence[str],
                 log: Callable[[str], None]) -> None:
    """Adds ``fidelity`` to every finished run of ``results.json``: split -> number -> value.

    What was measured lies beside ``result.json``, with all that it depends on, and is kept while that is the same: the
    identity of the run (in a plain student's there is no teacher), the teacher, and version and settings of the metric.
    What can not be measured is left out, and the log tells why.

    Args:
        entries: The runs; changed.
        root: The work dir of the benchmark.
        teacher: ``config`` and ``checkpoint``.
        splits: ``'val'`` and ``'train'``, or one of them; none to measure nothing.
        log: Given a line on what is measured.
    """
    if not splits:
        return
    register_all_modules(init_default_scope=True)
    metric = dict(teacher=dict(model=hash_model(teacher['config']), weights=hash_weights(teacher['checkpoint'])),
                  settings=dict(FidelityMetric(teacher).settings, kd_det=__version__))
    for entry in entries:
        if entry['status'] != 'finished':
            continue
        file = root / entry['folder'] / FIDELITY_FILE
        of = dict(identity=entry['identity'], **metric)
        measured = _read_measured(file, of)
        for split in splits:
            if split not in measured:
                name = f"{entry['variant']}, seed {entry['seed']}: fidelity on {split}"
                log(name)
                try:
                    config = load_config(file.parent / CONFIG_FILE)
                    with redirect_stdout(StringIO()):  # of pycocotools
                        measured[split] = measure_fidelity(config, str(root / entry['checkpoint']), teacher, split)
                except Exception as error:  # whatever it is, it must not cost the others
                    log(f'{name} failed: {describe(error)}')
                else:
                    write_whole(file, json.dumps(dict(of, splits=measured), indent=2) + '\n')
        entry['fidelity'] = {split: measured[split] for split in splits if split in measured}


def _read_measured(file: Path, of: dict) -> dict[str, dict[str, float]]:
    """What was measured of the same before; nothing where the file can not be read."""
    try:
        stored = read_json(file) if file.is_file() else {}
        if {key: stored.get(key) for key in of} != of:
            return {}
        check_shape(stored.get('splits'), Splits)
        return stored['splits']
    except ConfigurationError:
        return {}


def class_overlaps(boxes: InstanceData, others: InstanceData, mode: str = 'iou') -> Tensor:
    """Computes how much boxes overlap others of their class.

    Args:
        boxes: n ``bboxes`` as x1, y1, x2, y2, with their ``labels``.
        others: m of them.
        mode: ``'iou'``, or ``'iof'``: the intersection's share of the first box, as COCO measures it on crowds.

    Returns:
        (n, m); 0 between boxes of unlike classes.
    """
    overlaps = bbox_overlaps(boxes.bboxes.double(), others.bboxes.double(), mode)
    return overlaps * (boxes.labels[:, None] == others.labels)


def match_boxes(overlaps: Tensor, min_iou: float = 0.5) -> tuple[Tensor, Tensor]:
    """Pairs boxes one to one so that their overlaps sum up to the most.

    Args:
        overlaps: (n, m).
        min_iou: Pairs that overlap less are none.

    Returns:
        (p,) indices of the rows and (p,) indices of the columns.
    """
    gain = torch.where(overlaps >= min_iou, overlaps, torch.zeros_like(overlaps))
    rows, columns = map(torch.from_numpy, linear_sum_assignment(gain.numpy(), maximize=True))
    paired = gain[rows, columns] > 0
    return rows[paired], columns[paired]


def true_positives(overlaps: Tensor, scores: Tensor, min_iou: float = 0.5) -> Tensor:
    """Tells which detections are correct, as COCO does.

    By falling score, each takes the object of its class that it overlaps most and that is still free.

    Args:
        overlaps: (n, m) of detections and objects, see :func:`class_overlaps`.
        scores: (n,) of the detections.
        min_iou: Of a detection and its object.

    Returns:
        (n,) of bool.
    """
    free = overlaps.numpy().copy()
    correct = np.zeros(len(free), dtype=bool)
    for index in np.argsort(-scores.numpy(), kind='stable') if free.shape[1] else ():
        best = free[index].argmax()
        if free[index, best] >= min_iou:
            correct[index] = True
            free[:, best] = 0
    return torch.from_numpy(correct)


def _find_strides(detector: nn.Module) -> list[Stride]:
    """Finds the strides of what a detector's ``extract_feat`` returns."""
    path = 'neck' if getattr(detector, 'neck', None) is not None else 'backbone'
    return [level.stride for level in probe_levels(detector, Taps(detector, [path]))[path]]


def _attach_model(runner: Runner, loop: BaseLoop) -> None:
    model = find_model(runner)
    for metric in loop.evaluator.metrics:
        if isinstance(metric, FidelityMetric):
            metric.attach(model)
            dataset = loop.dataloader.dataset
            metric.dataset_meta = dict(get_metainfo(dataset), classes=find_label_names(dataset))


def _make_dataset_config(config: Config, split: str) -> dict:
    """Makes the config of a data set, with the pipeline of validation; training images that are filtered stay so."""
    validation = list_leaf_datasets(config.val_dataloader.dataset)[0]
    dataset = validation if split == 'val' else list_leaf_datasets(config.train_dataloader.dataset)[0]
    return copy.deepcopy(dict(dataset, pipeline=validation['pipeline']))
