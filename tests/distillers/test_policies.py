"""Who teaches in a step: weights of guides and images, guides that do not run, turns, and what is drawn."""
import copy
import math

import pytest
import torch
from mmdet.registry import MODELS, TASK_UTILS

from kd_det.config.arguments import ArgumentError
from kd_det.context import DistillContext, Progress
from kd_det.distillers.policies import PolicyStep
from kd_det.heads import DenseOutputs, QueryOutputs, RoIOutputs
from kd_det.heads.roi import Regions
from kd_det.heads.towers import TowerFeatures
from kd_det.teachers.judging import judge_boxes


@pytest.fixture
def taught(retinanet, faster_rcnn, batch):
    """Makes a distiller of a RetinaNet by two unlike teachers under a policy, and a batch for it."""

    def make(policy=None, terms=('PKD', 'PKD'), widths=(8, 12, 16), **changes):
        torch.manual_seed(0)
        distill = {f'own_{index}': dict(type=kind, teacher=index) for index, kind in enumerate(terms)}
        config = dict(type='DetectionDistiller', student=retinanet(), policy=policy, distill=distill,
                      teacher=[dict(config=retinanet(neck=width), random_teacher=True)
                               for width in widths[:len(terms)]])
        model = MODELS.build({**config, **changes})
        model.build_teachers()
        model.train()
        return model, model.data_preprocessor(batch(), True)

    return make


def step(model, data, iteration=0, epoch=0.0):
    """What a step logs, and the gradients of the student."""
    model.zero_grad()
    model.set_progress(iteration, epoch)
    torch.manual_seed(1)
    losses = model.loss(data['inputs'], data['data_samples'])
    total, logged = model.parse_losses(losses)
    total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.student.named_parameters()
                 if parameter.grad is not None}
    return {name: float(value.detach()) for name, value in logged.items()}, gradients


def count_forwards(model, monkeypatch):
    """Guide -> how often it has run for the terms."""
    counts = dict.fromkeys(range(len(model.teachers)), 0)
    for index, teacher in enumerate(model.teachers):
        def run(*args, index=index, observe=teacher.observe, **kwargs):
            counts[index] += 1
            return observe(*args, **kwargs)
        monkeypatch.setattr(teacher, 'observe', run)
    return counts


def test_a_fixed_weight_multiplies_that_of_the_terms(taught):
    _, plain = step(*taught(distill={}))
    (one, first), (two, second), (both, joined) = (
        step(*taught(dict(type='Fixed', weights=weights))) for weights in ((1, 0), (0, 1), (2, 0.5)))
    assert one['loss_own_0'] > 0 and one['loss_own_1'] == 0 and two['loss_own_0'] == 0 and two['loss_own_1'] > 0
    assert both['loss_own_0'] == pytest.approx(2 * one['loss_own_0'], rel=1e-5)
    assert (both['policy/guide0'], both['policy/guide1']) == (2, 0.5)
    for name in plain:
        expected = plain[name] + 2 * (first[name] - plain[name]) + 0.5 * (second[name] - plain[name])
        torch.testing.assert_close(joined[name], expected, rtol=1e-3, atol=2e-4)


def test_without_weights_it_is_plain_training_and_no_guide_runs(taught, monkeypatch):
    _, plain = step(*taught(distill={}))
    model, data = taught(dict(type='Fixed', weights=(0, 0)))
    counts = count_forwards(model, monkeypatch)
    logged, gradients = step(model, data)
    assert counts == {0: 0, 1: 0} and logged['loss_own_0'] == logged['loss_own_1'] == 0
    assert gradients.keys() == plain.keys() and all(torch.equal(gradients[name], plain[name]) for name in plain)
    assert all(parameter.grad is not None for parameter in model.terms.parameters())  # data-parallel training waits


def test_a_policy_over_terms_without_weight_is_none(taught):
    terms = {f'own_{index}': dict(type='PKD', teacher=index, weight=0) for index in range(2)}
    model, _ = taught(dict(type='Agent'), distill=terms)
    assert model.policy is None


def test_a_guide_of_weight_0_does_not_run(taught, monkeypatch):
    model, data = taught(dict(type='Random'), terms=('PKD', 'PKD', 'PKD'))
    counts, chosen = count_forwards(model, monkeypatch), []
    state = torch.get_rng_state()
    for iteration in range(12):
        logged, _ = step(model, data, iteration)
        chosen.append([logged[f'policy/guide{index}'] for index in range(3)].index(1))
    assert [counts[index] for index in range(3)] == [chosen.count(index) for index in range(3)]
    assert set(chosen) == {0, 1, 2} and model.policy.taught.tolist() == [chosen.count(index) for index in range(3)]
    torch.set_rng_state(state)
    model.policy.draw(5)
    assert torch.equal(torch.get_rng_state(), state)  # what it draws moves no generator
    assert [step(model, data, iteration)[0]['policy/guide0'] for iteration in range(12)] == [
        float(each == 0) for each in chosen]


def test_uniform_pulls_as_hard_as_one(taught):
    logged, _ = step(*taught(dict(type='Uniform')))
    alone, _ = step(*taught(dict(type='Fixed', weights=(1, 1))))
    assert logged['loss_own_0'] == pytest.approx(0.5 * alone['loss_own_0'])


def test_random_may_keep_a_guide_for_an_epoch(taught):
    model, _ = taught(dict(type='Random', per='epoch'))
    drawn = [[model.policy.weigh(_step(iteration, iteration / 10)) for iteration in range(10 * epoch, 10 * epoch + 10)]
             for epoch in range(20)]
    assert all(each == epoch[0] for epoch in drawn for each in epoch)
    assert {tuple(epoch[0]) for epoch in drawn} == {(1.0, 0.0), (0.0, 1.0)}


