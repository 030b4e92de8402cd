"""Features with the channels of a cell side by side, the order in which convolutions are fastest."""
from __future__ import annotations

from functools import wraps

import torch
from torch import nn

MMCV_OPERATORS = 'mmcv.ops'


def to_channels_last(part: nn.Module) -> None:
    """Keeps the weights of a part in that order, and with them what its convolutions put out.

    Not so mmcv's operators, such as deformable convolutions: their compiled kernels read memory as if it were in
    PyTorch's usual order, whatever the strides say, without a word (open-mmlab/mmcv, issue 2203). They keep their
    weights, and get their inputs, in the usual one.

    Args:
        part: Backbone or neck; changed.
    """
    part.to(memory_format=torch.channels_last)
    for module in part.modules():
        if any(each.__module__.startswith(MMCV_OPERATORS) for each in type(module).__mro__):
            module.to(memory_format=torch.contiguous_format)
            _take_contiguous(module)


def _take_contiguous(module: nn.Module) -> None:
    forward = module.forward

    @wraps(forward)
    def of_contiguous(*inputs, **named):
        return forward(*map(_contiguous, inputs), **{name: _contiguous(each) for name, each in named.items()})

    module.forward = of_contiguous  # on the instance; a hook would be taken for a tap


def _contiguous(value):
    return value.contiguous() if isinstance(value, torch.Tensor) else value
