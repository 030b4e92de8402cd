"""What data sets of other forms than COCO's hold: the boxes that a built one trains on, and why one can not be built.

MMDetection leaves nothing out of these: a box of NaN, or a label beyond the classes, trains.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet
from xml.etree import ElementTree

import numpy as np
from mmdet.datasets import CocoDataset, Objects365V1Dataset, Objects365V2Dataset, ODVGDataset, XMLDataset
from mmdet.datasets.transforms import FilterAnnotations, LoadAnnotations
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_from_file

from kd_det.checks.environment import Finding
from kd_det.checks.records import Damages, UnreadableError, kind_of, read_json, show, to_numbers
from kd_det.config.classes import get_metainfo
from kd_det.config.files import iterate_built_datasets
from kd_det.datasets import is_unlabelled

CORRECT_ANNOTATION = 'Correct these annotations, or take them out (entries are counted from 0)'
SAME_FILE = 'Give the evaluator the annotation file of its data set'
CHUNK = 10_000  # images whose boxes are judged at once
CORNERS = ('xmin', 'ymin', 'xmax', 'ymax')

_sound: WeakSet = WeakSet()  # data sets that were judged: they are asked for more than once, and do not change


def reads_as_coco(kind: Any) -> bool:
    """Whether MMDetection's own code reads the file of a data set of this class as one of COCO."""
    return CocoDataset in getattr(kind, '__mro__', ()) and kind.COCOAPI is CocoDataset.COCOAPI \
        and kind.parse_data_info is CocoDataset.parse_data_info and kind.load_data_list in (
            each.load_data_list for each in (CocoDataset, Objects365V1Dataset, Objects365V2Dataset))


def inspect_instances(datasets: Mapping[str, object]) -> Iterator[Finding]:
    """Judges the boxes and labels that built data sets hand to MMDetection's ``LoadAnnotations``.

    Args:
        datasets: By what they are called; those of COCO's form are judged by their files.
    """
    for split, dataset in datasets.items():
        for leaf in iterate_built_datasets(dataset):
            if reads_as_coco(type(leaf)) or is_unlabelled(leaf) or leaf in _sound:
                continue
            damages = Damages(f'{split} data', CORRECT_ANNOTATION)
            _judge_leaf(leaf, damages)
            if not damages:
                _sound.add(leaf)
            yield from damages.findings()


def inspect_evaluated_images(datasets: Mapping[str, object],
                             metrics: Mapping[str, Sequence[object]]) -> Iterator[Finding]:
    """Whether an evaluator's own annotation file lists the images of its data set, and no others."""
    for split, dataset in datasets.items():
        for api in filter(None, (getattr(metric, '_coco_api', None) for metric in metrics.get(split, ()))):
            evaluated = api.imgs.keys()
            ids = {leaf.get_data_info(index).get('img_id') for leaf in iterate_built_datasets(dataset)
                   if hasattr(leaf, 'get_data_info') for index in range(len(leaf))} - {None}
            unknown, unseen = ids - evaluated, evaluated - ids
            if unknown:
                text = f'{len(unknown):,} of the {len(ids):,} images of the data set are not in its annotation file'
                yield Finding(f'{split} evaluator', f'{text}, such as that of the id {show(next(iter(unknown)))}',
                              SAME_FILE, fault=True)
            elif unseen and ids:
                text = f'{len(unseen):,} of the {len(evaluated):,} images of its file are not in the data set'
                yield Finding(f'{split} evaluator', f'{text}, such as that of the id {show(next(iter(unseen)))}: their '
                              'objects count as not found', SAME_FILE)


