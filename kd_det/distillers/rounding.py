"""The numbers of quantisation-aware training: ranges of activations, steps of weights, and rounding by them."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le, Lt
from mmengine.dist import all_reduce
from torch import Tensor, nn

from kd_det.config.arguments import Bits, Names, declared

PREDICTORS, FIRST = 'predictors', 'first'
TINY = 1e-8  # a step that is not 0, where there is nothing but 0
SMALLEST = 1e-4  # of a channel's steps to the largest of a layer; in those of a dead one no bias would be an integer


@declared
@dataclass(frozen=True)
class Quantization:
    """How a student is trained for integers: ``model.quantize``.

    Args:
        bits: Of weights and activations. 8 is what runtimes compute with; fewer are a simulation.
        ranges: ``'tracked'``: of activations a moving average of the smallest and largest value, of weights the largest
            of each channel. ``'learnt'``: times a factor for each, which is trained (LSQ, arXiv 1902.08153); for few
            bits, where the largest value costs too much.
        keep_float: Layers that are not quantised: their paths in the student, or what they begin with;
            ``'predictors'``, the last layers of the heads; ``'first'``, the first layer.
        freeze: After this share of the training the tracked ranges stay as they are.
        momentum: Weight of a step in the moving average.
    """
    bits: Bits = 8
    ranges: Literal['tracked', 'learnt'] = 'tracked'
    keep_float: Names = (PREDICTORS, )
    freeze: Annotated[float, Gt(0), Le(1)] = 0.5
    momentum: Annotated[float, Gt(0), Lt(1)] = 0.1


class Rounder(nn.Module):
    """Holds the ranges, and rounds by them; gradients pass straight through.

    Args:
        settings: How.

    Attributes:
        ranges: (points, 2): the smallest and the largest value; both 0 where nothing was seen yet.
        tracks: Whether the ranges still move.
        follows: Whether they are another's, see :meth:`follow`.
    """

    ranges: Tensor

    def __init__(self, settings: Quantization) -> None:
        super().__init__()
        self.settings, self.tracks, self.follows = settings, True, False
        self.levels, self.top = 2**settings.bits - 1, 2**(settings.bits - 1) - 1
        self.is_learnt = settings.ranges == 'learnt'
        self._steps: list[tuple[float, int] | None] | None = None

    def allocate(self, points: int, layers: int) -> None:
        """Makes room for the ranges of so many points and layers."""
        self.register_buffer('ranges', torch.zeros(points, 2))
        if self.is_learnt:  # logarithms of factors, whose gradient no layer's scale changes: of ranges, of weights
            self.offsets = nn.Parameter(torch.zeros(points, 2))
            self.clips = nn.Parameter(torch.zeros(layers))

    def set_progress(self, share: float) -> None:
        """Tells how much of the training is done."""
        self.tracks = share < self.settings.freeze

    def follow(self, other: Rounder) -> None:
        """Rounds from now on by what another has learnt until then, step by step, and moves nothing of it.

        Where that has seen nothing yet, activations stay as they are.
        """
        self._parameters, self._buffers = other._parameters, other._buffers
        self.tracks, self.follows = False, True
        self.train()  # numbers of evaluation, which stay, would be waited for in each step

    def train(self, mode: bool = True) -> Rounder:
        self._steps = None
        return super().train(mode)

    def round_activation(self, x: Tensor, row: int, observe: bool) -> Tensor:
        """Rounds an activation by a row of the ranges, which may first move with what is observed."""
        if not self.training:
            step = self.steps[row]
            if step is None:
                return x
            return torch.fake_quantize_per_tensor_affine(x.float(), *step, 0, self.levels).type_as(x)
        if observe and self.tracks:
            self._observe(x.detach(), row)
        scale, zero = self._find_steps(slice(row, row + 1))
        if self.is_learnt:
            rounded = _round_through(x.float(), scale, zero, 0, self.levels).type_as(x)
        else:
            rounded = torch.fake_quantize_per_tensor_affine(x.float(), scale[0], zero[0].int(), 0,
                                                            self.levels).type_as(x)
        return torch.where(self.ranges[row].any(), rounded, x) if self.follows else rounded

    @torch.no_grad()
    def _observe(self, x: Tensor, row: int) -> None:
        """Moves a range towards that of this step, of all ranks."""
        extremes = x.new_full((2, ), -math.inf, dtype=torch.float32)
        if x.numel():
            low, high = x.float().aminmax()
            extremes = torch.stack([-low, high])
        all_reduce(extremes, 'max')
        before, sign = self.ranges[row], extremes.new_tensor([-1.0, 1.0])
        found = torch.where(extremes.isfinite().all(), sign * extremes.clamp(min=0), before)  # 0 is in each range
        self.ranges[row] = torch.where((before == 0).all(), found, before + self.settings.momentum * (found - before))

    def _find_steps(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The step between two integers, and the integer of 0, of some ranges."""
        ranges = self.ranges[rows].clone()
        if self.is_learnt:
            ranges = ranges * self.offsets[rows].exp()
        scale = ((ranges[:, 1] - ranges[:, 0]) / self.levels).clamp(min=TINY)
        return scale, _round_straight(-ranges[:, 0] / scale)

    @property
    def steps(self) -> list[tuple[float, int] | None]:
        """Step and integer of 0 of each row, as numbers; None where nothing was seen. They stay while it evaluates."""
        if self._steps is None:
            with torch.no_grad():
                seen, (scale, zero) = (self.ranges != 0).any(1).tolist(), self._find_steps(slice(None))
            self._steps = [(each, int(integer)) if known else None
                           for known, each, integer in zip(seen, scale.tolist(), zero.tolist())]
        return self._steps

    def find_weight_steps(self, weight: Tensor, layer: int) -> Tensor:
        """The step between two integers of each output channel of a layer."""
        scale = weight.detach().float().flatten(1).abs().amax(1) / self.top
        scale = torch.maximum(scale, (SMALLEST * scale.max()).clamp(min=TINY))
        if self.is_learnt:
            scale = scale * self.clips[layer].exp()
        return scale

    def round_weight(self, weight: Tensor, scale: Tensor, whole: bool) -> Tensor:
        """Rounds a weight by the steps of its channels; ``whole`` where exporters know the whole range alone."""
        if self.training and self.is_learnt:
            scale = scale.view(-1, *[1] * (weight.dim() - 1))
            return _round_through(weight.float(), scale, 0, -self.top, self.top).type_as(weight)
        zero = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight.float(), scale.detach(), zero, 0, -self.top - whole,
                                                         self.top)
        return rounded.type_as(weight)


def _round_straight(x: Tensor) -> Tensor:
    """Rounds, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def _round_through(x: Tensor, scale: Tensor, zero: Tensor | int, least: int, most: int) -> Tensor:
    """Rounds to integers within limits and back, with a gradient for the step too."""
    # Clamped first: at a limit itself clamp has no gradient, and most activations are rounded to the lowest integer.
    return _round_straight(torch.clamp(x / scale, least - zero, most - zero)) * scale
