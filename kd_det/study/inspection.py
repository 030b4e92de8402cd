"""What one batch of a distillation looks like: taps, values and gradients of the terms, levels, masks."""
from __future__ import annotations

import base64
import copy
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor

from kd_det.checks.data import check_labels
from kd_det.checks.doctor import check_config, explain
from kd_det.checks.images import check_images
from kd_det.checks.synthetic import draw_at_random
from kd_det.compat import load_checkpoint, require_finite
from kd_det.compat.console import TextTable
from kd_det.config import ConfigurationError
from kd_det.config.arguments import declared
from kd_det.config.classes import Names, find_label_names, find_training_classes
from kd_det.config.files import get_type_name, list_leaf_datasets
from kd_det.config.options import resolve_distillation
from kd_det.context import ComparedLevel
from kd_det.distillers.building import list_guide_configs
from kd_det.distillers.detection_distiller import DetectionDistiller, Observation
from kd_det.distillers.gradients import GradientNorms, gradient_norms
from kd_det.distillers.monitor import find_idle_terms
from kd_det.distillers.supervision import bring_detections
from kd_det.heads import DenseOutputs, QueryDecoder, QueryOutputs, RoIOutputs
from kd_det.losses import DistillTerm, FeatureTerm
from kd_det.losses.base import sum_parts
from kd_det.registry import build_detector, prepare_without_runner
from kd_det.study.maps import Comparison, draw_comparisons, make_mask_maps, observe_comparisons
from kd_det.teachers import load_strictly
from kd_det.training.hooks import CHECKPOINT_KEY

CHECKED_IMAGES = 500  # of the training data that are read before; a run reads all
NONE = '–'


@declared
def inspect(config: str | Path | Config, *, image: str | Path | None = None, checkpoint: str | None = None,
            teacher_checkpoint: str | None = None, random_teacher: bool = False, out: str | Path | None = None,
            data_root: str | None = None, options: dict[str, Any] | None = None, force: bool = False) -> Inspection:
    """Looks at one batch of a distillation, and draws the masks and attentions of its terms.

    Args:
        config: Of a distillation: a file, ``'package::folder/file.py'`` or a config.
        image: Look at this image, without ground truth, prepared as for validation; at the first training batch by
            default.
        checkpoint: Of the student: look at what it is after some training. Through an untrained head hardly any
            gradient of the task passes.
        teacher_checkpoint: The teacher's weights, in place of the config's.
        random_teacher: A dry run without the weights of any teacher.
        out: Folder for the pictures, ``work_dirs/CONFIG/inspection`` by default.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key.
        force: Replace files of the pictures' names that are none.

    Raises:
        WritingError: There are such files.
        ConfigurationError: The config is no distillation, or can not serve.
        DiagnosisError: A file is missing, or the data can not be trained on.
        FileNotFoundError: There is no such image.
    """
    config = resolve_distillation(config, data_root, options)
    _set_teachers(config, teacher_checkpoint, random_teacher)
    check_config(config, splits=() if image else ('train', ))
    prepare_without_runner(config, (config.get('randomness') or {}).get('seed') or 0)
    with explain(config):
        distiller = _build_distiller(config, checkpoint)
        batch, names = ((load_image(config, image), find_training_classes(config)) if image
                        else load_training_batch(config, distiller))
        distiller.match_classes(names)
        step = observe_step(distiller, batch)
    folder = Path(out) if out else Path('work_dirs') / Path(config.filename or 'config').stem / 'inspection'
    return describe_step(distiller, step, draw_step(distiller, step, folder, force))


class Tap(NamedTuple):
    """What is read in the student on one level, and what of the teacher it is paired with; shapes as N × C × H × W."""
    student: str
    student_shape: str
    stride: str
    teacher: str
    teacher_shape: str


