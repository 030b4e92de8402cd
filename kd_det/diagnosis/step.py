"""Tries one training step of a distillation, on noise and with random weights."""
from __future__ import annotations

import copy
from typing import Iterator

from mmengine.config import Config

from kd_det.configuration import is_distillation
from kd_det.diagnosis.finding import Finding
from kd_det.diagnosis.weights import known_classes, student_classes, teachers_of
from kd_det.randomness import preserved_randomness
from kd_det.step_costs import random_distiller, synthetic_batch

IMAGES, SIZE, BOXES = 2, (320, 320), 4  # the smallest image that all of an SSD's levels fit into


def inspect_step(config: Config) -> Iterator[Finding]:
    """Whether the terms find what they read, in student and teacher, and can compare it.

    Of errors that kd_det did not foresee it is only noted that there was one: noise may lack what a detector wants.
    """
    if not is_distillation(config):
        return
    config = copy.deepcopy(config)
    try:
        with preserved_randomness():
            for _, teacher in teachers_of(config):
                teacher['classes'] = known_classes(teacher)[1] or ()
            distiller = random_distiller(config)
            distiller.match_classes(student_classes(config))
            batch = synthetic_batch(distiller.student, IMAGES, SIZE, BOXES)
            distiller.loss(**distiller.data_preprocessor(batch, True))
    except Exception as error:
        if type(error).__module__.split('.')[0] == 'kd_det':
            yield Finding('a training step', str(error), 'Correct model.distill, or take another pair', fault=True)
        else:
            yield Finding('a training step', f'could not be tried on noise: {type(error).__name__}: {error}',
                          'kd-det inspect tries one on a batch of the training data')
        return
    yield Finding('a training step', f'computes {", ".join(distiller.terms) or "the task alone"}')
    for name, cause in distiller.idle_watch.idle.items():
        yield Finding(f'term {name}', 'teaches the student nothing: none of its weights gets a gradient from it', cause)
