"""Features with the channels of a cell side by side, the order in which convolutions are fastest."""
from __future__ import annotations

from functools import wraps

import torch
from torch import nn

MMCV_OPERATORS = 'mmcv.ops'


def to_channels_last(part: nn.Module) -> None:
    """Keeps the weights of a part's convolutions in that order, and with them what these put out.

    Convolutions of another kind keep their weights as they are: those that standardise them would fail. mmcv's
    operators, such as deformable convolutions, get their inputs in the usual order, too: compiled, they read memory as
    if it were in that, whatever the strides say, without a word (open-mmlab/mmcv, issue 2203).

    Args:
        part: Backbone or neck; changed.
    """
    operators = [module for module in part.modules() if _is_operator(module)]
    within = {child for operator in operators for child in operator.modules()}
    for module in part.modules():
        if type(module) is nn.Conv2d and module not in within:
            module.to(memory_format=torch.channels_last)
    for operator in operators:
        _take_contiguous(operator)


def _is_operator(module: nn.Module) -> bool:
    return any(each.__module__.startswith(MMCV_OPERATORS) for each in type(module).__mro__)


def _take_contiguous(module: nn.Module) -> None:
    forward = module.forward

    @wraps(forward)
    def of_contiguous(*inputs, **named):
        return forward(*map(_contiguous, inputs), **{name: _contiguous(each) for name, each in named.items()})

    module.forward = of_contiguous  # on the instance; a hook would be taken for a tap


def _contiguous(value):
    return value.contiguous() if isinstance(value, torch.Tensor) else value
