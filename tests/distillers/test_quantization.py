"""A student that is trained as it computes in integers: what is rounded, what is not, and what a checkpoint holds."""
import copy
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError
from kd_det.distillers.quantization import Quantizer, build_quantizer
from kd_det.distillers.rounding import Quantization, Rounder
from kd_det.training import runs

HEADS = ('retina', 'atss', 'gfl', 'fcos', 'rtmdet', 'rtmdet_separate', 'yolox', 'ssd', 'yolov3')
FAMILIES = (*HEADS, 'faster_rcnn', 'cascade_rcnn', 'detr')


@pytest.fixture
def make_student(request, one_stage):
    """Builds a student of a family, with statistics and biases that folding must not lose."""

    def make(family: str, **changes) -> nn.Module:
        config = one_stage(family, **changes) if family in HEADS else request.getfixturevalue(family)(**changes)
        student = MODELS.build(config)
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values, low, high in ((module.running_mean, -0.1, 0.1), (module.running_var, 0.5, 1.5),
                                          (module.weight, 0.5, 1.5), (module.bias, -0.1, 0.1)):
                    nn.init.uniform_(values, low, high)
        return student

    return make


def quantize(student: nn.Module, **settings) -> Quantizer:
    quantizer = Quantizer(student, Quantization(**settings))
    student.train()
    quantizer.freeze_statistics()
    return quantizer


def evaluate(student: nn.Module, quantizer: Quantizer) -> None:
    student.eval()
    quantizer.eval()


def run_parts(student: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    features = student.extract_feat(images)
    heads = [getattr(student, name)(features) for name in ('bbox_head', 'rpn_head')
             if hasattr(student, name) and not hasattr(student, 'decoder')]
    return [*features, *(level for head in heads for maps in head for level in maps)]


@pytest.mark.parametrize('family', FAMILIES)
def test_a_family_computes_as_before_but_for_rounding_and_trains_every_weight(family, make_student, batch, monkeypatch):
    student = make_student(family)
    names, plain = list(student.state_dict()), copy.deepcopy(student).eval()
    quantizer = quantize(student)
    data = student.data_preprocessor(batch(), True)

    with monkeypatch.context() as patch, torch.no_grad():  # BatchNorm is folded, frozen and in the right place
        patch.setattr(torch, 'fake_quantize_per_tensor_affine', lambda x, *_: x.clone())
        patch.setattr(torch, 'fake_quantize_per_channel_affine', lambda x, *_: x)
        for found, expected in zip(run_parts(student, data['inputs']), run_parts(plain, data['inputs'])):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)

    losses = student.loss(data['inputs'], data['data_samples'])
    sum(each.sum() for name, value in losses.items() if 'loss' in name
        for each in (value if isinstance(value, list) else [value])).backward()
    assert not [name for name, weight in student.named_parameters() if weight.requires_grad and weight.grad is None]
    assert not [point for point, row in quantizer.points.items() if not quantizer.ranges[row].any()]
    assert list(student.state_dict()) == names  # BatchNorm is not unfolded by a hair
    kept = {'faster_rcnn': 4, 'cascade_rcnn': 6, 'detr': 0, 'retina': 2, 'gfl': 2, 'rtmdet': 2, 'atss': 3, 'fcos': 3,
            'yolov3': 3, 'ssd': 6}.get(family, 9)
    assert len(quantizer.layers.kept) == kept
    assert not any('conv' in name and 'downsample' not in name and not name.startswith('backbone')
                   and name in quantizer.layers.folded for name in quantizer.layers.kept)


