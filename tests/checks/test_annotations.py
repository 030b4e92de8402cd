"""Damaged annotation files: what is found agrees with what MMDetection's own class makes of them."""
import json
import math
import time
from collections import Counter

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from kd_det.checks.annotations import (
    Use,
    _find_relevant,
    _judge_boxes,
    _read_sizes,
    inspect_coco_file,
    judge_coco,
)
from kd_det.checks.data import check_labels
from kd_det.checks.environment import DiagnosisError
from kd_det.checks.instances import inspect_instances, inspect_other_form
from kd_det.checks.records import Entries, read_json

TRAIN, EVALUATOR = Use('train data'), Use('val evaluator', scored=True)
NAN, INF = math.nan, math.inf


def sound() -> dict:
    """Three images of 100 x 80 with two objects each, of two classes."""
    boxes = [[10, 10, 20, 30], [40, 20, 30, 30], [0, 0, 50, 40], [60, 30, 40, 50], [5, 5, 90, 70], [20, 40, 12.5, 8]]
    return dict(
        images=[dict(id=index, file_name=f'{index}.jpg', width=100, height=80) for index in (1, 2, 3)],
        categories=[dict(id=7, name='cat'), dict(id=9, name='dog')],
        annotations=[dict(id=11 + index, image_id=1 + index // 2, category_id=(7, 9)[index % 2], bbox=box, iscrowd=0,
                          area=box[2] * box[3], segmentation=[[10, 10, 20, 10, 20, 20]])
                     for index, box in enumerate(boxes)])


def set_of(key, index, **values):
    """A change of one entry; ... takes a key out."""

    def change(content):
        content[key][index].update(values)
        for name in [name for name, value in values.items() if value is ...]:
            del content[key][index][name]
    return change


def box(*values):
    return set_of('annotations', 2, bbox=list(values))


def repeat(key, index, **values):
    return lambda content: content[key].append(dict(content[key][index], **values))


def as_texts(list_name, key):
    def change(content):
        for entry in content[list_name]:
            entry[key] = str(entry[key])
    return change


def put(key, index, value):
    def change(content):
        content[key][index] = value
    return change


def judge(change, use=TRAIN):
    content = sound()
    change(content)
    return [(finding.found, finding.mark) for finding in judge_coco(content, use, 'f.json')]


def count_objects(content, tmp_path, **settings):
    """How many objects MMDetection's class takes from each image, or the error in which that ends."""
    (tmp_path / 'f.json').write_text(json.dumps(content))
    try:
        dataset = CocoDataset(ann_file=str(tmp_path / 'f.json'), data_prefix=dict(img=''), pipeline=[],
                              serialize_data=False, metainfo=dict(classes=('cat', 'dog')), **settings)
    except Exception as error:
        return type(error).__name__
    return {info['img_id']: len(info['instances']) for info in dataset.data_list}


