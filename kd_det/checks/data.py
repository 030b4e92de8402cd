"""Inspects the data of a config: files, annotations and classes."""
from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from io import StringIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmengine.config import Config
from mmengine.evaluator import Evaluator

from kd_det.checks.annotations import Use, inspect_coco_file
from kd_det.checks.environment import Finding, raise_faults
from kd_det.checks.instances import (
    inspect_evaluated_images,
    inspect_instances,
    inspect_other_form,
    reads_as_coco,
)
from kd_det.checks.records import list_some
from kd_det.config.classes import (
    LabelNames,
    find_dataset_classes,
    get_metainfo,
    mean_the_same,
    normalize_name,
    read_label_names,
)
from kd_det.config.detectors import teachers_of
from kd_det.config.files import (
    DISTILL_HOOK,
    get_type_name,
    iterate_built_datasets,
    list_hooks,
    list_leaf_datasets,
    student_model,
    training_pipelines,
)
from kd_det.datasets import Unlabelled, is_unlabelled
from kd_det.registry import HOME, find_class, get_scope, within_scope

SPLITS = ('train', 'val', 'test')
SET_DATA_ROOT = 'Set the folder of the data with --data-root, or the path with --cfg-options'
MOST_LABELS = 20  # shown side by side
COCO_ORDER = ', for MMDetection numbers labels in the order of the annotation file'


def inspect_paths(config: Config, splits: Sequence[str] = SPLITS) -> Iterator[Finding]:
    """Whether the annotation files and image folders of the data sets and evaluators exist, each path once."""
    paths: dict[str, str] = {}
    for split, dataset in _datasets(config, splits):
        if dataset.get('ann_file'):
            paths.setdefault(_join(dataset, dataset['ann_file']), f'{split} annotations')
        folders = dataset.get('data_prefix') or {}
        for prefix in folders.values() if isinstance(folders, dict) else [folders]:
            paths.setdefault(_join(dataset, prefix), f'{split} images')
    for split in splits:
        for evaluator in _evaluators(config, split):
            if evaluator.get('ann_file'):
                paths.setdefault(evaluator['ann_file'], f'{split} evaluator')
    for path, subject in paths.items():
        yield _existing(subject, path)


def inspect_annotations(config: Config, splits: Sequence[str] = SPLITS, others: bool = True) -> Iterator[Finding]:
    """Reads annotation files: what is damaged, and of COCO's how much the config's classes use.

    Args:
        config: The config.
        splits: Whose data sets and evaluators to look at.
        others: Also read files of other forms, whose boxes are judged once they are built: see
            :func:`~kd_det.checks.instances.inspect_instances`.
    """
    uses: dict[str, list[Use]] = {}
    for split, dataset in _datasets(config, splits):
        path, kind = _join(dataset, dataset.get('ann_file') or ''), find_class(DATASETS, dataset, HOME)
        if kind is None and path.endswith('.json') or reads_as_coco(kind):
            uses.setdefault(path, []).append(_use(config, split, dataset))
        elif others:
            yield from inspect_other_form(f'{split} data', kind, dataset, _join, find_dataset_classes(dataset))
    for split in splits:
        for evaluator in _evaluators(config, split):
            metric = find_class(METRICS, evaluator, HOME) if 'type' in evaluator else None
            if getattr(metric, '__init__', None) is CocoMetric.__init__ and not evaluator.get('format_only'):
                uses.setdefault(evaluator.get('ann_file') or '', []).append(Use(f'{split} evaluator', scored=True))
    for path, of_path in uses.items():
        if Path(path).is_file():
            yield from inspect_coco_file(path, of_path)


def _use(config: Config, split: str, dataset: dict) -> Use:
    classes = find_dataset_classes(dataset)
    evaluators = _evaluators(config, split)
    unscored = split != 'train' and bool(evaluators) and all(each.get('format_only') for each in evaluators)
    return Use(f'{split} data', None if classes is None else tuple(classes),
               _loads_masks(dataset.get('pipeline')), unscored or _ends_unlabelled(dataset),
               bool((dataset.get('filter_cfg') or {}).get('filter_empty_gt')) and not dataset.get('test_mode'))


def _loads_masks(node: object) -> bool:
    """Whether a transform of a pipeline, at any depth, loads masks."""
    if isinstance(node, dict):
        return bool(node.get('with_mask')) or any(map(_loads_masks, node.values()))
    return isinstance(node, (list, tuple)) and any(map(_loads_masks, node))


