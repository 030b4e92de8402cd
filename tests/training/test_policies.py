"""Policies in a run: what is held out and scored, rewards, and where a resumed run ends."""
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import DATASETS, MODELS, TASK_UTILS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import kd_det
from kd_det.config.arguments import ArgumentError
from kd_det.config.files import ConfigurationError
from kd_det.context import Progress
from kd_det.distillers.rewards import MOST, Gains
from kd_det.losses import DistillTerm
from kd_det.training.pictures import read_scalars
from kd_det.training.probe import ProbeSettings, StudentProbe, make_probe_dataset
from kd_det.training.replay import training_epoch


def connect(config, arms=2):
    """A policy over as many guides, of a term each."""
    policy = TASK_UTILS.build(config)
    policy.connect([SimpleNamespace(detects=True)] * arms, {f'own_{index}': DistillTerm(teacher=index)
                                                       for index in range(arms)})
    return policy


# ------------------------------------------------------------------------------------------------------ the rewards


def test_gains_are_worth_their_distance_from_those_before():
    gains = Gains()
    found = [gains.take(score) for score in (1.0, 2.0, 3.2, 4.0, 5.0, math.nan, 6.0, 66.0, 66.0)]
    assert found[:3] == [None, 0, 0] and found[5] is None
    assert found[3] < 0 < found[7] == MOST and found[8] < 0
    # The same scores in other units, and twice as fast, are worth the same.
    other = Gains()
    assert [other.take(score) for score in (3.0, 13.0, 25.0, 33.0, 43.0)] == pytest.approx(found[:5], abs=1e-6)


def play(policy, means, decisions, seed=0):
    """The regret after each decision, of rewards that are 1 with these probabilities."""
    random = torch.Generator().manual_seed(seed)
    policy.start(len(means))
    regret, total = [], 0.0
    for decision in range(decisions):
        arm = policy.choose(decision + 1_000_000 * seed)
        policy.learn(float(torch.rand((), generator=random) < means[arm]))
        total += max(means) - means[arm]
        regret.append(total)
    return regret


@pytest.mark.parametrize('algorithm', ['exp3', 'ucb'])
def test_a_bandits_regret_grows_in_the_order_of_theory(algorithm):
    """EXP3: 2·√(e − 1)·√(T·K·ln K) of adversarial rewards; UCB1: 8·Σ ln T/Δ + (1 + π²/3)·ΣΔ, of a fixed problem."""
    means, decisions = (0.8, 0.4, 0.3), 2000
    number = len(means)
    gamma = min(1.0, math.sqrt(number * math.log(number) / ((math.e - 1) * decisions)))
    policy = connect(dict(type='Bandit', algorithm=algorithm, gamma=gamma), arms=number)
    regret = torch.tensor([play(policy, means, decisions, seed) for seed in range(3)]).mean(0)
    gaps = [max(means) - mean for mean in means[1:]]
    bound = (2 * math.sqrt(math.e - 1) * math.sqrt(decisions * number * math.log(number)) if algorithm == 'exp3' else
             sum(8 * math.log(decisions) / gap + (1 + math.pi**2 / 3) * gap for gap in gaps))
    at_random = decisions * sum(gaps) / number
    assert regret[-1] < min(bound, at_random / 3)
    assert regret[-1] - regret[-501] < 0.5 * (regret[499] - regret[0])  # it grows ever slower


def test_a_bandit_keeps_an_arm_between_evaluations_and_learns_the_good_one():
    policy = connect(dict(type='Bandit', interval=5, gamma=0.3), arms=3)
    score, taught, random = 0.0, [], torch.Generator().manual_seed(3)
    for iteration in range(1500):
        if policy.is_due(Progress(iteration)):
            policy.evaluate(score, Progress(iteration))
        arm = policy.weigh(None).index(1)
        taught.append(arm)
        score += (0.3, 1.0, 0.2)[arm] + 0.3 * torch.randn((), generator=random).item()
    assert all(len({*taught[first:first + 5]}) == 1 for first in range(0, 1500, 5))
    assert taught[-500:].count(1) > 250 > 1.5 * max(taught[-500:].count(0), taught[-500:].count(2))
    assert 'Preferred: guide1' in policy.report() and '299 evaluations' in policy.report()


