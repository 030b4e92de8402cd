"""A batch to look at: the first that a run would train on, or a single image."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kd_det.checks.data import check_labels
from kd_det.checks.images import check_images
from kd_det.config.classes import Names, label_names
from kd_det.config.files import ConfigurationError, leaf_datasets, type_name
from kd_det.context import ComparedLevel
from kd_det.distillers.detection_distiller import DetectionDistiller, Observation
from kd_det.distillers.gradients import GradientNorms, gradient_norms
from kd_det.distillers.monitor import find_idle
from kd_det.distillers.weights import total
from kd_det.heads import DenseOutputs, QueryOutputs, RoIOutputs
from kd_det.losses import DistillTerm, FeatureTerm
from kd_det.taps import record_calls

IMAGES = 500  # of the training data that are read before; a run reads all


def first_training_batch(config: Config) -> tuple[dict, Names | None]:
    """The first batch of the config's training data, loaded in this process, and what its labels mean.

    Raises:
        DiagnosisError: The data is empty, its labels mean something else than its metainfo says, or an image can not
            be read.
    """
    settings = copy.deepcopy(config.train_dataloader)
    settings.update(num_workers=0, persistent_workers=False)
    settings.pop('prefetch_factor', None)
    loader = Runner.build_dataloader(settings, seed=(config.get('randomness') or {}).get('seed') or 0)
    check_labels(dict(train=loader.dataset))
    check_images(loader.dataset, most=IMAGES)
    return next(iter(loader)), label_names(loader.dataset)


def image_batch(config: Config, file: str | Path) -> dict:
    """One image, prepared as for validation, without ground truth.

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
    pipeline = leaf_datasets(config.val_dataloader.dataset)[0]['pipeline']
    load, *prepare = (step for step in pipeline if 'Annotations' not in type_name(step))
    try:  # whatever the transform reads is an image
        loaded = Compose([load])(dict(img_path=str(file), img_id=0))
    except Exception as error:
        raise ConfigurationError(f"'{file}' can not be read as an image by {type_name(load)}, the first transform of "
                                 f'the val_dataloader: {type(error).__name__}: {error}') from error
    data = Compose(prepare)(loaded)
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    data['data_samples'].ignored_instances = nothing
    data['data_samples'].gt_instances = nothing.clone()
    data['data_samples'].gt_instances.masks = BitmapMasks([], *data['data_samples'].img_shape[:2])
    return pseudo_collate([data])


class InspectedStep(NamedTuple):
    """What was seen in one step.

    Attributes:
        inputs: (N, 3, H, W), the preprocessed batch.
        observation: What the distiller observed, with the values of all terms, without weights.
        task: The student's own loss.
        norms: By the terms' names, without weights.
        levels: By the names of the terms that compare features level by level: what they compared.
    """
    inputs: Tensor
    observation: Observation
    task: Tensor
    norms: dict[str, GradientNorms]
    levels: dict[str, list[ComparedLevel]]


def inspect_step(distiller: DetectionDistiller, batch: dict) -> InspectedStep:
    """Runs one training step without learning from it.

    All terms are run, those too that have no weight at the beginning of the training.

    Args:
        distiller: The distiller, in training mode.
        batch: As a data loader gives it.
    """
    data = distiller.data_preprocessor(batch, True)
    observation, levels = compared_levels(distiller, data)
    task, _ = distiller.parse_losses(observation.losses)
    norms = gradient_norms(task, {name: total(value) for name, value in observation.values.items()},
                           {name: distiller.measured_features(name, observation.context) for name in distiller.terms})
    return InspectedStep(data['inputs'], observation, task, norms, levels)


def compared_levels(distiller: DetectionDistiller, data: dict) -> tuple[Observation, dict[str, list[ComparedLevel]]]:
    """Observes a batch with all terms.

    Args:
        distiller: The distiller.
        data: A batch, preprocessed.

    Returns:
        What was observed; and, by the names of the terms that compare features, the levels that they compared.
    """
    with ExitStack() as stack:
        calls = {name: stack.enter_context(record_calls(term, 'compare'))
                 for name, term in distiller.terms.items() if isinstance(term, FeatureTerm)}
        observation = distiller.observe(data['inputs'], data['data_samples'], distiller.terms)
    return observation, {name: [call.arguments['level'] for call in made] for name, made in calls.items()}


Row = tuple[str, str, str, str, str]  # what is read in the student, its shape, stride, the same of the teacher


