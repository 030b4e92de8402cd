"""Weights that follow the task's gradient, and the measurement behind them."""
import copy
import re

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from kd_det.config.files import ConfigurationError
from kd_det.context import Progress
from kd_det.distillers import build_schedule, monitor
from kd_det.distillers.gradients import GradientNorms, SharedPass, gradient_norms
from kd_det.losses import FeatureTerm

BALANCE = dict(type='Balance', ratio=0.5)
TERMS = dict(
    features=('retinanet', dict(type='FGD')),
    tiny=('retinanet', dict(type='FGD', alpha=1e-9, beta=1e-9, gamma=1e-9, lambda_=1e-9)),
    backbone=('faster_rcnn', dict(type='FeatureImitation', tap='backbone')),
    written_to=('retinanet', dict(type='FeatureImitation', tap='backbone.layer2.0.bn1')),  # an in-place ReLU follows
    outputs=('faster_rcnn', dict(type='RoIClassification')))


def _norms(term, task, measurements=1, **balance):
    weight = build_schedule(dict(BALANCE, **balance))
    for _ in range(measurements):
        weight.update(GradientNorms(torch.tensor(float(term)), torch.tensor(float(task))))
    return weight


def _losses(model, data):
    model.train()
    return model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss')


# ---------------------------------------------------------------- the measurement


def test_norms_are_those_of_the_backward_pass_and_leave_no_trace():
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(3))
    fine = layers[0](torch.randn(1, 2, 8, 8))
    coarse, unread, off_path = layers[1](fine[..., ::2, ::2]), layers[2](fine), layers[2](fine)
    task = coarse.square().sum() + unread.sum()
    term = coarse.abs().sum() + fine.pow(4).sum() + off_path.square().sum()
    norms = gradient_norms(task, dict(term=term), dict(term=[fine, coarse, unread, off_path]))['term']
    assert all(parameter.grad is None for parameter in layers.parameters())
    fine.retain_grad(), coarse.retain_grad()
    for loss, norm in ((task, norms.task), (term, norms.term)):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(norm, (fine.grad.square().sum() + coarse.grad.square().sum()).sqrt())
        fine.grad = coarse.grad = None


def test_norms_of_losses_that_share_nothing_are_0():
    feature, frozen = torch.ones(1, 1, 2, 2, requires_grad=True), torch.ones(1, 1, 2, 2)
    losses = dict(apart=frozen.sum(), frozen=feature.sum())
    norms = gradient_norms(feature.sum(), losses, dict(apart=[feature], frozen=[frozen]))
    assert all(norm == 0 for pair in norms.values() for norm in pair)


def test_gradients_that_float16_would_lose_are_measured():
    feature = torch.ones(1, 1, 4, 4, dtype=torch.float16, requires_grad=True)
    norms = gradient_norms(feature.float().sum(), dict(term=feature.float().sum() * 2e-8), dict(term=[feature]))['term']
    assert norms.term.dtype == torch.float32 and norms.term / norms.task == pytest.approx(2e-8, rel=1e-2)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_an_autocast_of_the_step_does_not_round_the_gradients(dtype):
    """As in the step's own backward pass, which is outside of it; in float16 this gradient would be infinite."""
    feature, weight = torch.rand(4, 4, requires_grad=True), 100 + torch.rand(4, 4)
    task, term = feature.sum(), (feature @ weight).sum()
    expected = gradient_norms(task, dict(term=term), dict(term=[feature]))
    with torch.autocast('cpu', dtype):
        assert gradient_norms(task, dict(term=term), dict(term=[feature])) == expected


# ---------------------------------------------------------------- the weight


def test_scale_is_the_geometric_mean_of_the_ratios_without_bias():
    for measurements in (1, 2, 50):
        assert _norms(4.0, 2.0, measurements).scale == pytest.approx(0.5)
    weight = _norms(4.0, 2.0, momentum=0.5)
    weight.update(GradientNorms(torch.tensor(2.0), torch.tensor(8.0)))
    assert weight.scale == pytest.approx(0.5**(1 / 3) * 4**(2 / 3))  # the later one counts twice