def test_halving_keeps_the_better_half_until_one_is_left_that_teaches_to_the_end():
    """Rounds of 8 decisions for each arm left: of 4, 2 and 1; the best is found far more often than by chance."""
    found = []
    for seed in range(40):
        policy = connect(dict(type='Bandit', algorithm='halving', rounds=8), arms=4)
        play(policy, (0.8, 0.3, 0.2, 0.1), 8 * 4 + 8 * 2, seed)
        assert sorted(policy.counts.tolist())[:2] == [8, 8] and policy.counts.sum() == 48
        assert len(policy.left) == 1 and not policy.is_due(Progress(0)) and policy.choose(0) == policy.left[0]
        found += policy.left
    assert found.count(0) >= 36
    assert 'Left: guide' in policy.report() and '48 evaluations' in policy.report()


def expected_reward(policy, states, reward):
    """Over all actions of the images, each with its likelihood."""
    likely = policy.likelihoods(states)
    for code in range(2**likely.numel()):
        actions = torch.tensor([float(code >> bit & 1) for bit in range(likely.numel())],
                               dtype=torch.float64).view_as(likely)
        probability = torch.where(actions == 1, likely, 1 - likely).prod()
        yield probability, actions, reward(actions)


def test_an_agents_gradient_is_that_of_the_expected_reward():
    """REINFORCE's mean over the actions, of a problem of two teachers, against finite differences; for any baseline."""
    policy = connect(dict(type='Agent'))
    states = torch.randn(2, 3, dtype=torch.float64)
    policy.slopes = torch.randn(2, 4, dtype=torch.float64) / 2

    def reward(actions):
        return actions[:, 0].sum() - 0.5 * actions[:, 1].sum() + actions[0, 0] * actions[1, 1]

    def value():
        return sum(probability * each for probability, _, each in expected_reward(policy, states, reward))

    for baseline in (0.0, 0.7):
        gradient = sum(probability * (each - baseline) * policy.trace(states, actions)
                       for probability, actions, each in expected_reward(policy, states, reward))
        slopes = policy.slopes
        for place in [(0, 0), (0, 3), (1, 2), (1, 3)]:
            change = torch.zeros_like(slopes)
            change[place] = 1e-5
            policy.slopes = slopes + change
            above = value()
            policy.slopes = slopes - change
            difference = (above - value()) / 2e-5
            policy.slopes = slopes
            assert gradient[place].item() == pytest.approx(difference.item(), rel=1e-4, abs=1e-7)