def test_a_balance_keeps_its_ratio_times_the_weight_of_the_arm(taught):
    terms = {f'own_{index}': dict(type='PKD', teacher=index, weight=dict(type='Balance', ratio=0.5))
             for index in range(2)}
    model, data = taught(dict(type='Fixed', weights=(1, 0.25)), distill=terms)
    logged, _ = step(model, data)
    assert logged['distill/own_0_gradient'] == pytest.approx(0.5, rel=1e-4)
    assert logged['distill/own_1_gradient'] == pytest.approx(0.125, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- single images


def test_what_terms_read_has_the_gradient_of_each_image_times_its_share():
    shares, images = torch.tensor([0.0, 2.0]), torch.tensor([0, 1, 1])
    features, dense, queries, rois = (torch.rand(*shape, requires_grad=True) for shape in (
        (2, 3, 4, 4), (2, 4, 4), (3, 2, 5, 4), (3, 4)))
    regions = Regions(torch.cat([images[:, None].float(), torch.rand(3, 4)], 1), *torch.zeros(4, 3).long())
    context = DistillContext.of_features(features, features.detach(), student_outputs={
        'bbox_head': DenseOutputs.of_boxes(dense, dense, (2, 2)),
        'queries': QueryOutputs(queries, queries, 'sigmoid'),
        'roi_head': RoIOutputs(regions, rois, rois[:, None]),
        'bbox_head.towers': TowerFeatures((features, ), (features, ))})
    weighed = context.weigh_images(shares)
    outputs = weighed.student_outputs
    assert torch.equal(weighed.student['neck'][0], features) and torch.equal(outputs['bbox_head'].boxes[0], dense)
    for read, source, dim, expected in (
            (weighed.student['neck'][0], features, 0, shares),
            (outputs['bbox_head.towers'].boxes[0], features, 0, shares),
            (outputs['bbox_head'].logits[0], dense, 0, shares), (outputs['bbox_head'].boxes[0], dense, 0, shares),
            (outputs['queries'].boxes, queries, 1, shares), (outputs['roi_head'].deltas, rois, 0, shares[images])):
        gradient, = torch.autograd.grad(read.sum(), source, retain_graph=True)
        torch.testing.assert_close(gradient.movedim(dim, 0).flatten(1).mean(1), expected)


def test_an_image_of_weight_0_teaches_the_student_nothing(taught, monkeypatch):
    """With weight on the first image alone the student learns what it learns from a batch whose others are unlike."""
    model, data = taught(dict(type='Uniform'))
    monkeypatch.setattr(model.policy, 'weigh', lambda step: torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    counts = count_forwards(model, monkeypatch)
    _, plain = step(*taught(distill={}))
    logged, gradients = step(model, data)
    assert (logged['policy/guide0'], logged['policy/guide1']) == (0.5, 0)
    assert counts == {0: 1, 1: 0}  # the weights lie on the host, where it is known that nobody chose the second
    seen = {}

    def keep(context):
        seen.update(first=context.student['neck'][0], context=context)
        return context

    observation = model.observe(data['inputs'], data['data_samples'], ['own_0'])
    value = sum(model.terms['own_0'](keep(observation.context).weigh_images(torch.tensor([2.0, 0.0]))).values())
    gradient, = torch.autograd.grad(value, seen['first'])
    assert gradient[0].any() and not gradient[1].any()
    assert any((gradients[name] - plain[name]).abs().max() > 1e-7 for name in plain if name.startswith('backbone'))


def _step(iteration, epoch=0.0):
    return PolicyStep(Progress(iteration, epoch), None, None, (), None, None)


@pytest.mark.parametrize('by', ['loss', 'boxes'])
def test_confidence_is_the_formula(taught, by):
    model, data = taught(dict(type='Confidence', by=by, temperature=2.0), terms=('PKD', 'PKD', 'PKD'))
    found = {}

    def remember(each):
        found['step'] = each
        return type(model.policy).weigh(model.policy, each)

    model.policy.weigh = remember
    before = torch.get_rng_state()
    logged, _ = step(model, data)
    looked = found['step']
    losses = torch.stack([looked.measure_losses(index) if by == 'loss' else looked.judge_boxes(index).losses
                          for index in range(3)])
    assert losses.shape == (3, 2) and losses.unique().numel() == 6 and not losses.requires_grad
    weights = (1 - (losses / 2).exp() / (losses / 2).exp().sum(0)) / 2
    torch.testing.assert_close(weights.sum(0), torch.ones(2))
    assert [logged[f'policy/guide{index}'] for index in range(3)] == pytest.approx(weights.mean(1).tolist(), rel=1e-4)
    assert before is not None


def test_a_teachers_loss_on_an_image_is_that_of_the_image_alone(taught, batch):
    model, data = taught(dict(type='Confidence'))
    found = {}
    model.policy.weigh = lambda each: found.update(step=each) or [1.0, 0.0]
    step(model, data)
    losses = found['step'].measure_losses(1)
    teacher = model.teachers[1].model
    for row in range(2):
        sample = copy.deepcopy(data['data_samples'][row])
        with torch.no_grad():
            total, _ = model.parse_losses(teacher.loss(data['inputs'][row:row + 1], [sample]))
        assert losses[row].item() == pytest.approx(total.item(), rel=1e-4)


def test_boxes_are_judged_by_what_they_find():
    from mmengine.structures import InstanceData
    truth, labels = [torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])], [torch.tensor([0, 1])]

    def judge(boxes, scores, classes):
        return judge_boxes([InstanceData(bboxes=torch.tensor(boxes).reshape(-1, 4), scores=torch.tensor(scores),
                                         labels=torch.tensor(classes, dtype=torch.long))], truth, labels)

    found = judge([[0.0, 0, 10, 9], [20, 20, 40, 40], [0, 0, 10, 10]], [0.9, 0.5, 0.25], [0, 1, 1])
    assert found.losses.item() == pytest.approx(-(math.log(0.9) + math.log(0.5) + math.log(0.75)) / 2)
    assert found.scores.item() == pytest.approx(1.65 / 5)
    assert judge([], [], []).losses.item() == pytest.approx(-math.log(0.05))
    nothing = judge_boxes([InstanceData(bboxes=torch.zeros(1, 4), scores=torch.tensor([0.5]),
                                        labels=torch.tensor([0]))], [torch.zeros(0, 4)], [torch.zeros(0).long()])
    assert nothing.losses.item() == pytest.approx(math.log(2))


# ---------------------------------------------------------------------------------------------------------- turns


def connect(config, arms=3):
    """A policy over as many guides, of a term each."""
    from kd_det.losses import DistillTerm
    policy = TASK_UTILS.build(config)
    terms = {f'own_{index}': DistillTerm(teacher=index) for index in range(arms)}
    policy.connect([None] * arms, terms)
    return policy


def turns(policy, values, steps, per_epoch=10):
    """Which arm taught in each step, given the value of a term by arm and step."""
    taught = []
    for iteration in range(steps):
        weights = policy.weigh(_step(iteration, iteration / per_epoch))
        taught.append(weights.index(1) if 1 in weights else None)
        policy.notice(Progress(iteration), {f'own_{arm}': torch.tensor(float(values(arm, iteration)))
                                            for arm, weight in enumerate(weights) if weight})
    return taught