@pytest.mark.parametrize('term, task', [(0.0, 1.0), (1.0, 0.0), (float('inf'), 1.0), (1.0, float('nan')),
                                        (1e-9, 1.0)])  # the last: rounding
def test_a_measurement_without_a_ratio_changes_nothing(term, task):
    assert _norms(term, task).scale == 0
    weight = _norms(4.0, 2.0)
    weight.update(GradientNorms(torch.tensor(term), torch.tensor(task)))
    assert weight.scale == pytest.approx(0.5)


def test_schedules_shape_the_ratio_from_within_and_without():
    warmup = dict(type='Warmup', epochs=2)
    for config in (dict(warmup, value=BALANCE), dict(BALANCE, ratio=dict(warmup, value=0.5))):
        weight = build_schedule(config)
        assert weight.balance is not None and weight.full == 0.5 and not weight.is_constant
        assert [weight(Progress(epoch=epoch)) for epoch in range(4)] == [0, 0.25, 0.5, 0.5]
    assert build_schedule(dict(BALANCE, ratio=0)).is_zero


@pytest.mark.parametrize('start, expected', [(1, [4, 6, 9, 12]), (4, [4, 5, 6, 7, 9, 12])])
def test_it_measures_first_and_then_at_every_interval(start, expected):
    weight, measured = build_schedule(dict(BALANCE, interval=3, start=start)), []
    for iteration in range(4, 14):
        if weight.is_due(Progress(iteration)):
            measured.append(iteration)
            weight.update(GradientNorms(torch.tensor(1.0), torch.tensor(1.0)))
    assert measured == expected


def test_the_interval_doubles_while_the_ratio_has_settled():
    weight, measured = build_schedule(dict(BALANCE, interval=2, start=1, longest=9)), []
    for iteration in range(80):
        if weight.is_due(Progress(iteration)):
            measured.append(iteration)
            if iteration in (24, 40):  # after a checkpoint of either
                restored = build_schedule(dict(BALANCE, interval=2, start=1, longest=9))
                restored.load_state_dict(copy.deepcopy(weight.state_dict()))
                weight = restored
            norms, boxes = (1.0, 4.0 if iteration == 40 else 1.0), (0.0, 0.0) if iteration == 56 else (2.0, 1.0)
            weight.update(GradientNorms(*map(torch.tensor, norms)), torch.tensor(boxes))
    # Up to 8, for 16 is more than 9; the one of 40 moves the mean, that of 56 without boxes says nothing.
    assert measured == [0, 2, 4, 8, 16, 24, 32, 40, 42, 44, 48, 56, 64, 72]
    assert weight.spacing == 8 and build_schedule(BALANCE).longest == 10


@pytest.mark.parametrize('name, value', [('ratio', -1.0), ('interval', 0), ('momentum', 1.0), ('start', 0),
                                         ('longest', 9), ('ratio', dict(BALANCE))])
def test_arguments_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f'^{name}: expected .*, got '):
        build_schedule(dict(BALANCE, **{name: value}))


# ---------------------------------------------------------------- what represents the data


def _measured(*measurements, **balance):
    """A weight that has measured (task's / term's, boxes, images with boxes)."""
    weight = build_schedule(dict(BALANCE, **balance))
    for ratio, *boxes in measurements:
        weight.update(GradientNorms(torch.tensor(1.0), torch.tensor(float(ratio))), torch.tensor(boxes or [4.0, 2.0]))
    return weight


def test_batches_without_boxes_change_nothing_once_there_are_others():
    seen = [(4.0, 3, 2), (5.0, 3, 2), (4.5, 3, 2)]
    expected = _measured(*seen).scale
    empty = (1e4, 0, 0)
    assert _measured(empty, *seen).scale == _measured(*seen, *[empty] * 1000).scale == expected
    assert _measured(empty, seen[0], empty, empty, seen[1], seen[2]).scale == expected == pytest.approx(4.5, rel=0.02)