@dataclass(frozen=True)
class InspectedLevel:
    """One level that a term compares.

    Attributes:
        name: What of the student it is, such as ``neck[0]``.
        stride: In pixels.
        student_shape: (N, C, H, W) after the adapter; of a dense head (N, H·W·A, K).
        teacher_shape: The same of the teacher.
        parts: Part -> its share of the term's value, without weight.
        masks: Mask -> its mass: the sum of its weights over the cells of an image, mean over the batch; the mean of its
            weights over the channels, where it has them, is a factor.
        cells: Cells of an image that hold a part of it and not only padding, mean over the batch.
    """
    name: str
    stride: float
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    parts: dict[str, float]
    masks: dict[str, float] = field(default_factory=dict)
    cells: float | None = None


@dataclass(frozen=True)
class InspectedTerm:
    """One term.

    Attributes:
        value: Without weight.
        parts: The parts that it is the sum of, by name.
        weight: Without schedules; of a balanced term that of this step.
        kind: Type of a weight that is not constant; else empty.
        taps: Where the gradients are measured.
        gradient: Norm of the weighted term's gradient there.
        task_gradient: The same of the student's own loss.
        levels: What it compares level by level; empty where it does not.
        idle: Why it can teach the student nothing; empty where it can.
    """
    value: float
    parts: dict[str, float]
    weight: float
    kind: str
    taps: tuple[str, ...]
    gradient: float
    task_gradient: float
    levels: tuple[InspectedLevel, ...] = ()
    idle: str = ''


