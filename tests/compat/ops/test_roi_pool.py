import math

import pytest
import torch
from mmcv.ops import roi_pool


def reference_roi_pool(feature, rois, size, scale):
    """mmcv's bins, one at a time: the unrounded box divided, each bin then widened to whole cells."""
    height, width = feature.shape[2:]
    output = feature.new_zeros(len(rois), feature.shape[1], size, size)
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        bin_w, bin_h = ((x2 + 1) * scale - x1 * scale) / size, ((y2 + 1) * scale - y1 * scale) / size
        for i in range(size):
            for j in range(size):
                top, bottom = math.floor(i * bin_h + y1 * scale), math.ceil((i + 1) * bin_h + y1 * scale)
                left, right = math.floor(j * bin_w + x1 * scale), math.ceil((j + 1) * bin_w + x1 * scale)
                cells = feature[int(image), :, max(top, 0):min(bottom, height), max(left, 0):min(right, width)]
                if cells.numel():
                    output[k, :, i, j] = cells.flatten(1).max(dim=1).values
    return output


@pytest.fixture
def feature():
    return torch.rand(2, 3, 10, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


ROIS = torch.tensor([
    [0, 3.1, 2.6, 29.4, 33.9],
    [1, 0, 0, 47, 39],
    [1, 20.5, 8.2, 23.1, 9.9],  # smaller than a bin a cell
    [0, 40, 30, 90, 90],  # leaves the feature: its last bins are empty
], dtype=torch.float64)  # yapf: disable


def test_equals_its_definition(feature):
    torch.testing.assert_close(roi_pool(feature, ROIS, 3, 0.25), reference_roi_pool(feature, ROIS, 3, 0.25))


def test_gradient_by_finite_differences(feature):
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, ROIS, 3, 0.25), feature.requires_grad_())


def test_bins_without_a_cell_are_zero_and_pass_no_gradient(feature):
    feature = -feature.requires_grad_()  # a maximum over nothing but 0 would show
    feature.retain_grad()
    outside = torch.tensor([[0, 60, 60, 80, 80], [0, 8, 8, 2, 2]], dtype=torch.float64)  # beyond, and inside out
    output = roi_pool(feature, outside, 2, 0.25)
    output.sum().backward()
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(feature.grad, torch.zeros_like(feature))


def test_no_rois(feature):
    feature.requires_grad_()
    output = roi_pool(feature, torch.zeros(0, 5, dtype=torch.float64), 2, 0.25)
    output.sum().backward()
    assert output.shape == (0, 3, 2, 2)
    assert torch.equal(feature.grad, torch.zeros_like(feature))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_reduced_precision_picks_the_same_cells(feature, dtype):
    feature = feature.to(dtype)
    output = roi_pool(feature, ROIS.float().to(dtype), 3, 0.25)
    assert output.dtype == dtype
    assert torch.equal(output.double(), reference_roi_pool(feature.double(), ROIS.to(dtype), 3, 0.25))
