"""Sums over channels, cells or rows, evaluated a few at a time, so that a CPU finds them in its cache."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block on the CPU: 1 MB in float32, so that the few that are at work stay in its cache.
BLOCK = 2**18
# The same of a block of rows, of which more temporaries are made; and on a GPU, where blocks bound the memory alone.
ROW_BLOCK, ROW_BLOCK_OF_GPU = 2**16, 2**22


def by_channels(loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
    """``loss(*features)`` of a loss that is a sum over channels, by blocks of channels.

    Value and gradient are those of ``loss(*features)``, up to rounding. Temporaries have the size of a block, and stay
    in the cache of a CPU; on a GPU one block holds all channels. For the backward pass nothing is kept but the
    features: each block is computed once more there (arXiv 1604.06174).

    Args:
        loss: Of the same channels of all features. Its result has one shape for any number of channels; other tensors
            that it uses get no gradient.
        features: (N, C, ...), the first of which is the largest.

    Returns:
        The sum of the results.

    Example:
        >>> feature = torch.arange(6.0).view(1, 3, 1, 2)
        >>> by_channels(lambda x: x.square().sum(1), feature)
        tensor([[[20., 35.]]])
    """
    if features[0].numel() <= BLOCK:
        return loss(*features)
    total: Tensor = _ByChannels.apply(loss, *features)
    return total


def cut_into_blocks(feature: Tensor, scratch: int) -> Iterator[tuple[tuple[slice, slice], list[Tensor]]]:
    """Cuts a feature into blocks of images and channels, one that holds all on a GPU.

    Args:
        feature: (N, C, K), with K cells.
        scratch: Number of buffers.

    Yields:
        The slices of images and channels, and the buffers, each of the block's size, for what is made of it; the next
        block gets the same memory.
    """
    batch, channels, cells = feature.shape
    images, step = max(1, BLOCK // (channels * cells)), max(1, BLOCK // cells)
    if feature.device.type != 'cpu':
        images, step = batch, channels
    buffers = feature.new_empty(scratch, min(images, batch), min(step, channels), cells)
    for image in range(0, batch, images):
        for first in range(0, channels, step):
            yield ((slice(image, image + images), slice(first, first + step)),
                   [buffer[:batch - image, :channels - first] for buffer in buffers])


class _ByChannels(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, loss: Callable[..., Tensor], *features: Tensor) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(*features)
        first, *others = cut_channels(features[0])
        total = loss(*(feature[:, first] for feature in features))
        for block in others:
            total = total + loss(*(feature[:, block] for feature in features))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        gradients = [torch.empty_like(feature) if need else None for feature, need in zip(features, needed)]
        learning = [each for each in gradients if each is not None]
        for block in cut_channels(features[0]):
            inputs = [feature[:, block].detach().requires_grad_(need) for feature, need in zip(features, needed)]
            with torch.enable_grad():
                value = ctx.loss(*inputs)
            found = torch.autograd.grad(value, [each for each in inputs if each.requires_grad], gradient)
            for whole, part in zip(learning, found):
                whole[:, block] = part
        return (None, *gradients)


def cut_channels(feature: Tensor) -> list[slice]:
    """Cuts the channels of all images (N, C, ...) into blocks; one that holds all on a GPU."""
    channels = feature.shape[1]
    step = max(1, BLOCK * channels // max(1, feature.numel())) if feature.device.type == 'cpu' else channels
    return [slice(first, first + step) for first in range(0, channels, step)]


# ------------------------------------------------------------------------------------------------------------- rows


def is_on_host(tensor: Tensor) -> bool:
    """Whether the host computes with a tensor itself, so that what it looks up in it waits for nobody."""
    return tensor.device.type == 'cpu'


class RowLoss(NamedTuple):
    """A loss of each row of some tensors, the first of which learns.

    Attributes:
        value: Of blocks of rows (r, ...), one of each tensor: (r,). It writes into none of them.
        gradient: Of the same, that of the rows' sum by the first: as large as its block. None to differentiate the
            value.
    """
    value: Callable[..., Tensor]
    gradient: Callable[..., Tensor] | None = None

    def differentiate(self, first: Tensor, *others: Tensor) -> Tensor:
        """The gradient of the rows' sum by the first block."""
        if self.gradient is not None:
            return self.gradient(first, *others)
        first = first.detach().requires_grad_()
        with torch.enable_grad():
            total = self.value(first, *others).sum()
        return torch.autograd.grad(total, first)[0]