def test_there_is_no_weight_before_three_single_images_or_two_at_once_have_boxes():
    empty, one, two = (80.0, 0, 0), (4.0, 5, 1), (4.0, 5, 2)
    for others, several in (([one, one], one), ([], two), ([one], two)):
        measurements = [empty, *others, empty, several, empty]
        scales = [_measured(*measurements[:count]).scale.item() for count in range(len(measurements) + 1)]
        assert scales == [0] * (len(others) + 3) + [pytest.approx(4.0)] * 2
    assert _measured(one, *[empty] * 49).scale == pytest.approx(4.0)  # long enough waited


def test_batches_without_boxes_count_where_there_are_no_others():
    empty = (0.3, 0, 0)
    assert _measured(*[empty] * 49).scale == 0
    assert _measured(*[empty] * 50).scale == pytest.approx(0.3)
    assert _measured(*[empty] * 60, (4.0, 1, 1)).scale == pytest.approx(4.0)  # until there are some


def test_a_batch_counts_by_its_boxes_and_at_most_as_one_measurement():
    usual = [(2.0, 10, 5)] * 4
    few, many = (_measured(*usual, (4.0, boxes, 1)).scale for boxes in (1, 1000))
    assert 2.0 < few < 2.1 and many == pytest.approx(_measured(*usual, (4.0, 10, 5)).scale)
    assert many == pytest.approx(2.0 * 2**(0.2 / (1 - 0.8**5)))  # as the moving mean of equal measurements


def test_one_measurement_far_from_the_others_moves_little_but_a_lasting_change_is_followed():
    usual = [(4.0, ), (5.0, ), (4.5, ), (4.2, ), (4.8, )]
    before, outlier = _measured(*usual).scale, _measured(*usual, (1e6, )).scale
    assert 1 < outlier / before < 1.25 and 0.8 < _measured(*usual, (1e-6, )).scale / before < 1
    assert _measured(*usual, *[(450.0, )] * 8).scale > 200
    assert _measured(*usual, *[(0.045, )] * 8).scale < 0.1


def test_a_checkpoint_of_any_point_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(0)
    measurements = [(ratio, boxes, boxes) for ratio, boxes in zip(
        torch.randn(20).exp().tolist(), torch.randint(0, 3, (20, )).tolist())]
    straight = _measured(*measurements, start=6)
    for point in (0, 1, 4, 7, 15):
        resumed = build_schedule(dict(BALANCE, start=6))
        resumed.load_state_dict(copy.deepcopy(_measured(*measurements[:point], start=6).state_dict()))
        assert resumed.is_due(Progress(1)) == (point < 6)
        for ratio, *boxes in measurements[point:]:
            resumed.update(GradientNorms(torch.tensor(1.0), torch.tensor(ratio)), torch.tensor(boxes))
        assert resumed.scale == straight.scale and resumed.state_dict().keys() == straight.state_dict().keys()
        assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_checkpoints_of_earlier_versions_hold_averages_alone():
    weight = build_schedule(BALANCE)
    weight.load_state_dict(dict(averages=torch.tensor([0.36 * 1.25, 0.36])))
    assert weight.scale == pytest.approx(torch.tensor(1.25).exp().item())
    assert not weight.is_due(Progress(iteration=1)) and weight.is_due(Progress(iteration=10))
    weight.update(GradientNorms(torch.tensor(1.0), torch.tensor(9.0)), torch.tensor([5.0, 1.0]))
    assert 3.5 < weight.scale < 9


def _crowds(data):
    for sample in data['data_samples']:
        sample.ignored_instances, sample.gt_instances = sample.gt_instances, sample.ignored_instances
    return data


@pytest.mark.parametrize('term', [dict(type='FGD'), dict(type='CrossKD', head='bbox_head')])
def test_images_without_boxes_and_with_crowds_alone_do_not_move_the_weight(term, retinanet, distiller, batch):
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(term=dict(term, weight=BALANCE)))
    weights = [_losses(model, data)['distill/term_weight'].item()
               for data in (batch(boxes=((), ())), _crowds(batch()), batch(), batch(boxes=((), ())), _crowds(batch()))]
    assert weights[:2] == [0, 0] and weights[2] > 0 and weights[2:] == [weights[2]] * 3
    assert model.monitor.balances['term'].means.counts.tolist() == [1, 2]


