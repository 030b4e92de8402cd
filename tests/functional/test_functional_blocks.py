"""Losses by blocks of channels against the same at once: values, gradients, and what they keep in memory."""
import pytest
import torch

from kd_det.functional import blocks, features, masks
from kd_det.study.step_costs import measure_peak_memory

BATCH, CELLS = (64, 96), (8, 12)
VALID = masks.valid_cells([BATCH, (40, 56)], BATCH, CELLS)
MASK = torch.rand(2, *CELLS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHT = torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

LOSSES = dict(
    imitation=lambda s, t: features.masked_imitation(s, t),
    masked=lambda s, t: features.masked_imitation(s, t, MASK, WEIGHT[:, :s.shape[1]], normalizer='mask'),
    smooth_l1=lambda s, t: features.masked_imitation(s, t, MASK, distance='smooth_l1'),
    cosine=lambda s, t: features.masked_imitation(s, t, MASK, distance='cosine'),
    decoupled=lambda s, t: sum(features.decoupled_imitation(s, t, MASK, VALID)),
    channel_wise=lambda s, t: features.channel_wise_kl(s, t, 2.0, VALID),
    pearson=lambda s, t: features.pearson_distance(s, t, VALID),
    fkd=lambda s, t: features.fkd_loss(s, t, MASK, s.mean((2, 3)), s.mean(1, keepdim=True))['imitation'],
)
every_loss = pytest.mark.parametrize('loss', LOSSES.values(), ids=LOSSES.keys())


def pair(layout=lambda feature: feature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (layout(torch.randn(2, 5, *CELLS, generator=generator, dtype=torch.float64)) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


@every_loss
@pytest.mark.parametrize('block', [500, 1])  # two channels and the rest, or single channels
@pytest.mark.parametrize('layout', [lambda feature: feature, lambda feature: feature[:, :, :, :1].expand_as(feature),
                                    lambda feature: feature.to(memory_format=torch.channels_last)],
                         ids=['contiguous', 'expanded', 'channels_last'])
def test_value_and_gradient_are_those_of_all_channels_at_once(loss, block, layout, monkeypatch):
    student, teacher = pair(layout)
    expected = loss(student, teacher)
    expected_gradient, = torch.autograd.grad(expected, student)
    monkeypatch.setattr(blocks, 'BLOCK', block)
    actual = loss(student, teacher)
    gradient, = torch.autograd.grad(actual, student, retain_graph=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    actual.backward()  # once more: the balance of weights looks at the gradient before the step does
    torch.testing.assert_close(student.grad, expected_gradient)
    assert teacher.grad is None


@every_loss
def test_loss_is_zero_with_a_finite_gradient_where_the_student_equals_the_teacher(loss, monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', 1)
    student, _ = pair()
    value = loss(student, student.detach().clone())
    gradient, = torch.autograd.grad(value, student)
    assert value == 0 and gradient.abs().max() < 1e-12


def test_all_features_may_learn(monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', 1)
    weight = WEIGHT.clone().requires_grad_()
    inputs = [*pair(), weight]
    assert torch.autograd.gradcheck(
        lambda *each: blocks.by_channels(lambda s, t, w: torch.einsum('nchw,nc->nhw', (s - t).exp(), w), *each), inputs)


@pytest.mark.parametrize('loss', [LOSSES[name] for name in ('imitation', 'channel_wise', 'pearson')])
def test_nothing_of_the_features_size_is_made_but_the_gradient(loss, monkeypatch):
    student, teacher = (feature.detach().repeat(1, 16, 1, 1).float() for feature in pair())
    student.requires_grad_()

    def peak():
        return measure_peak_memory(lambda: torch.autograd.grad(loss(student, teacher), student)) / (4 * student.numel())

    at_once = peak()
    monkeypatch.setattr(blocks, 'BLOCK', 2**9)
    assert 1 < peak() < 1.6 and at_once > 3
