"""Inspects whether a teacher's cache can find anything: an image is found where it recurs pixel by pixel."""
from __future__ import annotations

import inspect
import re
from typing import Iterator, List

from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from kd_det.configuration import (DISTILL_HOOK, hooks_of, is_distillation, student_model, training_pipelines,
                                  type_name)
from kd_det.diagnosis.finding import Finding
from kd_det.scopes import HOME, find_class

REPLAYED = 'ReplayedRandomness'
DRAWS = re.compile(r'(?<![\w.])((np|numpy|torch)\.)?random\.\w+\(|@cache_randomness|torch\.rand')
DRAWS_ELSEWHERE = ('Albu', )  # whose own library draws


def inspect_cache(config: Config) -> Iterator[Finding]:
    """Whether the images of a distillation with a teacher's cache recur, and whether replayed transforms can."""
    pipelines = training_pipelines(config)
    if any(REPLAYED in map(type_name, pipeline) for pipeline in pipelines):
        yield from _inspect_replay(config)
    teachers = config.model.teacher if is_distillation(config) else []
    if not any(teacher.get('cache') for teacher in ([teachers] if isinstance(teachers, dict) else teachers)):
        return
    drawing = list(dict.fromkeys(name for pipeline in pipelines for name in random_transforms(pipeline)))
    if drawing:
        yield Finding('teacher cache', f"the training pipeline is random ({', '.join(drawing)}): images seldom or "
                      'never recur pixel by pixel, and the cache finds nothing else',
                      f"Put them into dict(type='{REPLAYED}', period=2, transforms=[…]), or leave them out; transforms "
                      'that mix images can not be replayed')
    elif _shapes_vary(config, pipelines):
        yield Finding('teacher cache', 'images keep their aspect ratio, so the shape of a batch, and with it the '
                      'padding of an image, depends on the other images in it; an image is found in batches of the '
                      'same shape only',
                      "Resize with keep_ratio=False, or pad all batches to one size: data_preprocessor.batch_augments="
                      "[dict(type='BatchFixedSizePad', size=(height, width))]")
    else:
        yield Finding('teacher cache', 'nothing random in the training pipeline')


def random_transforms(pipeline: List[dict]) -> Iterator[str]:
    """Names the transforms of a pipeline that draw random numbers, except replayed ones."""
    for transform in pipeline:
        if type_name(transform) == REPLAYED:
            continue
        if _draws(transform):
            yield type_name(transform)
        for inner in transform.get('transforms') or ():
            yield from random_transforms(inner if isinstance(inner, (list, tuple)) else [inner])


def _draws(transform: dict) -> bool:
    """Whether the code of a transform's class, or of a base, draws random numbers."""
    found = find_class(TRANSFORMS, transform, HOME)
    if found is None or type_name(transform) in DRAWS_ELSEWHERE:
        return found is not None
    for each in getattr(found, '__mro__', ()):
        try:
            if DRAWS.search(inspect.getsource(each)):
                return True
        except (OSError, TypeError):  # of a class without a source file nothing is known
            continue
    return False


def _shapes_vary(config: Config, pipelines: List[List[dict]]) -> bool:
    preprocessor = student_model(config).get('data_preprocessor') or {}
    padded = [type_name(each) for each in preprocessor.get('batch_augments') or ()]
    keeps = any(transform.get('keep_ratio') for pipeline in pipelines for transform in pipeline)
    return keeps and 'BatchFixedSizePad' not in padded and (config.train_dataloader.get('batch_size') or 1) > 1


def _inspect_replay(config: Config) -> Iterator[Finding]:
    if DISTILL_HOOK not in map(type_name, hooks_of(config)):
        yield Finding(REPLAYED, 'nothing tells it the epoch, so that every image would stay in its first variant',
                      f"Add default_hooks=dict(distill=dict(type='{DISTILL_HOOK}')); a plain detector can have it, too",
                      fault=True)
    if type_name(config.get('train_cfg')) == 'IterBasedTrainLoop':
        yield Finding(REPLAYED, 'training counts iterations, so that every image would stay in its first variant',
                      "Train by epochs: train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=…)", fault=True)