def test_a_sequence_by_epochs():
    policy = connect(dict(type='Sequence', order=(2, 0, 1), epochs=1.5))
    assert turns(policy, lambda arm, iteration: 1, 60) == [2] * 15 + [0] * 15 + [1] * 30


def test_a_sequence_moves_on_when_the_student_stops_gaining():
    policy = connect(dict(type='Sequence', order=(0, 1, 2), patience=2, interval=5, gain=0.1))
    # The first falls for 25 steps, then two windows without a gain; the second is a plateau from its first window on.
    taught = turns(policy, lambda arm, iteration: max(1 - iteration / 40, 0.5) if arm == 0 else 1, 60)
    assert taught == [0] * 35 + [1] * 15 + [2] * 10


def test_a_sequence_finds_the_order_by_the_cost_of_adapting():
    policy = connect(dict(type='Sequence', epochs=1, trial=6))
    cost = [0.9, 0.2, 0.5]
    taught = turns(policy, lambda arm, iteration: 9 - arm if iteration < 3 else cost[arm], 40)
    assert policy.order == [1, 2, 0] and taught == [None] * 6 + [1] * 4 + [2] * 10 + [0] * 20
    torch.testing.assert_close(policy.costs, 3 * torch.tensor(cost))


def test_a_sequence_may_go_by_the_probe():
    policy = connect(dict(type='Sequence', order=(0, 1, 2), patience=1, interval=4, signal='probe'))
    scores = iter([-1.0, -0.5, -0.5, -0.9, -0.8, -0.8])
    taught = []
    for iteration in range(24):
        if policy.is_due(Progress(iteration)):
            policy.evaluate(next(scores), Progress(iteration))
        taught += [policy.weigh(_step(iteration)).index(1)]
    assert taught == [0] * 8 + [1] * 12 + [2] * 4


def test_a_route_goes_on_with_the_adapters_that_the_student_has_learnt(taught):
    model, data = taught(dict(type='Route', patience=1, interval=2, gain=0.9), widths=(12, 12))
    first, second = (model.terms[f'own_{index}'] for index in range(2))
    assert any(not torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))
    taught_by = [step(model, data, iteration)[0]['policy/guide1'] for iteration in range(4)]
    assert taught_by == [0, 0, 0, 0]
    assert step(model, data, 4)[0]['policy/guide1'] == 1
    assert all(torch.equal(*pair) for pair in zip(first.parameters(), second.parameters()))


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize('policy, message', [
    (dict(type='Fixed', weights=(1, 1, 1)), r'model\.policy\.weights: expected 2 numbers, one for each guide'),
    (dict(type='Fixed', weights=(1, -1)), r'model\.policy\.weights'),
    (dict(type='Sequence'), r'model\.policy\.epochs: expected how long an arm teaches .* got neither'),
    (dict(type='Sequence', epochs=1, patience=1), 'got both'),
    (dict(type='Sequence', epochs=1, order=(0, 2)), r'model\.policy\.order: expected the indices 0 to 1'),
    (dict(type='Random', arms=dict(a=['own_0'], b=['own_7'])), r"model\.policy\.arms\.b: expected names of terms"),
    (dict(type='Random', arms=dict(a=['own_0'], b=['own_0'])), r"model\.policy\.arms\.b: expected names of terms"),
    (dict(type='Random', arms=dict(loss=['own_0'], b=['own_1'])), "without 'loss'"),
    (dict(type='Randon'), "there is no 'Randon'"),
    (dict(type='Warmup', value=1, epochs=1), 'expected a policy'),
    (dict(type='Bandit', algorithm='greedy'), r'model\.policy\.algorithm'),
])
def test_bad_input_is_one_clear_error(taught, policy, message):
    with pytest.raises(ArgumentError, match=message):
        taught(policy)


def test_one_guide_leaves_nothing_to_choose(taught):
    with pytest.raises(ArgumentError, match='there is nothing to choose: Random weighs arms, and .* has 1 of them'):
        taught(dict(type='Random'), terms=('PKD', ))


def test_a_guide_that_has_no_loss_can_not_be_judged_by_it(taught, retinanet):
    teachers = [dict(config=retinanet(neck=8), random_teacher=True), dict(type='Average')]
    with pytest.raises(ArgumentError, match=r'model\.teacher\[1\] is an Average, which has no loss on the ground'):
        taught(dict(type='Confidence'), teacher=teachers)
