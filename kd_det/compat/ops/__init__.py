"""The operators of ``mmcv._ext`` that PyTorch and torchvision can compute.

Each function has the name, the argument names and the in-place outputs of the compiled operator, so that ``mmcv.ops``
calls it unchanged. Only the numbers are ours: reduced precision is computed in float32, on the CPU and on the GPU.
"""
# ruff: noqa: F401  what OPERATORS names
from .attention import ms_deform_attn_backward, ms_deform_attn_forward
from .deform_conv import (
                          deform_conv_backward_input,
                          deform_conv_backward_parameters,
                          deform_conv_forward,
                          modulated_deform_conv_backward,
                          modulated_deform_conv_forward,
)
from .deform_roi_pool import deform_roi_pool_backward, deform_roi_pool_forward
from .focal_loss import (
                          sigmoid_focal_loss_backward,
                          sigmoid_focal_loss_forward,
                          softmax_focal_loss_backward,
                          softmax_focal_loss_forward,
)
from .info import get_compiler_version, get_compiling_cuda_version
from .nms import nms, nms_match, softnms
from .roi_align import roi_align_backward, roi_align_forward
from .roi_pool import roi_pool_backward, roi_pool_forward
from .sync_bn import (
                          sync_bn_backward_data,
                          sync_bn_backward_param,
                          sync_bn_forward_mean,
                          sync_bn_forward_output,
                          sync_bn_forward_var,
)
from .windows import carafe_backward, carafe_forward, masked_col2im_forward, masked_im2col_forward

OPERATORS = [  # mmcv's names, not of this package's making
    'carafe_backward', 'carafe_forward', 'deform_conv_backward_input', 'deform_conv_backward_parameters',
    'deform_conv_forward', 'deform_roi_pool_backward', 'deform_roi_pool_forward', 'get_compiler_version',
    'get_compiling_cuda_version', 'masked_col2im_forward', 'masked_im2col_forward', 'modulated_deform_conv_backward',
    'modulated_deform_conv_forward', 'ms_deform_attn_backward', 'ms_deform_attn_forward', 'nms', 'nms_match',
    'roi_align_backward', 'roi_align_forward', 'roi_pool_backward', 'roi_pool_forward', 'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward', 'softmax_focal_loss_backward', 'softmax_focal_loss_forward', 'softnms',
    'sync_bn_backward_data', 'sync_bn_backward_param', 'sync_bn_forward_mean', 'sync_bn_forward_output',
    'sync_bn_forward_var',
]
