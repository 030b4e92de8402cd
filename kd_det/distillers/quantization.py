"""Quantisation-aware training: the student computes as an integer runtime would, while its weights stay float.

Nothing of the student's module tree changes. While its backbone, neck and heads run, a
:class:`~torch.overrides.TorchFunctionMode` sees each operator and rounds what it reads: weights per channel and
symmetric, after BatchNorm was folded into them; activations per tensor and asymmetric. An activation is rounded where
it is read, once for all its readers, so that a ReLU is part of the layer or the sum before it, as runtimes fuse them.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from kd_det.config import ConfigurationError
from kd_det.config.arguments import at, check_arguments
from kd_det.distillers.quantization_plan import LAYERS, find_parts, list_layers, plan_layers, show_blank, survey_layers
from kd_det.distillers.rounding import Quantization, Rounder

READERS = (torch.sigmoid, torch.Tensor.sigmoid, F.hardsigmoid, F.hardswish, F.leaky_relu, F.elu, F.gelu, F.mish,
           F.group_norm, F.avg_pool2d, F.adaptive_avg_pool2d)
MOVERS = (F.max_pool2d, F.interpolate)  # what they put out lies in the range of what they read
PRODUCTS = (torch.mul, torch.Tensor.mul)
SUMS = (torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__iadd__)
FUSED = (F.relu, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_, F.relu6, F.hardtanh, torch.clamp,
         torch.Tensor.clamp)  # with the layer or the sum before them
PASSING = ('_known', '_rows', '_rounded', '_live', '_pending')  # by tensor, of one forward


class FoldedWeight(NamedTuple):
    """A layer's weight and bias with its BatchNorm folded in, and the step between two integers of each channel."""
    weight: Tensor
    steps: Tensor
    bias: Tensor | None


