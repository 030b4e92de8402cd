"""Terms that can teach the student nothing are told in their first step."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from kd_det.config.files import ConfigurationError
from kd_det.distillers import monitor
from kd_det.distillers.gradients import reaches_parameters
from kd_det.losses import DistillTerm, FeatureTerm

HINT = dict(type='FeatureImitation', tap='backbone', normalizer='mean')
BALANCE = dict(type='Balance', ratio=0.5)


@pytest.fixture
def said(monkeypatch):
    """What is told, as (level, message)."""
    messages = []
    monkeypatch.setattr(monitor, 'print_log', lambda message, logger, level: messages.append((level, message)))
    return messages


def _step(model, data, iteration=0):
    model.train()
    model.set_progress(iteration, epoch=0)
    return model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')


def _frozen(detector, stages=4):
    detector.backbone.frozen_stages = stages
    return detector


def _freeze(model, *learning):
    """All weights of the student but those whose name begins so."""
    for name, parameter in model.student.named_parameters():
        parameter.requires_grad_(name.startswith(learning))


# ---------------------------------------------------------------- the graph


def test_weights_are_reached_where_there_is_a_way_whatever_the_gradient_is():
    weight, apart = (torch.ones(3, requires_grad=True) for _ in range(2))
    weight.register_hook(lambda gradient: pytest.fail('a backward pass'))
    assert reaches_parameters((weight * apart).sum()) and reaches_parameters((weight * 0).sum(), apart=[apart])
    assert reaches_parameters(apart.sum()) and not reaches_parameters(apart.sum(), apart=[apart])
    assert not reaches_parameters((weight.detach() * apart).sum(), apart=[apart])
    assert not reaches_parameters(torch.zeros(()))
    assert reaches_parameters(torch.stack([apart.sum(), weight[1:].relu().sum()]).prod(), apart=[apart])


@pytest.mark.parametrize('reentrant', [True, False])
def test_weights_are_reached_through_checkpointing(reentrant):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    output = checkpoint(second, first(torch.ones(1, 2)), use_reentrant=reentrant)
    assert reaches_parameters(output.sum())
    output.sum().backward()  # which it allows once only
    assert first.weight.grad is not None


# ---------------------------------------------------------------- the first step of a term


@pytest.mark.parametrize('weight, first', [
    (1.0, 0), (BALANCE, 0), (dict(type='Start', value=1.0, iterations=3), 3),
    (dict(type='Warmup', value=BALANCE, iterations=4), 1), (dict(type='Stop', value=1.0, iterations=2), 0)])
def test_a_term_on_a_frozen_part_is_warned_of_once_in_its_first_step(weight, first, retinanet, distiller, batch, said):
    terms = dict(hint=dict(HINT, weight=weight), neck=dict(type='FGD'))
    model, told = distiller(_frozen(retinanet()), retinanet(neck=12), distill=terms), []
    for iteration in range(5):
        _step(model, batch(), iteration)
        told.append(len(said))
    assert told == [0] * first + [1] * (5 - first)
    assert "model.distill.hint teaches the student nothing" in said[0][1] and 'frozen_stages' in said[0][1]
    assert "It reads 'backbone'" in said[0][1] and said[0][1].endswith('a part that learns: neck, bbox_head.')


@pytest.mark.parametrize('terms', [dict(hint=HINT),
                                   dict(hint=dict(HINT, weight=BALANCE), other=dict(HINT, weight=0.1))])
def test_a_run_whose_terms_all_teach_nothing_ends_in_its_first_step(terms, retinanet, distiller, batch, said):
    model = distiller(_frozen(retinanet()), retinanet(neck=12), distill=terms)
    with pytest.raises(ConfigurationError, match="gradient from any term.* model.distill.hint: It reads 'backbone'"):
        _step(model, batch())
    assert len(said) == len(terms)


def test_it_ends_where_the_last_of_the_terms_turns_out_to_teach_nothing(retinanet, distiller, batch, said):
    late = dict(HINT, weight=dict(type='Start', value=1.0, iterations=2))
    model = distiller(_frozen(retinanet()), retinanet(), distill=dict(hint=HINT, late=late))
    for iteration in range(2):
        _step(model, batch(), iteration)  # the late one might teach something
    with pytest.raises(ConfigurationError, match='model.distill.hint: .* model.distill.late: '):
        _step(model, batch(), 2)


def test_pseudo_labels_teach_beside_an_idle_term_or_alone(retinanet, distiller, batch, said):
    for terms in (dict(hint=HINT), {}):
        model = distiller(_frozen(retinanet()), retinanet(), distill=terms, pseudo_labels=dict(score=0.5))
        _step(model, batch())
    _step(distiller(_frozen(retinanet()), retinanet(), distill=dict(hint=dict(HINT, weight=0))), batch())
    assert len(said) == 1


def _cut_neck(model):
    model.student.neck.register_forward_hook(lambda module, inputs, output: tuple(each.detach() for each in output),
                                             prepend=True)


def _checkpoint_a_stage(model):
    layer, forward = model.student.backbone.layer3, model.student.backbone.layer3.forward
    layer.forward = lambda image: checkpoint(forward, image, use_reentrant=True)


@pytest.mark.parametrize('tap, cut, path', [('neck', _cut_neck, 'neck'),
                                            ('backbone.layer3.1.conv2', _checkpoint_a_stage, 'layer3.1.conv2')])
def test_a_tap_whose_gradient_is_cut_is_told_apart_from_a_frozen_one(tap, cut, path, retinanet, distiller, batch):
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(hint=dict(HINT, tap=tap)))
    cut(model)
    with pytest.raises(ConfigurationError, match=rf'{path}., which learns, but .*with_cp=True'):
        _step(model, batch())


def test_a_checkpointed_stage_that_is_tapped_whole_teaches(retinanet, distiller, batch, said):
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(hint=dict(HINT, tap='backbone.layer3')))
    _checkpoint_a_stage(model)
    losses = _step(model, batch())
    model.parse_losses(losses)[0].backward()
    assert not said and model.student.backbone.layer3[1].conv2.weight.grad.norm() > 0


def test_single_frozen_levels_are_no_fault(retinanet, distiller, batch, said):
    model = distiller(_frozen(retinanet(), 2), retinanet(neck=12), distill=dict(hint=HINT, neck=dict(type='FGD')))
    _step(model, batch())
    (level, message), = said
    assert level == monitor.logging.INFO and "level 0, 1 of 'backbone' is frozen" in message
    assert 'levels=(2, 3)' in message
    said.clear()
    _step(distiller(_frozen(retinanet(), 2), retinanet(neck=12), distill=dict(hint=dict(HINT, levels=(2, 3)))), batch())
    assert not said


@pytest.mark.parametrize('family, term, learning, idle_path', [
    ('retinanet', 'CrossKD', ('neck', ), None),  # through a frozen head
    ('retinanet', 'CrossKD', ('bbox_head.retina_cls', 'bbox_head.retina_reg'), 'bbox_head'),  # behind what it reads
    ('retinanet', 'DenseClassification', ('bbox_head.retina_cls', ), None),
    ('faster_rcnn', 'RPNImitation', ('rpn_head', ), None),
    ('faster_rcnn', 'RPNImitation', ('roi_head', ), 'rpn_head'),
    ('faster_rcnn', 'RoIClassification', ('roi_head', ), None)])
def test_terms_on_heads(family, term, learning, idle_path, request, distiller, batch, said):
    make = request.getfixturevalue(family)
    arguments = dict(remaining=1, head='bbox_head') if term == 'CrossKD' else {}
    model = distiller(make(), make(neck=12), distill=dict(term=dict(type=term, **arguments)))
    _freeze(model, *learning)
    if idle_path is None:
        _step(model, batch())
        assert not said
    else:
        with pytest.raises(ConfigurationError, match=f"model.distill.term: It reads '{idle_path}'"):
            _step(model, batch())


def test_queries_of_a_frozen_detr(detr, distiller, batch, said):
    terms = dict(classes=dict(type='QueryClassification'), encoder=dict(type='PKD', tap='encoder', levels=1))
    model = distiller(detr(), detr(queries=12, layers=3), distill=terms)
    _freeze(model, 'bbox_head')
    _step(model, batch())
    assert len(said) == 1 and "model.distill.encoder teaches" in said[0][1] and "It reads 'encoder'" in said[0][1]


# ---------------------------------------------------------------- terms of one's own


class _Detached(FeatureTerm):

    def compare(self, level, position):
        return dict(imitation=(level.student.detach() - level.teacher).square().mean())


class _OfBoxes(DistillTerm):
    """0, a constant, without boxes, as a user's term may be."""
    student_taps = ('neck', )

    def forward(self, context):
        boxes = sum(map(len, context.boxes))
        return sum(level.mean() for level in context.student['neck']) if boxes else torch.zeros(())