def test_an_agent_finds_the_good_teacher_where_the_other_gives_noise():
    """The second always harms; the first helps where a feature of the image is 1, and harms where it is −1."""
    policy = connect(dict(type='Agent', rate=0.3))
    random, score = torch.Generator().manual_seed(0), 0.0
    for episode in range(400):
        policy.evaluate(score, Progress(episode))
        states = torch.cat([torch.ones(8, 1), torch.randint(0, 2, (8, 1), generator=random) * 2.0 - 1], 1)
        actions = policy.decide(states, episode)
        good = (actions[:, 0] * states[:, 1] - actions[:, 1] * 0.8).mean()
        score += good.item() + 0.1 * torch.randn((), generator=random).item()
    likely = policy.likelihoods(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    assert likely[0, 0] > 0.8 and likely[1, 0] < 0.2 and (likely[:, 1] < 0.2).all()


# ---------------------------------------------------------------------------------------------------------- resume


SCRIPTED = [dict(type='Fixed', weights=(1, 2)), dict(type='Uniform'), dict(type='Random'),
            dict(type='Random', per='epoch'), dict(type='Sequence', epochs=1, trial=7),
            dict(type='Sequence', patience=1, interval=4, trial=6), dict(type='Route', patience=1, interval=3),
            dict(type='Sequence', patience=1, interval=3, signal='probe', order=(1, 0)),
            dict(type='Bandit', interval=2), dict(type='Bandit', interval=2, algorithm='ucb'),
            dict(type='Bandit', interval=2, algorithm='halving', rounds=3)]


def go_through(policy, steps):
    """What a policy does in these steps, given a world that follows from its weights."""
    found = []
    for iteration in steps:
        progress = Progress(iteration, iteration / 8)
        if policy.is_due(progress):
            policy.evaluate(math.sin(iteration**2), progress)
        weights = (policy.decide(torch.tensor([[math.sin(iteration), 1.0], [math.cos(iteration), 0.5]]), iteration).T
                   if policy.__class__.__name__ == 'Agent' else policy.weigh(SimpleNamespace(progress=progress)))
        found.append(weights.tolist() if isinstance(weights, torch.Tensor) else list(weights))
        policy.notice(progress, {f'own_{arm}': torch.tensor(1 + math.cos(iteration * (arm + 1)))
                                 for arm in range(2) if found[-1][arm]})
    return found


@pytest.mark.parametrize('config', [*SCRIPTED, dict(type='Agent', interval=3)])
@pytest.mark.parametrize('halt', [5, 18])
def test_a_policy_goes_on_where_it_was(config, halt, tmp_path):
    straight = go_through(connect(config), range(40))
    first = connect(config)
    before = go_through(first, range(halt))
    torch.save(first.state_dict(), tmp_path / 'state.pth')
    again = connect(config)
    again.load_state_dict(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert before + go_through(again, range(halt, 40)) == straight
    assert len({str(each) for each in straight}) > 1 or config['type'] in ('Fixed', 'Uniform')


@pytest.fixture
def held_out(run_config, retinanet):
    """Makes the config of a run of a RetinaNet by two teachers under a policy, with two of eight images held out."""

    def make(policy, probe=None, images=2, **changes):
        model = dict(type='DetectionDistiller', student=retinanet(), policy=policy,
                     teacher=[dict(config=retinanet(neck=width), random_teacher=True) for width in (8, 12)],
                     distill={f'own_{index}': dict(type='PKD', teacher=index) for index in range(2)})
        config = run_config(model, **changes)
        config.train_dataloader.dataset = dict(type='HeldOut', images=images, dataset=config.train_dataloader.dataset)
        config.train_dataloader.batch_size = 2
        config.default_hooks.distill.probe = probe
        return config

    return make


def train(config):
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(held_out, stop_after):
    policy = dict(type='Agent', interval=1)
    runner = train(held_out(policy, name='straight'))
    first = Runner.from_cfg(held_out(policy, name='resumed'))
    first.register_hook(stop_after(epochs=1), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        first.train()
    train(held_out(policy, name='resumed', resume=True))
    straight, resumed = (torch.load(Path(runner.work_dir).parent / name / 'epoch_2.pth', weights_only=True)
                         for name in ('straight', 'resumed'))
    for key in ('state_dict', 'optimizer', 'distill'):
        assert_equal(straight[key], resumed[key])
    state = straight['distill']['policy']
    assert state['gains_state']['count'] == 5 and state['taught'].sum() >= 3 and state['slopes'].any()
    assert list(straight['state_dict']) == list(runner.model.student.state_dict())


def assert_equal(first, second):
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second):
            assert_equal(*pair)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


# -------------------------------------------------------------------------------------------------------- the probe


@pytest.mark.parametrize('metric', ['loss', 'map'])
def test_the_probe_scores_the_student_and_changes_nothing(metric, held_out):
    runner = Runner.from_cfg(held_out(dict(type='Uniform'), images=3))
    probe, model = StudentProbe(runner, ProbeSettings(metric=metric, batch_size=2)), runner.model
    model.train()
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    score = probe.score(model)
    assert probe.score(model) == score and modes == [module.training for module in model.modules()]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert (score < 0) if metric == 'loss' else (0 <= score <= 1)
    with torch.no_grad():
        for parameter in model.student.bbox_head.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert probe.score(model) < score or metric == 'map'


def test_the_probe_draws_its_images_once_whatever_the_epoch(held_out):
    """Transforms that keep what they saw, and those that ask for the epoch, would else show others each time."""
    config = held_out(dict(type='Uniform'), images=3)
    pipeline = config.train_dataloader.dataset.dataset.pipeline
    pipeline.insert(-1, dict(type='ReplayedRandomness', period=2, transforms=[dict(type='PhotoMetricDistortion')]))
    runner = Runner.from_cfg(config)
    probe, scores = StudentProbe(runner), []
    for epoch in (1, 0, 3):
        training_epoch().set(epoch)
        scores.append(probe.score(runner.model))
        assert training_epoch().get() == epoch
    training_epoch().set(2)
    assert {*scores, StudentProbe(runner).score(runner.model)} == {scores[0]}


def test_the_probe_moves_no_ranges_of_a_student_that_is_trained_for_integers(held_out):
    config = held_out(dict(type='Uniform'), images=3)
    config.model.quantize = dict(bits=8)
    runner = Runner.from_cfg(config)
    runner.model.train()
    quantizer = runner.model.quantizer
    before = copy.deepcopy(quantizer.state())
    StudentProbe(runner).score(runner.model)
    assert_equal(before, quantizer.state())
    assert quantizer.training


def test_a_hook_exchanges_the_pipeline_of_data_that_holds_images_out(held_out):
    """As RTMDet's recipes do for their last epochs."""
    config = held_out(dict(type='Uniform'))
    pipeline = copy.deepcopy(config.train_dataloader.dataset.dataset.pipeline)
    pipeline.insert(-1, dict(type='Resize', scale=(32, 32)))
    config.custom_hooks = [*config.get('custom_hooks', ()),
                           dict(type='PipelineSwitchHook', switch_epoch=1, switch_pipeline=pipeline)]
    runner, sizes = Runner.from_cfg(config), []

    class Sizes(Hook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            sizes.append((runner.epoch, tuple(data_batch['inputs'][0].shape[-2:])))

    runner.register_hook(Sizes())
    runner.train()
    assert {*sizes} == {(0, (64, 64)), (1, (32, 32))}


def test_a_held_out_image_is_never_trained_on(held_out):
    config = held_out(dict(type='Uniform'), images=3)
    data = DATASETS.build(config.train_dataloader.dataset)
    probe = DATASETS.build(make_probe_dataset(config.train_dataloader.dataset))
    paths = [{each[index]['data_samples'].img_path for index in range(len(each))} for each in (data, probe)]
    assert len(paths[0]) == 5 and len(paths[1]) == 3 and not paths[0] & paths[1]
    assert probe.indices == [1, 4, 6] and data.indices == [0, 2, 3, 5, 7]  # evenly spaced
    assert data.metainfo['classes'] == ('blue', 'green', 'red') and data.get_cat_ids(0)


def test_wrappers_of_the_training_data_stay_but_for_those_that_repeat():
    leaf = dict(type='HeldOut', images=2, dataset=dict(type='CocoDataset'))
    mixed = dict(type='RepeatDataset', times=3, dataset=dict(type='MultiImageMixDataset', pipeline=[1], dataset=leaf))
    whole = dict(type='ConcatDataset', datasets=[dict(type='CocoDataset'), mixed])
    assert make_probe_dataset(whole) == dict(type='ConcatDataset', datasets=[
        dict(type='MultiImageMixDataset', pipeline=[1], dataset=dict(leaf, part='probe'))])
    assert make_probe_dataset(dict(type='RepeatDataset', dataset=dict(type='CocoDataset'))) is None


def test_a_probe_larger_than_the_data_is_refused(held_out):
    with pytest.raises(ConfigurationError, match='A probe of 8 images can not be held out from training data of 8'):
        DATASETS.build(held_out(dict(type='Agent'), images=8).train_dataloader.dataset)


def test_a_policy_that_learns_needs_a_probe(held_out):
    config = held_out(dict(type='Bandit'))
    config.train_dataloader.dataset = config.train_dataloader.dataset.dataset
    with pytest.raises(ConfigurationError, match='train_dataloader.dataset holds out none: wrap it'):
        train(config)
    with pytest.raises(ArgumentError, match='probe.metric'):
        train(held_out(dict(type='Bandit'), probe=dict(metric='accuracy')))


def test_distilling_from_unlike_teachers_under_a_policy_is_one_call(run_config, retinanet, faster_rcnn, tmp_path):
    for name, model in dict(first=retinanet(neck=12), second=faster_rcnn(neck=16)).items():
        Config(dict(default_scope='mmdet', model=model)).dump(tmp_path / f'{name}.py')
        torch.save(dict(state_dict=MODELS.build(model).state_dict()), tmp_path / f'{name}.pth')
    result = kd_det.distill(
        run_config(retinanet(), log_level='INFO', visualizer=dict(vis_backends=[dict(type='LocalVisBackend')])),
        [tmp_path / 'first.py', tmp_path / 'second.py'], [tmp_path / 'first.pth', tmp_path / 'second.pth'], 'pkd',
        policy='bandit', work_dir=tmp_path / 'run', epochs=2, check_images=0, options={
            'default_hooks.distill.preflight': None, 'train_dataloader.dataset.images': 2,
            'train_dataloader.batch_size': 2, 'model.policy.interval': 1,
            'default_hooks.logger': dict(type='LoggerHook', interval=1)})
    logged = read_scalars(result.scalars)
    weights = [list(logged[f'policy/guide{index}'].values()) for index in range(2)]
    assert [sum(each) for each in zip(*weights)] == [1] * 2 and logged['policy/probe']
    state = torch.load(result.checkpoint, weights_only=True)['distill']['policy']
    assert state['taught'].sum() == 6 and state['counts'].sum() == 5
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert 'Policy: Bandit: steps in which each taught: guide0' in log and '5 evaluations on the probe' in log


def test_ranks_share_a_probe_and_find_what_one_process_does(held_out, monkeypatch):
    runner = Runner.from_cfg(held_out(dict(type='Uniform'), images=5))
    probe = StudentProbe(runner, ProbeSettings(batch_size=2))
    alone, totals = probe.score(runner.model), []
    monkeypatch.setattr('kd_det.training.probe.get_world_size', lambda: 2)
    monkeypatch.setattr('kd_det.training.probe.all_reduce', lambda total: totals.append(total.clone()))
    for rank in range(2):
        monkeypatch.setattr('kd_det.training.probe.get_rank', lambda rank=rank: rank)
        probe.score(runner.model)
    total, images = sum(totals)
    assert [each[1].item() for each in totals] == [3, 2] and -(total / images).item() == pytest.approx(alone, rel=1e-5)


def test_each_rank_shows_the_student_with_the_statistics_of_the_first(held_out, monkeypatch):
    """By which a run goes on that is resumed; each rank's own are of its own images."""
    runner = Runner.from_cfg(held_out(dict(type='Uniform')))
    probe, means = StudentProbe(runner), [each for name, each in runner.model.named_buffers() if 'running_mean' in name]

    def shift(tensors=means, by: float = 0.5) -> None:
        for each in tensors:
            each += by

    own = probe.score(runner.model)
    shift()
    of_first = probe.score(runner.model)
    shift(by=-0.5)
    before = [each.clone() for each in means]
    monkeypatch.setattr('kd_det.training.probe.get_world_size', lambda: 2)
    monkeypatch.setattr('kd_det.training.probe.take_from_first_rank', lambda tensors: shift())
    assert probe.score(runner.model) == pytest.approx(of_first) != pytest.approx(own)
    assert all(map(torch.equal, means, before))
