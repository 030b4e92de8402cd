"""Distillation between detectors of other classes, or of the same in another order."""
import copy

import pytest
import torch

from kd_det.config.classes import match_classes
from kd_det.config.files import ConfigurationError
from kd_det.distillers.class_sets import restrict_to_shared_classes
from kd_det.heads import HeadError, Regions, RoIOutputs

DENSE = dict(classes=dict(type='DenseClassification'), boxes=dict(type='DenseRegression', weighting='gap'),
             ranks=dict(type='RankMimicking'),
             masked=dict(type='FeatureImitation', mask=dict(type='PredictionDifference')))
TERMS = dict(retina=DENSE, retina_softmax=DENSE, yolox=dict(classes=DENSE['classes'], boxes=DENSE['boxes']),
             faster_rcnn=dict(classes=dict(type='RoIClassification'),
                              decoupled=dict(type='RoIClassification', form='decoupled'),
                              boxes=dict(type='RoIRegression', form='l1'), rpn=dict(type='RPNImitation')))
STUDENT = ('cat', 'dog', 'horse')


def _class_tensors(model):
    """The tensors with a block for each class: name -> values per prior and class, and whether a background follows."""
    names = dict(retina_cls=1, conv_cls=1, fc_cls=1, fc_reg=4, multi_level_conv_cls=1)
    return {key: size for key in model.state_dict() for name, size in names.items() if f'.{name}.' in key}


def _as_teacher(state, tensors, match, softmax, extra):
    """The student's weights in the teacher's order; what the teacher alone knows has a logit of ``extra``."""
    state = copy.deepcopy(state)
    for key, size in tensors.items():
        with_background = softmax and size == 1
        blocks = state[key].unflatten(0, (-1, len(match.student) + with_background, size))
        new = torch.zeros(blocks.shape[0], len(match.teacher), *blocks.shape[2:])
        new[:, list(match.of_teacher)] = blocks[:, list(match.of_student)]
        only = [label for label in range(len(match.teacher)) if label not in match.of_teacher]
        if only and key.endswith('bias') and size == 1:
            new[:, only] = extra
        if with_background:
            new = torch.cat([new, blocks[:, -1:]], 1)
        state[key] = new.flatten(0, 2)
    return state


@pytest.fixture
def pair(request, distiller, one_stage, faster_rcnn):
    """Makes a distiller whose teacher detects as its student does, with the given classes."""

    def make(family, classes, terms=None, extra=-100.):
        config = dict(retina=lambda n: one_stage('retina', classes=n),
                      retina_softmax=lambda n: one_stage('retina_softmax', classes=n),
                      yolox=lambda n: one_stage('yolox', classes=n),
                      faster_rcnn=lambda n: faster_rcnn(classes=n))[family]
        model = distiller(config(len(STUDENT)), config(len(classes)), distill=terms or TERMS[family])
        model.teacher_configs[0].update(classes=classes, fuse=False, channels_last=False)  # folded, it rounds otherwise
        match = match_classes(STUDENT, classes)
        tensors = _class_tensors(model.student)
        lacking = [label for label in range(len(STUDENT)) if label not in match.of_student]
        for key in tensors if lacking else ():
            if key.endswith('fc_cls.bias'):  # the student never predicts what the teacher does not know
                model.state_dict()[key][lacking] = extra
        state = _as_teacher(model.student.state_dict(), tensors, match, family in ('retina_softmax', 'faster_rcnn'),
                            extra)
        model.build_teachers()[0].model.load_state_dict(state)
        model.eval()  # BatchNorm computes as the teacher's does
        return model

    return make


def _losses(model, batch, labels=None):
    data = model.data_preprocessor(copy.deepcopy(batch()), True)
    for sample, given in zip(data['data_samples'], labels or ()):
        sample.gt_instances.labels = torch.tensor(given)
    torch.manual_seed(0)
    losses = model.loss(**data)
    return {name: losses[f'loss_{name}'] for name in model.terms}


@pytest.mark.parametrize('classes', [('horse', 'cat', 'dog'), ('bird', 'dog', 'horse', 'fish', 'cat')])
@pytest.mark.parametrize('family', TERMS)
def test_a_teacher_that_detects_the_same_teaches_nothing(pair, batch, family, classes):
    """Its classes have another order, and it may know others that it does not see here."""
    model = pair(family, classes)
    if len(classes) == len(STUDENT):
        assert max(_losses(model, batch).values()) > 1e-4  # labels taken by their number compare other classes
    else:
        with pytest.raises(HeadError, match="student tells 3 classes apart, the teacher 5.*teacher.classes="):
            _losses(model, batch)
    model.match_classes(STUDENT)
    for name, loss in _losses(model, batch).items():
        assert loss.abs() < 1e-6, name


