"""Born-Again: each generation of a student learns from the one before it, and all of them together find what they find.

After Furlanello et al., "Born-Again Neural Networks", ICML 2018.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmdet.models.utils import weighted_boxes_fusion
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData
from torch.utils.data import DataLoader

from kd_det.checks.arguments import inspect_arguments
from kd_det.checks.doctor import check_config
from kd_det.checks.environment import raise_faults
from kd_det.checks.preflight import plain_boxes, plain_object
from kd_det.compat.console import TextTable
from kd_det.compat.process import preserved_randomness
from kd_det.compat.writing import locked_folder, refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Count, Parts, Ratio, Seed, Weight, at, declared
from kd_det.config.classes import count_classes, find_label_names
from kd_det.config.composition import build_term, distillation_config
from kd_det.config.options import merge_options, resolve_config
from kd_det.deploy.checking import quiet
from kd_det.heads import HeadError
from kd_det.losses.outputs import Treatment, treat_teacher
from kd_det.registry import build_detector, get_scope, prepare_without_runner, within_scope
from kd_det.study.chain import Chain
from kd_det.study.identity import hash_weights
from kd_det.study.variants import DISTILLATION_KEYS
from kd_det.teachers.loading import load_strictly
from kd_det.training.runs import distill, train

RECORD, CONFIG, FOUND, MAP = 'generations.json', 'generation.py', 'found.npz', 'coco/bbox_mAP'
SAME_BOX = 0.55  # the IoU from which on boxes are of one object, as in the fusion's paper
MOST_SEEDS = 2**32


@dataclass(frozen=True)
class Generation:
    """One of them.

    Attributes:
        name: ``generation_0``, which has no teacher, and so on.
        checkpoint: A plain detector's; of the first, what was given, if anything was.
        metrics: COCO's of its boxes on the validation data, such as ``coco/bbox_mAP``, 0 to 1.
        ensemble: The same of its boxes united with those of all before it; of the first its own.
    """
    name: str
    checkpoint: str | Path
    metrics: dict[str, float]
    ensemble: dict[str, float]


@dataclass(frozen=True)
class Generations:
    """A student and those that were born of it.

    Attributes:
        work_dir: Holds all of it, a folder for each.
        config: Of each of the detectors.
        method: By which each learnt from the one before.
        treatment: Of what that said of classes.
        members: They, in order.
    """
    work_dir: Path
    config: Path
    method: str
    treatment: str
    members: tuple[Generation, ...]

    @property
    def best(self) -> Generation:
        """The one of the highest mAP; of equals the first."""
        return max(self.members, key=lambda each: each.metrics[MAP])

    def tabulate(self) -> TextTable:
        """Makes a table with a row for each."""
        first, rows = self.members[0].metrics[MAP], []
        for number, each in enumerate(self.members):
            own, united = each.metrics[MAP], each.ensemble[MAP]
            cells = [f'{100 * own:.1f}', f"{100 * each.metrics[f'{MAP}_50']:.1f}"]
            cells += [f'{100 * (own - first):+.1f}', f'0 to {number}', f'{100 * united:.1f}',
                      f'{100 * (united - first):+.1f}'] if number else [''] * 4
            rows.append((str(number), *cells))
        treated = '' if self.treatment == 'none' else f', {self.treatment}'
        return TextTable('Generations', ('generation', 'mAP', 'AP50', 'difference to 0', 'ensemble of', 'mAP',
                                         'difference to 0'), rows,
                         f'Each learns from the one before it by {self.method}{treated}. Boxes on the validation data; '
                         "an ensemble's are fused. Of one training each: see what seeds alone do to them.")

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        return dict(asdict(self), work_dir=str(self.work_dir), config=str(self.config),
                    members=[dict(asdict(each), checkpoint=str(each.checkpoint)) for each in self.members])

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def generations(student: str | Path | Config, *, generations: Count = 3, method: str = 'kd',
                treatment: Treatment = 'none', checkpoint: str | Path | None = None,
                work_dir: str | Path | None = None, epochs: Count | None = None, task_weight: Weight = 1.0,
                inherit: Parts = (), balance: Ratio | None = None, family: str = '', seed: Seed = 0,
                data_root: str | None = None, options: dict[str, Any] | None = None,
                log: Callable[[str], None] = print) -> Generations:
    """Trains a student, and after it generations of the same detector, each of which learns from the one before.

    Each is measured on the validation data, and so are the boxes of all up to it, fused by :func:`unite`. What is
    finished is not done again, and a training that was ended goes on. More generations of the same settings may be
    asked for later.

    Args:
        student: The student's config, as :func:`~kd_det.training.runs.distill` takes it.
        generations: How many learn from the one before; generation 0 is beside them.
        method: By which, see there.
        treatment: Of what the teacher says of classes, of all terms of the method that compare them: ``'none'``,
            ``'cwtm'`` or ``'dkpp'``, see :class:`~kd_det.losses.DenseClassification`.
        checkpoint: The weights of generation 0; it is trained by default, without a teacher.
        work_dir: The folder for all of it; ``work_dirs/STUDENT_generations`` by default.
        epochs: Of each training; the config's own by default.
        task_weight: Of the loss on the ground truth, where there is a teacher. With 0 a method has to teach all that
            the detector is to learn, its boxes too.
        inherit: What a student starts from of its teacher's weights; nothing by default, see there.
        balance: See there.
        family: See there.
        seed: Of generation 0; that of generation k is by k higher, so that it does not start as its teacher did.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key; those of the distillation, such as
            ``model.distill.kd.temperature``, reach all generations but the first.
        log: Given a line on what is being done.

    Raises:
        ConfigurationError: The config has no validation data, or is a distillation; the method has no term that the
            treatment is for, or the detector too few classes for it; or see the functions that train.
        WritingError: The folder holds generations of other settings, or a file that would be replaced.
        DiagnosisError: A key or value does not fit, or a file is missing.
        CheckpointError: The checkpoint is of another detector.
    """
    options = dict(options or {})
    of_distillation = {key: options.pop(key) for key in [*options] if key.startswith(DISTILLATION_KEYS)}
    config = resolve_config(student, data_root, options)
    name = Path(config.filename or 'student').stem
    if not config.get('val_dataloader'):
        raise ConfigurationError(f"The config '{name}' has no val_dataloader: generations are measured on validation "
                                 'data.')
    folder = Path(work_dir or Path('work_dirs') / f'{name}_generations')
    text = config.pretty_text
    settings = dict(student=text, method=method, treatment=treatment, epochs=epochs, inherit=inherit,
                    task_weight=task_weight, balance=balance, family=family, seed=seed, options=of_distillation,
                    checkpoint=checkpoint and hash_weights(str(checkpoint)))
    with locked_folder(folder):
        file = folder / CONFIG
        if not (folder / RECORD).is_file():  # else both are of an earlier call
            refuse_to_replace(file, lambda content: content == text.encode(), 'the config of these generations',
                              advice='Give another folder.')
        lineage = _Lineage(folder, settings, config, log)
        write_whole(file, text)
        # What the later generations will be refused for is told before the first one trains.
        composed = distillation_config(config, str(file), 'generation_0.pth', method, inherit, family, balance)
        merge_options(composed, {**of_distillation, 'model.task_weight': task_weight})
        raise_faults(inspect_arguments(composed))
        treated = _find_treated(composed, method, treatment)
        check_config(config, splits=('train', 'val'))
        teach = partial(distill, config, file, method=method, inherit=inherit, balance=balance, family=family,
                        options={**of_distillation, **treated, 'model.task_weight': task_weight})
        members: list[Generation] = []
        for number in range(generations + 1):
            name, own = f'generation_{number}', checkpoint
            if number or checkpoint is None:
                start = partial(teach, members[-1].checkpoint) if number else partial(train, config)
                own = lineage.train(name, folder / name,
                                    partial(start, epochs=epochs, seed=(seed + number) % MOST_SEEDS))[1]
            members.append(lineage.measure(name, own))
    return Generations(folder, file, method, treatment, tuple(members))


class _Lineage(Chain):
    """What is finished of all generations, and what those so far have found.

    Args:
        out: The folder.
        settings: All that the result depends on.
        config: Of the detector, with validation data.
        log: Given a line on what is being done.

    Raises:
        WritingError: The folder holds generations of other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any], config: Config, log: Callable[[str], None]) -> None:
        super().__init__(out, RECORD, settings, 'generations', log)
        self.config, self.found = config, []

    @cached_property
    def dataset(self) -> Any:
        """The validation data."""
        with within_scope(get_scope(self.config)):
            return DATASETS.build(copy.deepcopy(self.config.val_dataloader.dataset))

    def measure(self, name: str, checkpoint: str | Path) -> Generation:
        """Measures the next generation, alone and with those before it, once."""
        stored, file = self.record['stages'].get(name), self.out / name / FOUND
        if stored is not None and stored['checkpoint'] == str(checkpoint) and file.is_file():
            self.found.append(_unpack(file))
        else:
            self.log(f'{name}: evaluation …')
            self.found.append(find_boxes(self.config, str(checkpoint), self.dataset))
            file.parent.mkdir(exist_ok=True)
            write_whole(file, _pack(self.found[-1]))
            metrics = ensemble = measure_boxes(self.found[-1], self.dataset)
            if len(self.found) > 1:
                ensemble = measure_boxes([unite(of_image) for of_image in zip(*self.found, strict=True)], self.dataset)
            stored = dict(checkpoint=str(checkpoint), metrics=metrics, ensemble=ensemble)
            self.record['stages'][name] = stored
            self.save()
        return Generation(name, checkpoint, stored['metrics'], stored['ensemble'])


