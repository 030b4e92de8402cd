"""Reads a COCO annotation file and judges what MMDetection makes of it, as mmdet 3's ``CocoDataset`` does.

A fault is what ends in an error, and what teaches something wrong: an object of a listed image that is lost, for
then it is taken for background, or a box that is none. A note is what MMDetection leaves out, no image the poorer.
"""
from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from kd_det.checks.environment import Finding
from kd_det.checks.records import (
    Entries,
    UnreadableError,
    as_text,
    kind_of,
    list_some,
    name_of,
    read_json,
    show,
    to_numbers,
    without_garbage_collection,
)

EXPECTED = 'Expected a JSON object with the lists images, categories and annotations'
NUMBER = 'Give each entry an id of its own, and the annotations the ids that are meant (entries are counted from 0)'
UNLISTED = 'Add the image or category to the file, or take its annotations out'
LOST = 'so the object would be background'
MANY = 0.1  # of the boxes; fewer that reach beyond their image are objects which the border cuts
FEW = 8  # boxes do not tell in which form they are written


class Use(NamedTuple):
    """What a config does with an annotation file.

    Attributes:
        subject: What reads it, such as ``'train data'``.
        classes: The config's classes; None for all of the file's.
        masks: Whether the pipeline loads masks.
        unlabelled: Whether all boxes are dropped, or nothing asks for them.
        filters_empty: Whether images without boxes are left out.
        scored: Whether COCO's metric reads it, which leaves nothing out.
    """
    subject: str
    classes: tuple | None = None
    masks: bool = False
    unlabelled: bool = False
    filters_empty: bool = False
    scored: bool = False


def inspect_coco_file(path: str, uses: Sequence[Use]) -> list[Finding]:
    """Judges a COCO file for all that reads it: one finding for each kind of damage, and what there is to train on.

    The file is read once, and not again as long as it does not change.
    """
    state = os.stat(path)
    return list(_inspect(str(path), state.st_mtime_ns, state.st_size, tuple(uses)))


@lru_cache(maxsize=32)
def _inspect(path: str, changed: int, size: int, uses: tuple[Use, ...]) -> tuple[Finding, ...]:
    found: dict[str, Finding] = {}
    with without_garbage_collection():
        try:
            content, finite = read_json(path)
        except UnreadableError as error:
            return Finding(uses[0].subject, f"'{path}' is no COCO annotation file ({error})", EXPECTED, fault=True),
        for use in uses:
            for finding in judge_coco(content, use, path, finite):
                found.setdefault(finding.found, finding)
    return tuple(found.values())


def judge_coco(content: Any, use: Use, path: str, finite: bool = True) -> Iterator[Finding]:
    """Judges what a COCO file holds.

    Args:
        content: As JSON has it.
        use: What it is for.
        path: What the findings call it.
        finite: Whether it is known that all numbers are finite.
    """

    def report(text: str, remedy: str, fault: bool) -> Finding:
        return Finding(use.subject, f"'{path}': {text}", remedy, fault)

    kinds = dict(images='image', categories='category', annotations='annotation')
    try:
        lists = [Entries(kind, _take_list(content, key, use), report) for key, kind in kinds.items()]
    except UnreadableError as error:
        yield Finding(use.subject, f"'{path}' is no COCO annotation file ({error})", EXPECTED, fault=True)
        return
    strange = [[index for index, entry in enumerate(each.entries) if not isinstance(entry, dict)] for each in lists]
    if any(strange):
        for each, indices in zip(lists, strange):
            yield from each.damage(indices, lambda index, each=each: f'it is {kind_of(each.entries[index])}, no object')
        return
    images, categories, annotations = lists
    damages = [*images.missing(('id', ) if use.scored else ('id', 'file_name', 'height', 'width')),
               *categories.missing(('id', 'name')), *annotations.missing(('id', 'image_id', 'category_id')),
               *_judge_ids(images), *_judge_ids(categories), *_judge_ids(annotations),
               *_judge_ids(annotations, 'image_id'), *_judge_ids(annotations, 'category_id')]
    sizes = _read_sizes(images)
    try:
        damages += [*_judge_images(images, annotations, sizes, use), *_judge_names(categories, use),
                    *_judge_references(images, annotations, 'image_id', range(len(annotations.entries)))]
        relevant = _find_relevant(images, annotations, use)
        damages += _judge_references(categories, annotations, 'category_id', relevant)
        found, kept = _judge_boxes(images, annotations, sizes, relevant, use)
        damages += found
    except TypeError:  # an id that is a list, which is told already
        if not damages:
            raise
    if use.masks and not use.unlabelled and not any(damage.fault for damage in damages):
        damages += _judge_masks(images, annotations, kept, finite)
    yield from damages
    if not use.scored and not any(damage.fault for damage in damages):
        yield _summarize(images, categories, annotations, kept, use, path)


