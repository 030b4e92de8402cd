import copy
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from torch import nn

from kd_det.taps import TapError, Taps, find_module, record_calls


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.neck = nn.Conv2d(3, 4, 1)
        self.after = nn.ReLU(inplace=True)

    def forward(self, images):
        return self.after(self.neck(images))


def test_unknown_path_names_the_nearest():
    with pytest.raises(TapError, match="no module 'nek'.*neck"):
        find_module(Net(), 'nek')


def test_value_is_safe_from_later_in_place_layers():
    net, images = Net(), torch.randn(2, 3, 4, 4)
    taps = Taps(net, ['neck'])
    for _ in range(3):  # also once it is known what is written to
        with taps.capture() as features:
            net(images)
        torch.testing.assert_close(features['neck'][0], nn.functional.conv2d(images, net.neck.weight, net.neck.bias))
    assert features['neck'][0].requires_grad


def test_copy_is_dropped_where_nothing_writes():
    net, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.randn(2, 3, 4, 4)
    taps, outputs = Taps(net, ['0']), []
    net[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for _ in range(2):
        with taps.capture() as features:
            net(images)
    assert features['0'][0] is outputs[1]


def test_a_value_lies_on_the_models_own_path():
    """So gradients with respect to it are those of the model's losses too, copied or not."""
    for net in (Net(), nn.Sequential(OrderedDict(neck=nn.Conv2d(3, 4, 1), after=nn.Tanh()))):
        taps = Taps(net, ['neck'])
        for _ in range(2):
            with taps.capture() as features:
                output = net(torch.randn(2, 3, 4, 4))
            gradient, = torch.autograd.grad(output.sum(), features['neck'])
            value = features['neck'][0].detach()
            expected = 1 - value.tanh()**2 if isinstance(net, nn.Sequential) else (value > 0).float()
            torch.testing.assert_close(gradient, expected)


def test_outputs_keep_their_kind_when_copies_are_passed_on():

    class Pair(NamedTuple):
        fine: torch.Tensor
        coarse: torch.Tensor

    class Pyramid(nn.Module):

        def forward(self, image):
            return Pair(image * 1, image[..., ::2, ::2] * 1)

    class Groups(nn.Module):

        def forward(self, image):
            return [image * 1], (image * 2, )

    image, net = torch.ones(1, 3, 4, 4), nn.ModuleDict(dict(pyramid=Pyramid(), groups=Groups()))
    with Taps(net, ['pyramid']).capture() as features:
        assert net['pyramid'](image).coarse.shape[-1] == 2
    assert len(features['pyramid']) == 2
    with Taps(net, ['groups'], grouped=True).capture() as features:
        assert [type(group) for group in net['groups'](image)] == [list, tuple]
    assert torch.equal(features['groups'][1][0], image * 2)


def test_a_write_that_no_copy_can_keep_away_is_an_error():

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, image):
            image = image * 1
            self.same(image)
            return image.add_(1)

    net = Net()
    with pytest.raises(TapError, match="output of 'same' was changed in place"):
        with Taps(net, ['same']).capture():
            net(torch.ones(1, 3, 4, 4))


@pytest.mark.parametrize('forwards', [0, 2])
def test_a_tap_that_saw_nothing_or_too_much_is_an_error(forwards):
    net = Net()
    taps = Taps(net, ['neck'])
    with pytest.raises(TapError, match=f'saw {forwards} forwards'):
        with taps.capture():
            for _ in range(forwards):
                net(torch.randn(1, 3, 2, 2))


def test_nothing_is_read_or_kept_outside_of_capture():
    net = Net()
    taps = Taps(net, ['neck'])
    net(torch.randn(1, 3, 2, 2))
    with taps.capture() as features:
        net(torch.randn(1, 3, 2, 2))
    assert set(features) == {'neck'} and not taps._seen


def test_output_that_is_no_feature_is_an_error():
    net = nn.Sequential(nn.Flatten())
    with pytest.raises(TapError, match=r'\(N, C, H, W\)'):
        with Taps(net, ['0']).capture():
            net(torch.randn(1, 3, 2, 2))


class Transformer(nn.Module):
    """Two levels to tokens and through an encoder; or the coarser one alone."""

    def __init__(self, levels: int = 2):
        super().__init__()
        self.levels = levels
        self.neck = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1, stride=2)])
        self.neck.forward = lambda images: tuple(each(images) for each in self.neck)
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.Tanh())

    def forward(self, images):
        tokens = torch.cat([level.flatten(2).mT for level in self.neck(images)[-self.levels:]], 1)
        return self.encoder(tokens)


