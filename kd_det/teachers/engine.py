"""How a frozen teacher computes: what may be changed in a detector because it will never train."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor, nn

from kd_det.taps import Levels
from kd_det.teachers.folding import fold_batch_norms
from kd_det.teachers.loading import TeacherError
from kd_det.teachers.memory_order import to_channels_last
from kd_det.teachers.sharding import shard_weights

PRECISIONS = dict(float32=None, bfloat16=torch.bfloat16, float16=torch.float16)
PARTS = ('backbone', 'neck')


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
            :func:`~kd_det.teachers.sharding.shard_weights`.

    Raises:
        TeacherError: An unknown precision, or options that do not go together.
    """
    fuse: bool = True
    channels_last: bool = True
    precision: str = 'float32'
    compile: Union[bool, dict] = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise TeacherError(f"model.teacher.precision='{self.precision}': expected one of {', '.join(PRECISIONS)}.")
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
        """Gives backbone and neck the kind of tensors that they are made for, and the heads theirs."""
        lowered, extract = PRECISIONS[self.precision], model.extract_feat
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format

        def extract_feat(images: Tensor) -> Levels:
            given = images.to(dtype=lowered or images.dtype, memory_format=memory_format)
            if lowered is None:
                return tuple(level.contiguous() for level in extract(given))
            with torch.autocast(images.device.type, enabled=False):  # of the student's step
                return tuple(level.to(images.dtype).contiguous() for level in extract(given))

        model.extract_feat = extract_feat  # on the instance: predict() calls it, too


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