def _take_list(content: Any, key: str, use: Use) -> list:
    if not isinstance(content, dict):
        raise UnreadableError(f"it holds {kind_of(content)}")
    if key not in content:
        if key == 'annotations' and use.unlabelled:
            return []
        raise UnreadableError(f"no '{key}'")
    if not isinstance(content[key], list):
        raise UnreadableError(f"'{key}' is {kind_of(content[key])}, no list")
    return content[key]


def _judge_ids(entries: Entries, key: str = 'id') -> Iterator[Finding]:
    """Ids that are no number and no text, or both in one list, or given twice."""
    values = entries[key]
    types = set(map(type, values))
    strange = [index for index, value in enumerate(values) if type(value) not in (int, float, str)
               and key in entries.entries[index]] if types - {int, float, str} else []
    yield from entries.damage(
        strange, lambda index: f'its {key} is {show(values[index])}, expected a number or a text', NUMBER)
    if key != 'id' or strange:
        return
    texts = [index for index, value in enumerate(values) if isinstance(value, str)] if str in types else []
    if texts and len(texts) < len(values):
        others = sorted(set(range(len(values))) - set(texts))
        yield from entries.damage(min(texts, others, key=len), lambda index: f'its id is {name_of(values[index])}, '
                                  'those of most others are not', NUMBER)
    yield from entries.damage(entries.repeated('id'), lambda index: f'{entries.kind} {values.index(values[index])} has '
                              'this id, too', NUMBER)


def _judge_images(images: Entries, annotations: Entries, sizes: np.ndarray, use: Use) -> Iterator[Finding]:
    if use.scored:
        return
    names, heights, widths = images['file_name'], images['height'], images['width']
    strange = [index for index, name in enumerate(names) if not (isinstance(name, str) and name)
               and 'file_name' in images.entries[index]]
    yield from images.damage(strange, lambda index: f'its file_name is {show(names[index])}, expected a path')
    with np.errstate(invalid='ignore'):
        wrong = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)).all(1))
    yield from images.damage(
        [index for index in wrong.tolist() if {'height', 'width'} <= images.entries[index].keys()],
        lambda index: f'its size is {show(widths[index])} x {show(heights[index])} (width x height), expected '
        'numbers above 0')
    again = [] if strange else images.repeated('file_name')
    if not again:
        return
    twice = {names[index] for index in again}
    ids = {identity for identity, name in zip(images['id'], names) if name in twice}
    shown: dict[Hashable, list] = {identity: [] for identity in ids}
    for annotation in annotations.entries:
        if annotation.get('image_id') in ids:
            shown[annotation['image_id']].append((annotation.get('category_id'), annotation.get('bbox')))
    objects = [sorted(map(repr, shown.get(identity, ()))) for identity in images['id']]
    first = {name: index for index, name in reversed(list(enumerate(names)))}
    differ = [] if use.unlabelled else [index for index in again if objects[index] != objects[first[names[index]]]]
    if use.filters_empty:  # a copy that shows nothing is left out
        differ = [index for index in differ if objects[index] and objects[first[names[index]]]]

    def tell(index: int) -> str:
        return f"image {first[names[index]]} has the file_name '{names[index]}', too"

    yield from images.damage(differ, lambda index: f'{tell(index)}, with other boxes: each would teach that the '
                             'objects of the other are background',
                             'List each image once, with all of its boxes (entries are counted from 0)')
    same = sorted(set(again) - set(differ))
    yield from images.damage(same, lambda index: f'{tell(index)}; it is used more than once',
                             'List each image once, unless that is meant', fault=False)


def _judge_names(categories: Entries, use: Use) -> Iterator[Finding]:
    names = categories['name']
    strange = [index for index, name in enumerate(names) if not isinstance(name, (str, int, float))
               and 'name' in categories.entries[index]]
    yield from categories.damage(strange, lambda index: f'its name is {show(names[index])}, expected a text')
    if not strange:
        again = categories.repeated('name')
        used = [index for index in again if use.classes is None or names[index] in use.classes]
        yield from categories.damage(
            used, lambda index: f"category {names.index(names[index])} has the name {show(names[index])}, too, so all "
            'later labels would shift', 'Give each category a name of its own, or unite the two')
        yield from categories.damage(
            sorted(set(again) - set(used)), lambda index: f"category {names.index(names[index])} has the name "
            f"{show(names[index])}, too; it is none of the config's classes",
            'Give each category a name of its own, or unite the two', fault=False)


