"""The precision in which the operators compute."""

import torch
from torch import Tensor


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """Casts to one common type, float32 or wider.

    torchvision's kernels want equal types, and some lack float16 or bfloat16 on the CPU. torchvision itself computes
    in float32 under autocast.
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]
