"""Classes are matched by name: any order, any number, any spelling of spaces."""
import pytest
import torch
from mmengine.structures import InstanceData

from kd_det.classes import dataset_classes, match_classes, number_of_classes
from kd_det.configuration import ConfigurationError
from mmdet.registry import MODELS


def test_the_same_classes_change_nothing():
    match = match_classes(['cat', 'dog'], ('cat', 'dog'))
    assert match.is_identity and match.report() == "the teacher's 2 are the student's, in the same order."


@pytest.mark.parametrize('student, teacher', [('ab', 'ba'), ('ab', 'abc'), ('abc', 'ab')])
def test_what_is_no_identity(student, teacher):
    assert not match_classes(student, teacher).is_identity


def test_another_order_and_another_set():
    match = match_classes(['dog', 'unicorn', 'cat'], ['bird', 'cat', 'dog'])
    assert match.of_student == (0, 2) and match.of_teacher == (2, 1)
    assert match.shared(torch.tensor([2, 1, 0, 2])).tolist() == [1, -1, 0, 1]
    assert match.report() == ("2 of the student's 3 are among the teacher's 3; distillation is restricted to them, and "
                              'follows their names. Not shared: unicorn.')
    assert 'teacher\'s 3; the comparison is restricted to them' in match.report('the comparison')


def test_detections_get_the_students_labels():
    match = match_classes(['dog', 'unicorn', 'cat'], ['bird', 'cat', 'dog'])
    detections = InstanceData(bboxes=torch.arange(16.).view(4, 4), labels=torch.tensor([0, 1, 2, 1]),
                              scores=torch.rand(4))
    translated = match.translated(detections)
    assert translated.labels.tolist() == [2, 0, 2]
    assert torch.equal(translated.bboxes, detections.bboxes[1:])
    assert torch.equal(translated.scores, detections.scores[1:])
    assert detections.labels.tolist() == [0, 1, 2, 1]
    assert len(match.translated(detections[:0])) == 0


def test_spelling_counts_only_where_no_name_is_equal():
    match = match_classes(['Traffic_Light', 'Car', 'car'], ['car', 'traffic light'])
    assert match.of_student == (0, 2) and match.of_teacher == (1, 0)  # not 'Car': the teacher's 'car' is the student's
    assert "Taken for the same: 'Traffic_Light' = 'traffic light'." in match.report()


def test_nothing_in_common():
    with pytest.raises(ConfigurationError, match=r'\(cat\).*\(0, 1, 2, 3, 4, 5, … and 74 more\).*teacher.classes='):
        match_classes(['cat'], list(map(str, range(80))))


def test_classes_of_a_data_set(tmp_path):
    (tmp_path / 'names.txt').write_text('cat\ndog\n')
    assert dataset_classes(dict(type='CocoDataset', metainfo=dict(classes=('cat', )))) == ('cat', )
    named = dict(type='CocoDataset', metainfo=dict(classes=str(tmp_path / 'names.txt')))
    assert dataset_classes(named) == ['cat', 'dog']
    assert len(dataset_classes(dict(type='CocoDataset'))) == 80


@pytest.mark.parametrize('family', ['retinanet', 'faster_rcnn', 'cascade_rcnn'])
def test_number_of_classes(family, request):
    assert number_of_classes(MODELS.build(request.getfixturevalue(family)(classes=5))) == 5
    assert number_of_classes(torch.nn.Identity()) is None
