"""The student's score on images that are held out from its training: what policies that learn are rewarded by."""
from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.logging import MMLogger
from mmengine.runner import Runner, set_random_seed
from torch import nn

from kd_det.checks.preflight import MAP, plain_boxes
from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Count, declared
from kd_det.config.classes import find_label_names
from kd_det.config.files import ConfigurationError, get_type_name
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.policies import Policy
from kd_det.distillers.supervision import get_boxes, read_supervision
from kd_det.teachers.engine import take_from_first_rank
from kd_det.teachers.judging import alone, in_training, sum_losses
from kd_det.training.finiteness import find_common_seed
from kd_det.training.replay import training_epoch

REPEATING = 'RepeatDataset', 'ClassBalancedDataset'  # wrappers that only show images more often


@DATASETS.register_module()
class HeldOut:
    """A data set without some of its images, or these images alone, evenly spaced over it.

    Args:
        dataset: The config of the data set.
        images: How many are held out.
        part: ``'train'``: all others; ``'probe'``: those held out.
        lazy_init: As that of MMEngine's data sets.

    Raises:
        ConfigurationError: The data set has not more images.
    """

    @declared
    def __init__(self, dataset: dict[str, Any], images: Count = 64, part: Literal['train', 'probe'] = 'train',
                 lazy_init: bool = False) -> None:
        self.dataset = DATASETS.build(dataset)
        self.images, self.part = images, part
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        return self.dataset.metainfo

    @property
    def pipeline(self) -> Any:
        """That of the data set within, which a PipelineSwitchHook exchanges."""
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        self.dataset.pipeline = pipeline

    def full_init(self) -> None:
        """Loads the annotations of the data set within, and finds which images are held out."""
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()
        number = len(self.dataset)
        if self.images >= number:
            raise ConfigurationError(f'A probe of {self.images} images can not be held out from training data of '
                                     f'{number}: give HeldOut fewer images.')
        held = [int((place + 0.5) * number / self.images) for place in range(self.images)]
        self.indices = held if self.part == 'probe' else sorted(set(range(number)) - {*held})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        prepare = getattr(self.dataset, 'prepare_data', None)
        if prepare is None:
            return self.dataset[self.indices[index]]
        for _ in range(getattr(self.dataset, 'max_refetch', 1000) + 1):
            data = prepare(self.indices[index])
            if data is not None:
                return data
            index = np.random.randint(len(self))  # as MMEngine does, but among its own
        raise RuntimeError('The pipeline leaves no image of the data set: look at its filters.')

    def get_data_info(self, index: int) -> dict:
        """What is known of an image before the pipeline."""
        return self.dataset.get_data_info(self.indices[index])

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes in an image, for data sets that balance these."""
        return self.dataset.get_cat_ids(self.indices[index])


def make_probe_dataset(dataset: Mapping[str, Any]) -> dict | None:
    """Makes the config of the images that a training data set's config holds out; None where it holds out none.

    Wrappers stay, but for those that only repeat images.
    """
    kind = get_type_name(dataset)
    if kind == HeldOut.__name__:
        return dict(copy.deepcopy(dict(dataset)), part='probe')
    if 'datasets' in dataset:
        found = [each for each in map(make_probe_dataset, dataset['datasets']) if each is not None]
        return dict(copy.deepcopy({**dataset, 'datasets': ()}), datasets=found) if found else None
    if 'dataset' not in dataset:
        return None
    inner = make_probe_dataset(dataset['dataset'])
    if inner is None or kind in REPEATING:
        return inner
    return dict(copy.deepcopy({**dataset, 'dataset': None}), dataset=inner)


@declared
@dataclass(frozen=True)
class ProbeSettings:
    """How the student is evaluated for its policy.

    Args:
        metric: ``'loss'``: minus the student's own loss, mean over the images; ``'map'``: the mAP of its boxes, COCO's.
        batch_size: Images at a time; that of the training by default.
    """
    metric: Literal['loss', 'map'] = 'loss'
    batch_size: Count | None = None


class StudentProbe:
    """Evaluates the student on the images that the training data holds out (:class:`HeldOut`).

    Images pass the training pipeline, and are drawn alike each time. Normalisation layers use their moving statistics,
    those of the first rank, and nothing of the student or of any generator changes. Ranks share the batches, each
    computed as by one process.

    Args:
        runner: The run.
        settings: How.

    Raises:
        ConfigurationError: The training data holds out no images.
    """

    def __init__(self, runner: Runner, settings: ProbeSettings = ProbeSettings()) -> None:
        loader = runner.cfg.train_dataloader
        config = make_probe_dataset(loader['dataset'])
        if config is None:
            raise ConfigurationError(
                'model.policy learns from what the student scores on images that it does not train on, and '
                "train_dataloader.dataset holds out none: wrap it, as dict(type='HeldOut', dataset=…, images=64); "
                'kd-det distill --policy does.')
        with preserved_randomness():
            self.dataset = DATASETS.build(config)
            getattr(self.dataset, 'full_init', lambda: None)()
        self.metric, size = settings.metric, settings.batch_size or loader.get('batch_size') or 1
        self._drawn: dict[int, Any] = {}
        self.batches = [range(first, min(first + size, len(self.dataset)))
                        for first in range(0, len(self.dataset), size)]

    @torch.no_grad()
    def score(self, distiller: DetectionDistiller) -> float:
        """The score, the same on all ranks; the higher the better."""
        student, found, quantizer = distiller.student, [], distiller.quantizer
        with preserved_randomness(), with_statistics_of_first_rank(student), in_training(student), alone(), \
                ExitStack() as stack:
            if quantizer is not None:  # its ranges are those of the images that the student trains on
                stack.callback(quantizer.train, quantizer.training)
                quantizer.eval()
            for number in range(get_rank(), len(self.batches), get_world_size()):
                images = self._draw(number)
                set_random_seed(number)
                data = distiller.data_preprocessor(copy.deepcopy(images), False)
                supervision = read_supervision(data['data_samples'])
                rows = [row for row, labelled in enumerate(supervision.labelled) if labelled]
                samples = [supervision.samples[row] for row in rows]
                if rows:
                    found.append(self._judge(student, data['inputs'][rows], samples, self.batches[number][0]))
        return self._unite_boxes(found) if self.metric == 'map' else self._unite_losses(found)

    def _draw(self, number: int) -> Any:
        """The images of a batch, as they were drawn first: transforms may keep what they saw, or ask for the epoch."""
        if number not in self._drawn:
            epoch = training_epoch()
            now = epoch.get()
            epoch.set(0)
            set_random_seed(number)
            self._drawn[number] = pseudo_collate([self.dataset[each] for each in self.batches[number]])
            epoch.set(now)
        return self._drawn[number]

    def _judge(self, student: nn.Module, inputs: torch.Tensor, samples: list, first: int) -> Any:
        if self.metric == 'loss':
            return sum_losses(student.loss(inputs, samples)).item() * len(samples), len(samples)
        student.eval()
        judged = []
        for place, (sample, predicted) in enumerate(zip(samples, student.predict(inputs, samples, rescale=False))):
            truth = [dict(bbox=box, bbox_label=label, ignore_flag=0) for box, label in
                     zip(get_boxes(sample).tolist(), sample.gt_instances.labels.tolist())]
            judged.append(dict(img_id=first + place, ori_shape=sample.img_shape[:2], instances=truth,
                               pred_instances=plain_boxes(predicted.pred_instances)))
        return judged

    def _unite_losses(self, found: Sequence[tuple[float, int]]) -> float:
        total = torch.tensor([[*each] for each in found], dtype=torch.float64).reshape(-1, 2).sum(0)
        all_reduce(total)
        return -(total[0] / total[1].clamp(min=1)).item()

    def _unite_boxes(self, found: Sequence[list[dict]]) -> float:
        everyone = [each for rank in all_gather_object(list(found)) for batch in rank for each in batch]
        metric = CocoMetric(metric='bbox')
        metric.dataset_meta = dict(classes=find_label_names(self.dataset) or self.dataset.metainfo['classes'])
        metric.process({}, sorted(everyone, key=lambda each: each['img_id']))
        with _quiet():
            return float(metric.compute_metrics(metric.results).get(MAP.partition('/')[2], 0.0))


@contextmanager
def with_statistics_of_first_rank(model: nn.Module) -> Iterator[None]:
    """Within, a model has the buffers that a checkpoint holds, by which a resumed run goes on, on every rank."""
    buffers = [each for each in model.buffers() if each.is_floating_point()] if get_world_size() > 1 else []
    own = [each.clone() for each in buffers]
    take_from_first_rank(buffers)
    try:
        yield
    finally:
        for buffer, before in zip(buffers, own):
            buffer.copy_(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, only warnings are logged."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def start_policy(runner: Runner, distiller: DetectionDistiller, settings: ProbeSettings) -> StudentProbe | None:
    """Prepares a policy for a run: its seed, and the probe that it needs.

    Raises:
        ConfigurationError: It needs one, and the training data holds out no images.
    """
    policy: Policy | None = distiller.policy
    if policy is None:
        return None
    policy.seed = find_common_seed(runner)
    return StudentProbe(runner, settings) if policy.needs_probe else None


def reward_policy(runner: Runner, distiller: DetectionDistiller, probe: StudentProbe | None) -> None:
    """Evaluates the student before a step, where its policy wants that."""
    policy: Policy | None = distiller.policy
    if policy is not None and probe is not None and policy.is_due(distiller.progress):
        score = probe.score(distiller)
        policy.evaluate(score, distiller.progress)
        runner.message_hub.update_scalar('train/policy/probe', score)