class Inputs(torch.overrides.TorchFunctionMode):
    """Notes what convolutions are given, once everything is rounded."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d:
            self.seen.append(args[:2])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('bits', [8, 4, 2])
@pytest.mark.parametrize('ranges', ['tracked', 'learnt'])
def test_layers_read_integers_and_have_integers_for_weights(bits, ranges, make_student, monkeypatch):
    """Of their folded weights, channel by channel, and of activations from the smallest to the largest."""
    student = make_student('rtmdet_separate')
    quantizer = quantize(student, bits=bits, ranges=ranges)
    images, seen, conv = torch.randn(2, 3, 64, 64), [], torch.conv2d
    fold = Quantizer._fold

    def note(self, name, *args):
        folded = fold(self, name, *args)
        seen.append((name, folded.steps.detach()))
        return folded

    monkeypatch.setattr(Quantizer, '_fold', note)
    for training in (True, False):
        evaluate(student, quantizer) if not training else None
        seen.clear()
        with Inputs() as inputs:
            run_parts(student, images)
        quantized = [(x, weight) for x, weight in inputs.seen if not isinstance(weight, nn.Parameter)]
        assert len(quantized) == len(seen) >= len(quantizer.layers.quantized) and conv is torch.conv2d
        for (x, weight), (name, steps) in zip(quantized, seen):
            integers = weight / steps.view(-1, 1, 1, 1)
            torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-3)
            assert integers.abs().max().round() == 2**(bits - 1) - 1, name
            assert x.unique().numel() <= 2**bits, name
        kept = [x for x, weight in inputs.seen if isinstance(weight, nn.Parameter)]
        assert len(kept) == 9 and all(x.unique().numel() <= 2**bits for x in kept)  # what the layer before puts out


def test_what_several_layers_read_is_rounded_once(make_student):
    quantizer = quantize(make_student('retina'))
    points = list(quantizer.points)
    assert 'backbone.layer1.1.conv1.input' in points and 'backbone.layer2.0.conv1.input' in points
    assert not [point for point in points if 'downsample.0.input' in point or 'reg_convs.0.conv.input' in point]
    assert 'backbone.layer1.0.conv1.input' not in points  # max pooling puts out in the range that it reads


def test_ranges_move_in_training_alone_and_until_they_are_frozen(make_student):
    student = make_student('retina')
    quantizer = quantize(student, momentum=0.25, freeze=0.5)
    first, second = torch.rand(1, 3, 64, 64) * 3 - 1, torch.rand(1, 3, 64, 64) * 7 - 3
    expected = torch.stack([first.aminmax().min, first.aminmax().max])
    row = quantizer.points['backbone.conv1.input']
    run_parts(student, first)
    torch.testing.assert_close(quantizer.ranges[row], expected)
    run_parts(student, second)
    expected += 0.25 * (torch.stack([second.min(), second.max()]) - expected)
    torch.testing.assert_close(quantizer.ranges[row], expected)
    before = quantizer.ranges.clone()
    quantizer.set_progress(0.5)
    run_parts(student, first)
    evaluate(student, quantizer)
    quantizer.set_progress(0.0)
    run_parts(student, first)
    assert torch.equal(quantizer.ranges, before)
    student.train()
    quantizer.train()
    run_parts(student, first)
    assert not torch.equal(quantizer.ranges, before)


def test_a_range_is_that_of_all_ranks_and_holds_zero(monkeypatch):
    """Another rank's extremes count, and a rank that has nothing to show takes part."""
    other = torch.tensor([2.0, 5.0])  # minus its smallest, and its largest
    monkeypatch.setattr('kd_det.distillers.rounding.all_reduce', lambda x, op: x.copy_(torch.maximum(x, other)))
    rounder = Rounder(Quantization())
    rounder.allocate(points=3, layers=1)
    for row, x in enumerate((torch.tensor([-1.0, 7.0]), torch.tensor([-4.0, 1.0]), torch.zeros(0))):
        rounder.round_activation(x, row, observe=True)
    assert rounder.ranges.tolist() == [[-2, 7], [-4, 5], [-2, 5]]
    monkeypatch.undo()
    rounder.ranges.zero_()
    rounder.round_activation(torch.tensor([3.0, 4.0]), 0, observe=True)
    rounder.round_activation(torch.tensor([torch.inf, 4.0]), 1, observe=True)
    assert rounder.ranges[:2].tolist() == [[0, 4], [0, 0]]