@dataclass(frozen=True)
class Inspection:
    """What one batch of a distillation looks like.

    Attributes:
        taps: What is read, with the names of the terms that read it.
        terms: By name.
        task_loss: The student's own loss.
        has_boxes: Whether there is any box in the batch.
        pictures: Files of the masks and attentions of the terms.
        arms: Between which a policy chooses, each with the names of its terms; the batch shows all as they teach alone.
    """
    taps: dict[Tap, tuple[str, ...]]
    terms: dict[str, InspectedTerm]
    task_loss: float
    has_boxes: bool
    pictures: tuple[Path, ...] = ()
    arms: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def tabulate_taps(self) -> TextTable:
        """Makes a table of what the terms read in the student, and what of the teacher it is paired with."""
        rows = [(*tap, ', '.join(names)) for tap, names in self.taps.items()]
        return TextTable('Taps', ('Student', 'Shape', 'Stride', 'Paired with', 'Shape', 'Read by'), rows,
                         words=range(6))

    def tabulate_terms(self) -> TextTable:
        """Makes a table of each term's value and parts, its weight, and its gradient beside the task's."""
        rows = []
        for name, term in self.terms.items():
            ratio = f'{term.gradient / term.task_gradient:.2f}' if term.task_gradient > 0 else NONE
            rows.append((name, _number(term.value), _number(term.weight) + (f' ({term.kind})' if term.kind else ''),
                         _number(term.weight * term.value), ', '.join(term.taps), _number(term.gradient),
                         _number(term.task_gradient), ratio))
            rows += [(f'  {part}', _number(value), '', _number(term.weight * value), '', '', '', '')
                     for part, value in (term.parts.items() if len(term.parts) > 1 else ())]
        rows.append(("the student's own loss", _number(self.task_loss), *[''] * 6))
        caption = "Ratio: of the weighted term's gradient on the student's features to the task's"
        if not self.has_boxes:
            caption += ', to which all is background: there are no boxes'
        if self.arms:
            caption += '\nEach as it teaches alone; the policy weighs ' + ', '.join(
                f"{arm} ({', '.join(names)})" for arm, names in self.arms.items())
        for name, term in self.terms.items():
            if term.idle:
                caption += (f'\n{name} teaches the student nothing: none of its weights gets a gradient from it. '
                            f'{term.idle}')
        return TextTable('Terms', ('Term', 'Value', 'Weight', 'Weighted', 'Measured at', 'Gradient', "Task's", 'Ratio'),
                         rows, caption)

    def tabulate_levels(self) -> TextTable:
        """Makes a table of what each term compares on each level, and what that gives."""
        rows = []
        for name, term in self.terms.items():
            for level in term.levels:
                shapes = [_shape(shape) for shape in (level.student_shape, level.teacher_shape)]
                rows.append((name, level.name, f'{level.stride:g}', ' / '.join(dict.fromkeys(shapes)),
                             _number(sum(level.parts.values())),
                             _list(level.parts) if len(level.parts) > 1 else '',
                             _list(level.masks) + (f' of {level.cells:g}' if level.masks else '')))
        return TextTable('Levels', ('Term', 'Level', 'Stride', 'Compared', 'Value', 'Parts', 'Masks'), rows,
                         'Compared: after the adapter; student / teacher where the shapes differ. Masks: the sum of '
                         'the weights over the cells of an image, of so many cells, mean over the batch',
                         words=(0, 1, 3, 5, 6))

    def tabulate(self) -> list[TextTable]:
        """Makes all tables: taps, terms and, where any term compares level by level, levels."""
        levels = self.tabulate_levels()
        return [self.tabulate_taps(), self.tabulate_terms(), *([levels] if levels.rows else [])]

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers and the names of the pictures, as JSON can hold them."""
        return dict(taps=[dict(tap._asdict(), read_by=list(names)) for tap, names in self.taps.items()],
                    terms={name: asdict(term) for name, term in self.terms.items()}, task_loss=self.task_loss,
                    has_boxes=self.has_boxes, pictures=list(map(str, self.pictures)),
                    arms={arm: list(names) for arm, names in self.arms.items()})

    def _repr_html_(self) -> str:
        """The tables, and the pictures of the first image."""
        first = [file for file in self.pictures if file.name.startswith('0_') and file.is_file()]
        pictures = (f'<figure><img alt="{file.stem}" src="data:image/png;base64,'
                    f'{base64.b64encode(file.read_bytes()).decode()}"><figcaption>{file.stem[2:]}</figcaption></figure>'
                    for file in first)
        return ''.join((*(table.to_html() for table in self.tabulate()), *pictures))


class ObservedStep(NamedTuple):
    """One training step that nothing was learnt from.

    Attributes:
        inputs: (N, C, H, W), the preprocessed batch.
        observation: What the distiller observed, with the values of all terms, without weights.
        task: The student's own loss.
        norms: By the terms' names, without weights.
        comparisons: By the names of the terms that compare level by level, see
            :func:`~kd_det.study.maps.observe_comparisons`.
    """
    inputs: Tensor
    observation: Observation
    task: Tensor
    norms: dict[str, GradientNorms]
    comparisons: dict[str, list[Comparison]]


def observe_step(distiller: DetectionDistiller, batch: dict) -> ObservedStep:
    """Runs one training step without learning from it.

    All terms are run, those too that have no weight at the beginning of the training.

    Args:
        distiller: The distiller, in training mode.
        batch: As a data loader gives it.
    """
    data = distiller.data_preprocessor(batch, True)
    observation, comparisons = observe_comparisons(distiller, data)
    task, learner = distiller.parse_losses(observation.losses)[0], distiller.learners[0]
    norms = gradient_norms(task, {name: sum_parts(value) for name, value in observation.values.items()},
                           {name: learner.gradient_features(name, observation.context) for name in learner.terms})
    return ObservedStep(data['inputs'], observation, task, norms, comparisons)


def draw_step(distiller: DetectionDistiller, step: ObservedStep, folder: Path, force: bool = True) -> list[Path]:
    """Draws the masks and attentions of a step, see :func:`~kd_det.study.maps.draw_comparisons`."""
    return draw_comparisons(distiller, step.inputs, step.observation.context.boxes, step.comparisons, folder,
                            force)


def describe_step(distiller: DetectionDistiller, step: ObservedStep, pictures: Sequence[Path] = ()) -> Inspection:
    """Describes a step in numbers."""
    taps: dict[Tap, dict[str, None]] = {}
    for name, term in distiller.learners[0].terms.items():
        for tap in (*_feature_taps(term, step), *_head_taps(term, step)):
            taps.setdefault(tap, {})[name] = None
    idle, terms = find_idle_terms(distiller.learners[0], step.observation), {}
    for name, value in step.observation.values.items():
        norms, weight = step.norms[name], distiller.schedules[name]
        factor = weight.full
        if weight.balance is not None:
            factor *= (norms.task / norms.term).item() if norms.term > 0 else 0.0
        parts = {part: each.item() for part, each in value.items()} if isinstance(value, dict) else {}
        terms[name] = InspectedTerm(
            sum_parts(value).item(), parts, factor, '' if weight.is_constant else type(weight).__name__,
            tuple(distiller.connections.gradient_taps[name]), factor * norms.term.item(), norms.task.item(),
            tuple(_describe_levels(distiller.terms[name], step.comparisons.get(name, ()))), idle.get(name, ''))
    return Inspection({tap: tuple(names) for tap, names in taps.items()}, terms, step.task.item(),
                      any(map(len, step.observation.context.boxes)), tuple(pictures),
                      dict(distiller.policy.arms) if distiller.policy else {})


@torch.no_grad()
def _describe_levels(term: DistillTerm, comparisons: Sequence[Comparison]) -> Iterator[InspectedLevel]:
    for level, values in comparisons:
        parts = {part: value.item() for part, value in values.items()}
        if isinstance(level, ComparedLevel):
            valid, masks = level.valid.float(), {}
            for title, (each, ) in make_mask_maps(term, [level]):
                cells = (valid if each.cells is None else each.cells).sum((1, 2))
                masks[title] = float((cells if each.channels is None else cells * each.channels.mean(1)).mean())
            yield InspectedLevel(f'{term.student_path}[{level.index}]', level.stride, tuple(level.student.shape),
                                 tuple(level.teacher.shape), parts, masks, float(valid.sum((1, 2)).mean()))
        else:
            student, teacher = level.both('logits')
            yield InspectedLevel(f'{term.student_head}[{level.student_level}]',
                                 level.student.strides[level.student_level], tuple(student.shape),
                                 tuple(teacher.shape), parts)


def _feature_taps(term: DistillTerm, step: ObservedStep) -> Iterator[Tap]:
    context = step.observation.context
    for pair in term.pairs if isinstance(term, FeatureTerm) else ():
        student = context.student[term.student_path][pair.student_level]
        teacher = context.teachers[term.teacher_index][term.teacher_path][pair.teacher_level]
        yield Tap(f'{term.student_path}[{pair.student_level}]', _shape(student.shape), str(pair.student_spec.stride),
                  f'{_name_teacher(term, step)}{term.teacher_path}[{pair.teacher_level}]', _shape(teacher.shape))


def _head_taps(term: DistillTerm, step: ObservedStep) -> Iterator[Tap]:
    context = step.observation.context
    for student_head, teacher_head in zip_longest(term.student_heads, term.teacher_heads):
        students = _read_by_stride(context.student_outputs.get(student_head))
        teachers = _read_by_stride(context.teacher_outputs[term.teacher_index].get(teacher_head))
        what = 'memory' if isinstance(context.student_outputs.get(student_head), QueryDecoder) else 'logits'
        for stride in dict.fromkeys((*students, *teachers)):
            yield Tap(f'{student_head} {what}' if stride in students else NONE,
                      _shape(students[stride].shape) if stride in students else NONE, stride,
                      f'{_name_teacher(term, step)}{teacher_head} {what}' if stride in teachers else NONE,
                      _shape(teachers[stride].shape) if stride in teachers else NONE)


def _read_by_stride(outputs: Any) -> dict[str, Tensor]:
    """Class logits by stride; those of queries, and of a RoI head, of whose stages the first is shown, have none.

    Of a decoder it is the memory that it reads.
    """
    if isinstance(outputs, DenseOutputs):
        return dict(zip(map(str, outputs.strides), outputs.logits))
    first = outputs[0] if isinstance(outputs, tuple) and not isinstance(outputs, RoIOutputs) else outputs
    if isinstance(first, QueryDecoder):
        return {NONE: first.memory}
    return {NONE: first.logits} if isinstance(first, (QueryOutputs, RoIOutputs)) else {}


def _name_teacher(term: DistillTerm, step: ObservedStep) -> str:
    return f'teacher {term.teacher_index}: ' if len(step.observation.context.teachers) > 1 else ''


def _shape(sizes: Sequence[int]) -> str:
    return ' × '.join(map(str, sizes))


def _number(value: float) -> str:
    return f'{value:.4g}'


def _list(numbers: dict[str, float]) -> str:
    return ', '.join(f'{name} {_number(value)}' for name, value in numbers.items())


def load_training_batch(config: Config,
                        distiller: DetectionDistiller | None = None) -> tuple[dict, Names | None]:
    """Loads the first batch of the config's training data, in this process, and what its labels mean.

    Raises:
        DiagnosisError: The data is empty, its labels mean something else than its metainfo says, or an image can not
            be read.
    """
    settings = copy.deepcopy(config.train_dataloader)
    settings.update(num_workers=0, persistent_workers=False)
    settings.pop('prefetch_factor', None)
    with redirect_stdout(StringIO()):  # pycocotools writes
        loader = Runner.build_dataloader(settings, seed=(config.get('randomness') or {}).get('seed') or 0)
    check_labels(dict(train=loader.dataset))
    check_images(loader.dataset, most=CHECKED_IMAGES)
    if distiller is not None:
        bring_detections(distiller.pseudo_labels, distiller.build_teachers(), loader.dataset)
    return next(iter(loader)), find_label_names(loader.dataset)


def load_image(config: Config, file: str | Path) -> dict:
    """Loads one image, prepared as for validation, without ground truth, as a batch.

    Args:
        config: Its ``val_dataloader`` says how to prepare an image.
        file: The image.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: It is no image, or the config has no validation data.
    """
    if not config.get('val_dataloader'):
        raise ConfigurationError(f"The config '{config.filename}' has no val_dataloader, whose pipeline would prepare "
                                 'the image. Leave --image out to look at training data.')
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no image '{file}'.")
    pipeline = list_leaf_datasets(config.val_dataloader.dataset)[0]['pipeline']
    load, *prepare = (step for step in pipeline if 'Annotations' not in get_type_name(step))
    try:  # whatever the transform reads is an image
        loaded = Compose([load])(dict(img_path=str(file), img_id=0))
    except Exception as error:
        raise ConfigurationError(f"'{file}' can not be read as an image by {get_type_name(load)}, the first transform "
                                 f'of the val_dataloader: {type(error).__name__}: {error}') from error
    data = Compose(prepare)(loaded)
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    data['data_samples'].ignored_instances = nothing
    data['data_samples'].gt_instances = nothing.clone()
    data['data_samples'].gt_instances.masks = BitmapMasks([], *data['data_samples'].img_shape[:2])
    return pseudo_collate([data])


def _set_teachers(config: Config, checkpoint: str | None, random: bool) -> None:
    teachers = list_guide_configs(config.model.get('teacher', ()))
    if checkpoint and len(teachers) > 1:
        raise ConfigurationError(f'--teacher-checkpoint is for one teacher, and this config has {len(teachers)}: set '
                                 'theirs with --cfg-options model.teacher.0.checkpoint=FILE …')
    for teacher in teachers:
        if checkpoint:
            teacher['checkpoint'] = checkpoint
        elif random:
            draw_at_random(teacher)


def _build_distiller(config: Config, checkpoint: str | None) -> DetectionDistiller:
    """Builds the distiller as it is when training starts, or as a checkpoint has it."""
    distiller: DetectionDistiller = build_detector(config.model)
    distiller.init_weights()
    checkpoint = checkpoint or config.get('load_from')
    if checkpoint:
        load_strictly(distiller, checkpoint, role='student')
        loaded = load_checkpoint(checkpoint)
        if CHECKPOINT_KEY in loaded:
            require_finite(loaded[CHECKPOINT_KEY]['terms'], checkpoint, 'distillation')
            distiller.load_terms(loaded[CHECKPOINT_KEY]['terms'])
    return distiller.to(get_device()).train()
