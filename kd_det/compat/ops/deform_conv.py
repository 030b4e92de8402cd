"""Deformable convolution, v1 (arXiv 1703.06211) and modulated, v2 (arXiv 1811.11168).

Offsets are y, x pairs for each kernel cell in both mmcv and torchvision. ``im2col_step`` and the two buffers belong to
mmcv's kernels and are not used.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from .precision import at_least_float32


def deform_conv_forward(input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor,
                        kW: int, kH: int, dW: int, dH: int, padW: int, padH: int, dilationW: int, dilationH: int,
                        group: int, deformable_group: int, im2col_step: int) -> None:
    """Writes ``output``, (N, C_out, H_out, W_out).

    Args:
        input: (N, C_in, H, W).
        weight: (C_out, C_in / group, kH, kW).
        offset: (N, deformable_group * kH * kW * 2, H_out, W_out), in cells.
    """
    input, offset, weight = at_least_float32(input, offset, weight)
    output.copy_(torchvision.ops.deform_conv2d(input, offset, weight, stride=(dH, dW), padding=(padH, padW),
                                               dilation=(dilationH, dilationW)))


def deform_conv_backward_input(input: Tensor, offset: Tensor, gradOutput: Tensor, gradInput: Tensor,
                               gradOffset: Tensor, weight: Tensor, columns: Tensor, kW: int, kH: int, dW: int, dH: int,
                               padW: int, padH: int, dilationW: int, dilationH: int, group: int,
                               deformable_group: int, im2col_step: int) -> None:
    """Writes ``gradInput`` and ``gradOffset``."""
    grad_input, _, grad_offset, _, _ = _backward(gradOutput, input, weight, offset, None, dH, dW, padH, padW,
                                                 dilationH, dilationW, group, deformable_group)
    gradInput.copy_(grad_input)
    gradOffset.copy_(grad_offset)


def deform_conv_backward_parameters(input: Tensor, offset: Tensor, gradOutput: Tensor, gradWeight: Tensor,
                                    columns: Tensor, ones: Tensor, kW: int, kH: int, dW: int, dH: int, padW: int,
                                    padH: int, dilationW: int, dilationH: int, group: int, deformable_group: int,
                                    scale: float, im2col_step: int) -> None:
    """Writes ``gradWeight``, times ``scale``."""
    _, grad_weight, _, _, _ = _backward(gradOutput, input, gradWeight, offset, None, dH, dW, padH, padW, dilationH,
                                        dilationW, group, deformable_group)
    gradWeight.copy_(grad_weight * scale)


def modulated_deform_conv_forward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                  mask: Tensor, output: Tensor, columns: Tensor, kernel_h: int, kernel_w: int,
                                  stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int,
                                  dilation_w: int, group: int, deformable_group: int, with_bias: bool) -> None:
    """Writes ``output``, (N, C_out, H_out, W_out).

    Args:
        input, weight, offset: as in :func:`deform_conv_forward`.
        bias: (C_out,); empty unless ``with_bias``.
        mask: (N, deformable_group * kernel_h * kernel_w, H_out, W_out), the weight of each sample.

    Offsets and masks of a larger map are read as mmcv's kernel does, see :func:`_as_read`.
    """
    input, weight, bias, offset, mask = at_least_float32(input, weight, bias, offset, mask)
    offset, mask = _as_read(offset, output), _as_read(mask, output)
    output.copy_(torchvision.ops.deform_conv2d(input, offset, weight, bias if with_bias else None,
                                               (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), mask))


def modulated_deform_conv_backward(input: Tensor, weight: Tensor, bias: Tensor, ones: Tensor, offset: Tensor,
                                   mask: Tensor, columns: Tensor, grad_input: Tensor, grad_weight: Tensor,
                                   grad_bias: Tensor, grad_offset: Tensor, grad_mask: Tensor, grad_output: Tensor,
                                   kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
                                   dilation_h: int, dilation_w: int, group: int, deformable_group: int,
                                   with_bias: bool) -> None:
    """Writes the gradient of each input, that of the bias only ``with_bias``."""
    gradients = _backward(grad_output, input, weight, _as_read(offset, grad_output), _as_read(mask, grad_output),
                          stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    targets = (grad_input, grad_weight, grad_offset, grad_mask, grad_bias if with_bias else None)
    for target, gradient in zip(targets, gradients):
        if target is not None:
            unread = target.numel() - gradient.numel()  # of offsets and masks of a larger map
            if unread:
                gradient = F.pad(gradient.flatten(1), (0, unread // len(target)))
            target.copy_(gradient.view_as(target))


def _as_read(values: Tensor, output: Tensor) -> Tensor:
    """Offsets or masks, (N, C, H, W), as mmcv's modulated kernel reads them: (N, C, H_out, W_out).

    It knows no other map than the output's, and so takes the first C * H_out * W_out values of each image, whatever
    their map. DyHead, and GLIP with it, hands the offsets of one level to the convolution of the next, smaller one.

    Raises:
        ValueError: The map is too small. mmcv would read beyond its end.
    """
    n, channels, height, width = values.shape
    wanted = output.shape[2:]
    if (height, width) == wanted:
        return values
    if height * width < wanted.numel():
        raise ValueError(f'The offsets and masks of a modulated deformable convolution are a map of {height} x {width} '
                         f'cells, too small for its output of {wanted[0]} x {wanted[1]}.')
    return values.flatten(1)[:, :channels * wanted.numel()].reshape(n, channels, *wanted)


def _backward(grad_output, input, weight, offset, mask, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w,
              groups, offset_groups):
    """Gradients of input, weight, offset, mask and bias from torchvision's kernel; without ``mask`` that of v1."""
    grad_output, input, weight, offset = at_least_float32(grad_output, input, weight, offset)
    mask_or_none = input.new_zeros(len(input), 1) if mask is None else mask.to(input.dtype)
    bias = input.new_zeros(len(weight))  # the gradient does not depend on its value
    grad_input, grad_weight, grad_offset, grad_mask, grad_bias = torch.ops.torchvision._deform_conv2d_backward(
        grad_output, input, weight, offset, mask_or_none, bias, stride_h, stride_w, pad_h, pad_w, dilation_h,
        dilation_w, groups, offset_groups, mask is not None)
    # On the border torchvision takes the derivative from within, mmcv none: at zero offsets, where training starts,
    # that is every sample in the padding's innermost ring.
    samples = (len(offset), offset_groups, *weight.shape[2:], 2, *offset.shape[2:])
    outside = _outside(offset.view(samples), input.shape[2:], (stride_h, stride_w), (pad_h, pad_w),
                       (dilation_h, dilation_w))
    grad_offset = grad_offset.view(samples).masked_fill(outside, 0).view_as(offset)
    return grad_input, grad_weight, grad_offset, grad_mask, grad_bias


def _outside(offset: Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
             dilation: tuple[int, int]) -> Tensor:
    """Which samples lie on the border, at -1 or at the size of the input, or beyond.

    Args:
        offset: (N, deformable groups, kernel_h, kernel_w, 2, H_out, W_out).
        size: H and W of the input.

    Returns:
        As ``offset``, with 1 in place of 2.
    """
    kernel, size_out = offset.shape[2:4], offset.shape[5:]
    outside = None
    for axis, shift in enumerate(offset.unbind(4)):
        cell, output = (torch.arange(count, device=offset.device) for count in (kernel[axis], size_out[axis]))
        position = cell[:, None] * dilation[axis] + output * stride[axis] - padding[axis]  # without offset
        shape = [1, 1, 1, 1]
        shape[axis], shape[axis + 2] = position.shape
        position = shift + position.view(shape)
        beyond = (position <= -1) | (position >= size[axis])
        outside = beyond if outside is None else outside | beyond
    return outside.unsqueeze(4)
