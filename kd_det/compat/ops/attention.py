"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159), from mmcv's own PyTorch formulation."""
import torch
from torch import Tensor

from .precision import at_least_float32


def ms_deform_attn_forward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                           sampling_locations: Tensor, attention_weights: Tensor, im2col_step: int) -> Tensor:
    """Attention over a few sampled cells of every level.

    Args:
        value: (N, sum of H*W, heads, channels).
        value_spatial_shapes: (levels, 2) as H, W.
        value_level_start_index: (levels,), implied by the shapes.
        sampling_locations: (N, queries, heads, levels, points, 2) as x, y in [0, 1].
        attention_weights: (N, queries, heads, levels, points).

    Returns:
        (N, queries, heads * channels).
    """
    # Only mmcv.ops calls this, so it is imported by now; at the top the import would be circular.
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
    tensors = at_least_float32(value, sampling_locations, attention_weights)
    shapes = value_spatial_shapes.tolist()  # the one transfer from the device
    return multi_scale_deformable_attn_pytorch(tensors[0], shapes, *tensors[1:]).to(value.dtype)


def ms_deform_attn_backward(value: Tensor, value_spatial_shapes: Tensor, value_level_start_index: Tensor,
                            sampling_locations: Tensor, attention_weights: Tensor, grad_output: Tensor,
                            grad_value: Tensor, grad_sampling_loc: Tensor, grad_attn_weight: Tensor,
                            im2col_step: int) -> None:
    """Writes the three gradients, by computing the forward pass once more with autograd."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        output = ms_deform_attn_forward(inputs[0], value_spatial_shapes, value_level_start_index, inputs[1],
                                        inputs[2], im2col_step)
    gradients = torch.autograd.grad(output, inputs, grad_output)
    for target, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight), gradients):
        target.copy_(gradient)
