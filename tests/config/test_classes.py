"""Classes are matched by name: any order, any number, any spelling of spaces."""
import json
import unicodedata

import pytest
import torch
from mmdet.datasets import ConcatDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import RepeatDataset
from mmengine.structures import InstanceData
from torch.utils.data import Subset

from kd_det.config.classes import (
    count_classes,
    find_dataset_classes,
    find_label_names,
    get_metainfo,
    match_classes,
    read_categories,
    read_label_names,
)
from kd_det.config.files import ConfigurationError


def test_the_same_classes_change_nothing():
    match = match_classes(['cat', 'dog'], ('cat', 'dog'))
    assert match.is_identity and match.report() == "the teacher's 2 are the student's, in the same order."


@pytest.mark.parametrize('student, teacher', [('ab', 'ba'), ('ab', 'abc'), ('abc', 'ab')])
def test_what_is_no_identity(student, teacher):
    assert not match_classes(student, teacher).is_identity


def test_another_order_and_another_set():
    match = match_classes(['dog', 'unicorn', 'cat'], ['bird', 'cat', 'dog'])
    assert match.of_student == (0, 2) and match.of_teacher == (2, 1)
    assert match.index_shared(torch.tensor([2, 1, 0, 2])).tolist() == [1, -1, 0, 1]
    assert match.report() == ("2 of the student's 3 are among the teacher's 3; distillation is restricted to them, and "
                              'follows their names. Not shared: unicorn.')
    assert 'teacher\'s 3; the comparison is restricted to them' in match.report('the comparison')


def test_detections_get_the_students_labels():
    match = match_classes(['dog', 'unicorn', 'cat'], ['bird', 'cat', 'dog'])
    detections = InstanceData(bboxes=torch.arange(16.).view(4, 4), labels=torch.tensor([0, 1, 2, 1]),
                              scores=torch.rand(4))
    translated = match.translate(detections)
    assert translated.labels.tolist() == [2, 0, 2]
    assert torch.equal(translated.bboxes, detections.bboxes[1:])
    assert torch.equal(translated.scores, detections.scores[1:])
    assert detections.labels.tolist() == [0, 1, 2, 1]
    assert len(match.translate(detections[:0])) == 0


def test_how_unicode_composes_a_name_does_not_count():
    assert match_classes(('épée', 'ﬁsh'), ('fish', unicodedata.normalize('NFD', 'épée'))).of_teacher == (1, 0)


def test_spelling_counts_only_where_no_name_is_equal():
    match = match_classes(['Traffic_Light', 'Car', 'car'], ['car', 'traffic light'])
    assert match.of_student == (0, 2) and match.of_teacher == (1, 0)  # not 'Car': the teacher's 'car' is the student's
    assert "Taken for the same: 'Traffic_Light' = 'traffic light'." in match.report()


def test_nothing_in_common():
    with pytest.raises(ConfigurationError, match=r'\(cat\).*\(0, 1, 2, 3, 4, 5, … and 74 more\).*teacher.classes='):
        match_classes(['cat'], list(map(str, range(80))))


def test_classes_of_a_data_set(tmp_path):
    (tmp_path / 'names.txt').write_text('cat\ndog\n')
    assert find_dataset_classes(dict(type='CocoDataset', metainfo=dict(classes=('cat', )))) == ('cat', )
    named = dict(type='CocoDataset', metainfo=dict(classes=str(tmp_path / 'names.txt')))
    assert find_dataset_classes(named) == ['cat', 'dog']
    assert len(find_dataset_classes(dict(type='CocoDataset'))) == 80
    assert len(find_dataset_classes(dict(type='CocoPanopticDataset'))) == 80  # its boxes are of things
    own = dict(classes=('cat', 'sky'), thing_classes=('cat', ), stuff_classes=('sky', ))
    assert find_dataset_classes(dict(type='CocoPanopticDataset', metainfo=own)) == ('cat', )


@pytest.mark.parametrize('family', ['retinanet', 'faster_rcnn', 'cascade_rcnn'])
def test_number_of_classes(family, request):
    assert count_classes(MODELS.build(request.getfixturevalue(family)(classes=5))) == 5
    assert count_classes(torch.nn.Identity()) is None


# ---------------------------------------------------------------- what labels mean


COCO = dict(images=[dict(id=1, file_name='1.jpg', width=8, height=8)],
            categories=[dict(id=7, name='zebra'), dict(id=3, name='Katze 猫'), dict(id=5, name='ant')],
            annotations=[dict(id=1, image_id=1, category_id=5, bbox=[0, 0, 4, 4], area=16, iscrowd=0)])


@pytest.fixture
def built(tmp_path):
    """Builds a data set over a file."""

    def build(content, kind='CocoDataset', **options):
        (tmp_path / 'data.json').write_text(content if isinstance(content, str) else json.dumps(content))
        return DATASETS.build(dict(type=kind, ann_file=str(tmp_path / 'data.json'), pipeline=[],
                                   **{'data_prefix': dict(img=''), **options}))

    return build


