"""CrossKD in whole training steps, and against its formula."""
import copy
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.functional.boxes import distribution_kl, giou_imitation
from kd_det.heads import HeadError

CROSSKD = dict(type='CrossKD')


def _sharp(*models):
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)


@pytest.fixture
def pair(one_stage, distiller):
    """A student and a teacher of one family, whose heads have towers of two convolutions."""

    def make(family: str, teacher: dict = MappingProxyType({}), **term):
        model = distiller(one_stage(family, stacked_convs=2), one_stage(family, depth=50, stacked_convs=2, **teacher),
                          distill=dict(term=dict(CROSSKD, **term))).train()
        _sharp(model.bbox_head, model.build_teachers()[0].model.bbox_head)
        return model

    return make


@pytest.mark.parametrize('family', ['retina', 'retina_softmax', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet'])
def test_is_0_where_the_student_equals_the_teacher(family, one_stage, pupil_of_itself, parts_of):
    parts, loss = parts_of(pupil_of_itself(one_stage(family, stacked_convs=2), **CROSSKD))
    assert loss == 0 and all(value == 0 for value in parts.values())
    assert set(parts) == {'classes', 'distribution' if family == 'gfl' else 'giou'}


@pytest.mark.parametrize('family', ['retina', 'gfl', 'fcos_normalized'])
def test_reaches_the_students_first_layers_alone(family, pair, parts_of):
    model = pair(family)
    before = model.teacher.fingerprint()
    _, loss = parts_of(model)
    loss.backward()
    learns = {name for name, parameter in model.bbox_head.named_parameters() if parameter.grad is not None}
    assert loss > 0 and learns and all(name.startswith(('cls_convs.0.', 'reg_convs.0.')) for name in learns)
    assert model.backbone.conv1.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before


@pytest.mark.parametrize('family', ['gfl', 'fcos_normalized'])
def test_is_its_formula(family, pair, batch):
    """The teacher's last convolutions and predictions, applied by hand to the student's features."""
    model = pair(family, box_weight=2.0, distribution_weight=2.0)
    data = model.data_preprocessor(copy.deepcopy(batch()), True)
    context = model.observe(**data, names=['term']).context
    head, passed = model.teacher.model.bbox_head, context.student_outputs['bbox_head.towers']
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    classify, regress = (head.gfl_cls, head.gfl_reg) if family == 'gfl' else (head.conv_cls, head.conv_reg)
    classes = boxes = 0
    for level, (logits, stride) in enumerate(zip(teacher.logits, (8, 16, 32))):
        score = teacher.scores(level)
        cross = classify(head.cls_convs[1](passed.classes[1][level])).permute(0, 2, 3, 1).reshape(logits.shape)
        p = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(cross, p, reduction='none')
        classes = classes + (entropy * (p - cross.sigmoid()).abs()).sum()
        cross = head.scales[level](regress(head.reg_convs[1](passed.boxes[1][level]))).permute(0, 2, 3, 1)
        if family == 'gfl':
            distributions = teacher.distributions[level].flatten(0, 1)
            divergence = distribution_kl(cross.reshape(-1, 4, 5), distributions, 1.0, 'sum')
        else:
            distances = cross.reshape(-1, 4).clamp(min=0) * stride
            centers = teacher.priors[level].unflatten(1, (2, 2)).mean(1).repeat(2, 1)
            decoded = torch.cat([centers - distances[:, :2], centers + distances[:, 2:]], 1)
            real = (teacher.boxes[level][..., 2:] > teacher.boxes[level][..., :2]).all(-1)
            divergence = giou_imitation(decoded, teacher.boxes[level].flatten(0, 1)) * real.flatten()
        boxes = boxes + (score.flatten() * divergence).sum()
    positives = sum(level.sum() for level in student.assigned)
    confidence = sum(teacher.scores(level).sum() for level in range(3))
    parts = model.terms['term'](context)
    torch.testing.assert_close(parts.pop('classes'), classes / positives.clamp(min=1))
    torch.testing.assert_close(*parts.values(), 2 * boxes / confidence.clamp(min=1))


@pytest.mark.parametrize('family, layer', [('atss', 'atss_centerness'), ('fcos', 'conv_centerness')])
def test_centerness_weighs_the_boxes_and_is_not_compared(family, layer, pair, parts_of):
    model = pair(family)
    before, _ = parts_of(model)
    torch.nn.init.constant_(getattr(model.teacher.model.bbox_head, layer).bias, -100.0)
    after, _ = parts_of(model)
    assert set(after) == set(before) == {'classes', 'giou'}
    assert after['classes'] == before['classes'] > 0 and before['giou'] > 1e-3 > after['giou']


def test_levels_are_paired_by_stride(pair, batch):
    """A student's head that lists its levels in another order crosses the same."""
    model = pair('retina')
    data = model.data_preprocessor(copy.deepcopy(batch()), True)
    context = model.observe(**data, names=['term']).context
    expected, outputs = model.terms['term'](context), context.student_outputs
    student, towers = outputs['bbox_head'], outputs['bbox_head.towers']
    for field in ('logits', 'regressions', 'shapes', 'strides', 'assigned'):
        setattr(student, field, getattr(student, field)[::-1])
    outputs['bbox_head.towers'] = type(towers)(*(tuple(levels[::-1] for levels in tower) for tower in towers))
    assert {name: value.item() for name, value in model.terms['term'](context).items()} == {
        name: value.item() for name, value in expected.items()}
    student.strides, student.shapes = student.strides[1:], student.shapes[1:]
    student.logits = student.logits[1:]
    with pytest.raises(HeadError, match=r"student's .* strides \[16, 8\], the teacher's \[8, 16, 32\]"):
        model.terms['term'](context)


@pytest.mark.parametrize('family', ['retina', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet'])
def test_heads_of_other_widths_take_an_adapter_by_themselves(family, one_stage, distiller, parts_of):
    """It is there when the optimizer is made, before there is a teacher, and moves no random number of the student."""
    student, teacher = one_stage(family, stacked_convs=2), one_stage(family, stacked_convs=2, feat_channels=12)
    model = distiller(student, teacher, distill=dict(term=CROSSKD)).train()
    adapters = model.terms['term'].adapters
    assert model.teachers is None and [tuple(each.weight.shape[:2]) for each in adapters] == [(12, 8)] * 2
    assert set(adapters.parameters()) <= set(model.parameters())
    torch.manual_seed(0)
    assert torch.equal(MODELS.build(copy.deepcopy(student)).backbone.conv1.weight, model.backbone.conv1.weight)
    _sharp(model.bbox_head, model.build_teachers()[0].model.bbox_head)
    _, loss = parts_of(model)
    loss.backward()
    assert all(each.weight.grad.any() for each in adapters)
    with pytest.raises(ConfigurationError, match="adapter='none' needs equal channels, but the student has 8 and "):
        distiller(student, teacher, distill=dict(term=dict(CROSSKD, adapter='none')))


def test_width_of_the_neck_before_all_convolutions(pair, parts_of):
    """With the whole tower the teacher's, it is its neck's width that counts, not its head's."""
    model = pair('gfl', dict(feat_channels=10, neck=12), remaining=2)
    assert [tuple(each.weight.shape[:2]) for each in model.terms['term'].adapters] == [(12, 8)] * 2
    _, loss = parts_of(model)
    assert loss > 0


def test_towers_of_other_depths_share_their_last_convolutions(one_stage, distiller, parts_of):
    student, teacher = one_stage('fcos', stacked_convs=1), one_stage('fcos', depth=50, stacked_convs=3)
    _, loss = parts_of(distiller(student, teacher, distill=dict(term=CROSSKD)).train())
    assert loss.isfinite() and loss > 0
    with pytest.raises(ConfigurationError, match='term: remaining=2 convolutions: the depth of a tower is 1'):
        distiller(student, teacher, distill=dict(term=dict(CROSSKD, remaining=2)))


def test_mistakes_are_named_where_they_are(one_stage, distiller):
    with pytest.raises(ConfigurationError, match='model.distill.term.remaining: expected an integer'):
        distiller(one_stage('gfl'), one_stage('gfl'), distill=dict(term=dict(CROSSKD, remaining=-1)))
    with pytest.raises(ConfigurationError, match='model.distill.term: A SSDHead has no towers'):
        distiller(one_stage('ssd'), one_stage('gfl'), distill=dict(term=CROSSKD))
    with pytest.raises(ConfigurationError, match="teacher's bbox_head.towers. A YOLOXHead has no towers"):
        distiller(one_stage('gfl'), one_stage('yolox'), distill=dict(term=CROSSKD))
