"""Queries of DETRs: which is compared with which, by what, and that the terms teach the student alone."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from kd_det.config.files import ConfigurationError
from kd_det.functional import boxes as box_functions
from kd_det.functional.logits import permute_others, quality_bce
from kd_det.functional.queries import corners
from kd_det.heads import HeadError
from kd_det.losses import QueryRegression
from kd_det.losses import queries as module

KINDS = ('DETR', 'ConditionalDETR', 'DABDETR', 'DeformableDETR', 'DINO')
NAME = 'bbox_head.queries'
TERMS = dict(classes=dict(type='QueryClassification'), boxes=dict(type='QueryRegression'))
# The second is padded; the third has no box.
IMAGES = dict(shapes=((64, 96), (48, 56), (64, 64)), boxes=(((8, 8, 40, 40), (50, 10, 90, 60)), ((4, 4, 40, 44), ), ()))


@pytest.fixture
def make(distiller):
    """Makes a distiller of two DETRs, whose outputs differ from query to query."""

    def build(student: dict, teacher: dict, distill=TERMS):
        model = distiller(student, teacher, distill=distill).train()
        for each in (model.student, model.build_teachers()[0].model):
            torch.manual_seed(len(each.state_dict()))
            for parameter in each.bbox_head.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
        return model

    return build


@pytest.fixture
def observed(batch):
    """Runs one step of a distiller without weights; returns its context, and the values of the terms."""

    def run(model, images=IMAGES):
        data = model.data_preprocessor(batch(**images), True)
        _, context, values = model.observe(**data, names=model.terms)
        return context, values

    return run


@pytest.mark.parametrize('kind', KINDS)
def test_terms_teach_the_student_and_nothing_else(kind, detr, make, observed):
    model = make(detr(kind), detr(kind, depth=50, queries=14, layers=3))
    _, values = observed(model)
    assert {name: list(value) for name, value in values.items()} == dict(classes=['foreground', 'background'],
                                                                         boxes=['l1', 'giou'])
    for value in values.values():
        assert all(part.isfinite() and part > 0 for part in value.values())
        model.zero_grad()
        sum(value.values()).backward(retain_graph=True)
        for part in ('backbone', 'neck', 'encoder', 'decoder', 'bbox_head'):
            gradients = [parameter.grad for parameter in getattr(model, part).parameters()
                         if parameter.grad is not None]
            assert any(gradient.any() for gradient in gradients)
            assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())


@pytest.mark.parametrize('kind', KINDS)
def test_0_where_the_student_equals_the_teacher(kind, detr, pupil_of_itself, observed):
    for term in TERMS.values():
        context, values = observed(pupil_of_itself(detr(kind), **term))
        assert all(value.abs() < 1e-4 for value in values['term'].values())
        student, teacher = context.student_outputs[NAME], context.teacher_outputs[0][NAME]
        torch.testing.assert_close(student.boxes, teacher.boxes)


@pytest.mark.parametrize('queries, layers', [(10, 1), (25, 2), (4, 3)])
@pytest.mark.parametrize('kind', ['DETR', 'DINO'])
def test_layers_are_paired_from_the_last_and_queries_by_their_box(kind, queries, layers, detr, make, observed):
    """The teacher's query for a box is the one that mmdet's own assigner, the student's, would assign to it."""
    model = make(detr(kind), detr(kind, queries=queries, layers=layers))
    context, _ = observed(model)
    pairs = model.terms['boxes'].pair_queries(context)
    student, teacher = context.student_outputs[NAME], context.teacher_outputs[0][NAME]
    depth = min(2, layers)
    assert pairs.foreground.shape == (depth, 3, 10)
    for layer in range(-depth, 0):
        for image, (boxes, labels, shape) in enumerate(zip(context.boxes, context.labels, context.image_shapes)):
            height, width = shape
            predicted = corners(teacher.boxes[layer, image]) / 1000 * torch.tensor([width, height, width, height])
            expected = model.bbox_head.assigner.assign(
                InstanceData(scores=teacher.logits[layer, image], bboxes=predicted),
                InstanceData(bboxes=boxes, labels=labels), dict(img_shape=shape)).gt_inds
            for query in range(10):
                box = student.assigned[layer, image, query].item()
                assert pairs.foreground[layer, image, query] == (box >= 0)
                if box >= 0:
                    (partner, ) = (expected == box + 1).nonzero()[0]
                    assert torch.equal(pairs.teacher.boxes[layer, image, query], teacher.boxes[layer, image, partner])
                    assert torch.equal(pairs.teacher.logits[layer, image, query], teacher.logits[layer, image, partner])
    rest = min(10, queries) - torch.tensor([2, 1, 0])
    assert torch.equal(pairs.background.sum(2), rest.expand(depth, 3).float())


