from functools import partial

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


def beyond_border(offset, size):
    """Whether each offset's sample lies at -1 or at the size of the input, or beyond; one at a time."""
    stride, padding, dilation = (1, 2), (2, 1), (2, 1)
    n, _, *size_out = offset.shape
    offset = offset.view(n, 2, 3, 2, 2, *size_out)  # groups, kernel, axes
    beyond = torch.zeros(n, 2, 3, 2, *size_out, dtype=torch.bool)
    for index in torch.cartesian_prod(*map(torch.arange, beyond.shape)).tolist():
        image, group, *cell = index[:4]
        for axis in (0, 1):
            start = index[4 + axis] * stride[axis] - padding[axis] + cell[axis] * dilation[axis]
            position = start + float(offset[image, group, cell[0], cell[1], axis, index[4], index[5]])
            beyond[tuple(index)] |= position <= -1 or position >= size[axis]
    return beyond.unsqueeze(4).expand_as(offset).reshape(n, -1, *size_out)


@pytest.mark.parametrize('modulated', [False, True])
@pytest.mark.parametrize('scale', [0, 1, 2])
def test_offsets_of_whole_cells_get_the_derivative_from_within(scale, modulated):
    # On a cell the derivative jumps; mmcv takes the right one, and none on the border, where the sample is 0.
    feature, offset, mask, weight, bias = inputs()
    offset = (offset * scale).round()
    grad_output = torch.randn(2, 6, *offset.shape[2:], dtype=torch.float64)

    def convolve(offset):
        if modulated:
            return modulated_deform_conv2d(feature, offset, mask, weight, bias, *GEOMETRY.values())
        return deform_conv2d(feature, offset, weight, *GEOMETRY.values())

    expected, step = torch.zeros_like(offset), 1e-3  # within a cell the sample is linear, so the step may be large
    for channel in range(offset.shape[1]):
        moved = offset.clone()
        moved[:, channel] += step
        expected[:, channel] = ((convolve(moved) - convolve(offset)) / step * grad_output).sum(1)
    beyond = beyond_border(offset, feature.shape[2:])
    expected[beyond] = 0
    assert beyond.any() and not beyond.all()

    convolve(offset.requires_grad_()).backward(grad_output)
    torch.testing.assert_close(offset.grad, expected)


def larger_maps(dtype=torch.float64):
    """The inputs with offsets and masks of a map that is larger by a row and two columns, slices of one tensor."""
    feature, offset, mask, weight, bias = inputs(dtype)
    _, _, height, width = offset.shape
    both = torch.randn(2, 24 + 12, height + 1, width + 2, dtype=torch.float64).to(dtype)
    return feature, both[:, :24], both[:, 24:].sigmoid(), weight, bias, (height, width)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16])
def test_maps_larger_than_the_output_are_read_from_their_start(dtype, memory_format):
    feature, offset, mask, weight, bias, size = larger_maps(dtype)
    offset, mask = (tensor.detach().to(memory_format=memory_format).requires_grad_() for tensor in (offset, mask))
    output = modulated_deform_conv2d(feature, offset, mask, weight, bias, *GEOMETRY.values())
    output.sum().backward()

    read = [tensor.detach().flatten(1)[:, :channels * size[0] * size[1]].reshape(2, channels, *size).requires_grad_()
            for tensor, channels in ((offset, 24), (mask, 12))]
    expected = modulated_deform_conv2d(feature, *read, weight, bias, *GEOMETRY.values())
    expected.sum().backward()
    assert torch.equal(output, expected)
    for whole, part in zip((offset, mask), read):
        values = part.grad.numel() // 2
        assert whole.grad.dtype == dtype and part.grad.abs().sum() > 0
        assert torch.equal(whole.grad.flatten(1)[:, :values], part.grad.flatten(1))
        assert not whole.grad.flatten(1)[:, values:].any()


def test_only_the_masks_may_be_larger():
    feature, offset, _, weight, bias = inputs()
    *_, mask, _, _, (height, width) = larger_maps()
    expected = mask.flatten(1)[:, :12 * height * width].view(2, 12, height, width)
    assert torch.equal(modulated_deform_conv2d(feature, offset, mask, weight, bias, *GEOMETRY.values()),
                       modulated_deform_conv2d(feature, offset, expected, weight, bias, *GEOMETRY.values()))


def test_maps_smaller_than_the_output_are_refused():
    feature, offset, mask, weight, bias = inputs()
    with pytest.raises(ValueError, match='a map of 5 x 3 cells, too small for its output of 5 x 4'):
        modulated_deform_conv2d(feature, offset[..., :3], mask[..., :3], weight, bias, *GEOMETRY.values())


def test_v1_refuses_larger_maps_as_mmcv_does():
    feature, offset, _, weight, _ = inputs()
    with pytest.raises(RuntimeError, match='offset'):
        deform_conv2d(feature, F.pad(offset, (0, 1, 0, 1)), weight, *GEOMETRY.values())


@pytest.mark.parametrize('size, levels', [(64, 4), (50, 3)])
def test_dyhead(size, levels):
    # As MMDetection's own test: each level halves the one before, and its offsets steer the convolutions of both.
    from mmdet.models.necks import DyHead
    sizes = [size]
    while len(sizes) < levels:
        sizes.append((sizes[-1] + 1) // 2)
    features = [torch.rand(1, 8, side, side) for side in sizes]
    neck = DyHead(8, 16, num_blocks=3)
    outputs = neck(features)
    assert [tuple(output.shape) for output in outputs] == [(1, 16, side, side) for side in sizes]
    sum(output.mean() for output in outputs).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in neck.parameters())
    with pytest.raises(AssertionError):
        neck(torch.rand(1, 8, 4, 4))


def test_dynamic_convolution_of_glip():
    from mmdet.models.dense_heads.atss_vlfusion_head import Conv3x3Norm, DyConv
    block = DyConv(partial(Conv3x3Norm, use_dcn=True, norm_type=['gn', 4]), 16, 16, use_dyrelu=True, use_dcn=True)
    features = [torch.rand(1, 16, side, side, requires_grad=True) for side in (16, 8, 4)]
    outputs = block(dict(visual=features, lang=None))['visual']
    assert [output.shape for output in outputs] == [feature.shape for feature in features]
    sum(output.square().mean() for output in outputs).backward()
    assert all(feature.grad.any() for feature in features)
    assert block.offset.weight.grad.any()
