"""Dense heads on their own, and features for them."""
import pytest
import torch
from mmdet.registry import MODELS


@pytest.fixture
def dense_head(dense_head_config):
    """Makes a head of a family, with weights drawn so that its outputs are not all alike."""

    def make(family: str, seed: int = 0, **changes) -> torch.nn.Module:
        torch.manual_seed(seed)
        head = MODELS.build(dense_head_config(family, **changes))
        for parameter in head.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        return head

    return make


@pytest.fixture
def features():
    """Makes features of two images of 64 × 96 pixels, of strides 8, 16 and 32."""

    def make(seed: int = 0) -> list:
        random = torch.Generator().manual_seed(seed)
        return [torch.randn(2, 8, 64 // stride, 96 // stride, generator=random).requires_grad_()
                for stride in (8, 16, 32)]

    return make