def test_boxes_of_classes_that_the_teacher_does_not_know_do_not_count(retinanet, distiller, batch):
    term = dict(type='FGD', weight=dict(BALANCE, start=1))
    model = distiller(retinanet(), dict(retinanet(), bbox_head=dict(retinanet().bbox_head, num_classes=1)),
                      distill=dict(term=term))
    model.build_teachers()[0].classes = ('b', )
    model.match_classes(('a', 'b', 'c'))
    _losses(model, batch())  # labels 0, 0 and 1
    assert model.monitor.balances['term'].means.boxes[0] == pytest.approx(0.2)  # 1 at its share
    assert model.monitor.balances['term'].means.counts.tolist() == [1, 1]


# ---------------------------------------------------------------- in a step


@pytest.mark.parametrize('case', TERMS)
def test_the_gradient_has_the_ratio_to_the_tasks(case, request, distiller, batch):
    family, term = TERMS[case]
    make = request.getfixturevalue(family)
    teacher = make() if case == 'written_to' else make(depth=50, neck=12)
    model = distiller(make(), teacher, distill=dict(term=dict(term, weight=BALANCE)))
    levels = []
    (path, ) = model.connections.gradient_taps['term']

    def note(module, inputs, output):
        levels.extend([output] if isinstance(output, torch.Tensor) else output)

    model.student.get_submodule(path).register_forward_hook(note, prepend=True)  # before the tap's
    losses = _losses(model, batch())
    task = model.parse_losses({name: value for name, value in losses.items() if name != 'loss_term'})[0]
    pairs = [torch.autograd.grad(loss, levels, retain_graph=True, allow_unused=True)
             for loss in (losses['loss_term'], task)]
    norms = [sum(each.square().sum() for each in side if each is not None).sqrt() for side in pairs]
    assert norms[0] / norms[1] == pytest.approx(0.5, rel=1e-3)
    assert losses['distill/term_weight'] > 0


def test_a_step_without_anything_to_learn_is_finite(retinanet, distiller, batch):
    """No boxes, of which the term's mask is made: its gradient is 0, and so is its weight."""
    term = dict(type='FeatureImitation', mask='BoxForeground', weight=BALANCE)
    model = distiller(retinanet(), retinanet(), distill=dict(term=term))
    losses = _losses(model, batch(boxes=((), ())))
    assert losses['loss_term'] == 0 and losses['distill/term_weight'] == 0
    model.parse_losses(losses)[0].backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_balance_under_autocast_is_float32_and_near_that_of_full_precision(dtype, retinanet, distiller, batch):
    weights = []
    for enabled in (True, False):
        model = distiller(retinanet(), retinanet(neck=12), distill=dict(fgd=dict(type='FGD', weight=BALANCE)))
        with torch.autocast('cpu', dtype=dtype, enabled=enabled):
            losses = _losses(model, batch())
        assert losses['loss_fgd'].dtype == torch.float32
        weights.append(float(losses['distill/fgd_weight']))
    assert weights[0] == pytest.approx(weights[1], rel=0.05)


# ---------------------------------------------------------------- one pass for the measurement and the step


# A level made of another; several losses a level; taps of which one lies behind the other; a transformer.
SHARED = {'RetinaNet': (dict(type='FGD'), 'bbox_head.retina_cls'),
          'Faster R-CNN': (dict(type='PKD'), 'roi_head.bbox_head.fc_cls'),
          'DINO': (dict(type='CWD'), 'bbox_head.reg_branches.0.0')}