def test_background_is_paired_with_the_surest_that_have_no_box(detr, make, observed):
    model = make(detr('DINO'), detr('DINO', queries=20), dict(boxes=dict(TERMS['boxes'], background=4)))
    context, _ = observed(model)
    pairs = model.terms['boxes'].pair_queries(context)
    scores = context.teacher_outputs[0][NAME].scores()
    for layer in range(2):
        for image in range(3):
            partners = pairs.teacher.scores()[layer, image][pairs.background[layer, image] > 0]
            assert 4 - len(context.boxes[image]) <= len(partners) <= 4
            assert partners.min() >= scores[layer, image].sort(descending=True).values[3]
    model.terms['boxes'].background = 0
    context._computed.clear()
    assert model.terms['boxes'].pair_queries(context).background.sum() == 0


@pytest.mark.parametrize('kind', ['DETR', 'DeformableDETR'])
def test_values_are_those_of_the_formulas(kind, detr, make, observed):
    distill = dict(classes=dict(TERMS['classes'], foreground_weight=2.0, background_weight=0.5), boxes=TERMS['boxes'])
    model = make(detr(kind), detr(kind, queries=12), distill)
    context, values = observed(model)
    pairs, expected = model.terms['boxes'].pair_queries(context), dict(foreground=0, background=0, l1=0, giou=0)
    for layer in range(2):
        for image in range(3):
            for query in range(10):
                place = layer, image, query
                s, t = pairs.student.logits[place], pairs.teacher.logits[place]
                if kind == 'DETR':
                    classes = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction='sum')
                    score = t.softmax(-1)[:-1].max()
                else:
                    gap = (t.sigmoid() - s.sigmoid()).abs()
                    classes = (gap * F.binary_cross_entropy(s.sigmoid(), t.sigmoid(), reduction='none')).sum()
                    score = t.sigmoid().max()
                expected['foreground'] += 2 * classes * pairs.foreground[place]
                expected['background'] += 0.5 * classes * pairs.background[place]
                weight = score * (pairs.foreground[place] + pairs.background[place])
                first, second = pairs.student.boxes[place], pairs.teacher.boxes[place]
                expected['l1'] += 5 * weight * (first - second).abs().sum()
                distance, = box_functions.giou_imitation(corners(first)[None], corners(second)[None])
                expected['giou'] += 2 * weight * distance
    for name, value in {**values['classes'], **values['boxes']}.items():
        torch.testing.assert_close(value, expected[name] / 3)  # there are three boxes


@pytest.mark.parametrize('kind', ['DETR', 'DeformableDETR'])
def test_treatments_are_those_of_the_formulas_over_the_pairs(kind, detr, make, observed):
    model = make(detr(kind), detr(kind, queries=12))
    context, _ = observed(model)
    pairs = model.terms['classes'].pair_queries(context)
    s, t, is_softmax = pairs.student.logits, pairs.teacher.logits, kind == 'DETR'
    counted = [place for place in itertools.product(range(2), range(3), range(10))
               if pairs.foreground[place] + pairs.background[place]]
    maxima = {place: (t[place].softmax(-1) if is_softmax else t[place].sigmoid()).max() for place in counted}
    mean = sum(maxima.values()) / len(counted)

    def divergence(teacher, place):
        if is_softmax:
            return F.kl_div(s[place].log_softmax(-1), teacher[place].softmax(-1), reduction='sum')
        return quality_bce(s[place], teacher[place])

    cwtm = MODELS.build(dict(TERMS['classes'], treatment='cwtm'))(context)
    torch.manual_seed(2)
    dkpp = MODELS.build(dict(TERMS['classes'], treatment='dkpp'))(context)
    torch.manual_seed(2)
    permuted = permute_others(t)
    standardized = MODELS.build(dict(TERMS['classes'], standardize=True))(context)
    raw, s = s, (s - s.mean(-1, keepdim=True)) / s.std(-1, keepdim=True)  # what divergence compares
    for part, value in standardized.items():
        places = [place for place in counted if getattr(pairs, part)[place]]
        by_hand = (t - t.mean(-1, keepdim=True)) / t.std(-1, keepdim=True)
        torch.testing.assert_close(value, sum(divergence(by_hand, place) for place in places) / 3)
    s = raw
    for part in ('foreground', 'background'):
        places = [place for place in counted if getattr(pairs, part)[place]]
        expected = sum(maxima[place] / mean * divergence(t, place) for place in places) / 3
        torch.testing.assert_close(cwtm[part], expected)
        torch.testing.assert_close(dkpp[part], sum(divergence(permuted, place) for place in places) / 3)


