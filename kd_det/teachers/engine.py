"""Makes a frozen detector cheaper to run: folded normalisation, memory order, precision, compilation, sharding."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, Literal

import torch
from mmcv.cnn import ConvModule
from mmengine.dist import broadcast, get_world_size
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_det.config.arguments import declared
from kd_det.config.detectors import TeacherError
from kd_det.taps import Features

PLAIN_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)  # MMEngine derives from them
MMCV_OPERATORS = 'mmcv.ops'
Precision = Literal['float32', 'bfloat16', 'float16']
PRECISIONS: dict[Precision, torch.dtype | None] = dict(float32=None, bfloat16=torch.bfloat16, float16=torch.float16)
PARTS = ('backbone', 'neck')


@declared
@dataclass(frozen=True)
class Engine:
    """Makes a detector in evaluation mode cheaper to run, by options that leave its results alone up to rounding.

    Args:
        fuse: Fold batch normalisation into the convolutions.
        channels_last: Keep weights and features of backbone and neck with the channels of a cell side by side, the
            order in which convolutions are fastest.
        precision: ``'bfloat16'`` or ``'float16'`` runs backbone and neck in it, and the heads, which compute boxes, in
            that of the student; ``'float32'`` runs everything in that of the student.
        compile: Compile backbone and neck by ``torch.compile``; a dict holds its arguments.
        shard: Keep a part of the weights of backbone and neck on each rank, see
            :func:`~kd_det.teachers.engine.shard_weights`.

    Raises:
        ArgumentError: An argument does not fit.
        TeacherError: Options that do not go together.
    """
    fuse: bool = True
    channels_last: bool = True
    precision: Precision = 'float32'
    compile: bool | dict[str, Any] = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.shard and self.compile:
            raise TeacherError('model.teacher.shard and model.teacher.compile do not go together: remove one.')

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Changes a detector into what is run. Its taps must have been set before."""
        if self.fuse:
            fold_batch_norms(model)
        parts = [module for module in (getattr(model, part, None) for part in PARTS) if isinstance(module, nn.Module)]
        for part in parts:
            if self.channels_last:
                to_channels_last(part)
            part.to(PRECISIONS[self.precision])
            if self.compile:
                _compile(part, {} if self.compile is True else self.compile)
            if self.shard:
                shard_weights(part)
        self._convert_inputs(model)

    def _convert_inputs(self, model: nn.Module) -> None:
        """Gives backbone and neck tensors of the kind that they are made for, and the heads those of theirs."""
        lowered, extract = PRECISIONS[self.precision], model.extract_feat
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format

        def extract_feat(images: Tensor) -> Features:
            converted = images.to(dtype=lowered or images.dtype, memory_format=memory_format)
            if lowered is None:
                return tuple(level.contiguous() for level in extract(converted))
            with torch.autocast(images.device.type, enabled=False):  # of the student's step
                return tuple(level.to(images.dtype).contiguous() for level in extract(converted))

        model.extract_feat = extract_feat  # on the instance: predict() calls it, too


def fold_batch_norms(model: nn.Module) -> None:
    """Folds each batch normalisation whose convolution stands just before it in the same module.

    Left as they are: modules with hooks, for a tap reads what they put out; kinds of convolution and normalisation that
    compute something else; convolutions after their normalisation. A convolution that several modules share, as
    those of RTMDet's head, is folded for each of them apart.

    Args:
        model: A model in evaluation mode; changed.
    """
    for module in list(model.modules()):
        children = list(module._modules.items())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if _can_fold(module, conv, norm):
                fused = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
                module._modules.update({conv_name: fused, norm_name: nn.Identity().eval()})
                module.efficient_conv_bn_eval_forward = None  # by which a ConvModule folds in each forward anew


def _can_fold(parent: nn.Module, conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a normalisation that stands behind a convolution in a module computes a linear map of its output."""
    if type(conv) is not nn.Conv2d or type(norm).forward not in PLAIN_NORMS:
        return False
    if norm.running_mean is None or norm.num_features != conv.out_channels:
        return False
    if isinstance(parent, ConvModule) and parent.order.index('norm') != parent.order.index('conv') + 1:
        return False
    return not any((module._forward_hooks or module._forward_pre_hooks) for module in (conv, norm))


def to_channels_last(part: nn.Module) -> None:
    """Keeps the weights of a part's convolutions in that order, and with them what these put out.

    Convolutions of another kind keep their weights as they are: those that standardise them would fail. mmcv's
    operators, such as deformable convolutions, get their inputs in the usual order, too: compiled, they read memory as
    if it were in that, whatever the strides say, without a word (open-mmlab/mmcv, issue 2203).

    Args:
        part: Backbone or neck; changed.
    """
    operators = [module for module in part.modules()
                 if any(each.__module__.startswith(MMCV_OPERATORS) for each in type(module).__mro__)]
    within = {child for operator in operators for child in operator.modules()}
    for module in part.modules():
        if type(module) is nn.Conv2d and module not in within:
            module.to(memory_format=torch.channels_last)
    for operator in operators:
        _make_inputs_contiguous(operator)


def _make_inputs_contiguous(module: nn.Module) -> None:
    """Lets a module's forward see its inputs in the usual order of memory."""
    forward = module.forward

    @wraps(forward)
    def of_contiguous(*inputs, **named):
        return forward(*map(_to_contiguous, inputs), **{name: _to_contiguous(each) for name, each in named.items()})

    module.forward = of_contiguous  # on the instance; a hook would be taken for a tap


def _to_contiguous(value):
    return value.contiguous() if isinstance(value, Tensor) else value


def _compile(module: nn.Module, options: dict) -> None:
    """Compiles the largest parts that no hook lies within: a tap, which may end the forward, runs between them."""
    if not any(True for _ in module.parameters()):
        return
    within = (child for child in module.modules() if child is not module)
    container = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    if container or any(child._forward_hooks for child in within):
        for child in module.children():
            _compile(child, options)
    else:
        module.forward = torch.compile(module.forward, **options)


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
    stages = list(_find_stages(part))
    if stages:
        mesh = init_device_mesh(next(part.parameters()).device.type, (get_world_size(), ))
    for stage in stages:
        fully_shard(stage, mesh=mesh, reshard_after_forward=True)


def _find_stages(module: nn.Module) -> Iterator[nn.Module]:
    """Finds the children that hold weights; in place of containers, which are never called, theirs."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _find_stages(child)
        elif any(True for _ in child.parameters()):
            yield child


def to_local(tensor: Tensor) -> Tensor:
    """Returns what this rank has of a weight: all of it, or its part where that is sharded."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


@torch.no_grad()
def take_from_first_rank(tensors: Iterable[Tensor]) -> None:
    """Writes into tensors, in place, what the first rank has in them: each may have drawn or measured something else.

    To be called on every rank; those of one kind go together.
    """
    if get_world_size() == 1:
        return
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        joined = torch.cat([tensor.reshape(-1) for tensor in alike])
        broadcast(joined)
        for tensor, first in zip(alike, joined.split([tensor.numel() for tensor in alike])):
            tensor.copy_(first.view_as(tensor))


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over the names and values of all parameters and buffers, as far as this rank holds them."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(to_local(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