@pytest.mark.parametrize('kind', SHARED)
def test_a_step_that_measures_passes_the_heads_once(kind, detector_config, distiller, batch, monkeypatch):
    term, layer = SHARED[kind]
    terms = dict(neck=dict(term, weight=BALANCE), backbone=dict(type='PKD', tap='backbone', weight=BALANCE))
    passes, steps = [], []
    for find in (lambda *_: None, SharedPass.find):
        monkeypatch.setattr(SharedPass, 'find', find)
        model = distiller(detector_config(kind), detector_config(kind), distill=terms, task_weight=0.5).train()
        model.student.get_submodule(layer).register_full_backward_hook(lambda *_: passes.append(len(steps)))
        losses = _losses(model, batch())
        total, logged = model.parse_losses(losses)
        (total / 4).backward()  # as one of several steps whose gradients are added up
        logged = {name: value.item() for name, value in logged.items()}
        steps.append((logged, {name: each.grad for name, each in model.named_parameters() if each.grad is not None}))
    (expected, gradients), (logged, shared) = steps
    assert passes.count(0) == 2 * passes.count(1) > 0
    assert logged == pytest.approx(expected, rel=1e-5) and logged['distill/neck_weight'] > 0
    assert gradients.keys() == shared.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_the_pass_is_shared_where_no_term_goes_that_way_and_float16_loses_nothing():
    feature, weight, other = (torch.ones(2, requires_grad=True) for _ in range(3))
    level = feature * 2
    task = (level * weight).sum()
    assert SharedPass.find(task, [level], [level.sum()]).weights == [weight]
    assert SharedPass.find(task, [level], [(level * weight).sum()]) is None  # a term that reads the head
    assert SharedPass.find(task + feature.sum() + (feature * other).sum(), [level], []) is None  # a way beside
    assert SharedPass.find(level.sum(), [level], []) is SharedPass.find(task, [feature], []) is None
    half = level.half()
    assert SharedPass.find((half * weight).sum(), [half], []) is None
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast('cpu', dtype):
            assert (SharedPass.find(task, [level], []) is None) == (dtype == torch.float16)


# ---------------------------------------------------------------- the warning


@pytest.fixture
def warnings_of(monkeypatch):
    """Trains some steps in which the watch measures; returns what it says."""

    def run(model, data):
        said = []
        monkeypatch.setattr(monitor, 'print_log', lambda message, *args: said.append(message))
        for iteration in range(0, 300, 25):
            model.set_progress(iteration, epoch=0)
            _losses(model, data)
        return said

    return run


def test_a_term_that_drowns_the_task_is_warned_of_once(retinanet, distiller, batch, warnings_of):
    terms = dict(loud=dict(type='FGD', weight=1e5), quiet=dict(type='PKD', weight=1e-3),
                 balanced=dict(type='FGD', weight=dict(BALANCE, ratio=100.0)))  # the user's explicit wish
    said = warnings_of(distiller(retinanet(), retinanet(neck=12), distill=terms), batch())
    assert len(said) == 1 and "The gradient of 'loud'" in said[0] and "weight=dict(type='Balance'" in said[0]


def test_gradients_that_can_not_be_measured_stop_a_balance_but_not_a_run(retinanet, distiller, batch, warnings_of):
    for weight in (1.0, BALANCE):
        term = dict(type='FGD', tap='backbone', weight=weight)
        model = distiller(retinanet(), retinanet(neck=12), distill=dict(fgd=term))
        layer, forward = model.student.backbone.layer3, model.student.backbone.layer3.forward
        layer.forward = lambda image: torch.utils.checkpoint.checkpoint(forward, image, use_reentrant=True)
        if weight == 1.0:
            said = warnings_of(model, batch())
            assert len(said) == 1 and 'can not be compared' in said[0]
            model.parse_losses(_losses(model, batch()))[0].backward()
        else:
            with pytest.raises(ConfigurationError, match='model.distill.fgd.weight: Balance can not measure'):
                _losses(model, batch())


def test_a_measurement_costs_a_backward_pass_each_and_other_steps_none(retinanet, distiller, batch, monkeypatch):
    passes, backward = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, 'grad',
                        lambda *args, **kwargs: passes.append(iteration) or backward(*args, **kwargs))
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(
        one=dict(type='PKD', weight=dict(BALANCE, interval=4, start=2)),
        two=dict(type='CWD', weight=dict(BALANCE, interval=4, start=1))))
    for iteration in range(6):
        model.set_progress(iteration, epoch=0)
        _losses(model, batch())
    # Of the task, which goes on from level to level, and of each term; down to the features alone.
    assert passes == [0] * 4 + [1] * 3 + [4] * 4