FIRST = "'f.json': annotation 2 (id 13): "
LOSES, KEEPS = 'loses objects', 'keeps all objects'
LOST = 'so the object would be background'
# What is changed, what is found (the beginning), whether it is a fault, and what MMDetection makes of it.
DAMAGES = {
    'a NaN': (box(NAN, 0, 50, 40), FIRST + 'its bbox is [nan, 0, 50, 40], which is not finite', True, LOSES),
    'NaN for a width': (box(0, 0, NAN, 40), FIRST + 'its bbox is [0, 0, nan, 40], which is not finite', True, LOSES),
    'an infinite width': (box(0, 0, INF, 40), FIRST + 'its bbox is [0, 0, inf, 40], which is not finite', True, KEEPS),
    'beyond float32': (box(0, 0, 1e39, 40), FIRST + 'its bbox is [0, 0, 1e+39, 40], which is not finite', True, KEEPS),
    'an infinite corner': (box(-INF, 0, 50, 40), FIRST + 'its bbox is [-inf, 0, 50, 40], which is not', True, LOSES),
    'a negative width': (box(50, 0, -50, 40), FIRST + 'its bbox is [50, 0, -50, 40], of negative size', True, LOSES),
    'a negative height': (box(0, 40, 50, -40), FIRST + 'its bbox is [0, 40, 50, -40], of negative size', True, LOSES),
    'no width': (box(10, 10, 0, 40), FIRST + 'its bbox is [10, 10, 0, 40], of less than a pixel, which MMDetection '
                 'leaves out', False, LOSES),
    'half a pixel': (box(10, 10, 9, 0.5), FIRST + 'its bbox is [10, 10, 9, 0.5], of less than a pixel', False, LOSES),
    'outside': (box(100, 10, 20, 20), FIRST + 'its bbox is [100, 10, 20, 20], outside of its image, which MMDetection '
                'leaves out', False, LOSES),
    'three numbers': (box(0, 0, 50), FIRST + 'its bbox is [0, 0, 50], expected 4 numbers: x, y, width, height', True,
                      'ValueError'),
    'five numbers': (box(0, 0, 50, 40, 1), FIRST + 'its bbox is [0, 0, 50, 40, 1], expected 4', True, 'ValueError'),
    'no numbers': (box(), FIRST + 'its bbox is [], expected 4 numbers', True, 'ValueError'),
    'texts': (box('0', '0', '50', '40'), FIRST + "its bbox is ['0', '0', '50', '40'], expected 4", True, 'TypeError'),
    'a null': (box(0, 0, None, 40), FIRST + 'its bbox is [0, 0, None, 40], expected 4 numbers', True, 'TypeError'),
    'a text among numbers': (box(0, 0, 50, 'x'), FIRST + "its bbox is [0, 0, 50, 'x'], expected 4", True,
                            'TypeError'),
    'null for a box': (set_of('annotations', 2, bbox=None), FIRST + 'its bbox is None, expected', True, 'TypeError'),
    'a dict for a box': (set_of('annotations', 2, bbox=dict(x=0)), FIRST + "its bbox is {'x': 0}, expected", True,
                         'ValueError'),
    'a box in a list': (box([0, 0, 50, 40]), FIRST + 'its bbox is [[0, 0, 50, 40]], expected 4', True, 'ValueError'),
    'no box': (set_of('annotations', 2, bbox=...), FIRST + "no 'bbox'", True, 'KeyError'),
    'no area': (set_of('annotations', 2, area=...), FIRST + "no 'area'", True, 'KeyError'),
    'an area of 0': (set_of('annotations', 2, area=0), FIRST + 'its area is 0, so MMDetection leaves it out, and the '
                     'object would be background', True, LOSES),
    'a text for an area': (set_of('annotations', 2, area='9'), FIRST + "its area is '9', expected a number", True,
                           'TypeError'),
    'NaN for an area': (set_of('annotations', 2, area=NAN), FIRST + 'its area is nan, expected a number', True, KEEPS),
    'no image_id': (set_of('annotations', 2, image_id=...), FIRST + "no 'image_id'", True, 'KeyError'),
    'no category_id': (set_of('annotations', 2, category_id=...), FIRST + "no 'category_id'", True, 'KeyError'),
    'no id': (set_of('annotations', 2, id=...), "'f.json': annotation 2: no 'id'", True, 'KeyError'),
    'no image_id and no box': (set_of('annotations', 2, image_id=..., bbox=...), FIRST + "no 'image_id'", True,
                               'KeyError'),
    'no ids': (set_of('annotations', 2, image_id=..., category_id=...), FIRST + "no 'image_id', 'category_id'", True,
               'KeyError'),
    'an unknown image': (set_of('annotations', 2, image_id=99), FIRST + 'its image_id 99 is none of the ids of the 3 '
                         'images, and MMDetection leaves it out', False, LOSES),
    'an unknown category': (set_of('annotations', 2, category_id=99), FIRST + 'its category_id 99 is none of the ids '
                            f'of the 2 categories, {LOST}', True, LOSES),
    'an image_id as a text': (set_of('annotations', 2, image_id='2'), FIRST + "its image_id is the text '2', the id of "
                              f'the image is the number 2, {LOST}', True, LOSES),
    'image ids as texts': (as_texts('annotations', 'image_id'), "'f.json': annotation 0 (id 11): its image_id is the "
                           "text '1', the id of the image is the number 1, so the object would be background (the "
                           'first of 6)', True, LOSES),
    'category ids as texts': (as_texts('annotations', 'category_id'), "'f.json': annotation 0 (id 11): its category_id "
                              "is the text '7', the id of the category is the number 7", True, LOSES),
    'images with texts': (as_texts('images', 'id'), "'f.json': annotation 0 (id 11): its image_id is the number 1, the "
                          "id of the image is the text '1'", True, LOSES),
    'categories with texts': (as_texts('categories', 'id'), "'f.json': annotation 0 (id 11): its category_id is the "
                              "number 7, the id of the category is the text '7'", True, LOSES),
    'one image with a text': (set_of('images', 1, id='2'), "'f.json': image 1 (id '2'): its id is the text '2', those "
                              'of most others are not', True, LOSES),
    'a list for an id': (set_of('images', 1, id=[2]), "'f.json': image 1 (id [2]): its id is [2], expected a number or "
                         'a text', True, 'TypeError'),
    'null for an image_id': (set_of('annotations', 2, image_id=None), FIRST + 'its image_id is None, expected', True,
                             LOSES),
    'two annotations of one id': (set_of('annotations', 2, id=12), "'f.json': annotation 2 (id 12): annotation 1 has "
                                  'this id, too', True, 'AssertionError'),
    'two images of one id': (set_of('images', 2, id=2), "'f.json': image 2 (id 2): image 1 has this id, too", True,
                             LOSES),
    'two categories of one id': (set_of('categories', 1, id=7), "'f.json': category 1 (id 7): category 0 has this id, "
                                 'too', True, LOSES),
    'two categories of one name': (set_of('categories', 1, name='cat'), "'f.json': category 1 (id 9): category 0 has "
                                   "the name 'cat', too, so all later labels would shift", True, KEEPS),
    'two images of one file': (set_of('images', 1, file_name='1.jpg'), "'f.json': image 1 (id 2): image 0 has the "
                               "file_name '1.jpg', too, with other boxes: each would teach that the objects of the "
                               'other are background', True, KEEPS),
    'no file_name': (set_of('images', 1, file_name=...), "'f.json': image 1 (id 2): no 'file_name'", True, 'KeyError'),
    'a number for a file_name': (set_of('images', 1, file_name=2), "'f.json': image 1 (id 2): its file_name is 2, "
                                 'expected a path', True, 'TypeError'),
    'no size': (set_of('images', 1, width=..., height=...), "'f.json': image 1 (id 2): no 'height', 'width'", True,
                'KeyError'),
    'a width of 0': (set_of('images', 1, width=0), "'f.json': image 1 (id 2): its size is 0 x 80 (width x height), "
                     'expected numbers above 0', True, LOSES),
    'a negative image': (set_of('images', 1, height=-80), "'f.json': image 1 (id 2): its size is 100 x -80", True,
                         LOSES),
    'a text for a height': (set_of('images', 1, height='80'), "'f.json': image 1 (id 2): its size is 100 x '80'", True,
                            'TypeError'),
    'NaN for a height': (set_of('images', 1, height=NAN), "'f.json': image 1 (id 2): its size is 100 x nan", True,
                         KEEPS),
    'a category without a name': (set_of('categories', 1, name=...), "'f.json': category 1 (id 9): no 'name'", True,
                                  'KeyError'),
    'a category without an id': (set_of('categories', 1, id=...), "'f.json': category 1: no 'id'", True, 'KeyError'),
    'null for an annotation': (put('annotations', 2, None), "'f.json': annotation 2: it is null, no object", True,
                               'TypeError'),
    'a text for an image': (put('images', 0, '1.jpg'), "'f.json': image 0: it is a text, no object", True, 'TypeError'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_each_damage_is_named_with_its_file_and_entry(damage, tmp_path):
    change, expected, fault, outcome = DAMAGES[damage]
    found = [(text, mark) for text, mark in judge(change) if mark != 'ok']
    assert found[0][0].startswith(expected) and found[0][1] == ('fault' if fault else 'note')
    assert fault or not any(mark == 'fault' for _, mark in found)
    # MMDetection's own class is the witness that the damage does what the finding says.
    content = sound()
    change(content)
    taken = count_objects(content, tmp_path)
    if outcome in (LOSES, KEEPS):
        assert (sum(taken.values()) < 6) == (outcome == LOSES)
    else:
        assert taken == outcome


def test_a_sound_file_is_sound(tmp_path):
    for use in (TRAIN, Use('train data', masks=True), Use('train data', classes=('dog', ))):
        (found, mark), = judge(lambda content: None, use)
        assert mark == 'ok' and found.startswith('3 images, 3 of them with boxes of')
    assert judge(lambda content: None, EVALUATOR) == []
    content = sound()  # with ids that are texts everywhere there is nothing wrong
    as_texts('images', 'id')(content)
    as_texts('annotations', 'image_id')(content)
    assert [finding.mark for finding in judge_coco(content, TRAIN, 'f.json')] == ['ok']
    assert sum(count_objects(content, tmp_path).values()) == 6
    assert judge(set_of('annotations', 2, ignore=1, bbox=...))[0][1] == 'ok'  # MMDetection passes over it
    assert judge(set_of('annotations', 2, iscrowd=1))[0][1] == 'ok'


def test_how_many_and_which_is_the_first():
    def change(content):
        for index in (1, 3, 4):
            content['annotations'][index]['bbox'] = [1, 2, NAN, 4]
        content['annotations'][5]['bbox'] = [1, 2, 3]
    found = judge(change)
    assert [text.split(': ', 1)[1] for text, _ in found] == [
        'annotation 5 (id 16): its bbox is [1, 2, 3], expected 4 numbers: x, y, width, height',
        'annotation 1 (id 12): its bbox is [1, 2, nan, 4], which is not finite (the first of 3)']


def test_boxes_that_are_taken_are_those_that_mmdetection_takes(tmp_path):
    """Of 4,000 random boxes, many of them odd, the same number for every image."""
    random = np.random.default_rng(0)
    odd = [NAN, INF, -INF, 0, 0.5, 1, -1, 99, 100, 101, 1e39]
    content = sound()
    content['images'] = [dict(id=index, file_name=f'{index}.jpg', width=100, height=80) for index in range(400)]
    content['annotations'] = [
        dict(id=index, image_id=index % 400, category_id=int(random.choice([7, 9])), iscrowd=0,
             bbox=[float(value) if random.random() < 0.8 else random.choice(odd)
                   for value in random.uniform(-20, 120, 4)],
             area=float(random.choice([0, 1, 10])), ignore=int(random.random() < 0.1)) for index in range(4000)]
    images, annotations = (Entries(kind, content[kind], print) for kind in ('images', 'annotations'))
    _, kept = _judge_boxes(images, annotations, _read_sizes(images), _find_relevant(images, annotations, TRAIN), TRAIN)
    counts = Counter(content['annotations'][index]['image_id'] for index in kept)
    taken = count_objects(content, tmp_path)
    # An infinite width is the one thing that MMDetection takes and that is no box.
    infinite = Counter(each['image_id'] for each in content['annotations'] if not each['ignore'] and each['area'] > 0
                       and takes_infinite(*each['bbox']))
    assert {image: counts[image] + infinite[image] for image in range(400)} == taken and len(kept) > 500


def takes_infinite(x, y, width, height):
    return all(map(math.isfinite, (x, y))) and not all(abs(value) < 1e38 for value in (width, height)) and \
        min(x + width, 100) > max(x, 0) and min(y + height, 80) > max(y, 0) and min(width, height) >= 1


# What COCO's metric would make of a file of its own: it leaves nothing out.
SCORED = {
    'no iscrowd': (set_of('annotations', 2, iscrowd=...), FIRST + "no 'iscrowd'", 'fault'),
    'a NaN': (box(NAN, 0, 50, 40), FIRST + 'its bbox is [nan, 0, 50, 40], which is not finite', 'fault'),
    'no width': (box(10, 10, 0, 40), FIRST + 'its bbox is [10, 10, 0, 40], of less than a pixel, which counts as an '
                 'object that is not found', 'note'),
    'two images': (repeat('images', 1), "'f.json': image 3 (id 2): image 1 has this id, too", 'fault'),
    'no size': (set_of('images', 1, width=...), None, None),  # which it does not ask for
    'an area of 0': (set_of('annotations', 2, area=0), None, None),
}


@pytest.mark.parametrize('damage', SCORED)
def test_an_evaluators_file(damage):
    change, expected, mark = SCORED[damage]
    found = judge(change, EVALUATOR)
    assert (found == []) == (expected is None)
    assert all(text.startswith(expected) and marked == mark for text, marked in found)


MASKED = {
    'none': (dict(segmentation=...), "no 'segmentation', and the pipeline loads masks", 'fault'),
    'nothing': (dict(segmentation=[]), "no 'segmentation', and the pipeline loads masks", 'fault'),
    'texts': (dict(segmentation=[['1', '2'] * 3]), "its segmentation is [['1', '2', '1', '2', '1', '2']], expected",
              'fault'),
    'numbers': (dict(segmentation=[1, 2, 3, 4, 5, 6]), 'its segmentation is [1, 2, 3, 4, 5, 6], expected', 'fault'),
    'a NaN': (dict(segmentation=[[1, 2, 3, 4, 5, NAN]]), 'its segmentation is [[1, 2, 3, 4, 5, nan]]', 'fault'),
    'another size': (dict(segmentation=dict(size=[100, 80], counts='x')), 'its segmentation is of the size (height, '
                     'width) [100, 80], its image of [80, 100]', 'fault'),
    'two points': (dict(segmentation=[[1, 2, 3, 4]]), 'its segmentation has no polygon of three points', 'note'),
    'half a point': (dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'its segmentation has no polygon of three', 'note'),
    'no counts': (dict(segmentation=dict(size=[80, 100])), 'its segmentation has no polygon of three', 'note'),
}


@pytest.mark.parametrize('damage', MASKED)
def test_masks_are_judged_where_they_are_loaded(damage):
    values, expected, mark = MASKED[damage]
    change = set_of('annotations', 2, **values)
    assert [mark for _, mark in judge(change)] == ['ok']
    content = sound()
    change(content)
    found = list(judge_coco(content, Use('train data', masks=True), 'f.json', finite=damage != 'a NaN'))
    assert found[0].found.startswith(FIRST + expected) and found[0].mark == mark


def test_images_that_are_listed_twice():
    def change(content):
        content['images'].append(dict(content['images'][0], id=4))
        content['annotations'] += [dict(each, id=each['id'] + 100, image_id=4) for each in content['annotations'][:2]]
    (found, mark), _ = judge(change)
    assert (found, mark) == ("'f.json': image 3 (id 4): image 0 has the file_name '1.jpg', too; it is used more than "
                             'once', 'note')
    empty = repeat('images', 0, id=4)  # the copy would teach that its objects are background
    assert judge(empty)[0][1] == 'fault'
    assert judge(empty, Use('train data', filters_empty=True))[0][1] == 'note'  # then it is left out
    assert judge(empty, Use('train data', unlabelled=True))[0][1] == 'note'


def test_an_unknown_category_on_an_unknown_image_is_no_fault():
    assert [mark for _, mark in judge(set_of('annotations', 2, image_id=99, category_id=99))] == ['note', 'ok']
    assert [mark for _, mark in judge(set_of('annotations', 2, ignore=True, category_id=99))] == ['ok']


def test_large_files_of_one_damage_are_judged_in_no_time():
    """What is looked up for each entry is looked up in a table."""
    content = sound()
    count = 20_000
    content['images'] = [dict(id=index, file_name=f'{index % (count // 2)}.jpg', width=100, height=80)
                         for index in range(count)]
    content['annotations'] = [dict(id=index // 2, image_id=str(index), category_id=5, bbox=[1, 2, NAN, 4], area=1)
                              for index in range(count)]
    content['categories'] = [dict(id=str(index), name=str(index // 2)) for index in range(count)]
    began = time.process_time()
    assert len(list(judge_coco(content, TRAIN, 'f.json'))) == 4
    assert time.process_time() - began < 5


def test_a_name_that_is_given_twice_matters_where_it_is_used():
    change = repeat('categories', 0, id=8)
    assert judge(change, Use('train data', classes=('dog', )))[0][1] == 'note'
    assert judge(change, Use('train data', classes=('cat', )))[0][1] == 'fault'


def test_boxes_of_unlabelled_images_are_dropped_but_read():
    unlabelled = Use('train data', unlabelled=True)
    assert [mark for _, mark in judge(box(NAN, 0, 50, 40), unlabelled)] == ['ok']
    assert judge(box(0, 0, 50), unlabelled)[0][1] == 'fault'


def as_corners(content):
    for each in content['annotations']:
        x, y, width, height = each['bbox']
        each['bbox'] = [x, y, x + width, y + height]


def test_boxes_that_hold_corners():
    def change(content):
        content['annotations'] += [dict(each, id=each['id'] + 100) for each in content['annotations']]
        as_corners(content)
    (found, mark), _ = judge(change)
    assert mark == 'note' and found == (
        "'f.json': 6 of 12 boxes reach beyond their images, such as that of annotation 1 (id 12): [40, 20, 70, 50]; as "
        'corners x1, y1, x2, y2 all would fit')
    assert [mark for _, mark in judge(box(60, 0, 41, 40))] == ['ok']  # by a pixel
    found, mark = judge(box(0, 0, 1000, 40))[0]
    assert mark == 'note' and '1 of 6 boxes reach beyond' in found and 'corners' not in found


def test_a_file_is_read_once_for_all_that_use_it(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr('kd_det.checks.annotations.read_json', lambda path: reads.append(path) or read_json(path))
    (tmp_path / 'f.json').write_text(json.dumps(sound()))
    uses = [Use('train data'), Use('val data'), Use('val evaluator', scored=True)]
    first = inspect_coco_file(str(tmp_path / 'f.json'), uses)
    assert inspect_coco_file(str(tmp_path / 'f.json'), uses) == first and len(reads) == len(first) == 1
    content = sound()
    box(0, 0, INF, 40)(content)
    (tmp_path / 'f.json').write_text(json.dumps(content))
    found = inspect_coco_file(str(tmp_path / 'f.json'), uses)
    assert len(reads) == 2 and [(each.subject, each.mark) for each in found] == [('train data', 'fault')]  # told once


# ---------------------------------------------------------------- other forms

LOADING = [dict(type='mmdet.LoadAnnotations', with_bbox=True)]


def own_form(tmp_path, instance, pipeline=LOADING, **entry):
    content = dict(metainfo=dict(classes=('cat', 'dog')), data_list=[
        dict(img_path='1.jpg', height=80, width=100, instances=[
            dict(bbox=[1, 2, 30, 40], bbox_label=1, ignore_flag=0), dict(
                dict(bbox=[1, 2, 30, 40], bbox_label=1, ignore_flag=0), **instance)], **entry)])
    (tmp_path / 'own.json').write_text(json.dumps(content))
    return dict(type='BaseDetDataset', ann_file=str(tmp_path / 'own.json'), data_prefix=dict(img_path=''),
                pipeline=pipeline)


BUILT = {
    'a NaN': (dict(bbox=[1, NAN, 30, 40]), 'its bbox is [1, nan, 30, 40], which is not finite', 'fault'),
    'infinite': (dict(bbox=[1, 2, INF, 40]), 'its bbox is [1, 2, inf, 40], which is not finite', 'fault'),
    'negative': (dict(bbox=[30, 2, 1, 40]), 'its bbox is [30, 2, 1, 40], of negative size, expected x1, y1, x2, y2',
                 'fault'),
    'empty': (dict(bbox=[1, 2, 1, 40]), 'its bbox is [1, 2, 1, 40], of no size, on which it trains', 'note'),
    'three': (dict(bbox=[1, 2, 30]), 'its bbox is [1, 2, 30], expected 4 numbers: x1, y1, x2, y2', 'fault'),
    'texts': (dict(bbox=['1', '2', '30', '40']), "its bbox is ['1', '2', '30', '40'], expected 4 numbers", 'fault'),
    'no class': (dict(bbox_label=2), 'its bbox_label is 2, and there are 2 classes, counted from 0', 'fault'),
    'below 0': (dict(bbox_label=-1), 'its bbox_label is -1, and there are 2 classes', 'fault'),
    'a name': (dict(bbox_label='dog'), "its bbox_label is 'dog', expected a whole number", 'fault'),
}


@pytest.mark.parametrize('damage', BUILT)
def test_boxes_of_other_forms_are_judged_when_they_are_built(damage, tmp_path):
    instance, expected, mark = BUILT[damage]
    dataset = DATASETS.build(own_form(tmp_path, instance))
    found, = inspect_instances(dict(train=dataset))
    assert found.found.startswith(f"'{tmp_path}/own.json': image 0 ('1.jpg'), instance 1: {expected}")
    assert (found.mark, found.subject) == (mark, 'train data')
    if mark == 'fault':
        with pytest.raises(DiagnosisError, match='image 0'):
            check_labels(dict(train=dataset))


def test_sound_boxes_of_other_forms(tmp_path):
    assert not list(inspect_instances(dict(train=DATASETS.build(own_form(tmp_path, {})))))
    filtered = [*LOADING, dict(type='mmdet.FilterAnnotations')]
    assert not list(inspect_instances(dict(train=DATASETS.build(own_form(
        tmp_path, dict(bbox=[1, 2, 1, 40]), filtered)))))
    dataset = DATASETS.build(own_form(tmp_path, dict(bbox=[NAN] * 4), pipeline=[]))  # something else may read it
    assert not list(inspect_instances(dict(train=dataset)))


def inspect_form(dataset, classes=('cat', 'dog')):
    kind = DATASETS.get(dataset['type'])
    return [(each.found, each.mark)
            for each in inspect_other_form('train data', kind, dataset, lambda _, path: str(path), classes)]


def test_why_a_file_of_mmengines_form_can_not_be_read(tmp_path):
    dataset, path = own_form(tmp_path, {}), tmp_path / 'own.json'
    assert inspect_form(dataset) == []
    for text, why in (('[]', 'it holds a list'), ('{"metainfo": {}', 'it is cut off'),
                      ('{"metainfo": {}}', "no 'data_list'"), ('{"metainfo": 1, "data_list": []}', "'metainfo' is a")):
        path.write_text(text)
        (found, mark), = inspect_form(dataset)
        assert found.startswith(f"'{path}' is no annotation file of MMEngine's form ({why}") and mark == 'fault'
    path.write_text('{"metainfo": {}, "data_list": [{"img_path": "a"}, {}, 3, {}]}')
    assert [found for found, _ in inspect_form(dataset)] == [
        f"'{path}': entry 1 of data_list: no 'img_path' (the first of 2)",
        f"'{path}': entry 2 of data_list: it is a number, no object"]


XML = ('<annotation><size><width>100</width><height>80</height></size><object><name>cat</name><bndbox><xmin>1</xmin>'
       '<ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>')
OBJECT = ": object 0 ('cat'): its "
DAMAGED_XML = {
    'cut off': (XML[:100], ': it is no XML, or cut off (no element found', 'fault', 'ParseError'),
    'empty': ('', ': it is no XML, or cut off (no element found', 'fault', 'ParseError'),
    'NaN': (XML.replace('<xmin>1', '<xmin>nan'), OBJECT + "xmin is 'nan', expected a number", 'fault', 'ValueError'),
    'infinite': (XML.replace('<ymax>40', '<ymax>inf'), OBJECT + "ymax is 'inf', expected", 'fault', 'OverflowError'),
    'a text': (XML.replace('<ymin>2', '<ymin>two'), OBJECT + "ymin is 'two', expected", 'fault', 'ValueError'),
    'no corner': (XML.replace('<ymin>2</ymin>', ''), OBJECT + 'ymin is None, expected', 'fault', 'AttributeError'),
    'no box': (XML.replace('bndbox', 'box'), OBJECT + 'xmin is None, expected', 'fault', 'AttributeError'),
    'no name': (XML.replace('name', 'label'), ': object 0 (None): no name', 'fault', 'AttributeError'),
    'no width': (XML.replace('<width>100</width>', ''), ': its width is None, expected a whole', 'fault',
                 'AttributeError'),
    'another class': (XML.replace('cat', 'cta'), ": object 0 ('cta'): none of the classes has this name, and "
                      'MMDetection leaves it out', 'note', 0),
    'sound': (XML, None, None, 1),
}


@pytest.mark.parametrize('damage', DAMAGED_XML)
def test_why_a_file_of_voc_can_not_be_read(damage, tmp_path):
    text, expected, mark, outcome = DAMAGED_XML[damage]
    (tmp_path / 'Annotations').mkdir()
    (tmp_path / 'Annotations/7.xml').write_text(text)
    (tmp_path / 'list.txt').write_text('7\n')
    dataset = dict(type='XMLDataset', ann_file=str(tmp_path / 'list.txt'), metainfo=dict(classes=('cat', 'dog')),
                   data_prefix=dict(sub_data_root=str(tmp_path)), pipeline=[])
    found = inspect_form(dataset)
    if expected is None:
        assert found == []
    else:
        start = f"'{tmp_path}/Annotations/7.xml'{expected}"
        assert found[0][0].startswith(start) and found[0][1] == mark
    try:
        taken = len(DATASETS.build(dataset).get_data_info(0)['instances'])
    except Exception as error:
        taken = type(error).__name__
    assert taken == outcome


def test_why_a_file_of_odvg_can_not_be_read(tmp_path):
    sound_line = dict(filename='1.jpg', height=80, width=100,
                      detection=dict(instances=[dict(bbox=[1, 2, 30, 40], label=1, category='dog')]))
    lines = [json.dumps(sound_line), '{"filename": ', '3', json.dumps(dict(filename='1.jpg', height=80)),
             json.dumps(dict(sound_line, detection=dict(instances=[dict(bbox=[1, 2, 30], label='dog')])))]
    path = tmp_path / 'odvg.json'
    path.write_text('\n'.join(lines))
    dataset = dict(type='ODVGDataset', ann_file=str(path), label_map_file='labels.json')
    assert [found.split(f"'{path}': ")[1].split(':')[0] for found, _ in inspect_form(dataset)] == [
        'line 2', 'line 3', 'line 4', 'line 5, instance 0', 'line 5, instance 0']
    path.write_text(lines[0])
    assert inspect_form(dataset) == []
    assert inspect_form(dict(dataset, label_map_file=None)) == [(f"'{path}': line 1: no 'grounding'", 'fault')]