def sum_rows(loss: RowLoss, weight: Tensor, learning: Tensor, *constants: Tensor) -> Tensor:
    """Σ of a loss over rows, weighted, by blocks of rows.

    Temporaries have the size of a block. For the backward pass nothing is kept but the tensors that are given: each
    block is computed once more there. On the CPU rows without weight are left out, if they are many;
    a GPU would have to tell the host how many these are, and computes them.

    Args:
        loss: Of the rows. It is given float32, or double precision if ``learning`` is.
        weight: (R,), without gradient.
        learning: (R, ...), the only one with a gradient, once differentiable.
        constants: (R, ...) each.

    Returns:
        Scalar, in float32 or double precision.

    Example:
        >>> square = RowLoss(lambda x: x.square().sum(1), lambda x: 2 * x)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
        >>> value = sum_rows(square, torch.tensor([1.0, 0.0]), x)
        >>> value, torch.autograd.grad(value, x)[0]
        (tensor(5., grad_fn=<_SumRowsBackward>), tensor([[2., 4.],
                [0., 0.]]))
    """
    total: Tensor = _SumRows.apply(loss, weight.detach(), learning, *(each.detach() for each in constants))
    return total


@torch.no_grad()
def map_rows(function: Callable[..., Tensor], first: Tensor, *others: Tensor | None, width: int | None = None,
             where: Tensor | None = None) -> Tensor:
    """``function(first, *others)`` of a function that makes each row of the same rows, by blocks, without gradient.

    Args:
        function: Of blocks of rows; of none it returns none.
        first: (R, ...).
        others: (R, ...) each; None for what is not there.
        width: Elements that the function makes of a row; by default as many as a row of ``first`` has.
        where: (R,) of bool, which of the rows are asked for; all by default. On the CPU no others are computed.

    Returns:
        (R, ...), 0 where nothing is asked for.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> map_rows(lambda x: x.sum(1), rows), map_rows(lambda x: x.sum(1), rows, where=torch.tensor([True, False]))
        (tensor([3., 7.]), tensor([3., 0.]))
    """
    result: Tensor | None = None
    width = first[:1].numel() if width is None else width
    for rows in _cut_rows(first, width) if where is None else _cut_weighted(where, first, width):
        block = function(*(each if each is None else each[rows] for each in (first, *others)))
        if result is None:
            result = block.new_zeros(len(first), *block.shape[1:])
        result[rows] = block
    if result is None:
        made = function(*(each if each is None else each[:0] for each in (first, *others)))
        return made.new_zeros(len(first), *made.shape[1:])
    return result if where is None else torch.where(where.view(-1, *[1] * (result.dim() - 1)), result, 0)


class _SumRows(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, loss: RowLoss, weight: Tensor, *tensors: Tensor) -> Tensor:
        ctx.loss, dtype = loss, _precision_of(tensors[0])
        ctx.save_for_backward(weight, *tensors)
        total = torch.zeros((), dtype=dtype, device=weight.device)
        for rows in _cut_weighted(weight, tensors[0], tensors[0][:1].numel()):
            total += torch.dot(loss.value(*(each[rows].to(dtype) for each in tensors)), weight[rows].to(dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *tensors = ctx.saved_tensors
        learning, dtype = tensors[0], _precision_of(tensors[0])
        found = torch.zeros_like(learning) if _find_weighted(weight) is not None else torch.empty_like(learning)
        for rows in _cut_weighted(weight, learning, learning[:1].numel()):
            part = ctx.loss.differentiate(*(each[rows].to(dtype) for each in tensors))
            scale = (gradient * weight[rows].to(dtype)).view(-1, *[1] * (learning.dim() - 1))
            if isinstance(rows, slice) and found.dtype == dtype:
                torch.mul(part, scale, out=found[rows])
            else:
                found[rows] = (part * scale).to(found.dtype)
        return (None, None, found, *[None] * (len(tensors) - 1))


def _precision_of(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _cut_rows(tensor: Tensor, width: int, count: int | None = None) -> Iterator[slice]:
    """Cuts the rows of a tensor, or so many like them, into blocks."""
    count = len(tensor) if count is None else count
    step = max(1, (ROW_BLOCK if tensor.device.type == 'cpu' else ROW_BLOCK_OF_GPU) // max(width, 1))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _cut_weighted(weight: Tensor, tensor: Tensor, width: int) -> Iterator[slice | Tensor]:
    """Cuts the rows of a tensor into blocks, without those that have no weight where that is known."""
    chosen = _find_weighted(weight)
    if chosen is None:
        return _cut_rows(tensor, width)
    return (chosen[block] for block in _cut_rows(tensor, width, len(chosen)))


def _find_weighted(weight: Tensor) -> Tensor | None:
    """Indices of the rows that have a weight; None if nearly all have, or if it is for a device to know."""
    if not is_on_host(weight):
        return None
    chosen = weight.nonzero().flatten()
    return None if len(chosen) > 0.75 * len(weight) else chosen
