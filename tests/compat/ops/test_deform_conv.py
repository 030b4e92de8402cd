import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack, deform_conv2d, modulated_deform_conv2d

# Two groups, two offset groups, and values that differ by axis, so that a swapped argument shows.
GEOMETRY = dict(stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2, deform_groups=2)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    feature, weight, bias = normal(2, 4, 5, 7), normal(6, 2, 3, 2), normal(6)
    shape = F.conv2d(feature, weight, None, (1, 2), (2, 1), (2, 1), 2).shape[2:]
    offset, mask = normal(2, 2 * 2 * 6, *shape), normal(2, 2 * 6, *shape).sigmoid()
    return [tensor.to(dtype) for tensor in (feature, offset, mask, weight, bias)]


def test_without_offsets_it_is_a_convolution():
    feature, offset, mask, weight, bias = inputs()
    expected = F.conv2d(feature, weight, None, (1, 2), (2, 1), (2, 1), 2)
    zero = torch.zeros_like(offset)
    torch.testing.assert_close(deform_conv2d(feature, zero, weight, *GEOMETRY.values()), expected)
    modulated = modulated_deform_conv2d(feature, zero, torch.ones_like(mask), weight, bias, *GEOMETRY.values())
    torch.testing.assert_close(modulated, expected + bias[:, None, None])


def test_gradients_of_v1_by_finite_differences():
    feature, offset, _, weight, _ = (tensor.requires_grad_() for tensor in inputs())
    assert torch.autograd.gradcheck(lambda *x: deform_conv2d(*x, *GEOMETRY.values()), (feature, offset, weight))


@pytest.mark.parametrize('with_bias', [True, False])
def test_gradients_of_v2_by_finite_differences(with_bias):
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    if with_bias:
        assert torch.autograd.gradcheck(lambda *x: modulated_deform_conv2d(*x, *GEOMETRY.values()), tensors)
    else:
        assert torch.autograd.gradcheck(lambda *x: modulated_deform_conv2d(*x, None, *GEOMETRY.values()), tensors[:4])


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-2), (torch.bfloat16, 2e-1)])
def test_reduced_precision(dtype, tolerance):
    tensors = [tensor.requires_grad_() for tensor in inputs(dtype)]
    output = modulated_deform_conv2d(*tensors, *GEOMETRY.values())
    output.float().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = modulated_deform_conv2d(*exact, *GEOMETRY.values())
    expected.sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    for tensor, reference in zip(tensors, exact):
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(tensor.grad.double(), reference.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('module', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_modules_train(module):
    torch.manual_seed(0)
    conv = module(4, 6, 3, padding=1, deform_groups=2)
    conv(torch.randn(1, 4, 6, 6)).square().mean().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
