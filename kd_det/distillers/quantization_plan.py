"""Which layers of a student are quantised, and what follows each: found by a blank image that it is shown."""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from kd_det.compat.process import preserved_randomness
from kd_det.config import ConfigurationError
from kd_det.config.arguments import refuse, suggest_names
from kd_det.distillers.rounding import FIRST, PREDICTORS
from kd_det.heads.request import ROI_HEAD
from kd_det.heads.roi import run_roi_head
from kd_det.teachers.probe import PROBE_SIZE, find_input_channels, find_prior_strides

LAYERS = (torch.conv2d, F.linear)
DENSE_HEADS = ('bbox_head', 'rpn_head')


class LayerPlan(NamedTuple):
    """What becomes of the layers of a student.

    Attributes:
        quantized: Their paths, in the order in which they run.
        kept: Those that stay float.
        folded: The quantised ones that are always followed by BatchNorm.
        last: The quantised ones that no other layer reads, whose output is rounded by itself.
    """
    quantized: tuple[str, ...]
    kept: frozenset[str]
    folded: frozenset[str]
    last: frozenset[str]


def plan_layers(survey: Survey, parts: Sequence[str], keep_float: Sequence[str]) -> LayerPlan:
    """Decides which of the layers that ran are quantised.

    Args:
        survey: What was noted while the student ran.
        parts: Of the student, see :func:`find_parts`.
        keep_float: See :class:`~kd_det.distillers.rounding.Quantization`.

    Raises:
        ConfigurationError: None is, or a name of ``keep_float`` is of no layer.
    """
    predictors = survey.list_unread(parts)
    groups = {PREDICTORS: predictors, FIRST: set(survey.order[:1])}
    kept: set[str] = set()
    for index, name in enumerate(keep_float):
        found = groups.get(name, {layer for layer in survey.order if f'{layer}.'.startswith(f'{name}.')})
        if not found and name not in groups:
            refuse(f'model.quantize.keep_float[{index}]', name, f'a layer, or {PREDICTORS} or {FIRST}',
                   suggest_names(name, (*groups, *survey.order)))
        kept |= found
    quantized = tuple(name for name in survey.order if name not in kept)
    if not quantized:
        raise ConfigurationError('model.quantize: the student has no convolution or linear layer in backbone, neck and '
                                 'heads that is not kept in float.')
    folded = frozenset(name for name in quantized if survey.followers[name] == {F.batch_norm})
    return LayerPlan(quantized, frozenset(kept), folded, frozenset(predictors - kept))


class Survey(TorchFunctionMode):
    """Notes which layers run, which of them read what others put out, and what directly follows each.

    Args:
        names: The path of each layer by its weight.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.order: list[str] = []
        self.read: set[str] = set()
        self.followers: dict[str, set[Callable]] = defaultdict(set)
        self._sources, self._direct = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()

    def list_unread(self, parts: Sequence[str]) -> set[str]:
        """The layers of heads whose outputs no other layer reads."""
        heads = tuple(f'{part}.' for part in parts if part not in ('backbone', 'neck'))
        return {name for name in self.order if name.startswith(heads) and name not in self.read}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        if not made:  # a shape, or another number
            return result
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        sources = {name for each in given for name in self._sources.get(each, ())}
        for each in given:
            if each in self._direct:
                self.followers[self._direct[each]].add(function)
        name = self.names.get(id(args[1])) if function in LAYERS else None
        if name is not None:
            self.read |= sources
            self.order += [name] * (name not in self.order)
            self._direct[made[0]], sources = name, {name}
        for each in made:
            self._sources[each] = frozenset(sources)
        return result


def survey_layers(detector: nn.Module) -> Survey:
    """Notes which layers of a detector's parts run, of a blank image."""
    parts, survey = find_parts(detector), Survey(list_layers(detector))

    def watch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with survey:
            return type(module).forward(module, *args, **kwargs)

    for part in parts:
        module = detector.get_submodule(part)
        module.forward = partial(watch, module)  # on the instance, before the class's
    try:
        show_blank(detector, parts)
    finally:
        for part in parts:
            del detector.get_submodule(part).forward
    return survey


def find_predictors(detector: nn.Module) -> set[str]:
    """Finds the last layers of a detector's heads, whose outputs are decoded; of a transformer none."""
    return survey_layers(detector).list_unread(find_parts(detector))


def list_layers(detector: nn.Module) -> dict[int, str]:
    """The path of each layer by the identity of its weight; of one weight in several layers the first."""
    names: dict[int, str] = {}
    for path, module in detector.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            names.setdefault(id(module.weight), path)
    return names


def find_parts(student: nn.Module) -> list[str]:
    """The parts of a detector whose forward is a network and nothing else; a transformer is none."""
    heads = [] if hasattr(student, 'decoder') else [*DENSE_HEADS, f'{ROI_HEAD}.bbox_head']
    modules = dict(student.named_modules())
    parts = []
    for name in ('backbone', 'neck', *heads):
        module = modules.get(name)
        if isinstance(module, nn.ModuleList):
            parts += [f'{name}.{index}' for index in range(len(module))]
        elif module is not None:
            parts.append(name)
    return parts


def show_blank(student: nn.Module, parts: Sequence[str]) -> None:
    """Passes a blank image through the parts of a student, and leaves it as it was."""
    was_training = {module: module.training for module in student.modules()}
    anchor = next(student.parameters())
    size = math.ceil(max((PROBE_SIZE, *find_prior_strides(student))))
    with preserved_randomness(), torch.no_grad():
        student.eval()
        features = student.extract_feat(anchor.new_zeros(1, find_input_channels(student), size, size))
        for part in parts:
            if part in DENSE_HEADS:
                student.get_submodule(part)(features)
        if any(part.startswith(ROI_HEAD) for part in parts):
            run_roi_head(student.roi_head, features, SimpleNamespace(rois=anchor.new_tensor([[0, 0, 0, 64, 64]])))
    for module, training in was_training.items():
        module.training = training
