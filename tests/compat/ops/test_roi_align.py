import pytest
import torch
from mmcv.ops import RoIAlign, roi_align


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


def test_max_pooling_names_itself():
    feature, rois = inputs(torch.float32)
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        RoIAlign(2, pool_mode='max')(feature, rois)
