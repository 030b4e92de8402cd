"""Inspects the data of a config: files, annotations and classes."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, Iterator, List, Sequence, Set, Tuple

from mmengine.config import Config

from kd_det.classes import dataset_classes
from kd_det.configuration import leaf_datasets, student_model
from kd_det.datasets.unlabelled import Unlabelled
from kd_det.diagnosis.finding import Finding

SPLITS = ('train', 'val', 'test')
SET_DATA_ROOT = 'Set the folder of the data with --data-root, or the path with --cfg-options'


def inspect_paths(config: Config, splits: Sequence[str] = SPLITS) -> Iterator[Finding]:
    """Whether the annotation files and image folders of the data sets and evaluators exist, each path once."""
    paths: Dict[str, str] = {}
    for split, dataset in _datasets(config, splits):
        if dataset.get('ann_file'):
            paths.setdefault(_join(dataset, dataset['ann_file']), f'{split} annotations')
        folders = dataset.get('data_prefix') or {}
        for prefix in folders.values() if isinstance(folders, dict) else [folders]:
            paths.setdefault(_join(dataset, prefix), f'{split} images')
    for split in splits:
        evaluators = config.get(f'{split}_evaluator') or []
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            if evaluator.get('ann_file'):
                paths.setdefault(evaluator['ann_file'], f'{split} evaluator')
    for path, subject in paths.items():
        yield _existing(subject, path)


def inspect_annotations(config: Config, splits: Sequence[str] = SPLITS) -> Iterator[Finding]:
    """Reads the COCO annotation files: their form, and how much of them the config's classes use."""
    for split, dataset in _datasets(config, splits):
        path = _join(dataset, dataset.get('ann_file') or '')
        if path.endswith('.json') and Path(path).is_file():
            yield from _inspect_coco(split, dataset, path)


def inspect_classes(config: Config, splits: Sequence[str] = SPLITS) -> Iterator[Finding]:
    """Whether the student's heads have as many classes as the data."""
    heads = class_counts(student_model(config))
    for split, dataset in _datasets(config, splits):
        classes = dataset_classes(dataset)
        if isinstance(classes, str):
            yield Finding(f'{split} classes', f"classes='{classes}' is a text, which counts as {len(classes)} classes",
                          f"Write a tuple: metainfo=dict(classes=('{classes}', ))", fault=True)
        elif classes is not None and heads and heads != {len(classes)}:
            yield Finding(
                f'{split} classes',
                f"the model's heads have num_classes={_listed(sorted(heads))}, the data set has {len(classes)}",
                'Set num_classes of every head to the number of classes, and metainfo=dict(classes=…) of every '
                'data set to their names',
                fault=True)


def class_counts(model: dict) -> Set[int]:
    """All values of ``num_classes`` in the heads that classify objects (an RPN does not)."""

    def search(node: object) -> Iterator[int]:
        if isinstance(node, dict):
            if isinstance(node.get('num_classes'), int):
                yield node['num_classes']
            node = list(node.values())
        if isinstance(node, (list, tuple)):
            for item in node:
                yield from search(item)

    return {count for head in ('bbox_head', 'roi_head') for count in search(model.get(head))}


def _datasets(config: Config, splits: Sequence[str]) -> Iterator[Tuple[str, dict]]:
    """Each leaf data set with its split; data that serves two splits, as val and test, is not looked at twice."""
    seen: List[tuple] = []
    for split in splits:
        loader = config.get(f'{split}_dataloader')
        for dataset in leaf_datasets(loader['dataset']) if loader else ():
            data = tuple(dataset.get(key) for key in ('data_root', 'ann_file', 'data_prefix', 'metainfo'))
            if data not in seen:
                seen.append(data)
                yield split, dataset


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


def _inspect_coco(split: str, dataset: dict, path: str) -> Iterator[Finding]:
    subject = f'{split} data'
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
        images = {image['id']: image['file_name'] for image in content['images']}
        names = {category['id']: category['name'] for category in content['categories']}
        unlabelled = _ends_unlabelled(dataset)
        annotations = () if unlabelled else content['annotations']
        boxes = [(box['image_id'], names[box['category_id']]) for box in annotations]
    except (ValueError, KeyError, TypeError) as error:
        yield Finding(subject, f"'{path}' is no COCO annotation file ({type(error).__name__}: {error})",
                      'Expected a JSON object with the lists images, categories and annotations', fault=True)
        return
    classes = dataset_classes(dataset) or tuple(names.values())
    missing = [name for name in classes if name not in names.values()]
    annotated = {image for image, name in boxes if name in classes}
    if not images:
        yield Finding(subject, f"'{path}' lists no images", 'Give a file with images', fault=True)
    elif unlabelled and (dataset.get('filter_cfg') or {}).get('filter_empty_gt'):
        yield Finding(subject, f'{len(images)} images, unlabelled, which filter_empty_gt passes over',
                      'Set filter_cfg=dict(filter_empty_gt=False) of the data set', fault=True)
    elif unlabelled:
        yield Finding(subject, f'{len(images)} images, unlabelled')
    elif not annotated:
        remedy = "If nobody labelled these images, end the data set's pipeline with dict(type='Unlabelled')"
        if missing:
            remedy = ("Set metainfo=dict(classes=…) of the data set to the file's names, and num_classes of every head "
                      'to their number')
        yield Finding(subject, f"'{path}' has no box of the config's classes ({_listed(classes)}); the file's "
                      f'categories are {_listed(sorted(names.values()))}', remedy, fault=True)
    else:
        yield Finding(subject, f'{len(images)} images, {len(annotated)} of them with boxes of {len(classes)} classes',
                      f"The file has no category for {_listed(missing)}: check their spelling" if missing else '')


def _ends_unlabelled(dataset: dict) -> bool:
    """Whether the pipeline marks every image as unlabelled."""
    pipeline = dataset.get('pipeline') or ()
    return bool(pipeline) and pipeline[-1].get('type') == Unlabelled.__name__


def _listed(values: Sequence, most: int = 6) -> str:
    rest = len(values) - most
    return ', '.join(map(str, values[:most])) + (f', … and {rest} more' if rest > 0 else '')
