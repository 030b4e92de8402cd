"""Tries training steps of a distillation, on noise and with random weights."""
from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path

from mmengine.config import Config
from torch import Tensor

from kd_det.checks.checkpoints import known_classes, student_classes
from kd_det.checks.environment import Finding
from kd_det.checks.synthetic import USUAL_SIZES, Size, random_distiller, synthetic_batch, training_sizes
from kd_det.compat import describe_not_finite
from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import ArgumentError
from kd_det.config.detectors import teachers_of
from kd_det.config.files import is_distillation, list_leaf_datasets
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.monitor import OF_TERM, explain_losses
from kd_det.teachers.bridge import LARGEST_STRIDE, SIZE_MISMATCH
from kd_det.teachers.probe import find_prior_strides

IMAGES, BOXES = 2, 4
SMALL = 192  # pixels
MOST_SIZES = 2
READ = 2**21  # bytes of an annotation file: images stand before the annotations, and some are enough
IMAGE_ENTRY = re.compile(r'\{[^{}]*"file_name"[^{}]*\}')
# Detectors with inputs of their own, such as texts, ask for what noise has not.
LACKING = re.compile(r"'(DetDataSample|InstanceData|PixelData)' object has no attribute")


def inspect_step(config: Config, names: Sequence[str] | None = None) -> Iterator[Finding]:
    """Whether the terms find what they read, in student and teacher, and can compare it, on images of training sizes.

    An error that kd_det did not foresee would stop the training too, unless it says that noise lacks what a detector
    asks of its data.

    Args:
        config: The config.
        names: See :func:`~kd_det.checks.checkpoints.student_classes`.
    """
    if not is_distillation(config):
        return
    config, size = copy.deepcopy(config), None  # no size while it is built
    try:
        with preserved_randomness():
            for _, teacher in teachers_of(config):
                teacher['classes'] = known_classes(teacher)[1] or ()
            distiller = random_distiller(config)
            distiller.match_classes(student_classes(config, names))
            if distiller.inheritance.rule != 'shape':
                distiller.inherit()
            sizes = tried_sizes(config, ceil(max((SMALL, *find_prior_strides(distiller.student)))))
            for size in sizes:
                loss, logged = step_loss(distiller, size)
                broken = explain_losses({name: value.item() for name, value in logged.items()}, list(distiller.terms),
                                        distiller.reads.find().get(distiller.progress.iteration, []), 'on noise')
                if broken:
                    yield _finding_of_losses(*broken)
                    return
                if size == sizes[0]:
                    loss.backward()
                    gradients = {name: weight.grad for name, weight in distiller.named_parameters()
                                 if weight.grad is not None}
                    broken = describe_not_finite(gradients)
                    if broken:
                        yield Finding('a training step', f'has a gradient on noise that is not finite: {broken}',
                                      'With random weights that may be; where a term takes a root, a logarithm or a '
                                      'norm, keep it from 0')
                        return
    except Exception as error:
        yield _finding(error, size)
        return
    yield Finding('a training step', f'computes {", ".join(distiller.terms) or "the task alone"}')
    for name, cause in (each for learner in distiller.learners for each in learner.idle_check.idle.items()):
        yield Finding(f'term {name}', 'teaches the student nothing: none of its weights gets a gradient from it', cause)


def step_loss(distiller: DetectionDistiller, size: Size) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a training step on images of this height and width, and what is logged of it."""
    data = distiller.data_preprocessor(synthetic_batch(distiller.student, IMAGES, size, BOXES), True)
    return distiller.parse_losses(distiller.loss(**data))


def _finding_of_losses(what: str, cause: str) -> Finding:
    """What losses that are not finite tell: a term's own end a run, a detector's may come of noise."""
    if cause == 'term':
        return Finding('a training step', what, OF_TERM, fault=True)
    return Finding('a training step', what, 'With random weights and noise that may be; kd-det inspect tries one on a '
                   'batch of the training data')


def _finding(error: Exception, size: Size | None) -> Finding:
    if isinstance(error, ArgumentError) and error.place.startswith('model.inherit'):
        return Finding(error.place, error.problem, "Take another student, or inherit_by='shape'", fault=True)
    if type(error).__module__.split('.')[0] == 'kd_det':
        return Finding('a training step', str(error), 'Correct model.distill, or take another pair', fault=True)
    what = f'{type(error).__name__}: {error}'
    if size is None:
        return Finding('a training step', f'can not be built: {what}',
                       'Correct the config: kd-det train CONFIG --debug shows where', fault=True)
    where = f' of {size[0]} × {size[1]} pixels, one of the sizes of the training data'
    if isinstance(error, AttributeError) and LACKING.search(str(error)):
        return Finding('a training step', f'could not be tried on noise{where}: {what}',
                       'kd-det inspect tries one on a batch of the training data')
    remedy = 'kd-det inspect tries one on a batch of the training data; with --debug it shows where'
    if SIZE_MISMATCH.search(str(error)):
        remedy = ("Set data_preprocessor.pad_size_divisor=32 in the student's config, or the largest stride of its "
                  f'pyramid, if its levels do not fit each other at that size; else: {remedy}')
    return Finding('a training step', f'fails on noise{where}: {what}', remedy, fault=True)


def tried_sizes(config: Config, smallest: int = SMALL) -> list[Size]:
    """Some sizes of the training data to try: those first that are no multiples of a pyramid's strides.

    A large one is represented by a smaller one with the same remainders, by which levels fit each other or not.

    Args:
        config: The config.
        smallest: No size becomes smaller than that, in pixels: an SSD's last levels are of its largest stride.
    """
    sizes = training_sizes(config, original_sizes(config))
    reduced = dict.fromkeys((_reduced(height, smallest), _reduced(width, smallest)) for height, width in sizes)
    return sorted(reduced, key=lambda size: not any(side % 32 for side in size))[:MOST_SIZES]


def _reduced(side: int, smallest: int) -> int:
    return side if side < smallest else smallest + (side - smallest) % LARGEST_STRIDE


def original_sizes(config: Config) -> list[Size]:
    """The most frequent sizes of the training images, wide and high, as their annotation file tells them."""
    loader = config.get('train_dataloader')
    leaf = list_leaf_datasets(loader['dataset'])[0] if loader else {}
    file = Path(leaf.get('data_root') or '') / (leaf.get('ann_file') or '')
    if file.suffix != '.json' or not file.is_file():
        return list(USUAL_SIZES)
    with file.open(encoding='utf-8', errors='replace') as opened:
        entries = IMAGE_ENTRY.findall(opened.read(READ))
    found = [[re.search(rf'"{side}"\s*:\s*(\d+)', entry) for side in ('height', 'width')] for entry in entries]
    counted = Counter((int(height[1]), int(width[1])) for height, width in found if height and width)
    frequent = [size for size, _ in counted.most_common()]
    wide, high = ([size for size in frequent if (size[0] > size[1]) == is_high] for is_high in (False, True))
    return [*wide[:1], *high[:1]] or list(USUAL_SIZES)