@pytest.mark.parametrize('path', ['encoder', 'encoder.0'])
@pytest.mark.parametrize('levels', [1, 2])
def test_tokens_of_an_encoder_are_read_as_maps(path, levels):
    net, images = Transformer(levels), torch.randn(2, 3, 4, 6)
    expected, taps = net(images), Taps(net, [path])
    for _ in range(2):
        with taps.capture() as features:
            assert taps.awaits('encoder') and not taps.awaits('neck')
            output = net(images)
            assert not taps.awaits('encoder')
        assert torch.equal(output, expected)
        maps = features[path]
        assert [tuple(each.shape) for each in maps] == [(2, 5, 4, 6), (2, 5, 2, 3)][-levels:]
        assert torch.autograd.grad(output.sum(), maps)[0].abs().sum() > 0  # they lie on the model's own path
    value = maps[-1] if path == 'encoder' else maps[-1].tanh()
    assert torch.equal(value[1, :, 1, 2], expected[1, -1]) and torch.equal(value[0, :, 0, 1], expected[0, -5])


def test_tokens_of_another_number_than_cells_are_an_error():
    net = Transformer()
    net.encoder = nn.Flatten(1, 1)
    taps = Taps(net, ['encoder'])
    with pytest.raises(TapError, match=r"'encoder' read 29 tokens, which .* the cells of .*\[\(4, 6\), \(2, 3\)\]"):
        with taps.capture():
            net.neck(torch.randn(1, 3, 4, 6))
            net.encoder(torch.zeros(1, 29, 4))


def test_a_forward_stops_when_everything_has_been_read():
    net, later = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 1)), []
    taps = Taps(net, ['0', '1'])
    net[2].register_forward_hook(lambda *args: later.append(args))
    image = torch.randn(1, 3, 2, 2)
    expected = net[0](image)
    for _ in range(2):
        with taps.capture(['0'], stop=True) as features:
            net(image)
        assert set(features) == {'0'} and torch.equal(features['0'][0], expected)
        with taps.capture(stop=True) as features:
            net(image)
        assert set(features) == {'0', '1'} and torch.equal(features['0'][0], expected)  # ReLU writes into a copy
    assert not later and not taps._seen
    with taps.capture(['1']) as features:
        net(image)
    assert len(later) == 1 and set(features) == {'1'}


def test_errors_within_a_forward_pass_through_a_capture_that_may_stop():
    taps = Taps(nn.Sequential(nn.Conv2d(3, 4, 1)), ['0'])
    with pytest.raises(ZeroDivisionError):
        with taps.capture(stop=True):
            1 / 0


def test_recorded_calls_bind_arguments_by_name():

    class Module(nn.Module):

        def method(self, first, second=2):
            return first + second

    module = Module()
    with record_calls(module, 'method') as calls:
        assert module.method(1) + module.method(second=1, first=0) == 4
    assert [(call.arguments, call.returned) for call in calls] == [(dict(first=1), 3), (dict(first=0, second=1), 1)]
    assert module.method(1) == 3 and len(calls) == 2


def test_taps_of_a_copy_see_the_copy_alone():
    """As the hooks of a distiller that is copied whole belong to the copy's own taps."""
    holder = nn.Module()
    holder.net = Net()
    holder.__dict__['taps'] = Taps(holder.net, ['neck'])
    twin = copy.deepcopy(holder)
    images = torch.randn(1, 3, 4, 4)
    with twin.taps.capture() as seen:
        twin.net(images)
    assert torch.equal(seen['neck'][0], twin.net.neck(images))
    with holder.taps.capture() as seen:
        twin.net(images)
        holder.net(images)
    assert len(seen['neck']) == 1


def test_a_module_that_takes_the_place_of_a_tapped_one_is_tapped():
    """MMEngine exchanges SyncBatchNorm for BatchNorm on one GPU, after the distiller was built."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), nn.ReLU())
    taps = Taps(model, ['0', '1'])
    model = revert_sync_batchnorm(model).eval()
    assert not isinstance(model[1], nn.SyncBatchNorm)
    for _ in range(2):
        with taps.capture() as features:
            output = model(torch.ones(1, 3, 2, 2))
        assert torch.equal(features['1'][0].relu(), output)