def test_learnt_ranges_shrink_where_rounding_costs_most():
    """At 2 bits an outlier is worth clipping: the factors learn that, and a tracked range can not."""
    torch.manual_seed(0)
    x = torch.cat([torch.rand(1000), torch.tensor([20.0])])
    rounder = Rounder(Quantization(bits=2, ranges='learnt'))
    rounder.allocate(points=1, layers=1)
    optimizer = torch.optim.Adam(rounder.parameters(), lr=0.05)
    errors = []
    for _ in range(80):
        loss = (rounder.round_activation(x, 0, observe=True) - x).abs().mean()
        steps = rounder.find_weight_steps(x[None], 0)
        loss = loss + (rounder.round_weight(x[None], steps, whole=False) - x).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors) < 0.75 * errors[0]
    assert rounder.offsets[0, 1] < -0.5 and rounder.clips[0] < -0.5


@pytest.mark.parametrize('ranges', ['tracked', 'learnt'])
def test_gradients_pass_straight_through_what_lies_in_the_range(ranges):
    """What is rounded to the lowest integer of all, as most of what a ReLU puts out, included."""
    rounder = Rounder(Quantization(bits=4, ranges=ranges))
    rounder.allocate(points=1, layers=1)
    rounder.ranges[0] = torch.tensor([0.0, 1.5])
    rounder.set_progress(1.0)
    x = torch.tensor([0.01, 0.049, 0.7, 1.49, 2.0, -0.2], requires_grad=True)
    rounded = rounder.round_activation(x, 0, observe=True)
    rounded.sum().backward()
    torch.testing.assert_close(rounded, torch.tensor([0, 0, 0.7, 1.5, 1.5, 0]))
    assert x.grad.tolist() == [1, 1, 1, 1, 0, 0]


