import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

SHAPES = [(3, 4), (2, 2)]


def inputs(dtype=torch.float64, queries=3):
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    value = uniform(2, 16, 2, 3)
    locations = uniform(2, queries, 2, 2, 2, 2) * 1.4 - 0.2  # some beyond the border
    weights = uniform(2, queries, 2, 2, 2)
    return value, locations, weights


def attend(value, locations, weights):
    shapes = torch.tensor(SHAPES)
    start = torch.tensor([0, 12])
    return MultiScaleDeformableAttnFunction.apply(value, shapes, start, locations, weights, 64)


def reference(value, locations, weights):
    """Bilinear samples, one at a time; cells beyond the border are zero."""
    n, queries, heads, levels, points, _ = locations.shape
    output = value.new_zeros(n, queries, heads, value.shape[-1])
    starts = [0, 12]
    for index in torch.cartesian_prod(*(torch.arange(size) for size in locations.shape[:-1])).tolist():
        b, q, h, level, point = index
        height, width = SHAPES[level]
        x, y = (locations[b, q, h, level, point] * locations.new_tensor([width, height]) - 0.5).tolist()
        for row in (int(y // 1), int(y // 1) + 1):
            for column in (int(x // 1), int(x // 1) + 1):
                if 0 <= row < height and 0 <= column < width:
                    share = (1 - abs(y - row)) * (1 - abs(x - column))
                    cell = value[b, starts[level] + row * width + column, h]
                    output[b, q, h] += weights[b, q, h, level, point] * share * cell
    return output.flatten(2)


def test_equals_its_definition():
    tensors = inputs()
    torch.testing.assert_close(attend(*tensors), reference(*tensors))


def test_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(attend, [tensor.requires_grad_() for tensor in inputs()])


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_reduced_precision(dtype, tolerance):
    tensors = [tensor.requires_grad_() for tensor in inputs(dtype)]
    output = attend(*tensors)
    output.float().sum().backward()
    assert output.dtype == dtype and all(tensor.grad.dtype == dtype for tensor in tensors)
    expected = attend(*(tensor.detach().double() for tensor in tensors))
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


def test_no_queries():
    value, locations, weights = inputs(queries=0)
    output = attend(value.requires_grad_(), locations, weights)
    output.sum().backward()
    assert output.shape == (2, 0, 6)
    assert torch.equal(value.grad, torch.zeros_like(value))
