"""The operators that torchvision has no kernel for: CARAFE, deformable RoI pooling, masked convolution, MMSyncBN."""
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import (
    CARAFEPack,
    DeformRoIPoolPack,
    MaskedConv2d,
    ModulatedDeformRoIPoolPack,
    SyncBatchNorm,
    carafe,
    deform_roi_pool,
    roi_align,
)


def normal(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference_carafe(features, masks, kernel_size, groups, scale):
    """One output cell at a time."""
    n, channels, height, width = features.shape
    masks = masks.view(n, groups, kernel_size, kernel_size, height * scale, width * scale)
    padded = F.pad(features, [kernel_size // 2] * 4).view(n, groups, channels // groups, *(
        size + kernel_size - 1 for size in (height, width)))
    output = features.new_zeros(n, groups, channels // groups, height * scale, width * scale)
    for row in range(height * scale):
        for column in range(width * scale):
            y, x = row // scale, column // scale
            window = padded[..., y:y + kernel_size, x:x + kernel_size]
            output[..., row, column] = (window * masks[:, :, None, :, :, row, column]).sum(dim=(-2, -1))
    return output.flatten(1, 2)


@pytest.mark.parametrize('kernel_size, groups, scale', [(1, 1, 1), (3, 2, 2), (5, 1, 3)])
def test_carafe_equals_its_definition(kernel_size, groups, scale):
    features = normal(2, 4, 3, 5).requires_grad_()
    masks = normal(2, groups * kernel_size**2, 3 * scale, 5 * scale, seed=1).requires_grad_()
    grad_output = normal(2, 4, 3 * scale, 5 * scale, seed=2)
    results = []
    for operator in (carafe, reference_carafe):
        output = operator(features, masks, kernel_size, groups, scale)
        results.append((output, *torch.autograd.grad(output, (features, masks), grad_output)))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
def test_carafe_in_reduced_precision(dtype, tolerance):
    tensors = [normal(1, 4, 3, 3, dtype=dtype), normal(1, 9, 6, 6, dtype=dtype, seed=1)]
    output = carafe(tensors[0].requires_grad_(), tensors[1].requires_grad_(), 3, 1, 2)
    output.float().sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = carafe(*exact, 3, 1, 2)
    expected.sum().backward()
    for actual, reference in ((output, expected), *zip((x.grad for x in tensors), (x.grad for x in exact))):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), reference, rtol=tolerance, atol=tolerance)


