"""Fidelity between detectors of other classes and of unlike heads, with values worked out by hand."""
from math import log

import pytest
import torch
from mmengine.structures import InstanceData

from kd_det.config.classes import match_classes
from kd_det.config.files import ConfigurationError
from kd_det.study.distributions import ClassDistributions, class_kl, find_classifying_head
from kd_det.study.fidelity import FidelityMetric
from kd_det.teachers import TeacherError


def yes_no(teacher, student):
    """KL(teacher ‖ student) of two yes-no distributions."""
    return teacher * log(teacher / student) + (1 - teacher) * log((1 - teacher) / (1 - student))


def from_softmax(*probabilities):
    """Of a head with background, as the last."""
    row = torch.tensor([probabilities])
    return ClassDistributions(row[:, :-1], row.log() + 1.5)  # logits are known up to a constant


def from_sigmoid(*probabilities):
    return ClassDistributions(torch.tensor([probabilities]), None)


def test_two_softmax_heads_are_compared_over_classes_and_background():
    found = class_kl(from_softmax(.6, .1, .3), from_softmax(.5, .2, .3))
    assert found.tolist() == pytest.approx([.5 * log(.5 / .6) + .2 * log(.2 / .1)], abs=1e-6)


@pytest.mark.parametrize('student, teacher', [(from_softmax(.6, .1, .3), from_sigmoid(.5, .2)),
                                              (from_sigmoid(.6, .1), from_softmax(.5, .2, .3)),
                                              (from_sigmoid(.6, .1), from_sigmoid(.5, .2))])
def test_a_sigmoid_head_on_either_side_is_compared_class_by_class(student, teacher):
    assert class_kl(student, teacher).tolist() == pytest.approx([yes_no(.5, .6) + yes_no(.2, .1)], abs=1e-6)


# ------------------------------------------------------------------------------------------------ of whole detectors


def says(detector, *probabilities):
    """Makes a detector say the same of every box; the background's probability is what is left."""
    wanted = torch.tensor(probabilities)
    if find_classifying_head(detector) == 'roi_head':
        layer, bias = detector.roi_head.bbox_head.fc_cls, torch.cat([wanted, 1 - wanted.sum().reshape(1)]).log()
    else:
        layer, bias = detector.bbox_head.retina_cls, wanted.logit()
    torch.nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.bias.copy_(bias)
    return detector


@pytest.fixture
def built(retinanet, faster_rcnn):
    """Makes a detector of either kind, and the model dict for it."""
    from mmdet.registry import MODELS

    def make(kind, classes=3):
        model = dict(retinanet=retinanet, faster_rcnn=faster_rcnn)[kind](classes=classes)
        (model.test_cfg.rcnn if kind == 'faster_rcnn' else model.test_cfg).score_thr = 0.05
        torch.manual_seed(0)
        return MODELS.build(model).eval(), model

    return make


@pytest.fixture
def measured(batch, tmp_path):
    """Measures a student against a teacher, whose model dict and whose classes' names are given."""

    def measure(student, names, teacher, model, teacher_names, **options):
        file = str(tmp_path / 'teacher.pth')
        torch.save(dict(state_dict=teacher.state_dict(), meta=dict(dataset_meta=dict(classes=teacher_names))), file)
        metric = FidelityMetric(dict(config=model, checkpoint=file, **options), confidence=0.2)
        metric.dataset_meta = dict(classes=names) if names else None
        metric.attach(student)
        data = batch()
        with torch.no_grad():
            outputs = student.val_step(data)
        metric.process(data, [output.to_dict() for output in outputs])
        return {name.split('/')[-1]: value for name, value in metric.evaluate(len(outputs)).items()}

    return measure


@pytest.mark.parametrize('kinds', [('retinanet', 'faster_rcnn'), ('faster_rcnn', 'retinanet')])
def test_unlike_heads_with_other_classes_are_compared_in_the_shared_ones(kinds, built, measured):
    student, (teacher, model) = built(kinds[0])[0], built(kinds[1])
    says(student, .5, .1, .2)
    says(teacher, .15, .25, .4)
    found = measured(student, ('cat', 'cow', 'dog'), teacher, model, ('dog', 'emu', 'Cat'))
    assert found['class_kl'] == pytest.approx(yes_no(.4, .5) + yes_no(.15, .2), abs=1e-5)
    assert found['shared_classes'] == 2