def inspect_classes(config: Config, splits: Sequence[str] = SPLITS) -> Iterator[Finding]:
    """Whether the student's heads have as many classes as the data."""
    heads = class_counts(student_model(config))
    for split, dataset in _datasets(config, splits):
        classes = find_dataset_classes(dataset)
        if isinstance(classes, str):
            yield Finding(f'{split} classes', f"classes='{classes}' is a text, which counts as {len(classes)} classes",
                          f"Write a tuple: metainfo=dict(classes=('{classes}', ))", fault=True)
        elif classes is not None and heads and heads != {len(classes)}:
            yield Finding(
                f'{split} classes',
                f"the model's heads have num_classes={list_some(sorted(heads))}, the data set has {len(classes)}",
                'Set num_classes of every head to the number of classes, and metainfo=dict(classes=…) of every '
                'data set to their names',
                fault=True)


def inspect_labels(datasets: Mapping[str, object], metrics: Mapping[str, Sequence[object]] = {}) -> Iterator[Finding]:
    """Whether the labels of built data sets mean what their metainfo says, and the same in all of them.

    Args:
        datasets: By what they are called, such as ``'train'``.
        metrics: Of the evaluators of some of them: one with an annotation file of its own numbers classes, too.
    """
    found: dict[str, LabelNames] = {}
    evaluated: list[LabelNames] = []
    for split, dataset in datasets.items():
        leaves = [leaf for leaf in iterate_built_datasets(dataset) if not is_unlabelled(leaf)]
        for index, leaf in enumerate(leaves):
            names = read_label_names(leaf)
            if names and names not in found.values():
                found[f'{split} data {index}' if len(leaves) > 1 else f'{split} data'] = names
        for api in filter(None, (getattr(metric, '_coco_api', None) for metric in metrics.get(split, ()))):
            names = _evaluated_names(api, get_metainfo(dataset).get('classes') or ())
            evaluated.append(names)
            if names not in found.values():
                found[f'{split} evaluator'] = names
    for subject, names in found.items():
        yield from _inspect_label_names(subject, names, names in evaluated)
    (first, names), others = next(iter(found.items()), ('', LabelNames((), (), ()))), list(found.items())[1:]
    for subject, other in others:
        if names.agree and other.agree and not mean_the_same(names.meant, other.meant):
            yield Finding(f'{subject} labels', f'a label does not mean the same as in the {first}:'
                          f'{_side_by_side(other.meant, names.meant, subject, first)}',
                          f'Give both the same classes in the same order{COCO_ORDER}; where their files have the '
                          'categories in different orders, write them anew in one', fault=True)


def build_data(config: Config, splits: Sequence[str]) -> tuple[dict[str, object], dict[str, list], list[Finding]]:
    """Builds the data sets of a config, and the metrics of its evaluators; what two splits share is built once.

    Returns:
        The data sets by split, the metrics by split, and what could not be built.
    """
    datasets, metrics, faults, configs = {}, {}, [], []
    with within_scope(get_scope(config)), redirect_stdout(StringIO()):  # pycocotools tells how long it took
        for split in splits:
            loader, evaluators = config.get(f'{split}_dataloader'), config.get(f'{split}_evaluator') or []
            if not loader or (loader['dataset'], evaluators) in configs:
                continue
            configs.append((loader['dataset'], evaluators))
            try:
                datasets[split] = DATASETS.build(copy.deepcopy(loader['dataset']))
                metrics[split] = Evaluator(copy.deepcopy(evaluators)).metrics
            except Exception as error:  # whatever stops it here would stop the run
                faults.append(Finding(f'{split} data set', f'can not be built ({type(error).__name__}: {error})',
                                      f'Correct {split}_dataloader.dataset, or {split}_evaluator', fault=True))
    return datasets, metrics, faults


def check_labels(datasets: Mapping[str, object], metrics: Mapping[str, Sequence[object]] = {}) -> None:
    """As :func:`inspect_labels` and :func:`~kd_det.checks.instances.inspect_instances`.

    Raises:
        DiagnosisError: Labels mean something else than the metainfo says, or not the same in all data sets; or boxes
            are none, or an evaluator does not know the images.
    """
    raise_faults(chain(inspect_labels(datasets, metrics), inspect_instances(datasets),
                       inspect_evaluated_images(datasets, metrics)))


