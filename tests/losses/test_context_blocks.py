import pytest
import torch

from kd_det.losses.adapters import GenerationBlock, NonLocal


def test_generation_block_restores_a_cell_from_its_neighbours():
    block, feature = GenerationBlock(16), torch.zeros(1, 16, 9, 9)  # so many channels that no ReLU hides all
    changed = feature.clone()
    changed[..., 4, 4] = 1
    difference = (block(changed) - block(feature)).abs().sum(1)[0]
    assert difference[2:7, 2:7].min() > 0  # as far as two 3×3 convolutions see
    difference[2:7, 2:7] = 0
    assert difference.max() == 0


def test_non_local_block_starts_as_the_identity_and_learns():
    block, feature = NonLocal(8), torch.randn(2, 8, 8, 12)
    torch.testing.assert_close(block(feature), feature)
    (block(feature) * torch.randn(2, 8, 8, 12)).sum().backward()
    assert block.norm.weight.grad.abs().max() > 0


def test_non_local_block_gathers_from_the_whole_image():
    block, feature = NonLocal(8, pool=2).eval(), torch.randn(1, 8, 8, 12)
    torch.nn.init.ones_(block.norm.weight)
    changed = feature.clone()
    changed[..., 0, 0] += 10
    assert (block(changed) - block(feature))[..., -1, -1].abs().max() > 1e-4


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(1, 1), (1, 3), (2, 2)])
def test_non_local_block_on_maps_smaller_than_its_pool(shape, training):
    """BatchNorm refuses a single value per channel, and pooling a window larger than the map."""
    block, feature = NonLocal(8, pool=4).train(training), torch.randn(1, 8, *shape, requires_grad=True)
    torch.nn.init.ones_(block.norm.weight)
    block(feature).square().sum().backward()
    assert feature.grad.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in block.parameters())