def _find_treated(config: Config, method: str, treatment: Treatment) -> dict[str, str]:
    """The options that give all terms of a distillation which compare classes a treatment.

    Raises:
        ConfigurationError: There are none, or one can not have it, or the detector has too few classes for it.
    """
    if treatment == 'none':
        return {}
    with within_scope(get_scope(config)):
        treated = [name for name, term in config.model.distill.items() if hasattr(build_term(term), 'treatment')]
        if not treated:
            raise ConfigurationError(f"treatment: '{treatment}' is of what a teacher says of classes, and the method "
                                     f"'{method}' has no term that compares them; kd, bckd, dkd and querykd have.")
        for name in treated:
            with at(f'model.distill.{name}'):
                build_term(dict(config.model.distill[name], treatment=treatment))
        with preserved_randomness():
            detector = build_detector(config.model.student)
    head = getattr(detector, 'bbox_head', None)
    logits = getattr(head, 'cls_out_channels', (count_classes(detector) or 2) + 1)  # a RoI head's have a background
    try:
        treat_teacher(treatment, torch.zeros(1, logits))
    except HeadError as error:
        raise ConfigurationError(str(error)) from None
    return {f'model.distill.{name}.treatment': treatment for name in treated}


def find_boxes(config: Config, checkpoint: str, dataset: Any) -> list[InstanceData]:
    """What a detector finds on each image of a data set: ``bboxes``, ``scores``, ``labels``, on the CPU."""
    prepare_without_runner(config)
    detector = build_detector(config.model)
    load_strictly(detector, checkpoint, role='student')
    detector.to(get_device()).eval()
    loader = config.val_dataloader
    found: list[InstanceData] = []
    with torch.no_grad():
        for batch in DataLoader(dataset, batch_size=loader.get('batch_size') or 1, collate_fn=pseudo_collate,
                                num_workers=loader.get('num_workers') or 0):
            found += [plain_boxes(sample.pred_instances) for sample in detector.val_step(batch)]
    return found