@pytest.fixture
def own_terms():
    for term in (_Detached, _OfBoxes):
        MODELS.register_module(module=term, force=True)


def test_a_term_that_detaches_is_the_cause_itself(own_terms, retinanet, distiller, batch, said):
    model = distiller(retinanet(), retinanet(), distill=dict(own=dict(type='_Detached')))
    with pytest.raises(ConfigurationError, match="reads 'neck', which has a gradient, .* _Detached detaches it"):
        _step(model, batch())


def test_a_batch_without_boxes_proves_nothing(own_terms, retinanet, distiller, batch, said):
    model = distiller(retinanet(), retinanet(), distill=dict(own=dict(type='_OfBoxes')))
    for iteration, boxes in enumerate([((), ())] * 3 + [(((8, 8, 40, 40), ), ())]):
        _step(model, batch(boxes=boxes), iteration)
    assert not said and not model.idle_check.remaining
    model = distiller(retinanet(), retinanet(), distill=dict(own=dict(type='_OfBoxes')))
    model.idle_check.remaining['own'] = 3  # such batches, of the 50 that are waited for
    for iteration in range(3):
        _step(model, batch(boxes=((), ())), iteration)
    with pytest.raises(ConfigurationError, match='model.distill.own'):
        _step(model, batch(boxes=((), ())), 3)