@pytest.mark.parametrize('kind, meant', [
    ('CocoDataset', ('zebra', 'Katze 猫', 'ant')),  # in the order of the file
    ('Objects365V1Dataset', ('Katze 猫', 'ant', 'zebra')),  # in that of the ids
    ('CityscapesDataset', ('zebra', 'Katze 猫', 'ant'))])
def test_labels_mean_the_categories_that_boxes_have(built, kind, meant):
    dataset = built(COCO, kind, metainfo=dict(classes=('ant', 'Katze 猫', 'zebra')))
    names = read_label_names(dataset)
    assert names.meant == names.known == meant and names.declared == ('ant', 'Katze 猫', 'zebra') and not names.agree
    assert names.meant[dataset.get_data_info(0)['instances'][0]['bbox_label']] == 'ant'
    assert find_label_names(dataset) == meant


def test_labels_of_a_data_set_that_is_not_read_yet(built):
    assert find_label_names(built(COCO, metainfo=dict(classes=('ant', 'zebra')), lazy_init=True)) == ('zebra', 'ant')


def test_a_data_set_that_unites_categories_says_what_they_are(built):
    dataset = built(COCO, metainfo=dict(classes=('animal', 'zebra')))
    dataset.cat2label, dataset.cat_ids = {7: 1, 3: 0, 5: 0}, [7, 3, 5]
    assert read_label_names(dataset).meant == ('animal', 'zebra') and read_label_names(dataset).agree


def test_a_name_that_is_no_category_shifts_the_labels(built):
    names = read_label_names(built(COCO, metainfo=dict(classes=('zbera', 'Katze 猫', 'ant'))))
    assert names.meant == ('Katze 猫', 'ant') and names.absent == ['zbera'] and not names.agree


def test_names_within_wrappers(built):
    parts = [built(COCO, metainfo=dict(classes=('ant', 'zebra'), palette=palette))
             for palette in ([(0, 0, 0)] * 2, None)]
    joined = ConcatDataset(parts)
    assert isinstance(joined.metainfo, list)
    assert find_label_names(Subset(joined, [0])) == find_label_names(RepeatDataset(parts[0], 2)) == ('zebra', 'ant')
    assert get_metainfo(joined)['palette'] == [(0, 0, 0)] * 2 and get_metainfo([]) == {}


def test_a_file_of_mmengine_names_its_labels(built):
    content = dict(metainfo=dict(classes=['a', 'b']), data_list=[dict(img='1.jpg', instances=[])])
    names = read_label_names(built(content, 'BaseDetDataset', metainfo=dict(classes=('b', 'a'))))
    assert (names.meant, names.declared) == (('a', 'b'), ('b', 'a'))
    assert read_label_names(built(content, 'BaseDetDataset')).agree


def test_odvg_has_a_file_of_names(built, tmp_path):
    (tmp_path / 'labels.json').write_text(json.dumps({'0': 'b', '1': 'a'}))
    dataset = built(json.dumps(dict(filename='1.jpg', height=8, width=8)), 'ODVGDataset', return_classes=True,
                    data_root=str(tmp_path), label_map_file='labels.json', metainfo=dict(classes=('a', 'b')))
    assert read_label_names(dataset).meant == ('b', 'a')


def test_xml_numbers_by_the_metainfo(tmp_path):
    (tmp_path / 'list.txt').write_text('')
    dataset = DATASETS.build(dict(type='VOCDataset', ann_file=str(tmp_path / 'list.txt'), pipeline=[],
                                  data_root=str(tmp_path) + '/VOC2007', metainfo=dict(classes=('b', 'a')),
                                  data_prefix=dict(sub_data_root=''), serialize_data=False))
    assert read_label_names(dataset).meant == ('b', 'a') and read_label_names(dataset).agree


def test_a_data_set_of_ones_own_that_reads_another_form(built):
    dataset = built(COCO, metainfo=dict(classes=('ant', 'zebra')))
    dataset.ann_file += '.csv'  # nothing that could be read as COCO's form
    assert read_label_names(dataset).meant == ('ant', 'zebra')
    assert read_label_names(object()) is None and find_label_names([]) is None


@pytest.mark.parametrize('text', [
    json.dumps(COCO), json.dumps(COCO, ensure_ascii=False, indent=1), json.dumps(dict(reversed(COCO.items()))),
    json.dumps(dict(COCO, info=dict(categories=['none'])))])  # a second list of that name
def test_categories_are_read_without_the_rest(tmp_path, text):
    (tmp_path / 'data.json').write_text(text, encoding='utf-8')
    assert list(read_categories(str(tmp_path / 'data.json')).items()) == [(7, 'zebra'), (3, 'Katze 猫'), (5, 'ant')]


def test_a_long_list_of_categories(tmp_path):
    categories = [dict(id=index, name='ö' * 100) for index in range(3000)]
    (tmp_path / 'data.json').write_text(json.dumps(dict(categories=categories, images=[]), ensure_ascii=False),
                                        encoding='utf-8')
    assert len(read_categories(str(tmp_path / 'data.json'))) == 3000
    (tmp_path / 'data.json').write_text('{"categories": [{"id": 1')
    with pytest.raises(ValueError):
        read_categories(str(tmp_path / 'data.json'))