def measure_boxes(found: Sequence[InstanceData], dataset: Any) -> dict[str, float]:
    """COCO's metrics of boxes on a data set: ``coco/bbox_mAP`` and so on, 0 to 1; -1 where there are no such objects.

    Args:
        found: On each image, ``bboxes``, ``scores`` and ``labels``.
        dataset: With their ground truth.

    Raises:
        ConfigurationError: It does not name its classes.
    """
    names = find_label_names(dataset)
    if names is None:
        raise ConfigurationError('The validation data does not name its classes: write metainfo=dict(classes=(…)) in '
                                 'val_dataloader.dataset.')
    metric = Evaluator([CocoMetric(metric='bbox')])
    metric.dataset_meta = dict(classes=names)
    for index, each in enumerate(found):
        image = dataset.get_data_info(index)
        metric.process([dict(img_id=index, ori_shape=(image['height'], image['width']), pred_instances=each,
                             instances=[plain_object(each) for each in image.get('instances') or ()])])
    with quiet():
        measured = metric.evaluate(len(found))
    # Of nothing found the metric makes none.
    return {f'{MAP}{kind}': float(measured.get(f'{MAP}{kind}', 0.0)) for kind in ('', '_50', '_75', '_s', '_m', '_l')}


def unite(members: Sequence[InstanceData]) -> InstanceData:
    """The boxes of several detectors on an image, fused: weighted boxes fusion (Solovyev et al., arXiv 1910.13302).

    Boxes of a class that overlap by an IoU of more than 0.55 become one: the mean of their corners, weighted by their
    scores, with the mean of the scores times the share of the detectors that found it. It is MMDetection's.

    Args:
        members: Of each detector, ``bboxes``, ``scores``, ``labels``. Boxes without area are left out.

    Example:
        >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> first, second = (InstanceData(bboxes=box + shift, scores=torch.tensor([score]), labels=torch.tensor([2]))
        ...                  for shift, score in ((0.0, 0.75), (1.0, 0.25)))
        >>> united = unite([first, second])
        >>> united.bboxes, united.scores  # both found it; next, one of two did
        (tensor([[ 0.2500,  0.2500, 10.2500, 10.2500]]), tensor([0.5000]))
        >>> unite([first, second[:0]]).scores
        tensor([0.3750])
    """
    kept = [each[(each.bboxes[:, 2:] > each.bboxes[:, :2]).all(1) & (each.scores > 0)] for each in members]
    boxes, scores, labels = weighted_boxes_fusion([each.bboxes.numpy() for each in kept],
                                                  [each.scores.numpy() for each in kept],
                                                  [each.labels.numpy() for each in kept], iou_thr=SAME_BOX)
    return InstanceData(bboxes=boxes.view(-1, 4), scores=scores, labels=labels.long())


def _pack(found: Sequence[InstanceData]) -> bytes:
    content = BytesIO()
    joined = {key: torch.cat([each[key] for each in found]).numpy() for key in ('bboxes', 'scores', 'labels')}
    np.savez_compressed(content, counts=[len(each) for each in found], **joined)
    return content.getvalue()


def _unpack(file: Path) -> list[InstanceData]:
    with np.load(file) as content:
        counts = content['counts'].tolist()
        parts = {key: torch.from_numpy(content[key]).split(counts) for key in ('bboxes', 'scores', 'labels')}
    return [InstanceData(**dict(zip(parts, each))) for each in zip(*parts.values())]