def _judge_leaf(leaf: Any, damages: Damages) -> None:
    transforms = getattr(getattr(leaf, 'pipeline', None), 'transforms', ())
    loader = next((each for each in transforms if isinstance(each, LoadAnnotations)), None)
    if loader is None or not hasattr(leaf, 'get_data_info'):
        return
    # Regions of a caption are counted anew in each image.
    classes = get_metainfo(leaf).get('classes') if getattr(leaf, 'dataset_mode', 'OD') == 'OD' else None
    filtered = any(isinstance(each, FilterAnnotations) and each.by_box for each in transforms)
    file = f"'{leaf.ann_file}': " if getattr(leaf, 'ann_file', None) else ''
    upright = getattr(loader, 'box_type', 'hbox') in (None, 'hbox')
    for start in range(0, len(leaf), CHUNK):
        found = [(index, info, place, instance)
                 for index in range(start, min(start + CHUNK, len(leaf))) for info in [leaf.get_data_info(index)]
                 for place, instance in enumerate(info.get('instances') or ())]

        def name(row: int, found: list = found) -> str:
            index, info, place, _ = found[row]
            return f"{file}image {index} ('{info.get('img_path')}'), instance {place}"

        if loader.with_bbox and upright:
            _judge_corners([instance.get('bbox') for *_, instance in found], filtered, name, damages)
        if loader.with_label:
            _judge_labels([instance.get('bbox_label') for *_, instance in found], classes, name, damages)


def _judge_corners(boxes: list, filtered: bool, name: Callable[[int], str], damages: Damages) -> None:
    """Judges boxes x1, y1, x2, y2."""
    boxes = [list(box) if isinstance(box, (tuple, np.ndarray)) else box for box in boxes]
    values, broken = to_numbers(boxes, 4)
    with np.errstate(all='ignore'):
        infinite = ~broken & ~np.isfinite(values.astype(np.float32)).all(1)
        sizes = values[:, 2:] - values[:, :2]
        negative, empty = (sizes < 0).any(1) & ~infinite, (sizes == 0).any(1) & ~infinite
    for rows, what in ((broken, 'expected 4 numbers: x1, y1, x2, y2'), (infinite, 'which is not finite'),
                       (negative, 'of negative size, expected x1, y1, x2, y2')):
        if rows.any():
            first = int(rows.argmax())
            damages.add(what, f'{name(first)}: its bbox is {show(boxes[first])}, {what}', int(rows.sum()))
    empty &= ~negative & (not filtered)
    if empty.any():
        first = int(empty.argmax())
        damages.add('empty', f'{name(first)}: its bbox is {show(boxes[first])}, of no size, on which it trains',
                    int(empty.sum()), "Take them out, or put dict(type='FilterAnnotations') after LoadAnnotations",
                    fault=False)


def _judge_labels(labels: list, classes: Sequence[str] | None, name: Callable[[int], str], damages: Damages) -> None:
    strange = [row for row, label in enumerate(labels) if not isinstance(label, (int, np.integer))]
    if strange:
        damages.add('label', f'{name(strange[0])}: its bbox_label is {show(labels[strange[0]])}, expected a whole '
                    'number', len(strange))
    elif classes:
        values = np.array(labels, int)
        beyond = (values < 0) | (values >= len(classes))
        if beyond.any():
            first = int(beyond.argmax())
            damages.add('class', f'{name(first)}: its bbox_label is {values[first]}, and there are {len(classes)} '
                        'classes, counted from 0', int(beyond.sum()))


def inspect_other_form(subject: str, kind: Any, dataset: dict, join: Callable[[dict, str], str],
                       classes: Sequence[str] | None) -> Iterator[Finding]:
    """Looks into the files of a data set for what its class would stumble over: VOC's XML, ODVG, MMEngine's own form.

    Args:
        subject: What it is called.
        kind: Its class.
        dataset: Its config.
        join: Joins a path to the root of a data set.
        classes: Its classes, if they are known.
    """
    path = join(dataset, dataset.get('ann_file') or '')
    bases = getattr(kind, '__mro__', ())
    if not bases or not Path(path).is_file():
        return
    damages = Damages(subject, CORRECT_ANNOTATION)
    if XMLDataset in bases and kind.load_data_list is XMLDataset.load_data_list \
            and kind._parse_instance_info is XMLDataset._parse_instance_info:
        prefix = dataset.get('data_prefix') or {}
        folder = Path(join(dataset, prefix.get('sub_data_root') or ''), dataset.get('ann_subdir') or 'Annotations')
        for name in list_from_file(path):
            _judge_xml(folder / f'{name}.xml', classes or (), damages)
    elif ODVGDataset in bases and kind.load_data_list is ODVGDataset.load_data_list:
        _judge_lines(path, bool(dataset.get('label_map_file')), damages)
    elif kind.load_data_list is BaseDataset.load_data_list and path.endswith('.json'):
        _judge_own_form(path, kind, dataset.get('data_prefix'), damages)
    yield from damages.findings()