def _judge_references(entries: Entries, annotations: Entries, key: str, among: Sequence[int]) -> Iterator[Finding]:
    """Annotations of images or categories that the file does not list."""
    known, values = set(entries['id']) - {None}, annotations[key]
    unknown = [index for index in among if values[index] not in known and values[index] is not None]
    alike = {as_text(value): value for value in known} if unknown else {}
    other_type = [index for index in unknown if as_text(values[index]) in alike]
    yield from annotations.damage(
        other_type, lambda index: f'its {key} is {name_of(values[index])}, the id of the {entries.kind} is '
        f'{name_of(alike[as_text(values[index])])}, {LOST}', NUMBER)
    is_category = key == 'category_id'
    yield from annotations.damage(
        sorted(set(unknown) - set(other_type)), lambda index: f'its {key} {show(values[index])} is none of the ids of '
        f"the {len(known):,} {'categories' if is_category else 'images'}, "
        f"{LOST if is_category else 'and MMDetection leaves it out'}", UNLISTED, fault=is_category)


def _read_sizes(images: Entries) -> np.ndarray:
    """Widths and heights, (I, 2); NaN where they are no numbers."""
    columns = [to_numbers(images[key]) for key in ('width', 'height')]
    return np.stack([np.where(broken, np.nan, values) for values, broken in columns], axis=1)


def _find_relevant(images: Entries, annotations: Entries, use: Use) -> list[int]:
    """The indices of the annotations that are looked at."""
    known = set(images['id']) - {None}
    return [index for index, (image, ignored) in enumerate(zip(annotations['image_id'], annotations['ignore']))
            if image in known and (use.scored or not ignored)]


def _judge_boxes(images: Entries, annotations: Entries, sizes: np.ndarray, relevant: Sequence[int],
                 use: Use) -> tuple[list[Finding], np.ndarray]:
    """Judges boxes and areas, and which of them ``CocoDataset.parse_data_info`` takes.

    Args:
        images: The images.
        annotations: The annotations.
        sizes: (I, 2) width and height of the images; NaN where they are no numbers.
        relevant: Indices of the annotations to look at.
        use: What the file is for.

    Returns:
        What was found, and the (M, ) indices of the annotations that are taken, of whatever class.
    """
    findings = list(annotations.missing(('bbox', 'area', *(['iscrowd'] if use.scored else [])), relevant))
    entries = annotations.entries
    given = np.array(relevant if annotations.has('bbox') else [index for index in relevant if 'bbox' in entries[index]],
                     int)
    columns = {key: annotations[key] for key in ('bbox', 'image_id', 'area')}
    values, broken = to_numbers([columns['bbox'][index] for index in given.tolist()], 4)
    findings += annotations.damage(given[broken], lambda index: f"its bbox is {show(entries[index]['bbox'])}, "
                                   'expected 4 numbers: x, y, width, height')
    given, values = given[~broken], values[~broken]
    places = {identity: place for place, identity in enumerate(images['id'])}
    sizes = sizes[np.array([places[columns['image_id'][index]] for index in given.tolist()], int)]
    areas, no_area = to_numbers([columns['area'][index] for index in given.tolist()])
    lacking = np.zeros(len(given), bool) if annotations.has('area') else np.array(
        ['area' not in entries[index] for index in given.tolist()], bool)
    areas[lacking], no_area[lacking] = 1, False  # which is told already
    with np.errstate(all='ignore'):
        corners = np.concatenate([values[:, :2], values[:, :2] + values[:, 2:]], axis=1).astype(np.float32)
        infinite = ~np.isfinite(corners).all(1)
        negative = ~infinite & (values[:, 2:] < 0).any(1)
        whole = ~infinite & ~negative
        small = whole & (values[:, 2:] < 1).any(1)
        inside = np.minimum(corners[:, 2:], sizes) - np.maximum(corners[:, :2], 0)
        outside = whole & ~small & (inside <= 0).any(1)
        taken = whole & ~small & ~outside
        beyond = np.maximum(-corners[:, :2], corners[:, 2:] - sizes).max(1, initial=0)
        no_area |= ~np.isfinite(areas)
        empty = taken & ~no_area & (areas <= 0)
    kept = given[taken & ~no_area & ~empty]
    if use.unlabelled:  # the boxes are dropped, but read
        return findings, kept

    def tell(indices: np.ndarray, what: str, key: str = 'bbox', fault: bool = True) -> None:
        findings.extend(annotations.damage(
            indices, lambda index: f'its {key} is {show(entries[index][key])}, {what}', fault=fault))

    left_out = 'which counts as an object that is not found' if use.scored else 'which MMDetection leaves out'
    tell(given[infinite], 'which is not finite')
    tell(given[negative], 'of negative size: COCO writes x, y, width, height')
    tell(given[no_area], 'expected a number', 'area')
    if not use.scored:
        tell(given[empty], f'so MMDetection leaves it out, and {LOST[3:]}', 'area')
    tell(given[small], f'of less than a pixel, {left_out}', fault=False)
    tell(given[outside], f'outside of its image, {left_out}', fault=False)
    findings += _judge_form(annotations, given, values, sizes, taken, beyond)
    return findings, kept