@pytest.mark.parametrize('kind', KINDS)
def test_finite_without_any_box(kind, detr, make, observed):
    model = make(detr(kind), detr(kind))
    context, values = observed(model, dict(shapes=((64, 64), (40, 48)), boxes=((), ())))
    assert values['classes']['foreground'] == 0
    assert all(part.isfinite() for value in values.values() for part in value.values())
    sum(part for value in values.values() for part in value.values()).backward()
    gradients = [parameter.grad for parameter in model.student.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_a_box_of_a_class_that_the_teacher_lacks_is_compared_with_nothing(detr, make, observed):
    model = make(detr(), detr())
    context, _ = observed(model)
    context.labels[0][1] = -1
    context._computed.clear()
    pairs, assigned = model.terms['boxes'].pair_queries(context), context.student_outputs[NAME].assigned
    assert torch.equal(pairs.foreground.sum(2), torch.tensor([[1., 1, 0]] * 2))
    unknown = assigned[:, 0] == 1
    assert (pairs.foreground + pairs.background)[:, 0][unknown].sum() == 0


def test_the_teachers_scores_count_for_the_boxes_of_unlabelled_images(detr, make, observed):
    model = make(detr(), detr())
    context, values = observed(model)
    context.labelled = (True, True, False)
    context._computed.clear()
    scores = context.teacher_outputs[0][NAME].scores()[-1, 2].sum()
    assert scores > 0.1  # else the factor below would be 1
    for part, value in model.terms['boxes'](context).items():
        torch.testing.assert_close(value, values['boxes'][part] * 3 / (3 + scores))


def test_queries_are_matched_once_a_step(detr, make, observed, monkeypatch):
    calls, original = [], module.match_queries
    monkeypatch.setattr(module, 'match_queries', lambda *args: calls.append(args) or original(*args))
    observed(make(detr(), detr()))
    assert len(calls) == 1


def test_a_number_of_layers(detr, make, observed):
    model = make(detr(layers=3), detr(layers=3), dict(boxes=dict(TERMS['boxes'], layers=1)))
    context, _ = observed(model)
    pairs = model.terms['boxes'].pair_queries(context)
    assert torch.equal(pairs.student.boxes, context.student_outputs[NAME].boxes[-1:])


def test_the_whole_step_with_weights(detr, make, batch):
    model = make(detr('DINO'), detr('DINO'), {name: dict(term, weight=0.5) for name, term in TERMS.items()})
    data = model.data_preprocessor(batch(**IMAGES), True)
    loss, log = model.parse_losses(model.loss(**data))
    loss.backward()
    assert loss.isfinite() and log['loss_classes'] > 0 and log['distill/boxes_giou'] > 0
    assert all(parameter.grad is not None for parameter in model.student.bbox_head.parameters())


def test_heads_that_differ_in_classes_or_kind(detr, make, observed):
    with pytest.raises(HeadError, match='The student tells 3 classes apart by sigmoid, the teacher 5 classes apart'):
        observed(make(detr(), detr(classes=5)))
    with pytest.raises(HeadError, match='by sigmoid, the teacher 3 classes apart by softmax'):
        observed(make(detr('DINO'), detr('DETR')))


def test_mistakes_are_named(detr, retinanet, distiller):
    with pytest.raises(ConfigurationError, match='model.distill.a: A RetinaHead predicts no queries'):
        distiller(retinanet(), detr(), distill=dict(a=TERMS['boxes']))
    with pytest.raises(ConfigurationError, match='predicts queries, nothing cell by cell'):
        distiller(detr(), detr(), distill=dict(a=dict(type='DenseClassification', normalizer='confidence')))
    with pytest.raises(ValueError, match='^layers: expected an integer of at least 1 or None, got 0'):
        QueryRegression(layers=0)
    with pytest.raises(ValueError, match='^background: expected an integer of at least 0, got -1'):
        QueryRegression(background=-1)
