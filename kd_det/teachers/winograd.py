"""Convolutions of 3 × 3 by Winograd's algorithm: fewer multiplications for the same result up to rounding."""
from __future__ import annotations

from functools import partial
from typing import Callable, Optional

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

TILE, WINDOW = 4, 6  # a tile of the output, and the window of the input that it sees, in cells a side
BLOCK = 2**20  # numbers of transformed input at once: small enough to stay in the cache

# F(4 × 4, 3 × 3) of the paper, with the points 0, ±1, ±2 and infinity. A map's two sides are transformed at once, which
# the Kronecker product of a matrix with itself does.
_INPUT = torch.tensor([[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
                       [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]], dtype=torch.float64)
_KERNEL = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
                       dtype=torch.float64) / 24
_OUTPUT = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
                       dtype=torch.float64)
INPUT, KERNEL, OUTPUT = (torch.kron(matrix, matrix).float() for matrix in (_INPUT, _KERNEL, _OUTPUT))


def winograd_conv2d(images: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """``conv2d(images, weight, bias, padding=1)`` with a quarter of its multiplications.

    After Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308. Windows of 6 × 6 cells
    and kernels are transformed, multiplied as 36 matrix products over the channels, and transformed back into tiles of
    4 × 4. The kernels are transformed in each call: their transform is four times their size, and reading it from
    memory takes as long as computing it.

    Args:
        images: (N, C, H, W), float32, on the CPU.
        weight: (K, C, 3, 3).
        bias: (K,)

    Returns:
        (N, K, H, W), channels last in memory. It deviates from the plain result by up to 1e-5 of its largest value.
    """
    count, channels, height, width = images.shape
    filters, rows, columns = len(weight), -(-height // TILE), -(-width // TILE)
    kernels = (KERNEL @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(WINDOW**2, filters, channels).transpose(1, 2)
    right, below = 1 + columns * TILE - width, 1 + rows * TILE - height
    cells = pad(images.permute(0, 2, 3, 1), (0, 0, 1, right, 1, below))
    windows = cells.unfold(1, WINDOW, TILE).unfold(2, WINDOW, TILE).permute(4, 5, 0, 1, 2, 3)  # 6, 6, N, rows, columns, C
    result = images.new_empty(count, rows, TILE, columns, TILE, filters)
    at_once = max(1, BLOCK // (WINDOW**2 * channels * columns))  # rows of tiles
    images_at_once = max(1, at_once // rows)
    for image in range(0, count, images_at_once):
        for row in range(0, rows, at_once):
            window = windows[:, :, image:image + images_at_once, row:row + at_once]
            products = (INPUT @ window.reshape(WINDOW**2, -1)).view(WINDOW**2, -1, channels) @ kernels
            tiles = (OUTPUT @ products.view(WINDOW**2, -1)).view(TILE, TILE, *window.shape[2:5], filters)
            result[image:image + images_at_once, row:row + at_once] = tiles.permute(2, 3, 0, 4, 1, 5)
    if bias is not None:
        result += bias
    return result.view(count, rows * TILE, columns * TILE, filters)[:, :height, :width].permute(0, 3, 1, 2)


def use_winograd(model: nn.Module) -> None:
    """Lets the convolutions of a model compute by :func:`winograd_conv2d` wherever that is faster.

    That is on the CPU, in float32, with many channels and not too small a map; whether it is so is seen in each call.

    Args:
        model: A model that is not trained; changed.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and _has_winograd_form(module):
            module._conv_forward = partial(_convolve, module._conv_forward)


def _convolve(plain: Callable, images: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    if not _pays(images, weight) or torch.is_grad_enabled() or torch.is_autocast_enabled('cpu'):
        return plain(images, weight, bias)
    return winograd_conv2d(images, weight, bias)


def _has_winograd_form(conv: nn.Conv2d) -> bool:
    return (conv.kernel_size == (3, 3) and conv.stride == conv.dilation == conv.padding == (1, 1) and conv.groups == 1
            and conv.padding_mode == 'zeros' and min(conv.in_channels, conv.out_channels) >= 128)


def _pays(images: Tensor, weight: Tensor) -> bool:
    """By the times of layers of 96 to 512 channels on maps of 12 × 12 to 80 × 80, on two cores with AVX-512."""
    if images.device.type != 'cpu' or images.dtype != torch.float32 or images.dim() != 4:
        return False
    count, _, height, width = images.shape
    tiles = count * -(-height // TILE) * -(-width // TILE)
    return 6 * tiles >= max(weight.shape[:2]) and height * width * count >= 0.7 * TILE**2 * tiles
