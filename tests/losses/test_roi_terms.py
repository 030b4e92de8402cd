"""Terms on the outputs of RoI heads, in whole training steps and against their formulas."""
from dataclasses import replace

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.context import DistillContext
from kd_det.functional import boxes, logits
from kd_det.heads import HeadError, Regions, RoIOutputs

CLASSES, MOVES = dict(type='RoIClassification'), dict(type='RoIRegression')
TERMS = [CLASSES, dict(CLASSES, temperature=4.0), dict(CLASSES, form='decoupled'), dict(CLASSES, form='coupled'), MOVES,
         dict(MOVES, form='l1', normalizer='own'), dict(MOVES, form='mse'), dict(type='RPNImitation'),
         dict(type='RPNImitation', form='bounded', normalizer='positives')]
PAIRS = [('faster_rcnn', 'faster_rcnn'), ('faster_rcnn', 'cascade_rcnn'), ('cascade_rcnn', 'faster_rcnn'),
         ('cascade_rcnn', 'cascade_rcnn')]


@pytest.fixture
def make(request):
    return lambda kind, **kwargs: request.getfixturevalue(kind)(**kwargs)


def _sharp(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize('student, teacher', PAIRS)
@pytest.mark.parametrize('term', [TERMS[0], TERMS[2], dict(CLASSES, form='weighted'), dict(MOVES, form='l1')])
def test_gradient_reaches_the_students_head_and_not_the_teacher(student, teacher, term, make, distiller, parts_of):
    model = distiller(make(student), make(teacher, depth=50, neck=12), distill=dict(term=term)).train()
    _sharp(model.roi_head), _sharp(model.build_teachers()[0].model.roi_head)
    before = model.teacher.fingerprint()
    parts, loss = parts_of(model)
    regresses = term['type'] == 'RoIRegression'
    assert set(parts) == ({'regression'} if regresses else {'foreground', 'background'})
    assert loss.isfinite() and loss > 0
    loss.backward()
    heads = model.roi_head.bbox_head if student == 'cascade_rcnn' else [model.roi_head.bbox_head]
    for head in heads:  # every stage of the student
        last = head.fc_reg if regresses else head.fc_cls
        assert last.weight.grad.abs().sum() > 0
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before


@pytest.mark.parametrize('term', TERMS)
@pytest.mark.parametrize('kind', ['faster_rcnn', 'cascade_rcnn'])
def test_is_0_where_the_student_equals_the_teacher(kind, term, make, pupil_of_itself, parts_of):
    stage = dict(stage='same') if kind == 'cascade_rcnn' and 'RoI' in term['type'] else {}
    parts, loss = parts_of(pupil_of_itself(make(kind), **term, **stage))
    assert loss == 0 and all(value == 0 for value in parts.values())


@pytest.mark.parametrize('term', [*TERMS, dict(CLASSES, form='weighted')])
def test_finite_without_boxes(term, faster_rcnn, distiller, parts_of, batch):
    model = distiller(faster_rcnn(), faster_rcnn(), distill=dict(term=term)).train()
    _, loss = parts_of(model, batch(boxes=((), ())))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def _outputs(regions, classes=4, by_class=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    count = len(regions.labels)
    return RoIOutputs(regions, torch.randn(count, classes, generator=random).requires_grad_(),
                      torch.randn(count, classes - 1 if by_class else 1, 4, generator=random).requires_grad_())


@pytest.fixture
def regions():
    """Six regions, two of them foreground, of classes 1 and 2; three classes."""
    labels = torch.tensor([1, 3, 3, 2, 3, 3])
    targets = torch.where((labels < 3)[:, None], torch.randn(6, 4, generator=torch.Generator().manual_seed(9)), 0)
    return Regions(torch.rand(6, 5), labels, targets, torch.tensor([0.1, 0.1, 0.2, 0.2]).expand(6, 4),
                   torch.tensor([0, 0, 0, 1, 1, 2]))


@pytest.fixture
def context(regions):
    stages = (_outputs(regions, seed=1), _outputs(regions, seed=2))
    return DistillContext(student={}, teachers=[{}], student_levels={}, teacher_levels=[{}], boxes=[], labels=[],
                          batch_shape=(64, 64), image_shapes=[], student_outputs=dict(roi_head=_outputs(regions)),
                          teacher_outputs=[dict(roi_head=stages)])


def test_plain_form_is_the_mean_divergence_over_regions(context):
    student, (first, second) = context.student_outputs['roi_head'], context.teacher_outputs[0]['roi_head']
    mean = (first.logits + second.logits) / 2
    same = torch.cat([first.logits[:3], second.logits[3:]])  # the student's third stage learns from the teacher's last
    for stage, target in ((0, first.logits), (1, second.logits), ('mean', mean), ('same', same)):
        parts = MODELS.build(dict(CLASSES, temperature=3.0, stage=stage))(context)
        torch.testing.assert_close(sum(parts.values()), logits.soft_target_kl(student.logits, target, 3.0))


def test_coupled_form_equals_the_plain_form(context):
    plain = MODELS.build(dict(CLASSES, temperature=2.0))(context)
    coupled = MODELS.build(dict(CLASSES, form='coupled', alpha=1.0, beta=1.0, temperature=2.0))(context)
    torch.testing.assert_close(plain, coupled)


def test_foreground_and_background_apart(context, regions):
    student, teacher = context.student_outputs['roi_head'].logits, context.teacher_outputs[0]['roi_head'][0].logits
    foreground = regions.labels < 3
    target, others, _ = logits.decoupled_kl(student, teacher, regions.labels)
    each = 2 * target + 3 * others
    for normalizer, counts in (('regions', (6, 6)), ('own', (2, 4))):
        term = MODELS.build(dict(CLASSES, form='decoupled', alpha=2.0, beta=3.0, foreground_weight=5.0,
                                 background_weight=0.5, stage=0, normalizer=normalizer))
        torch.testing.assert_close(term(context), dict(foreground=5 * each[foreground].sum() / counts[0],
                                                       background=0.5 * each[~foreground].sum() / counts[1]))


def test_weighted_form(context):
    student, teacher = context.student_outputs['roi_head'].logits, context.teacher_outputs[0]['roi_head'][0].logits
    weights = torch.tensor([1, 1, 1, 2.0])
    expected = -(weights * teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    parts = MODELS.build(dict(CLASSES, form='weighted', background_class_weight=2.0, stage=0))(context)
    torch.testing.assert_close(sum(parts.values()), expected)


@pytest.mark.parametrize('student_by_class', [True, False])
@pytest.mark.parametrize('teacher_by_class', [True, False])
def test_regression_compares_the_labelled_class(student_by_class, teacher_by_class, context, regions):
    context.student_outputs['roi_head'] = student = _outputs(regions, by_class=student_by_class)
    teacher = _outputs(regions, by_class=teacher_by_class, seed=4)
    context.teacher_outputs[0]['roi_head'] = (teacher, )
    foreground = ((0, 1), (3, 2))  # rows and their labels
    s, t = (torch.stack([side.deltas[row, label if by_class else 0] for row, label in foreground]) / regions.stds[0]
            for side, by_class in ((student, student_by_class), (teacher, teacher_by_class)))
    truth = regions.targets[[0, 3]] / regions.stds[0]
    for form, expected in (('bounded', boxes.bounded_regression(s, t, truth, 0.5)), ('l1', (s - t).abs().sum(1)),
                           ('mse', (s - t).square().sum(1))):
        for normalizer, count in (('regions', 6), ('own', 2)):
            term = MODELS.build(dict(MOVES, form=form, margin=0.5, normalizer=normalizer))
            torch.testing.assert_close(term(context)['regression'], expected.sum() / count)
    MODELS.build(dict(MOVES, form='l1'))(context)['regression'].backward()
    assert student.deltas.grad[[1, 2, 4, 5]].abs().max() == 0  # background has nothing to regress to


@pytest.mark.parametrize('form', ['plain', 'decoupled', 'weighted'])
def test_cwtm_weighs_each_region_by_the_teachers_maximum_over_its_mean(form, context, regions):
    teacher = context.teacher_outputs[0]['roi_head'][0].logits
    maxima = [max(region) for region in teacher.softmax(1).tolist()]
    expected = {'foreground': 0, 'background': 0}
    for region in range(6):  # each by itself, as if the others were not there
        student, teacher = (RoIOutputs(each.regions.select(torch.arange(6) == region), each.logits[region:region + 1],
                                       each.deltas[region:region + 1])
                            for each in (context.student_outputs['roi_head'],
                                         context.teacher_outputs[0]['roi_head'][0]))
        alone = replace(context, student_outputs=dict(roi_head=student), teacher_outputs=[dict(roi_head=(teacher, ))])
        for name, value in MODELS.build(dict(CLASSES, form=form))(alone).items():
            expected[name] += maxima[region] / (sum(maxima) / 6) * value / 6
    torch.testing.assert_close(MODELS.build(dict(CLASSES, form=form, stage=0, treatment='cwtm'))(context), expected)


@pytest.mark.parametrize('form', ['plain', 'decoupled', 'coupled', 'weighted'])
def test_standardised_regions_are_compared_by_the_same_form(form, context):
    expected = MODELS.build(dict(CLASSES, form=form, stage=0, temperature=2.0, standardize=True))(context)
    sides = context.student_outputs['roi_head'], context.teacher_outputs[0]['roi_head'][0]
    by_hand = [side._replace(logits=torch.stack([(each - each.mean()) / each.std() for each in side.logits]))
               for side in sides]
    context.student_outputs['roi_head'], context.teacher_outputs[0]['roi_head'] = by_hand[0], (by_hand[1], )
    torch.testing.assert_close(MODELS.build(dict(CLASSES, form=form, stage=0, temperature=2.0))(context), expected)


def test_dkpp_is_for_the_plain_form(context):
    student, teacher = context.student_outputs['roi_head'].logits, context.teacher_outputs[0]['roi_head'][0].logits
    torch.manual_seed(1)
    value = sum(MODELS.build(dict(CLASSES, stage=0, treatment='dkpp', temperature=2.0))(context).values())
    torch.manual_seed(1)
    torch.testing.assert_close(value, logits.soft_target_kl(student, logits.permute_others(teacher), 2.0))
    for form in ('decoupled', 'coupled', 'weighted'):
        with pytest.raises(ValueError, match=f"^treatment: 'dkpp' goes with form='plain', got form='{form}'"):
            MODELS.build(dict(CLASSES, form=form, treatment='dkpp'))


def test_no_regions_at_all(context, regions):
    none = Regions(*(each[:0] for each in regions))
    context.student_outputs['roi_head'] = _outputs(none)
    context.teacher_outputs[0]['roi_head'] = (_outputs(none), )
    for term in (CLASSES, dict(CLASSES, form='decoupled'), dict(CLASSES, treatment='cwtm'),
                 dict(CLASSES, treatment='dkpp'), MOVES):
        assert sum(MODELS.build(term)(context).values()) == 0


def test_what_can_not_be_compared(context, regions, faster_rcnn, distiller, parts_of):
    with pytest.raises(HeadError, match="stage=2: the teacher's RoI head has 2 stages"):
        MODELS.build(dict(CLASSES, stage=2))(context)
    with pytest.raises(HeadError, match='student tells 3 classes apart, the teacher 5'):
        parts_of(distiller(faster_rcnn(), faster_rcnn(classes=5), distill=dict(term=CLASSES)).train())


@pytest.mark.parametrize('arguments', [dict(CLASSES, form='x'), dict(CLASSES, normalizer='x'), dict(CLASSES, stage='x'),
                                       dict(MOVES, form='x'), dict(type='RPNImitation', form='x')])
def test_unknown_arguments(arguments):
    with pytest.raises(ValueError, match="^(form|normalizer|stage): expected .*, got 'x'"):
        MODELS.build(arguments)


def kept(context: DistillContext) -> DistillContext:
    """The same step; what a step has read of its teachers it lets go of."""
    return replace(context, teacher_outputs=[dict(each) for each in context.teacher_outputs])


@pytest.mark.parametrize('margin', [0.0, 0.01])
def test_bounded_regression_of_the_rpn_is_its_formula(margin, faster_rcnn, distiller, parts_of):
    """‖s − y‖² of the sampled positive anchors, where it is not better than the teacher's by the margin."""
    term = dict(type='RPNImitation', form='bounded', margin=margin, regression_weight=0.5, normalizer='positives')
    model = distiller(faster_rcnn(), faster_rcnn(), distill=dict(term=term)).train()
    _sharp(model.rpn_head), _sharp(model.build_teachers()[0].model.rpn_head)
    seen, compare = [], model.terms['term'].forward
    model.terms['term'].forward = lambda context: seen.append(kept(context)) or compare(context)
    parts_of(model)
    student, teacher = seen[0].student_outputs['rpn_head'], seen[0].teacher_outputs[0]['rpn_head']
    teacher.regressions = tuple(2 * torch.rand_like(each) * each.detach() for each in student.regressions)
    parts = compare(seen[0])
    positives = torch.cat(student.assigned, 1)
    s, t, y = (torch.cat(each, 1)[positives] for each in (student.regressions, teacher.regressions, student.targets))
    ours, theirs = (s - y).square().sum(1), (t - y).square().sum(1)
    counted = ours + margin > theirs
    assert counted.any() and not counted.all()
    torch.testing.assert_close(parts['regression'], 0.5 * ours[counted].sum() / positives.sum())
    parts['regression'].backward()
    assert model.rpn_head.rpn_reg.weight.grad.abs().sum() > 0


def test_rpn_imitation_is_its_formula(faster_rcnn, distiller, parts_of):
    term = dict(type='RPNImitation', regression_weight=0.5)
    model = distiller(faster_rcnn(), faster_rcnn(), distill=dict(term=term)).train()
    _sharp(model.rpn_head), _sharp(model.build_teachers()[0].model.rpn_head)
    seen, compare = [], model.terms['term'].forward
    model.terms['term'].forward = lambda context: seen.append(kept(context)) or compare(context)
    parts, loss = parts_of(model)
    student, teacher = seen[0].student_outputs['rpn_head'], seen[0].teacher_outputs[0]['rpn_head']
    s, t = (torch.cat(side.logits, 1).squeeze(-1) for side in (student, teacher))
    moved = (torch.cat(student.regressions, 1) - torch.cat(teacher.regressions, 1)).abs().sum(-1)
    p, q = t.sigmoid(), s.sigmoid()
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(parts['objectness'], (divergence.sum() / p.sum()).detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(parts['regression'], (0.5 * (p * moved).sum() / p.sum()).detach())
    loss.backward()
    assert model.rpn_head.rpn_cls.weight.grad.abs().sum() > 0 and model.rpn_head.rpn_reg.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('term', [CLASSES, dict(CLASSES, form='decoupled'), MOVES,
                                  dict(type='FeatureImitation', mask='RoIPredictionDifference')])
def test_finite_without_regions(term, faster_rcnn, distiller, parts_of, batch):
    """No boxes, and an RPN that proposes none: the plain student trains on."""
    student = faster_rcnn()
    student['train_cfg']['rpn_proposal']['min_bbox_size'] = 1000
    model = distiller(student, faster_rcnn(), distill=dict(term=term)).train()
    _, loss = parts_of(model, batch(boxes=((), ())))
    loss.backward()
    assert loss == 0


def test_ranks_of_an_rpn_are_those_of_its_one_class(faster_rcnn, distiller, parts_of):
    term = dict(type='RankMimicking', head='rpn_head')
    model = distiller(faster_rcnn(), faster_rcnn(), distill=dict(term=term)).train()
    _sharp(model.rpn_head), _sharp(model.build_teachers()[0].model.rpn_head)
    _, loss = parts_of(model)
    assert loss.isfinite()