def _judge_form(annotations: Entries, given: np.ndarray, boxes: np.ndarray, sizes: np.ndarray, taken: np.ndarray,
                beyond: np.ndarray) -> Iterator[Finding]:
    """Whether boxes that reach beyond their images are many, or far, as those are that hold x1, y1, x2, y2."""
    reach = taken & (beyond > 1)
    far = reach & (beyond > sizes.max(1, initial=0))
    if not far.any() and reach.sum() <= MANY * taken.sum():
        return
    corners = boxes[taken]
    fit = (corners[:, 2:] > corners[:, :2]).all() and (corners[:, 2:] <= sizes[taken] + 1).all()
    first = int(given[far if far.any() else reach][0])
    text = (f'{reach.sum():,} of {taken.sum():,} boxes reach beyond their images, such as that of annotation {first} '
            f"(id {show(annotations.entries[first].get('id'))}): {show(annotations.entries[first]['bbox'])}")
    yield annotations.report(text + ('; as corners x1, y1, x2, y2 all would fit' if fit and taken.sum() >= FEW else ''),
                             "COCO's boxes are x, y, width, height: look at some with kd-det inspect", False)


def _judge_masks(images: Entries, annotations: Entries, kept: np.ndarray, finite: bool) -> Iterator[Finding]:
    """Judges what ``LoadAnnotations(with_mask=True)`` reads of the annotations that are taken."""
    entries = annotations.entries
    sizes = {image['id']: [image['height'], image['width']] for image in images.entries}
    missing, strange, few, other = [], [], [], []
    for index in kept.tolist():
        mask = entries[index].get('segmentation')
        if not mask:
            missing.append(index)
        elif isinstance(mask, list):
            numbers = list(chain.from_iterable(mask)) if all(isinstance(each, list) for each in mask) else [None]
            if set(map(type, numbers)) - {int, float} or not (finite or np.isfinite(numbers).all()):
                strange.append(index)
            elif not any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
                few.append(index)
        elif not isinstance(mask, dict):
            strange.append(index)
        elif not isinstance(mask.get('counts'), (list, str)) or not mask.get('size'):
            few.append(index)
        elif mask['size'] != sizes[entries[index]['image_id']]:
            other.append(index)
    yield from annotations.damage(missing, "no 'segmentation', and the pipeline loads masks")
    yield from annotations.damage(strange, lambda index: (
        f"its segmentation is {show(entries[index]['segmentation'])}, expected polygons of numbers, or run lengths"))
    yield from annotations.damage(other, lambda index: 'its segmentation is of the size (height, width) '
                                  f"{show(entries[index]['segmentation']['size'])}, its image of "
                                  f"{sizes[entries[index]['image_id']]}")
    yield from annotations.damage(few, 'its segmentation has no polygon of three points or more, and no run lengths: '
                                  'MMDetection ignores the object', fault=False)


def _summarize(images: Entries, categories: Entries, annotations: Entries, kept: np.ndarray, use: Use,
               path: str) -> Finding:
    """What there is to train on, or why it is nothing."""
    names = dict(zip(categories['id'], categories['name']))
    count = len(images.entries)
    if not count:
        return Finding(use.subject, f"'{path}' lists no images", 'Give a file with images', fault=True)
    if use.unlabelled and use.filters_empty:
        return Finding(use.subject, f'{count} images, unlabelled, which filter_empty_gt passes over',
                       'Set filter_cfg=dict(filter_empty_gt=False) of the data set', fault=True)
    if use.unlabelled:
        return Finding(use.subject, f'{count} images, unlabelled')
    classes = use.classes or tuple(names.values())
    used = {identity for identity, name in names.items() if name in classes}
    of_images, of_categories = annotations['image_id'], annotations['category_id']
    annotated = {of_images[index] for index in kept.tolist() if of_categories[index] in used}
    if annotated:
        return Finding(use.subject, f'{count} images, {len(annotated)} of them with boxes of {len(classes)} classes')
    remedy = "If nobody labelled these images, end the data set's pipeline with dict(type='Unlabelled')"
    if any(name not in names.values() for name in classes):
        remedy = ("Set metainfo=dict(classes=…) of the data set to the file's names, and num_classes of every head "
                  'to their number')
    shown = str if all(isinstance(name, str) for name in (*classes, *names.values())) else repr  # as 1 and '1'
    expected, there = list(map(shown, classes)), sorted(map(shown, names.values()))
    return Finding(use.subject, f"'{path}' has no box of the config's classes ({list_some(expected)}); the file's "
                   f'categories are {list_some(there)}', remedy, fault=True)