class Quantizer(Rounder):
    """Rounds what a student's layers read while they run.

    BatchNorm keeps its statistics (:meth:`freeze_statistics`), which are folded into the layer before it: the rounded
    weight is that of the exported graph. Its scale and shift are trained.

    Args:
        student: The detector; the forward of its backbone, neck and heads is wrapped. A transformer stays float.
        settings: How.

    Attributes:
        layers: What becomes of them.
        points: Where activations are rounded -> the row of :attr:`ranges`.

    Raises:
        ConfigurationError: There is nothing to quantise, a name of ``keep_float`` is of no layer, or the student
            computes parts of its forward anew in the backward pass.
    """

    student: nn.Module
    _names: dict[int, str] | None
    _folded: dict[tuple, FoldedWeight]

    def __init__(self, student: nn.Module, settings: Quantization) -> None:
        super().__init__(settings)
        recomputed = [path for path, module in student.named_modules() if getattr(module, 'with_cp', False)]
        if recomputed:
            raise ConfigurationError(f"model.quantize: '{recomputed[0]}' computes its forward anew in the backward "
                                     'pass, where nothing would be rounded. Set its with_cp=False.')
        self.__dict__['student'] = student  # past nn.Module.__setattr__: neither is a part of the other
        student.__dict__['quantizer'] = self
        self.parts, self.points = find_parts(student), dict[str, int]()
        self._readers: set[str] = set()  # the operators that read rounded values
        self._is_planning, self.is_frozen = True, False
        self._forget()
        self.layers = plan_layers(survey_layers(student), self.parts, settings.keep_float)
        for part in self.parts:
            student.get_submodule(part).forward = partial(self.run, part)  # on the instance, before the class's
        self.allocate(0, len(self.layers.quantized))
        show_blank(student, self.parts)
        self._is_planning = False
        self._forget()
        self.allocate(len(self.points), len(self.layers.quantized))

    def run(self, part: str, *args: Any, **kwargs: Any) -> Any:
        """The forward of a part of the student, with what its layers read rounded."""
        if part == self.parts[0]:
            self._known.clear()
            self._rows.clear()
        self._last, self._count = part, 0
        module = self.student.get_submodule(part)
        with _Rounding(self):
            out = type(module).forward(module, *args, **kwargs)
        if part == 'neck' and part != self.parts[-1] and isinstance(out, (tuple, list)):
            self._last, self._count = f'{part}.output', 0  # heads read it, and what they do not run, as RoIAlign
            out = type(out)(self._read(list(out))[0])
        return out

    def round(self, x: Tensor, point: str) -> Tensor:
        """Rounds an activation; what was rounded for another reader is taken from there, with its range."""
        if x in self._rounded:
            return x
        if x in self._known:
            return self._known[x]
        inherited = self._rows.get(x)
        row = self.points.get(point) if inherited is None else inherited
        if self._is_planning:
            self._rows[x] = self.points.setdefault(point, len(self.points)) if row is None else row
            return x
        rounded = x if row is None else self.round_activation(x, row, observe=inherited is None)
        if rounded is not x:
            self._known[x], self._rows[rounded], self._rounded[rounded] = rounded, row, True
        return rounded

    # ------------------------------------------------------------------------------------------------- the operators

    def run_layer(self, function: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any,
                  **options: Any) -> Tensor:
        """A convolution or linear layer; where BatchNorm follows it runs there, and this is a blank in its place."""
        name = self.names.get(id(weight))
        if name is None:
            return function(x, weight, bias, *rest, **options)
        self._last, self._count = name, 0
        if name in self.layers.kept:  # the layer before it puts out integers all the same
            (x, ), _ = self._read([x])
            return function(x, weight, bias, *rest, **options)
        x = self.round(x, f'{name}.input')

        def compute(norm: tuple | None = None) -> Tensor:
            place = name, norm and id(norm[0])  # of one weight with several BatchNorms, each
            folded = self._folded.get(place) or self._fold(name, weight, bias, norm)
            if self.is_frozen:
                self._folded[place] = folded
            rounded = self.round_weight(folded.weight, folded.steps, whole=self.is_frozen)
            out = function(x, rounded, self._round_bias(x, folded), *rest, **options)
            if self._is_planning:
                self._live[out] = True
            return self.round(out, f'{name}.output') if name in self.layers.last else out

        if name not in self.layers.folded:
            return compute()
        blank = x.new_empty(1).expand(x.shape[0], weight.shape[0], 1, 1)
        self._pending[blank] = compute
        return blank

    def run_norm(self, function: Callable, x: Tensor, mean: Tensor | None, variance: Tensor | None,
                 weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False,
                 momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
        """BatchNorm: the layer before it with the BatchNorm in its weights; or, without one, as it stands."""
        if x in self._pending:
            return self._pending.pop(x)((mean, variance, weight, bias, eps))
        return self.run_reader(function, x, mean, variance, weight, bias, training, momentum, eps)

    def _fold(self, name: str, weight: Tensor, bias: Tensor | None, norm: tuple | None) -> FoldedWeight:
        if norm is not None:
            mean, variance, gamma, beta, eps = norm
            factor = (variance + eps).rsqrt() * (1 if gamma is None else gamma)
            bias = (-mean if bias is None else bias - mean) * factor + (0 if beta is None else beta)
            weight = weight * factor.view(-1, *[1] * (weight.dim() - 1))
        return FoldedWeight(weight, self.find_weight_steps(weight, self.layers.quantized.index(name)), bias)

    def _round_bias(self, x: Tensor, folded: FoldedWeight) -> Tensor | None:
        """Rounds a bias to a runtime's 32 bits, in units of the product of both steps; in training that is nothing."""
        step = None if self.training or x not in self._rows else self.steps[self._rows[x]]
        if folded.bias is None or step is None or torch.jit.is_tracing():
            return folded.bias
        unit = step[0] * folded.steps.detach()
        return (folded.bias / unit).round() * unit

    def run_reader(self, function: Callable, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """An operator that a runtime computes by itself, so that what it reads is integer, too."""
        (x, ), _ = self._read([x])
        out = function(x, *args, **options)
        if function in MOVERS and x in self._rows:
            self._rows[out] = self._rows[x]
        return self._mark(out, x)

    def run_pair(self, function: Callable, x: Any, y: Any, **options: Any) -> Any:
        """A sum or product of two maps; ``x += y`` makes another tensor. With numbers or weights it is left alone."""
        are_maps = all(isinstance(each, Tensor) and each.dim() == 4 and not isinstance(each, nn.Parameter)
                       for each in (x, y))
        (first, second), is_read = self._read([x, y]) if are_maps else ((x, y), False)
        if not is_read:
            return function(x, y, **options)
        combine = torch.mul if function in PRODUCTS else torch.add
        return self._mark(combine(first, second, **options), first, second)

    def run_join(self, function: Callable, tensors: Sequence[Tensor], *args: Any, **options: Any) -> Tensor:
        """Maps, joined along their channels."""
        read, _ = self._read(list(tensors))
        return self._mark(function(read, *args, **options), *read)

    def run_silu(self, function: Callable, x: Tensor, inplace: bool = False) -> Tensor:
        """SiLU as a graph has it: a sigmoid and a product."""
        (x, ), is_read = self._read([x])
        return self.run_pair(torch.mul, x, self._mark(x.sigmoid(), x)) if is_read else function(x, inplace)

    def run_fused(self, function: Callable, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """What a runtime fuses with the layer before it."""
        out = function(x, *args, **options)
        if out is x:  # in place: what was rounded of it is of its former values
            for kept in (self._known, self._rows, self._rounded):
                kept.pop(x, None)
        return self._mark(out, x)

    def _read(self, tensors: list[Tensor]) -> tuple[list[Tensor], bool]:
        """Rounds what an operator reads, if that stems from quantised layers; and whether it does."""
        self._count += 1
        reader = f'{self._last}/{self._count}'
        if self._stems_from_layers(tensors):
            self._readers.add(reader)
        if reader not in self._readers:
            return tensors, False
        return [self.round(each, f'{reader}.{index}') for index, each in enumerate(tensors)], True

    def _mark(self, out: Tensor, *sources: Tensor) -> Tensor:
        if self._stems_from_layers(sources):
            self._live[out] = True
        return out

    def _stems_from_layers(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of some tensors is made of what quantised layers put out; asked while it plans."""
        return self._is_planning and any(each in self._live or each in self._rows for each in tensors)

    # --------------------------------------------------------------------------------------------- the student, state

    @property
    def names(self) -> dict[int, str]:
        """See :func:`~kd_det.distillers.quantization_plan.list_layers`."""
        if self._names is None:
            self._names = list_layers(self.student)
        return self._names

    def freeze_statistics(self) -> None:
        """Lets BatchNorm compute with its running statistics, and keep them."""
        for module in self.student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()

    @torch.no_grad()
    def freeze(self) -> None:
        """Folds each weight once and for all, for whoever traces the forward in eval mode: an exporter.

        The student gets the folded weights as further parameters, for a tracer takes what is none for a constant.
        """
        self.is_frozen = True
        show_blank(self.student, self.parts)
        self._folded = {place: each._replace(weight=nn.Parameter(each.weight, requires_grad=False))
                        for place, each in self._folded.items()}
        self.student.folded_weights = nn.ParameterList([each.weight for each in self._folded.values()])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the ranges, by the names of their points."""
        return dict(points=list(self.points), **{key: value.cpu().clone() for key, value in self.state_dict().items()})

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` kept.

        Raises:
            ConfigurationError: It is of another student, or of other settings.
        """
        tensors = {key: value for key, value in state.items() if key != 'points'}
        if list(state['points']) != list(self.points) or tensors.keys() != self.state_dict().keys():
            raise ConfigurationError("The checkpoint's ranges are of another student, or of another model.quantize: "
                                     f"{len(state['points'])} points where this one has {len(self.points)}.")
        self.load_state_dict(tensors)
        self._steps = None

    def _forget(self) -> None:
        """Lets go of what is of one forward, or of one student: a copy finds the layers of its own."""
        self.__dict__.update({name: WeakTensorKeyDictionary() for name in PASSING}, _names=None, _folded={})

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in (*PASSING, '_names', '_folded')}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()


class _Rounding(TorchFunctionMode):
    """Passes each operator to the method of a quantizer that runs it."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        method = METHODS.get(function)
        return (function if method is None else partial(method, self.quantizer, function))(*args, **(kwargs or {}))


METHODS: dict[Callable, Callable] = {
    **dict.fromkeys(LAYERS, Quantizer.run_layer), F.batch_norm: Quantizer.run_norm, F.silu: Quantizer.run_silu,
    **dict.fromkeys((*READERS, *MOVERS), Quantizer.run_reader),
    **dict.fromkeys((*SUMS, *PRODUCTS), Quantizer.run_pair), torch.cat: Quantizer.run_join,
    **dict.fromkeys(FUSED, Quantizer.run_fused)}


def build_quantizer(config: dict[str, Any], student: nn.Module, taps: Iterable[str] = ()) -> Quantizer:
    """Builds what the distiller's ``quantize`` says.

    Args:
        config: The arguments of a :class:`~kd_det.distillers.rounding.Quantization`.
        student: The detector.
        taps: Paths that terms read.

    Raises:
        ConfigurationError: An argument is wrong, the student can not be quantised, or a term reads a layer that runs
            only together with its BatchNorm.
    """
    with at('model.quantize'):
        check_arguments(Quantization, config)
    quantizer = Quantizer(student, Quantization(**config))
    lost = sorted(quantizer.layers.folded & set(taps))
    if lost:
        raise ConfigurationError(f"model.quantize: a term taps '{lost[0]}', which becomes one layer with its "
                                 'BatchNorm. Tap that, or keep the layer in float: model.quantize.keep_float.')
    return quantizer
