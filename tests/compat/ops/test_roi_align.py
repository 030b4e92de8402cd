import pytest
import torch
from mmcv.ops import RoIAlign, roi_align

from kd_det.compat.ops.roi_align import _deterministic_backward


def inputs(dtype=torch.float64, height=9, width=11):
    generator = torch.Generator().manual_seed(0)
    feature = torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)
    rois = torch.tensor([[0, 1.3, 2.1, 30.2, 25.7], [1, 0, 0, 43, 35], [0, 8, 8, 9, 9.5]], dtype=dtype)
    return feature, rois


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 3])
def test_gradient_by_finite_differences(aligned, sampling_ratio):
    feature, rois = inputs()

    def pool(feature):
        return roi_align(feature, rois, (2, 3), 0.25, sampling_ratio, 'avg', aligned)

    assert pool(feature).shape == (3, 3, 2, 3)
    assert torch.autograd.gradcheck(pool, feature.requires_grad_())


def test_ramp_is_sampled_at_the_centres_of_the_bins():
    ramp = torch.arange(16.).expand(1, 1, 16, 16).contiguous()  # feature = column
    pooled = roi_align(ramp, torch.tensor([[0., 8., 8., 40., 40.]]), 4, 0.25, 0, 'avg', True)
    # Columns 2 to 10 of the feature in four bins, their centres 3, 5, 7, 9, half a cell less by the alignment.
    torch.testing.assert_close(pooled[0, 0], torch.tensor([2.5, 4.5, 6.5, 8.5]).expand(4, 4))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-2), (torch.bfloat16, 4e-2)])
def test_reduced_precision(dtype, tolerance):
    feature, rois = inputs(dtype)
    feature.requires_grad_()
    output = roi_align(feature, rois, 2, 0.25, 0, 'avg', True)
    output.sum().backward()
    assert output.dtype == feature.grad.dtype == dtype

    exact = feature.detach().double().requires_grad_()
    expected = roi_align(exact, rois.double(), 2, 0.25, 0, 'avg', True)
    expected.sum().backward()
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(feature.grad.double(), exact.grad, rtol=tolerance, atol=tolerance)


def test_rois_may_be_more_precise_than_the_feature():
    feature, _ = inputs(torch.float16)
    _, rois = inputs(torch.float32)
    assert roi_align(feature, rois, 2, 0.25, 0, 'avg', True).dtype == torch.float16


def test_no_rois():
    feature, _ = inputs(torch.float32)
    feature.requires_grad_()
    output = roi_align(feature, torch.zeros(0, 5), 7, 0.25)
    output.sum().backward()
    assert output.shape == (0, 3, 7, 7)
    assert torch.equal(feature.grad, torch.zeros_like(feature))


def test_deterministic_backward_is_the_same():
    _, rois = inputs()
    grad_output = torch.rand(3, 3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    arguments = (grad_output, rois, 0.25, 2, 4, 2, 3, 9, 11, 2, True)
    torch.testing.assert_close(_deterministic_backward(*arguments),
                               torch.ops.torchvision._roi_align_backward(*arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='on the CPU the kernel is deterministic')
def test_deterministic_run_on_the_gpu():
    feature, rois = (tensor.float().cuda() for tensor in inputs())
    exact = feature.clone().requires_grad_()
    roi_align(exact, rois, 2, 0.25).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        roi_align(feature.requires_grad_(), rois, 2, 0.25).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(feature.grad, exact.grad)


def test_max_pooling_names_itself():
    feature, rois = inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        RoIAlign(2, pool_mode='max')(feature, rois)