def check_annotations(config: Config, splits: Sequence[str]) -> None:
    """As :func:`inspect_annotations`, of COCO files.

    Raises:
        DiagnosisError: A file is damaged.
    """
    raise_faults(inspect_annotations(config, splits, others=False))


def _inspect_label_names(subject: str, names: LabelNames, evaluated: bool) -> Iterator[Finding]:
    """Whether the labels of one data set mean what its metainfo says; of an evaluator, what that of its data says.

    Args:
        subject: What is looked at.
        names: What its labels mean.
        evaluated: Whether an evaluator looks up the category of each label in this annotation file.
    """
    unused = {normalize_name(name): name for name in names.known if name not in names.meant}
    nearest = {name: [unused[near] for near in get_close_matches(normalize_name(name), unused, n=1)]
               for name in names.absent}
    misspelt = [f"there is no category '{name}' in the annotations; the nearest name is '{near[0]}'"
                for name, near in nearest.items() if near]
    missing = [f"'{name}'" for name, near in nearest.items() if not near]
    absent = [f"there {'are no categories' if missing[1:] else 'is no category'} {list_some(missing)} in the "
              'annotations']
    absent = absent if missing else []
    # A class without a category that stands last shifts no label: nothing but the evaluation stumbles over it.
    if names.agree and not misspelt and not (absent and evaluated):
        if absent:
            yield Finding(f'{subject} classes', '; '.join(absent), 'Check the spelling; no box has this class')
        return
    corrected = {near[0] if near else '' for near in nearest.values()} | set(names.declared)
    right = tuple(name for name in names.known if name in corrected)
    lines = [*misspelt, *absent]
    if not names.agree:
        lines.append(f'its boxes have other names than metainfo.classes says{COCO_ORDER}:'
                     + _side_by_side(names.meant, names.declared, 'boxes', 'metainfo'))
    if subject.endswith('evaluator') and not lines[:-1]:
        yield Finding(f'{subject} classes', lines[0], 'Give the evaluator the annotation file of its data set, or one '
                      'with the categories in that order', fault=True)
        return
    yield Finding(f'{subject} classes', '; '.join(lines),
                  ('Add the category to the annotation file, at its place in metainfo.classes, or leave it out: '
                   if absent else '') + f'Write metainfo=dict(classes={right!r}) in the data set'
                  + (f', and num_classes={len(right)} in every head' if len(right) != len(names.declared) else ''),
                  fault=True)


