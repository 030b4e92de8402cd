"""Damaged annotation files: what is found agrees with what MMDetection's own class makes of them."""
import json
import math
from collections import Counter

import numpy as np
import pytest
from mmdet.datasets import CocoDataset

from kd_det.checks.annotations import Use, _find_relevant, _judge_boxes, _read_sizes, judge_coco
from kd_det.checks.records import Entries

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
        dataset = CocoDataset(ann_file=str(tmp_path / 'f.json'), data_prefix=dict(img=''), pipeline=[], serialize_data=False,
                              metainfo=dict(classes=('cat', 'dog')), **settings)
    except Exception as error:
        return type(error).__name__
    return {info['img_id']: len(info['instances']) for info in dataset.data_list}


FIRST = "'f.json': annotation 2 (id 13): "
LOSES, KEEPS, LACKS = 'loses objects', 'keeps all objects', 'loses none that is shown'
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
    'a text among numbers': (box(0, 0, 50, 'x'), FIRST + "its bbox is [0, 0, 50, 'x'], expected 4 numbers", True, 'TypeError'),
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
    before = count_objects(content, tmp_path)
    change(content)
    taken = count_objects(content, tmp_path)
    if outcome in (LOSES, KEEPS):
        assert (sum(taken.values()) < sum(before.values())) == (outcome == LOSES)
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
             bbox=[float(value) if random.random() < 0.8 else random.choice(odd) for value in random.uniform(-20, 120, 4)],
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