def test_carafe_of_no_images_and_its_module():
    assert carafe(torch.zeros(0, 4, 3, 3), torch.zeros(0, 9, 6, 6), 3, 1, 2).shape == (0, 4, 6, 6)
    module = CARAFEPack(4, scale_factor=2, compressed_channels=4)
    module(normal(1, 4, 5, 3, dtype=torch.float32)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


ROIS = torch.tensor([[0, 6.3, 7.1, 30.2, 25.7], [1, 4, 4, 20, 28], [0, 8, 8, 20, 17.5]], dtype=torch.float64)


@pytest.mark.parametrize('sampling_ratio', [0, 3])
def test_bins_that_do_not_move_are_those_of_roi_align(sampling_ratio):
    feature = normal(2, 3, 9, 11).requires_grad_()
    for offset in (None, torch.zeros(3, 2, 2, 3, dtype=torch.float64)):
        output = deform_roi_pool(feature, ROIS, offset, (2, 3), 0.25, sampling_ratio, 0.1)
        expected = roi_align(feature, ROIS, (2, 3), 0.25, sampling_ratio, 'avg', True)
        torch.testing.assert_close(output, expected)
        grad_output = normal(*output.shape, seed=1)
        torch.testing.assert_close(*(torch.autograd.grad(y, feature, grad_output)[0] for y in (output, expected)))


@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_gradients_within_the_border_by_finite_differences(sampling_ratio):
    offset = normal(3, 2, 2, 3).clamp(-1, 1) * 0.5

    def pool(feature, offset):
        return deform_roi_pool(feature, ROIS, offset, (2, 3), 0.25, sampling_ratio, 0.1)

    assert torch.autograd.gradcheck(pool, (normal(2, 2, 9, 11).requires_grad_(), offset.requires_grad_()))


def test_an_offset_moves_its_bin_by_its_share_of_the_box():
    ramp = torch.arange(16.).expand(1, 1, 16, 16).contiguous()  # feature = column
    box = torch.tensor([[0., 8., 8., 40., 40.]])  # 8 columns
    offset = torch.zeros(1, 2, 2, 2)
    offset[0, 0, 0, 1] = 2.  # in x
    offset[0, 1, 1, 0] = 2.  # in y, where the ramp is level
    moved, still = (deform_roi_pool(ramp, box, each, 2, 0.25, 0, 0.1) for each in (offset, None))
    torch.testing.assert_close(moved - still, torch.tensor([[[[0., 2 * 0.1 * 8], [0., 0.]]]]))


def test_boxes_that_are_no_boxes():
    feature = normal(2, 3, 9, 11).requires_grad_()
    malformed = torch.tensor([[0, 60, 60, 80, 80], [1, 20, 20, 8, 8]], dtype=torch.float64)  # outside; inside out
    for rois in (malformed, malformed[:0]):
        offset = torch.zeros(len(rois), 2, 2, 3, dtype=torch.float64).requires_grad_()
        output = deform_roi_pool(feature, rois, offset, (2, 3), 0.25)
        output.sum().backward()
        assert output.shape == (len(rois), 3, 2, 3) and not output.any()
        assert not feature.grad.any() and (offset.grad is None or not offset.grad.any())


@pytest.mark.parametrize('module', [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_modules_that_pool_train(module, dtype):
    pool = module(3, output_channels=2, deform_fc_channels=8, spatial_scale=0.25).to(dtype)
    feature = normal(2, 2, 9, 11, dtype=dtype).requires_grad_()
    output = pool(feature, ROIS.to(dtype))
    output.square().mean().backward()
    assert output.dtype == feature.grad.dtype == dtype and feature.grad.any()
    assert pool.offset_fc[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize('kernel, padding', [(1, 0), (3, 1), ((3, 1), (1, 0)), (3, 0)])
def test_masked_convolution_is_the_convolution_at_the_chosen_cells(kernel, padding):
    conv, feature = MaskedConv2d(3, 5, kernel, padding=padding), normal(1, 3, 6, 7, dtype=torch.float32)
    expected = conv(feature)
    mask = torch.zeros(1, 6, 7)
    mask[0, :expected.shape[2], :expected.shape[3]] = normal(*expected.shape[2:], dtype=torch.float32) > 0.5
    chosen = mask[:, :expected.shape[2], :expected.shape[3]]
    with torch.no_grad():
        torch.testing.assert_close(conv(feature, mask), expected * chosen)
        assert 0 < chosen.mean() < 1 and not conv(feature, torch.zeros(1, 6, 7)).any()


def test_what_lies_beyond_the_border_counts_nothing_even_where_the_border_is_infinite():
    feature = torch.full((1, 1, 3, 3), float('inf'))
    conv = MaskedConv2d(1, 1, 3, padding=1, bias=True)
    torch.nn.init.ones_(conv.weight)
    with torch.no_grad():
        assert conv(feature, torch.ones(1, 3, 3)).isinf().all()


@pytest.fixture
def one_rank(monkeypatch):
    """MMSyncBN asks a process group for its size."""
    monkeypatch.setattr('torch.distributed.get_world_size', lambda group=None: 1)


def test_mm_sync_bn_is_batch_norm_on_one_rank(one_rank):
    layer, expected = SyncBatchNorm(3), torch.nn.BatchNorm2d(3)
    layer.load_state_dict(expected.state_dict())
    images = [normal(2, 3, 4, 5, dtype=torch.float32, seed=seed).requires_grad_() for seed in range(2)]
    for image in images:
        results = []
        for each in (layer, expected):
            for parameter in each.parameters():
                torch.nn.init.constant_(parameter, 0.7)
            output = each(image)
            gradients = torch.autograd.grad(output.square().sum() + output[:, 0].sum(), (image, *each.parameters()))
            results.append((output, *gradients, each.running_mean, each.running_var))
        for actual, reference in zip(*results):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.eval()(images[0]), expected.eval()(images[0]))


def test_mm_sync_bn_passes_no_images(one_rank):
    layer = SyncBatchNorm(3, stats_mode='N')
    output = layer(torch.zeros(0, 3, 4, 5, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, 3, 4, 5) and not layer.weight.grad.any()
    assert torch.equal(layer.running_mean, torch.zeros(3)) and torch.equal(layer.running_var, torch.ones(3))