def test_a_copy_has_ranges_and_layers_of_its_own(make_student):
    student = make_student('faster_rcnn')
    quantizer = quantize(student)
    twin, its_quantizer = copy.deepcopy((student, quantizer))
    run_parts(twin, torch.rand(1, 3, 64, 64))
    assert its_quantizer.ranges.any() and not quantizer.ranges.any()
    assert its_quantizer.student is twin and set(its_quantizer.names) == {
        id(module.weight) for module in twin.modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


@pytest.mark.parametrize('given, said', [
    (dict(bits=1), 'model.quantize.bits: expected an integer from 2 to 8, got 1'),
    (dict(bits=8.0), 'model.quantize.bits'), (dict(ranges='tracket'), 'Nearest: tracked'),
    (dict(keep_float=['backbone.conv2']), r"model.quantize.keep_float\[0\]: expected a layer.*Nearest: .*backbone"),
    (dict(freeze=0), 'model.quantize.freeze'), (dict(bit=4), 'model.quantize.bit'),
    (dict(keep_float=['backbone', 'neck', 'bbox_head']), 'no convolution or linear layer')])
def test_wrong_settings_are_told_by_their_place(given, said, make_student):
    with pytest.raises(ConfigurationError, match=said):
        build_quantizer(given, make_student('retina'))


def test_what_would_be_rounded_in_the_forward_alone_is_refused(make_student):
    student = make_student('retina')
    with pytest.raises(ConfigurationError, match=r"a term taps 'backbone.layer1.0.conv1'.*keep_float"):
        build_quantizer({}, student, ['neck', 'backbone.layer1.0.conv1'])
    student = make_student('retina')
    student.backbone.layer2[0].with_cp = True
    with pytest.raises(ConfigurationError, match=r"'backbone.layer2.0' computes its forward anew"):
        build_quantizer({}, student)


def test_layers_are_kept_in_float_by_name(make_student):
    quantizer = quantize(make_student('retina'), keep_float=['first', 'backbone.layer4', 'bbox_head.retina_reg'])
    kept = quantizer.layers.kept
    assert {'backbone.conv1', 'bbox_head.retina_reg'} < kept and 'bbox_head.retina_cls' not in kept
    assert all(name.startswith('backbone.layer4') for name in kept - {'backbone.conv1', 'bbox_head.retina_reg'})
    assert 'bbox_head.retina_cls.output' in quantizer.points and 'backbone.conv1.input' not in quantizer.points


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def distilled(retinanet):
    """Makes the model dict of a RetinaNet that is distilled, and trained for integers."""

    def make(quantize=None, **changes) -> dict:
        return dict(type='DetectionDistiller', student=retinanet(), quantize=quantize or {}, **{**dict(
            distill=dict(fgd=dict(type='FGD', alpha=1e-2)), teacher=dict(config=retinanet(neck=12),
                                                                         random_teacher=True)), **changes})

    return make


def _load(runner, epoch):
    return torch.load(f'{runner.work_dir}/epoch_{epoch}.pth', weights_only=True)


def _assert_same(found, expected):
    for part in ('state_dict', 'ema_state_dict'):
        for key, value in expected.get(part, {}).items():
            assert torch.equal(found[part][key], value), key
    for key, value in expected['distill']['ranges'].items():
        assert torch.equal(found['distill']['ranges'][key], value) if isinstance(value, torch.Tensor) else (
            found['distill']['ranges'][key] == value), key


@pytest.mark.parametrize('quantize, buffers', [(dict(bits=8), True), (dict(bits=4, ranges='learnt'), False)])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(quantize, buffers, retinanet, distilled, make_runner,
                                                             stop_after):
    """With averaged weights; every checkpoint is the float student's, and the logged accuracy that of the integers."""
    options = dict(epochs=2, val=True, custom_hooks=[dict(type='EMAHook', momentum=0.3, update_buffers=buffers)])
    evaluated = []

    class Look(Hook):

        def after_val_epoch(self, runner, metrics=None):
            quantizer = runner.model.quantizer
            evaluated.append((quantizer.training, quantizer.ranges.clone(), len(quantizer._steps)))

    whole = make_runner(distilled(quantize), name='whole', **options)
    whole.register_hook(Look(), priority='HIGHEST')
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        stopped = make_runner(distilled(quantize), name='parts', **options)
        stopped.register_hook(stop_after(1))
        stopped.train()
    resumed = make_runner(distilled(quantize), name='parts', resume=True, **options)
    resumed.train()
    _assert_same(_load(resumed, 2), _load(whole, 2))

    saved = _load(whole, 2)
    plain = MODELS.build(retinanet())
    assert list(saved['state_dict']) == list(plain.state_dict())
    plain.load_state_dict(saved['state_dict'])
    ranges = saved['distill']['ranges']
    assert len(ranges['points']) == len(ranges['ranges']) and ranges['ranges'].any(1).sum() >= 30
    assert ('offsets' in ranges) == (quantize.get('ranges') == 'learnt') and (
        'offsets' not in ranges or ranges['offsets'].any())
    # It validates as it computes in integers, with the ranges of the trained weights though they are averaged.
    assert [(training, count) for training, _, count in evaluated] == [(False, len(ranges['points']))] * 2
    assert torch.equal(evaluated[-1][1], ranges['ranges'])
    norm = whole.model.train().backbone.bn1
    assert not norm.training and norm.num_batches_tracked == 0  # statistics stay those of the float student
    assert torch.equal(saved['state_dict']['backbone.bn1.running_var'], plain.backbone.bn1.running_var)
    assert saved['state_dict']['backbone.bn1.running_var'].eq(1).all()


@pytest.mark.parametrize('quantize', [dict(bits=8), dict(bits=4, ranges='learnt')])
def test_the_average_rounds_by_the_students_ranges_and_goes_on_with_them(quantize, distilled, make_runner, stop_after):
    """Also as the guide of pseudo-labels, which runs before the student has in the first step."""
    model = distilled(quantize, distill=dict(fgd=dict(type='FGD', alpha=1e-2)), pseudo_labels=dict(score=0.01),
                      teacher=dict(type='Average', momentum=0.5))
    whole = make_runner(model, epochs=2, name='whole')
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        stopped = make_runner(model, epochs=2, name='parts')
        stopped.register_hook(stop_after(1))
        stopped.train()
    resumed = make_runner(model, epochs=2, name='parts', resume=True)
    resumed.train()
    _assert_same(_load(resumed, 2), _load(whole, 2))

    student, average, quantizer = whole.model.train().student, whole.model.teacher, whole.model.quantizer
    average.model.load_state_dict(student.state_dict())
    quantizer.tracks, before, images = False, quantizer.ranges.clone(), torch.randn(1, 3, 64, 64)
    for own, other in zip(student.extract_feat(images), average.model.extract_feat(images)):
        torch.testing.assert_close(own, other)
    average.model.extract_feat(100 * images)
    assert torch.equal(quantizer.ranges, before) and average.model.quantizer is not quantizer


def test_without_terms_a_student_is_trained_for_integers_all_the_same(retinanet, distilled, make_runner):
    runner = make_runner(distilled(distill={}, teacher=dict(config=retinanet(), random_teacher=True)), epochs=1)
    runner.train()
    assert runner.model.quantizer.ranges.any(1).sum() >= 30 and not len(runner.model.terms)


def test_ranges_of_another_student_are_refused(make_student):
    state = quantize(make_student('retina')).state()
    with pytest.raises(ConfigurationError, match="The checkpoint's ranges are of another student"):
        quantize(make_student('faster_rcnn')).load_state(state)
    with pytest.raises(ConfigurationError, match='or of another model.quantize'):
        quantize(make_student('retina'), ranges='learnt').load_state(state)


def test_the_distiller_says_what_is_wrong(distilled):
    with pytest.raises(ArgumentError, match='model.quantize.bits'):
        MODELS.build(distilled(dict(bits=16)))


@pytest.mark.parametrize('given, settings, name', [
    (4, dict(bits=4), 'student_none_4_bits'),
    (dict(ranges='learnt'), dict(ranges='learnt'), 'student_none_8_bits')])
def test_one_call_trains_for_integers(given, settings, name, retinanet, run_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_config(retinanet()).dump('student.py')
    monkeypatch.setattr(runs, '_train', lambda config, *_: config)
    config = runs.distill('student.py', 'student.py', 'student.pth', 'none', quantize=given)
    assert config.model.quantize == settings and not config.model.distill
    assert Path(config.filename).stem == name
    assert 'quantize' not in runs.distill('student.py', 'student.py', 'student.pth', 'none').model
    with pytest.raises(ArgumentError, match='quantize: expected'):
        runs.distill('student.py', 'student.py', 'student.pth', 'none', quantize=16)


@pytest.mark.parametrize('ranges', ['tracked', 'learnt'])
def test_who_follows_rounds_nothing_before_the_other_has_seen_something(ranges, make_student):
    quantizer = quantize(make_student('retina'), ranges=ranges)
    follower, x = copy.deepcopy(quantizer), torch.rand(1, 3, 8, 8)
    follower.follow(quantizer)
    assert torch.equal(follower.round_activation(x, 0, observe=True), x) and not quantizer.ranges.any()
    expected = quantizer.round_activation(x, 0, observe=True)
    assert torch.equal(follower.round_activation(x, 0, observe=True), expected) and not torch.equal(expected, x)


@pytest.mark.parametrize('ranges', ['tracked', 'learnt'])
def test_a_step_waits_for_no_number_of_the_device(ranges, make_student):
    waits = []

    class Watch(TorchDispatchMode):

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                waits.append(function)
            return function(*args, **(kwargs or {}))

    student = make_student('rtmdet_separate')
    quantize(student, ranges=ranges)
    with Watch():
        features = student.extract_feat(torch.rand(2, 3, 64, 64))
        maps = student.bbox_head(features)
    assert maps and not waits
