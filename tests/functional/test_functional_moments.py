"""Moments of channels: by loops, by PyTorch's batch normalisation, and at the edges."""
import pytest
import torch
import torch.nn.functional as F

from kd_det.functional.moments import align_channels, block_moments, image_moments, normalize_channels, pool_moments


@pytest.fixture
def features():
    """Two features of three images each, and the cells that count: of the last image none."""
    torch.manual_seed(0)
    made = [3 * torch.randn(3, channels, *cells, dtype=torch.float64) + 5
            for channels, cells in ((4, (5, 6)), (2, (2, 3)))]
    valid = [torch.rand(3, *each.shape[2:]) < 0.7 for each in made]
    for each in valid:
        each[2] = False
    return [each.requires_grad_() for each in made], valid


def pooled(features, valid) -> list[torch.Tensor]:
    return pool_moments([image_moments(*both) for both in zip(features, valid)], [each.sum((1, 2)) for each in valid])


def test_moments_are_those_of_the_cells_that_count_in_all_images(features):
    for (mean, variance), feature, valid in zip(pooled(*features), *features):
        for channel in range(feature.shape[1]):
            values = torch.stack([feature[image, channel, row, column] for image, row, column in valid.nonzero()])
            torch.testing.assert_close(mean[channel], values.mean())
            torch.testing.assert_close(variance[channel], (values - values.mean()).square().mean())


def test_without_padding_they_are_the_same(features):
    feature = features[0][0]
    whole = torch.ones_like(feature[:, 0], dtype=torch.bool)
    torch.testing.assert_close(image_moments(feature), image_moments(feature, whole))


@pytest.mark.parametrize('block', [1, 50, 10**6])
def test_by_blocks_they_are_the_same(block, features, monkeypatch):
    """Value and gradient, however the feature is cut."""
    monkeypatch.setattr('kd_det.functional.blocks.BLOCK', block)
    for feature, valid in zip(*features):
        weight = torch.randn(3, 2, feature.shape[1], dtype=torch.float64)
        found, expected = ((moments, *torch.autograd.grad((weight * moments).sum(), feature))
                           for moments in (compute(feature, valid) for compute in (block_moments, image_moments)))
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(block_moments, (features[0][1], features[1][1]))


def test_normalised_is_batch_normalisation(features):
    """Value and gradient; and of the cells that count alone, as if there were no others."""
    (feature, _), (valid, _) = features
    weight = torch.randn_like(feature)
    whole = torch.ones_like(valid)
    ours, theirs = (torch.autograd.grad((weight * normalized).sum(), feature) + (normalized, ) for normalized in (
        normalize_channels(feature, *pooled([feature], [whole])),
        F.batch_norm(feature, None, None, training=True, eps=1e-5)))
    torch.testing.assert_close(ours, theirs)
    inside = normalize_channels(feature, *pooled([feature], [valid])).movedim(1, -1)[valid]
    alone = F.batch_norm(feature.movedim(1, -1)[valid], None, None, training=True, eps=1e-5)
    torch.testing.assert_close(inside, alone)


def test_aligned_has_the_moments_of_the_other_and_is_itself_where_they_are_its_own(features):
    (feature, _), (valid, _) = features
    own, = pooled([feature], [valid])
    target = torch.stack([torch.randn(4), torch.rand(4) + 0.1]).double()
    found, = pooled([align_channels(feature, own, target)], [valid])
    torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)
    assert torch.equal(align_channels(feature.float(), own.float(), own.float()), feature.float())


@pytest.mark.parametrize('change', [normalize_channels, lambda each, own: align_channels(each, own, own.flip(1))])
@pytest.mark.parametrize('cells', [(1, 1), (2, 3)])
def test_a_channel_without_variation_has_finite_values_and_gradients(change, cells):
    feature = torch.stack([torch.full(cells, 1000.), torch.zeros(cells)])[None].requires_grad_()
    for valid in (torch.ones(1, *cells, dtype=torch.bool), torch.zeros(1, *cells, dtype=torch.bool)):
        changed = change(feature, *pooled([feature], [valid]))
        gradient, = torch.autograd.grad((changed * torch.rand_like(changed)).sum(), feature)
        assert changed.isfinite().all() and gradient.isfinite().all()


def test_moments_of_half_precision_features_that_are_read_in_float32_do_not_overflow():
    feature = torch.full((1, 1, 8, 8), 6e4).half()
    feature[..., ::2] = -6e4
    normalized = normalize_channels(feature.float(), *pooled([feature.float()], [torch.ones(1, 8, 8).bool()]))
    torch.testing.assert_close(normalized, feature.float().sign(), rtol=1e-3, atol=1e-3)