def _side_by_side(first: Sequence[str], second: Sequence[str], of_first: str, of_second: str) -> str:
    """Two orders of classes as lines of a table; of long ones those labels that differ."""
    rows = [(str(label), *pair) for label, pair in enumerate(zip_longest(first, second, fillvalue='–'))]
    if len(rows) > MOST_LABELS:
        rows = [row for row in rows if not mean_the_same(*([name] for name in row[1:]))]
    left = len(rows) - MOST_LABELS
    rows = [('label', of_first, of_second), *rows[:MOST_LABELS]]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = ['  '.join([row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows]
    return '\n    '.join(['', *lines, *([f'… and {left} more'] if left > 0 else [])])


def _evaluated_names(api: Any, classes: Sequence[str]) -> LabelNames:
    """What labels mean to a metric with an annotation file of its own, see mmdet's ``CocoMetric``."""
    known = {category['id']: str(category['name']) for category in api.dataset.get('categories', ())}
    meant = tuple(known[category] for category in api.get_cat_ids(cat_names=list(classes)))
    return LabelNames(meant, tuple(classes) or meant, tuple(known.values()))


def class_counts(model: dict) -> set[int]:
    """All values of ``num_classes`` in the heads that classify objects.

    An RPN does not, nor does a semantic head, as HTC has one for stuff. A detector that reads the names of classes has
    no number of them: its ``num_classes`` is that of words.
    """
    if model.get('language_model'):
        return set()

    def search(node: object) -> Iterator[int]:
        if isinstance(node, dict):
            if isinstance(node.get('num_classes'), int):
                yield node['num_classes']
            node = [value for key, value in node.items() if key != 'semantic_head']
        if isinstance(node, (list, tuple)):
            for item in node:
                yield from search(item)

    return {count for head in ('bbox_head', 'roi_head') for count in search(model.get(head))}


def _datasets(config: Config, splits: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Each leaf data set with its split; data that serves two splits, as val and test, is not looked at twice."""
    seen: list[tuple] = []
    for split in splits:
        loader = config.get(f'{split}_dataloader')
        for dataset in list_leaf_datasets(loader['dataset']) if loader else ():
            data = tuple(dataset.get(key) for key in ('data_root', 'ann_file', 'data_prefix', 'metainfo'))
            if data not in seen:
                seen.append(data)
                yield split, dataset


def _evaluators(config: Config, split: str) -> list[dict]:
    evaluators = config.get(f'{split}_evaluator') or []
    return [evaluators] if isinstance(evaluators, dict) else list(evaluators)


def _join(dataset: dict, path: str) -> str:
    """A path as the data set joins it to its root."""
    root = str(dataset.get('data_root') or '')
    if _is_address(path):
        return path
    return f"{root.rstrip('/')}/{path}" if _is_address(root) else str(Path(root) / path)


def _is_address(path: str) -> bool:
    return re.match(r'\w+://', str(path)) is not None


def _existing(subject: str, path: str) -> Finding:
    if _is_address(path):
        return Finding(subject, f'{path} (not looked up)')
    if Path(path).exists():
        return Finding(subject, path)
    return Finding(subject, f"'{path}' does not exist", SET_DATA_ROOT, fault=True)


def _ends_unlabelled(dataset: dict) -> bool:
    """Whether the pipeline marks every image as unlabelled."""
    pipeline = dataset.get('pipeline') or ()
    return bool(pipeline) and get_type_name(pipeline[-1]) == Unlabelled.__name__


REPLAYED = 'ReplayedRandomness'
DRAWS = re.compile(r'(?<![\w.])((np|numpy|torch)\.)?random\.\w+\(|@cache_randomness|torch\.rand')
DRAWS_ELSEWHERE = ('Albu', )  # whose own library draws


def inspect_cache(config: Config) -> Iterator[Finding]:
    """Whether the images of a distillation with a teacher's cache recur, and whether replayed transforms can."""
    pipelines = training_pipelines(config)
    if any(REPLAYED in map(get_type_name, pipeline) for pipeline in pipelines):
        yield from _inspect_replay(config)
    if not any(teacher.get('cache') for _, teacher in teachers_of(config)):
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


def random_transforms(pipeline: list[dict]) -> Iterator[str]:
    """Names the transforms of a pipeline that draw random numbers, except replayed ones."""
    for transform in pipeline:
        if get_type_name(transform) == REPLAYED:
            continue
        if _draws(transform):
            yield get_type_name(transform)
        for inner in transform.get('transforms') or ():
            yield from random_transforms(inner if isinstance(inner, (list, tuple)) else [inner])


def _draws(transform: dict) -> bool:
    """Whether the code of a transform's class, or of a base, draws random numbers."""
    found = find_class(TRANSFORMS, transform, HOME)
    if found is None or get_type_name(transform) in DRAWS_ELSEWHERE:
        return found is not None
    for each in getattr(found, '__mro__', ()):
        try:
            if DRAWS.search(inspect.getsource(each)):
                return True
        except (OSError, TypeError):  # of a class without a source file nothing is known
            continue
    return False


def _shapes_vary(config: Config, pipelines: list[list[dict]]) -> bool:
    preprocessor = student_model(config).get('data_preprocessor') or {}
    padded = [get_type_name(each) for each in preprocessor.get('batch_augments') or ()]
    keeps = any(transform.get('keep_ratio') for pipeline in pipelines for transform in pipeline)
    return keeps and 'BatchFixedSizePad' not in padded and (config.train_dataloader.get('batch_size') or 1) > 1


def _inspect_replay(config: Config) -> Iterator[Finding]:
    if DISTILL_HOOK not in map(get_type_name, list_hooks(config)):
        yield Finding(REPLAYED, 'nothing tells it the epoch, so that every image would stay in its first variant',
                      f"Add default_hooks=dict(distill=dict(type='{DISTILL_HOOK}')); a plain detector can have it, too",
                      fault=True)
    if get_type_name(config.get('train_cfg')) == 'IterBasedTrainLoop':
        yield Finding(REPLAYED, 'training counts iterations, so that every image would stay in its first variant',
                      "Train by epochs: train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=…)", fault=True)