def tap_table(distiller: DetectionDistiller, step: InspectedStep) -> Table:
    """What the terms read in the student, with shape and stride, and what of the teacher it is paired with."""
    rows: dict[Row, list[str]] = {}
    for name, term in distiller.terms.items():
        for row in (*_features(term, step), *_heads(term, step)):
            rows.setdefault(row, []).append(name)
    table = Table('Student', 'Shape', 'Stride', 'Paired with', 'Shape', 'Read by', title='Taps')
    for row, names in rows.items():
        table.add_row(*row, ', '.join(dict.fromkeys(names)))
    return table


def _features(term: DistillTerm, step: InspectedStep) -> Iterator[Row]:
    context = step.observation.context
    for pair in term.pairs if isinstance(term, FeatureTerm) else ():
        student = context.student[term.student_path][pair.student_level]
        teacher = context.teachers[term.teacher_index][term.teacher_path][pair.teacher_level]
        yield (f'{term.student_path}[{pair.student_level}]', _shape(student), str(pair.student_spec.stride),
               f'{_teacher(term, step)}{term.teacher_path}[{pair.teacher_level}]', _shape(teacher))


def _heads(term: DistillTerm, step: InspectedStep) -> Iterator[Row]:
    context = step.observation.context
    for student_head, teacher_head in zip_longest(term.student_heads, term.teacher_heads):
        students = _logits(context.student_outputs.get(student_head))
        teachers = _logits(context.teacher_outputs[term.teacher_index].get(teacher_head))
        for stride in dict.fromkeys((*students, *teachers)):
            student = f'{student_head} logits' if stride in students else '–'
            teacher = f'{_teacher(term, step)}{teacher_head} logits' if stride in teachers else '–'
            yield student, _shape(students.get(stride)), stride, teacher, _shape(teachers.get(stride))


def _logits(outputs: Any) -> dict[str, Tensor]:
    """Class logits by stride; those of queries, and of a RoI head, of whose stages the first is shown, have none."""
    if isinstance(outputs, DenseOutputs):
        return dict(zip(map(str, outputs.strides), outputs.logits))
    first = outputs[0] if isinstance(outputs, tuple) and not isinstance(outputs, RoIOutputs) else outputs
    return {'–': first.logits} if isinstance(first, (QueryOutputs, RoIOutputs)) else {}


def _teacher(term: DistillTerm, step: InspectedStep) -> str:
    return f'teacher {term.teacher_index}: ' if len(step.observation.context.teachers) > 1 else ''


def _shape(tensor: Tensor | None) -> str:
    return '–' if tensor is None else ' × '.join(map(str, tensor.shape))


def term_table(distiller: DetectionDistiller, step: InspectedStep) -> Table:
    """Each term's value and parts, its weight, and the norm of its gradient beside the task's.

    The weight is that without schedules, of a balanced term that of this step.
    """
    table = Table('Term', 'Value', 'Weight', 'Weighted', 'Measured at', 'Gradient', "Task's", 'Ratio', title='Terms',
                  caption="Ratio: of the weighted term's gradient on the student's features to the task's")
    for column in table.columns[1:]:
        column.justify = 'right'
    for name, value in step.observation.values.items():
        norms, weight = step.norms[name], _weight(distiller, step, name)
        scaled, task = weight * norms.term, norms.task
        table.add_row(Text(name, 'bold'), _number(total(value)), f'{_number(weight)}{_kind(distiller, name)}',
                      _number(weight * total(value)), ', '.join(distiller.measured_taps(distiller.terms[name])),
                      _number(scaled), _number(task), f'{scaled / task:.2f}' if task > 0 else '–')
        for part, each in value.items() if isinstance(value, dict) and len(value) > 1 else ():
            table.add_row(f'  {part}', _number(each), '', _number(weight * each))
    if not any(map(len, step.observation.context.boxes)):
        table.caption += ', to which all is background: there are no boxes'
    for name, cause in find_idle(distiller, step.observation).items():
        table.caption += f'\n{name} teaches the student nothing: none of its weights gets a gradient from it. {cause}'
    table.add_section()
    table.add_row("the student's own loss", _number(step.task))
    return table


def _weight(distiller: DetectionDistiller, step: InspectedStep, name: str) -> float:
    weight, (term, task) = distiller.weights[name], step.norms[name]
    if weight.balance is None:
        return weight.full
    return weight.full * float(task / term) if term > 0 else 0.0


def _kind(distiller: DetectionDistiller, name: str) -> str:
    weight = distiller.weights[name]
    return '' if weight.is_constant else f' ({type(weight).__name__})'


def _number(value: float | Tensor) -> str:
    return f'{value.item() if isinstance(value, Tensor) else value:.4g}'