def test_the_task_is_watched_seldom_and_not_before_it_has_learnt_something(retinanet, distiller, batch, monkeypatch):
    measured = []
    monkeypatch.setattr(monitor, 'gradient_norms', lambda task, values, *_: measured.append(iteration) or {
        name: GradientNorms(torch.tensor(25.0), torch.tensor(1.0)) for name in values})
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(fgd=dict(type='FGD', weight=0.5)))
    logged = {}
    for iteration in (0, 1, 50, 51, 100, 150, 200, 250, 300, 350, 400):
        model.set_progress(iteration, epoch=0)
        logged[iteration] = _losses(model, batch()).get('distill/fgd_gradient')
    assert measured == [50, 100, 150, 200, 400]
    seen = {iteration: value for iteration, value in logged.items() if value is not None}
    assert seen == dict.fromkeys(measured, 12.5)


class _Still(FeatureTerm):
    """There is a way to the student's weights, but nothing to learn, but perhaps without boxes."""

    def compare(self, level, position):
        return dict(imitation=(level.student * sum(len(boxes) == 0 for boxes in level.context.boxes)).sum())


@pytest.mark.parametrize('weight', [1.0, BALANCE])
def test_a_term_whose_gradient_stays_0_is_warned_of_once(weight, retinanet, distiller, batch, warnings_of, monkeypatch):
    MODELS.register_module(module=_Still, force=True)
    monkeypatch.setattr(monitor, 'PATIENCE', 5)
    said = warnings_of(distiller(retinanet(), retinanet(), distill=dict(term=dict(type='_Still', weight=weight))),
                       batch())
    assert len(said) == 1 and re.search('model.distill.term (teaches|has taught) the student nothing', said[0])


def test_measurements_without_boxes_do_not_prove_that_a_term_teaches_nothing(retinanet, distiller, batch, warnings_of):
    term = dict(type='FeatureImitation', mask='BoxForeground')
    assert warnings_of(distiller(retinanet(), retinanet(), distill=dict(term=term)), batch(boxes=((), ()))) == []


# ---------------------------------------------------------------- the task's weight


def test_the_tasks_weight_scales_its_losses_and_nothing_else(faster_rcnn, distiller, batch):
    losses = []
    for weight in (1.0, 0.25):
        term = dict(type='FGD', weight=BALANCE)
        model = distiller(faster_rcnn(), faster_rcnn(neck=12), distill=dict(fgd=term), task_weight=weight)
        torch.manual_seed(1)  # of the sampler
        losses.append(_losses(model, batch()))
    full, quarter = losses
    assert full.keys() == quarter.keys() and 'acc' in full
    for name in full:
        ratio = 0.25 if 'loss' in name and name != 'loss_fgd' else 1.0
        values = [each[name] for each in (full, quarter)]
        sums = [(sum(value) if isinstance(value, list) else value).detach() for value in values]
        torch.testing.assert_close(sums[0] * ratio, sums[1])


def test_a_hint_first_and_the_task_after(retinanet, distiller, batch):
    """FitNets' two stages."""
    hint = dict(type='FeatureImitation', tap='backbone', weight=dict(type='Stop', value=1.0, epochs=2))
    task = dict(type='Start', value=1.0, epochs=2)
    model = distiller(retinanet(), retinanet(), distill=dict(hint=hint), task_weight=task)
    model.train()
    for epoch, guided in ((0, True), (1.9, True), (2, False), (5, False)):
        model.set_progress(int(epoch * 10), epoch)
        losses = _losses(model, batch())
        assert (losses['loss_hint'] > 0) == guided and losses['distill/task_weight'] == (not guided)
        assert (model.parse_losses(dict(losses, loss_hint=losses['loss_hint'] * 0))[0] > 0) == (not guided)


def test_the_tasks_weight_can_not_be_balanced(retinanet, distiller):
    with pytest.raises(ConfigurationError, match='model.task_weight: .*number or a'):
        distiller(retinanet(), retinanet(), task_weight=BALANCE)
    with pytest.raises(ConfigurationError, match=r'model\.task_weight\.epochs: .*either in epochs'):
        distiller(retinanet(), retinanet(), task_weight=dict(type='Start', value=1.0))