def _judge_xml(path: Path, classes: Sequence[str], damages: Damages) -> None:
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        damages.add('absent', f"'{path}': it can not be read ({error.strerror})")
        return
    except ElementTree.ParseError as error:
        damages.add('xml', f"'{path}': it is no XML, or cut off ({error})")
        return
    size = root.find('size')
    if size is not None:
        for key in ('width', 'height'):
            if not (size.findtext(key) or '').strip().isdecimal():
                damages.add(key, f"'{path}': its {key} is {show(size.findtext(key))}, expected a whole number")
    for index, each in enumerate(root.findall('object')):
        name = each.findtext('name')
        place = f"'{path}': object {index} ({show(name)})"
        if name is None:
            damages.add('name', f'{place}: no name')
        if name not in classes:
            damages.add('class', f'{place}: none of the classes has this name, and MMDetection leaves it out',
                        remedy='Add the class to metainfo=dict(classes=…), unless that is meant', fault=False)
            continue
        for key in CORNERS:
            text = each.findtext(f'bndbox/{key}')
            values, broken = to_numbers([_read_float(text)])
            if broken[0] or not np.isfinite(values[0]):
                damages.add('bndbox', f'{place}: its {key} is {show(text)}, expected a number')
                break


def _read_float(text: str | None) -> float | None:
    try:
        return float(text or '')
    except ValueError:
        return None


def _judge_lines(path: str, detection: bool, damages: Damages) -> None:
    """Judges a file of ODVG: one JSON object a line."""
    with open(path, encoding='utf-8', errors='replace') as lines:
        for number, line in enumerate(lines, start=1):
            _judge_line(line, f"'{path}': line {number}", detection, damages)


def _judge_line(line: str, place: str, detection: bool, damages: Damages) -> None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        damages.add('json', f'{place}: it is no JSON ({error})')
        return
    if not isinstance(entry, dict):
        damages.add('object', f'{place}: it is {kind_of(entry)}, no object')
        return
    absent = [key for key in ('filename', 'height', 'width', *([] if detection else ['grounding'])) if key not in entry]
    if absent:
        damages.add(f'absent {absent}', f'{place}: no ' + ', '.join(map(repr, absent)))
    for index, each in enumerate((entry.get('detection') or {}).get('instances', ()) if detection else ()):
        bbox, label = each.get('bbox'), each.get('label')
        if to_numbers([bbox], 4)[1][0]:
            damages.add('bbox', f'{place}, instance {index}: its bbox is {show(bbox)}, expected 4 numbers: x1, y1, x2, '
                        'y2')
        if not str(label).strip().isdecimal():
            damages.add('label', f'{place}, instance {index}: its label is {show(label)}, expected a whole number')


def _judge_own_form(path: str, kind: Any, prefixes: dict | None, damages: Damages) -> None:
    """Judges a file in MMEngine's own form: ``metainfo`` and ``data_list``; its boxes are judged when it is built."""
    try:
        content, _ = read_json(path)
        if not isinstance(content, dict):
            raise UnreadableError(f'it holds {kind_of(content)}')
        for key, expected in (('metainfo', dict), ('data_list', list)):
            if key not in content:
                raise UnreadableError(f"no '{key}'")
            if not isinstance(content[key], expected):
                raise UnreadableError(f"'{key}' is {kind_of(content[key])}")
    except UnreadableError as error:
        damages.add('form', f"'{path}' is no annotation file of MMEngine's form ({error})",
                    remedy='Expected a JSON object with metainfo and the list data_list')
        return
    if kind.parse_data_info is not BaseDataset.parse_data_info:
        return
    keys = list(dict(img_path='') if prefixes is None else prefixes)
    for index, entry in enumerate(content['data_list']):
        place = f"'{path}': entry {index} of data_list"
        if not isinstance(entry, dict):
            damages.add('entry', f'{place}: it is {kind_of(entry)}, no object')
        elif absent := [key for key in keys if key not in entry]:
            damages.add(f'absent {absent}', f'{place}: no ' + ', '.join(map(repr, absent)))