def test_the_background_of_softmax_heads_stands_for_classes_that_are_not_shared(built, measured):
    student, (teacher, model) = built('faster_rcnn')[0], built('faster_rcnn', classes=2)
    says(student, .5, .1, .2)
    says(teacher, .25, .4)
    found = measured(student, ('cat', 'cow', 'dog'), teacher, model, ('emu', 'cat'))
    assert found['class_kl'] == pytest.approx(.4 * log(.4 / .5) + .6 * log(.6 / .5), abs=1e-5)
    assert found['shared_classes'] == 1


def test_a_student_that_is_its_teacher_in_another_order(built, measured):
    student, model = built('retinanet')
    teacher, order = built('retinanet')[0], [2, 0, 1]
    torch.nn.init.uniform_(student.bbox_head.retina_cls.bias, -1, 1)
    for name in ('weight', 'bias'):
        getattr(teacher.bbox_head.retina_cls, name).data = getattr(student.bbox_head.retina_cls, name)[order].detach()
    found = measured(student, ('a', 'b', 'c'), teacher, model, ('c', 'a', 'b'))
    assert found['found'] == found['agreement'] == 1 and found['class_kl'] == pytest.approx(0, abs=1e-4)
    assert 'shared_classes' not in found  # all are
    unmatched = measured(student, None, teacher, model, None)  # without names a label means the same to both
    assert unmatched['agreement'] < 1 and unmatched['class_kl'] > 1e-3


# -------------------------------------------------------------------------------------------------- detections alone


def test_detections_and_ground_truth_of_other_classes_do_not_count(instances):
    """Cat and dog are shared. The student finds the cat, calls the dog a cat, and sees a cow for the teacher's emu."""
    metric = FidelityMetric(dict(config=dict(type='none')), confidence=0.5, bins=1, calibrated_from=0.5)
    metric._cka, metric.match = {}, match_classes(('cat', 'cow', 'dog'), ('dog', 'emu', 'cat'))
    sample = dict(scale_factor=(1.0, 1.0),
                  pred_instances=instances([(0, .9, 0), (20, .7, 0), (40, .8, 1)]),
                  gt_instances=instances([(0, 1., 0), (20, 1., 2), (40, 1., 1)]))
    teacher = metric.match.translate(InstanceData(**instances([(0, .8, 2), (20, .8, 0), (40, .8, 1), (60, .8, 0)])))
    found = metric.compute_metrics([metric._compare(sample, teacher)])
    assert found['found'] == pytest.approx(1 / 3)
    assert found['teacher_errors'] == pytest.approx(1 / 3)  # the dog at 60
    assert found['agreement'] == pytest.approx(1 / 2)
    assert found['teacher_ece'] == pytest.approx(.8 - 2 / 3, abs=1e-6)
    assert found['student_ece'] == pytest.approx(.8 - 1 / 2, abs=1e-6)
    assert found['shared_classes'] == 2


# -------------------------------------------------------------------------------------------------- what can not be


@pytest.mark.parametrize('names, teacher_names, said', [
    (('a', 'b', 'c'), None, r"3 classes and the teacher 2.*teacher's names are not: .*teacher=dict\(classes="),
    (None, ('a', 'b'), "3 classes and the teacher 2.*student's names are not: .*metainfo of the validation data"),
    (('a', 'b'), ('a', 'b'), "3 classes and the teacher 2.*student's names are not"),  # names of other data
    (('a', 'b', 'c'), ('x', 'y'), 'no name in common'),
])
def test_numbers_that_differ_without_names_are_an_error(names, teacher_names, said, built, measured):
    student, (teacher, model) = built('retinanet')[0], built('retinanet', classes=2)
    with pytest.raises(ConfigurationError, match=said):
        measured(student, names, teacher, model, teacher_names)


def test_names_that_the_teacher_lacks_can_be_given(built, measured):
    student, (teacher, model) = built('retinanet')[0], built('retinanet', classes=2)
    assert measured(student, ('a', 'b', 'c'), teacher, model, None, classes=['c', 'a'])['shared_classes'] == 2
    with pytest.raises(TeacherError, match='1 names'):
        measured(student, ('a', 'b', 'c'), teacher, model, None, classes=['c'])
