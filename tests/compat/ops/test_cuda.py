"""The operators on the GPU against themselves on the CPU, where the other tests pin them."""
import pytest
import torch
from mmcv.ops import (
    carafe,
    deform_conv2d,
    deform_roi_pool,
    modulated_deform_conv2d,
    nms,
    roi_align,
    roi_pool,
    sigmoid_focal_loss,
    softmax_focal_loss,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

ROIS = torch.tensor([[0, 1.3, 2.1, 30.2, 25.7], [1, 0, 0, 43, 35], [0, 8, 8, 9, 9.5]])
TARGET = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
SHAPES, START = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])

# Each a function of random tensors of the given shapes, and of a mover of its constants to the device.
OPERATORS = dict(
    roi_align=(lambda to, x: roi_align(x, to(ROIS), 3, 0.25), [(2, 3, 9, 11)]),
    roi_pool=(lambda to, x: roi_pool(x, to(ROIS), 3, 0.25), [(2, 3, 9, 11)]),
    deform_conv=(lambda to, x, offset, weight: deform_conv2d(x, offset, weight, 1, 1),
                 [(2, 4, 5, 5), (2, 18, 5, 5), (6, 4, 3, 3)]),
    modulated_deform_conv=(lambda to, x, offset, mask, weight: modulated_deform_conv2d(x, offset, mask, weight, None,
                                                                                       1, 1),
                           [(2, 4, 5, 5), (2, 18, 5, 5), (2, 9, 5, 5), (6, 4, 3, 3)]),
    larger_maps=(lambda to, x, offset, mask, weight: modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1),
                 [(2, 4, 5, 5), (2, 18, 7, 6), (2, 9, 7, 6), (6, 4, 3, 3)]),
    carafe=(lambda to, x, masks: carafe(x, masks, 3, 2, 2), [(2, 4, 3, 5), (2, 18, 6, 10)]),
    deform_roi_pool=(lambda to, x, offset: deform_roi_pool(x, to(ROIS), offset, 3, 0.25),
                     [(2, 3, 9, 11), (3, 2, 3, 3)]),
    sigmoid_focal_loss=(lambda to, x: sigmoid_focal_loss(x, to(TARGET), 2.0, 0.25, None, 'none'), [(8, 4)]),
    softmax_focal_loss=(lambda to, x: softmax_focal_loss(x, to(TARGET), 2.0, 0.25, None, 'sum'), [(8, 4)]),
    ms_deform_attn=(lambda to, value, locations, weights: MultiScaleDeformableAttnFunction.apply(
        value, to(SHAPES), to(START), locations, weights, 64), [(2, 16, 2, 4), (2, 3, 2, 2, 2, 2), (2, 3, 2, 2, 2)]),
)  # yapf: disable


@pytest.mark.parametrize('name', OPERATORS)
def test_value_and_gradients(name):
    operator, shapes = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(shape, generator=generator) for shape in shapes]

    def run(device):
        inputs = [value.to(device).requires_grad_() for value in values]
        output = operator(lambda tensor: tensor.to(device), *inputs)
        output.square().sum().backward()
        return [tensor.detach().cpu() for tensor in (output, *(value.grad for value in inputs))]

    for on_gpu, on_cpu in zip(run('cuda'), run('cpu')):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('offset', [0, 1])
def test_nms(offset):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(200, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(200, 2, generator=generator) * 30], dim=1)
    scores = torch.rand(200, generator=generator)
    assert torch.equal(nms(boxes.cuda(), scores.cuda(), 0.5, offset=offset)[1].cpu(),
                       nms(boxes, scores, 0.5, offset=offset)[1])
