import pytest
import torch
from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss

GAMMA, ALPHA = 1.7, 0.3


def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(8, 5, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 5, 5, 0])  # 5 is background in the sigmoid form
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    return logits, target, weight


def sigmoid_formula(logits, target, weight=None):
    p = 1 / (1 + torch.exp(-logits))
    one_hot = torch.zeros(8, 6, dtype=torch.float64).scatter(1, target[:, None], 1)[:, :5]
    loss = -one_hot * ALPHA * (1 - p)**GAMMA * p.log() - (1 - one_hot) * (1 - ALPHA) * p**GAMMA * (1 - p).log()
    return loss if weight is None else loss * torch.cat([weight, weight.new_ones(1)])[target][:, None]


def softmax_formula(logits, target, weight=None):
    p = logits.softmax(dim=1).gather(1, target[:, None])[:, 0]
    loss = -ALPHA * (1 - p)**GAMMA * p.log()
    return loss if weight is None else loss * weight[target]


@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('operator, formula, reduction', [
    (sigmoid_focal_loss, sigmoid_formula, 'none'),
    (sigmoid_focal_loss, sigmoid_formula, 'sum'),
    (sigmoid_focal_loss, sigmoid_formula, 'mean'),
    (softmax_focal_loss, softmax_formula, 'sum'),  # mmcv's wrapper has no backward pass without a reduction
    (softmax_focal_loss, softmax_formula, 'mean'),
])
def test_value_and_gradient(operator, formula, reduction, weighted):
    logits, target, weight = inputs()
    if operator is softmax_focal_loss:
        target = target.clamp(max=4)
    if not weighted:
        weight = None
    loss = operator(logits.requires_grad_(), target, GAMMA, ALPHA, weight, reduction)
    loss.sum().backward()

    reference = logits.detach().clone().requires_grad_()
    expected = formula(reference, target, weight)
    if reduction != 'none':
        expected = expected.sum()
    if reduction == 'mean':
        expected = expected / len(logits)
    expected.sum().backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad, reference.grad)


def test_confident_logits_stay_finite():
    logits = torch.tensor([[200., -200.], [-200., 200.]], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, 'none')
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()
    torch.testing.assert_close(loss[0], torch.zeros(2))
    assert (loss[1] > 20).all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_reduced_precision(dtype):
    logits, target, _ = inputs()
    logits = logits.to(dtype)
    loss = sigmoid_focal_loss(logits, target, GAMMA, ALPHA, None, 'none')
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, sigmoid_formula(logits.double(), target).to(dtype), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize('operator', [sigmoid_focal_loss, softmax_focal_loss])
def test_no_samples(operator):
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = operator(logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, 'sum')
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 5)
