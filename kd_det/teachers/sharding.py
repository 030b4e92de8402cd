"""A teacher too large to stand whole on every rank: each keeps a part of its weights, and gathers the others' for a
stage while that runs."""
from __future__ import annotations

from typing import Iterator

import torch
from mmengine.dist import get_world_size
from torch import Tensor, nn

from kd_det.teachers.loading import TeacherError


def shard_weights(part: nn.Module) -> None:
    """Shards a part of a frozen detector over all ranks, stage by stage, by PyTorch's ``fully_shard``.

    From then on its forward is one of all ranks together: each has to call it as often as the others, and to let it
    end. With one process nothing changes.

    Args:
        part: Backbone or neck. Weights of its own, outside of its children, stay whole.

    Raises:
        TeacherError: PyTorch is too old.
    """
    if get_world_size() == 1:
        return
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise TeacherError(f'model.teacher.shard=True needs PyTorch 2.6 or newer: {error}') from error
    part.to(memory_format=torch.contiguous_format)  # fully_shard takes no weights in another order
    stages = list(_stages(part))
    if stages:
        mesh = init_device_mesh(next(part.parameters()).device.type, (get_world_size(), ))
    for stage in stages:
        fully_shard(stage, mesh=mesh, reshard_after_forward=True)


def _stages(module: nn.Module) -> Iterator[nn.Module]:
    """The children that hold weights; in place of containers, which are never called, theirs."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _stages(child)
        elif any(True for _ in child.parameters()):
            yield child


def held(tensor: Tensor) -> Tensor:
    """What this rank holds of a weight: all of it, or its part where that is sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor
