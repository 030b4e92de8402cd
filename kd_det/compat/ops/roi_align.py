"""RoIAlign (arXiv 1703.06870): the average of bilinear samples in each bin of a box."""
import torch
import torchvision
from torch import Tensor

from .precision import at_least_float32

MAX_POOLING = 0


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                      aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                      pool_mode: int, aligned: bool) -> None:
    """Writes the pooled boxes.

    Args:
        input: (N, C, H, W).
        rois: (K, 5) as image index, x1, y1, x2, y2.
        output: (K, C, aligned_height, aligned_width), written.
        argmax_y, argmax_x: used by max pooling only.
        spatial_scale: feature cells per pixel of ``rois``.
        sampling_ratio: samples a bin and axis; 0 adapts to the size of the box.
        pool_mode: 1 for the average; 0, the maximum, is not served.
        aligned: shift by half a cell, so that cell centres and pixel centres agree.

    Raises:
        NotImplementedError: for ``pool_mode`` 0.
    """
    _refuse_max_pooling(pool_mode)
    input, rois = at_least_float32(input, rois)
    output.copy_(torch.ops.torchvision.roi_align(input, rois, spatial_scale, aligned_height, aligned_width,
                                                 sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Writes ``grad_input``, (N, C, H, W); the other arguments are those of :func:`roi_align_forward`."""
    _refuse_max_pooling(pool_mode)
    grad_output, rois = at_least_float32(grad_output, rois)
    # The CUDA kernel adds up in any order, which PyTorch refuses in a deterministic run.
    deterministic = grad_output.is_cuda and torch.are_deterministic_algorithms_enabled()
    backward = _deterministic_backward if deterministic else torch.ops.torchvision._roi_align_backward
    batch, channels, height, width = grad_input.shape
    grad_input.copy_(backward(grad_output, rois, spatial_scale, aligned_height, aligned_width, batch, channels, height,
                              width, sampling_ratio, aligned))


def _deterministic_backward(grad_output: Tensor, rois: Tensor, spatial_scale: float, pooled_height: int,
                            pooled_width: int, batch_size: int, channels: int, height: int, width: int,
                            sampling_ratio: int, aligned: bool) -> Tensor:
    """Through ``torchvision.ops.roi_align``, which in a deterministic run is differentiable PyTorch code on the GPU."""
    with torch.enable_grad():
        # RoIAlign is linear, so the input's values do not matter.
        input = grad_output.new_zeros(batch_size, channels, height, width).requires_grad_()
        pooled = torchvision.ops.roi_align(input, rois, (pooled_height, pooled_width), spatial_scale, sampling_ratio,
                                           aligned)
    return torch.autograd.grad(pooled, input, grad_output)[0]


def _refuse_max_pooling(pool_mode: int) -> None:
    if pool_mode == MAX_POOLING:
        raise NotImplementedError("roi_align with pool_mode='max' needs compiled mmcv: torchvision's kernel averages. "
                                  "Use pool_mode='avg' (the default of mmcv and mmdet) or install compiled mmcv.")