@pytest.mark.parametrize('family', ['retina', 'faster_rcnn'])
def test_a_teacher_that_knows_fewer(pair, batch, family):
    model = pair(family, ('horse', 'bird', 'cat'))
    model.match_classes(STUDENT)
    for labels in ([[0], [2, 1]], [[1], [1, 1]]):  # a cat, a horse and a dog; dogs alone, which the teacher lacks
        for name, loss in _losses(model, batch, labels).items():
            assert loss.abs() < 1e-6 and loss.requires_grad, name


def test_two_teachers_of_other_classes(retinanet, distiller, batch):
    """Each is restricted on its own."""
    teachers = [dict(config=retinanet(classes=count), random_teacher=True, classes=names)
                for count, names in ((2, ('dog', 'cat')), (4, ('bird', 'horse', 'fish', 'dog')))]
    model = distiller(retinanet(), None, teacher=teachers, distill={
        f'from{index}': dict(type='DenseClassification', teacher=index) for index in range(2)})
    first, second = model.match_classes(STUDENT)
    assert first.startswith("Classes of teacher 0: 2 of the student's 3") and 'Not shared: cat' in second
    assert all(loss.isfinite() and loss > 0 for loss in _losses(model, batch).values())


def test_pgd_looks_at_boxes_of_shared_classes_alone(retinanet, distiller, batch):
    model = distiller(retinanet(), retinanet(classes=1), distill=dict(
        pgd=dict(type='FeatureImitation', mask=dict(type='PredictionQuality'), normalizer='mask')))
    model.teacher_configs[0]['classes'] = ['dog']
    model.match_classes(STUDENT)
    assert _losses(model, batch, [[1], [0, 2]])['pgd'] > 0
    assert _losses(model, batch, [[0], [0, 2]])['pgd'] == 0


def test_the_towers_of_a_crossed_head_are_restricted(one_stage, distiller, batch):
    model = distiller(one_stage('retina'), one_stage('retina', classes=4), distill=dict(cross=dict(type='CrossKD')))
    model.teacher_configs[0]['classes'] = ['horse', 'bird', 'cat', 'dog']
    model.match_classes(STUDENT)
    loss = _losses(model, batch)['cross']
    assert loss.isfinite() and loss > 0


def test_regions_of_other_classes_are_left_out(make_context):
    """What is left: one region of class 2, which is the teacher's 0, and one of background."""
    regions = Regions(torch.arange(15.).view(3, 5), torch.tensor([2, 0, 3]), torch.rand(3, 4), torch.ones(3, 4),
                      torch.zeros(3, dtype=torch.long))
    student = RoIOutputs(regions, torch.randn(3, 4), torch.randn(3, 3, 4))
    teacher = RoIOutputs(regions, torch.randn(3, 3), torch.randn(3, 1, 4))
    context = make_context(torch.randn(1, 2, 8, 12), torch.randn(1, 2, 8, 12), [torch.rand(3, 4)])
    context.labels = [torch.tensor([0, 2, 1])]
    context.student_outputs, context.teacher_outputs = dict(roi_head=student), [dict(roi_head=(teacher, ))]
    seen = restrict_to_shared_classes(context, 0, match_classes(STUDENT, ('horse', 'bird')))
    ours, (theirs, ) = seen.student_outputs['roi_head'], seen.teacher_outputs[0]['roi_head']
    assert ours.regions.labels.tolist() == [0, 1] == theirs.regions.labels.tolist()
    assert torch.equal(ours.regions.rois, regions.rois[[0, 2]])
    assert [each.tolist() for each in seen.labels] == [[-1, 0, -1]]
    probabilities = student.logits.softmax(1)[[0, 2]]
    torch.testing.assert_close(ours.logits.softmax(1), torch.stack([probabilities[:, 2], 1 - probabilities[:, 2]], 1))
    torch.testing.assert_close(theirs.logits.softmax(1)[:, 0], teacher.logits.softmax(1)[[0, 2], 0])
    assert torch.equal(ours.deltas, student.deltas[[0, 2]][:, 2:]) and theirs.deltas.shape == (2, 1, 4)
    assert context.student_outputs['roi_head'] is student and len(context.labels[0]) == 3


def test_reports_and_errors(retinanet, distiller):
    features, outputs = dict(fgd=dict(type='FGD')), dict(classes=dict(type='DenseClassification'))

    def report(distill, classes, student=STUDENT, **changes):
        teacher = dict(config=retinanet(classes=len(classes)), random_teacher=True, classes=classes)
        return distiller(retinanet(), None, teacher=teacher, distill=distill, **changes).match_classes(student)

    assert report(outputs, STUDENT) == ["Classes: the teacher's 3 are the student's, in the same order."]
    assert "student's names are not known" in report(outputs, STUDENT, None)[0]
    assert "student's names are not known" in report(outputs, STUDENT, ('cat', ))[0]  # not the labels of the head
    assert 'shares none' in report(features, ('bird', ))[0]
    with pytest.raises(ConfigurationError, match='no name in common'):
        report(outputs, ('bird', ))
    assert 'bbox_head inherited' in report(features, ('dog', 'cat', 'horse'), inherit=('neck', 'bbox_head'))[0]
