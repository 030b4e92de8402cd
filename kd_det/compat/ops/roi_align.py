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
    output.copy_(torchvision.ops.roi_align(input, rois, (aligned_height, aligned_width), spatial_scale,
                                           sampling_ratio, aligned))


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_input: Tensor,
                       aligned_height: int, aligned_width: int, spatial_scale: float, sampling_ratio: int,
                       pool_mode: int, aligned: bool) -> None:
    """Writes ``grad_input``, (N, C, H, W); the other arguments are those of :func:`roi_align_forward`."""
    _refuse_max_pooling(pool_mode)
    grad_output, rois = at_least_float32(grad_output, rois)
    if grad_output.is_cuda and torch.are_deterministic_algorithms_enabled():
        # The kernel adds in any order and PyTorch refuses it; torchvision's own deterministic RoIAlign is differentiable.
        with torch.enable_grad():
            input = grad_output.new_zeros(grad_input.shape, requires_grad=True)
            pooled = torchvision.ops.roi_align(input, rois, (aligned_height, aligned_width), spatial_scale,
                                               sampling_ratio, aligned)
        gradient, = torch.autograd.grad(pooled, input, grad_output)
    else:
        gradient = torch.ops.torchvision._roi_align_backward(grad_output, rois, spatial_scale, aligned_height,
                                                             aligned_width, *grad_input.shape, sampling_ratio, aligned)
    grad_input.copy_(gradient)


def _refuse_max_pooling(pool_mode: int) -> None:
    if pool_mode == MAX_POOLING:
        raise NotImplementedError("roi_align with pool_mode='max' needs compiled mmcv: torchvision's kernel averages. "
                                  "Use pool_mode='avg' (the default of mmcv and mmdet) or install compiled mmcv.")
