"""Detectors with fewer channels than their configs name: a type ``Pruned…`` for each of MMDetection's detectors.

Such a type is the detector's own, so that whatever asks for a RetinaNet finds one. Its config is the unpruned
detector's and ``kept``: which channels its layers have left, by which it is built, and inherits.
"""
from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmdet.models import detectors
from mmdet.models.detectors import (
    DetectionTransformer,
    KnowledgeDistillationSingleStageDetector,
    SingleStageDetector,
    TwoStageDetector,
)
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from kd_det.config.arguments import declared, refuse

SIDES = ('outputs', 'inputs')  # of a layer; what keeps its channels, as a norm, has outputs
Channels = tuple[int, ...]  # those that are kept, by their numbers in the unpruned detector
Width = tuple[Channels, int]  # the channels, and out of how many
Kept = dict[tuple[str, str], Width]  # by layer and side

# Where layers say how many channels they have.
OUTPUT_NAMES = ('out_channels', 'out_features', 'num_features', 'num_channels', 'num_parameters', 'n_dims')
INPUT_NAMES = ('in_channels', 'in_features')


def write_channels(channels: Channels, count: int) -> str:
    """Writes a set of channels: how many are kept of how many, and a hexadecimal number with a bit for each.

    Example:
        >>> write_channels((0, 1, 6), 8)
        '3/8 43'
    """
    return f'{len(channels)}/{count} {sum(1 << channel for channel in channels):0{math.ceil(count / 4)}x}'


def read_channels(text: str) -> Width:
    """Reads what :func:`write_channels` has written.

    Raises:
        ArgumentError: It is no such text, or its numbers contradict each other.

    Example:
        >>> read_channels('3/8 43')
        ((0, 1, 6), 8)
    """
    try:
        sizes, digits = text.split()
        size, count = map(int, sizes.split('/'))
        bits = int(digits, 16)
    except (AttributeError, ValueError):
        refuse('kept', text, "channels such as '3/8 43': 3 of 8, and a hexadecimal number with a bit for each")
    channels = tuple(channel for channel in range(bits.bit_length()) if bits >> channel & 1)
    if not channels or len(channels) != size or channels[-1] >= count:
        refuse('kept', text, f"as many of the channels 0 to {count - 1} as '{sizes}' says, and at least one")
    return channels, count


def write_kept(kept: Kept) -> list[dict[str, Any]]:
    """Writes what all layers kept, as a config has it: each set of channels, who puts it out and who takes it in."""
    groups: dict[str, dict[str, Any]] = {}
    for (path, side), (channels, count) in kept.items():
        text = write_channels(channels, count)
        groups.setdefault(text, dict(channels=text, outputs=[], inputs=[]))[side].append(path)
    return [{key: value for key, value in group.items() if value} for group in groups.values()]


def read_kept(groups: Iterable[Mapping[str, Any]]) -> Kept:
    """Reads what :func:`write_kept` has written.

    Raises:
        ArgumentError: A group is none, or names channels that there can not be.
    """
    kept: Kept = {}
    for group in groups:
        if 'channels' not in group or set(group) - {'channels', *SIDES}:
            refuse('kept', group, 'dicts of channels, outputs and inputs')
        channels = read_channels(group['channels'])
        kept.update({(path, side): channels for side in SIDES for path in group.get(side, ())})
    return kept


def compose_kept(earlier: Kept, later: Kept) -> Kept:
    """Joins what was kept at first and, of that, later: in the numbers of the unpruned detector."""
    channels = {key: (tuple(earlier[key][0][channel] for channel in kept), earlier[key][1])
                for key, (kept, _) in later.items() if key in earlier}
    return {**earlier, **later, **channels}


def find_cuts(layer: nn.Module, outputs: Width | None, inputs: Width | None) -> dict[str, dict[int, Width]]:
    """Finds what is kept of the tensors of a layer, be it narrowed already or not yet.

    Args:
        layer: A convolution, linear layer or norm, or another whose tensors have an entry for each channel.
        outputs: What it keeps of the channels that it puts out; None for all.
        inputs: Of those that it takes in.

    Returns:
        For each tensor by name the entries that are kept, by dimension.
    """
    if not isinstance(layer, (_ConvNd, nn.Linear)):
        tensors = {**layer._parameters, **layer._buffers}
        return {name: {0: outputs} for name, each in tensors.items() if outputs and each is not None and each.dim()}
    if is_depthwise(layer):
        inputs = None  # the weight has an entry for each channel once
    elif inputs and getattr(layer, 'groups', 1) > 1:  # each group keeps the same of its inputs
        channels, count = inputs
        size = count // layer.groups
        inputs = tuple(channel for channel in channels if channel < size), size
    sides = (inputs, outputs) if getattr(layer, 'transposed', False) else (outputs, inputs)
    cuts: dict[str, dict[int, Width | None]] = dict(weight=dict(enumerate(sides)))
    if layer.bias is not None:
        cuts['bias'] = {0: outputs}
    return {name: {dim: width for dim, width in cut.items() if width} for name, cut in cuts.items()}


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def keep(tensor: Tensor, cut: Mapping[int, Width]) -> Tensor:
    """Selects entries of a tensor, by dimension."""
    for dim, (channels, _) in cut.items():
        tensor = tensor.index_select(dim, torch.tensor(channels, device=tensor.device))
    return tensor


def narrow(layer: nn.Module, outputs: Width | None = None, inputs: Width | None = None) -> None:
    """Takes channels from a layer: its tensors and what it says of itself; see :func:`find_cuts`."""
    cuts = find_cuts(layer, outputs, inputs)
    if is_depthwise(layer) and outputs:
        inputs, layer.groups = outputs, len(outputs[0])
    for name, cut in cuts.items():
        if cut:
            tensor, parameter = keep(getattr(layer, name).detach(), cut), layer._parameters.get(name)
            setattr(layer, name, tensor if parameter is None else nn.Parameter(tensor, parameter.requires_grad))
    for names, width in ((OUTPUT_NAMES, outputs), (INPUT_NAMES, inputs)):
        for name in names if width else ():
            if isinstance(getattr(layer, name, None), int):
                setattr(layer, name, len(width[0]))
    if isinstance(layer, nn.LayerNorm) and outputs:
        layer.normalized_shape = (len(outputs[0]), )


def narrow_detector(detector: nn.Module, kept: Kept) -> None:
    """Narrows all layers of a detector that are named.

    Raises:
        ArgumentError: It has no such layer, or one of another width.
    """
    layers = dict(detector.named_modules())
    for path, side in kept:
        if path not in layers:
            refuse('kept', path, 'the path of a layer of the detector')
        count = count_channels(layers[path], side)
        if count != kept[path, side][1]:
            refuse('kept', path, f'a layer with {kept[path, side][1]} {side}, not with {count}')
    for path in dict.fromkeys(path for path, _ in kept):
        narrow(layers[path], *(kept.get((path, side)) for side in SIDES))


def count_channels(layer: nn.Module, side: str) -> int:
    """How many channels a layer has on a side; 0 where it does not tell."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1]
    names = OUTPUT_NAMES if side == 'outputs' else INPUT_NAMES
    return next((getattr(layer, name) for name in names if isinstance(getattr(layer, name, None), int)), 0)


class Pruned:
    """What a pruned detector has beside the detector that it is.

    Args:
        kept: The channels that its layers have left: dicts of ``channels``, as ``'3/8 43'`` (3 of 8, and a hexadecimal
            number with a bit for each), and of the layers that have them as ``outputs`` or as ``inputs``. ``kd-det
            prune`` writes them.
        arguments: The unpruned detector's own.

    Attributes:
        kept: The same, by layer and side.

    Raises:
        ArgumentError: The unpruned detector has no such layers or channels.
    """

    @declared
    def __init__(self, *args: Any, kept: Sequence[dict[str, Any]], **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.kept = read_kept(kept)
        narrow_detector(self, self.kept)

    def select_kept(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Selects from weights of an unpruned detector what this one kept; a tensor of another shape stays as it is."""
        selected, paths = dict(state), defaultdict(list)
        for path, layer in self.named_modules(remove_duplicate=False):  # type: ignore[attr-defined]
            paths[layer].append(path)  # one that levels share has several
        for path in dict.fromkeys(path for path, _ in self.kept):
            layer = self.get_submodule(path)  # type: ignore[attr-defined]
            for name, cut in find_cuts(layer, *(self.kept.get((path, side)) for side in SIDES)).items():
                whole = [cut[dim][1] if dim in cut else size for dim, size in enumerate(getattr(layer, name).shape)]
                for key in (f'{each}.{name}' for each in paths[layer]):
                    if key in selected and list(selected[key].shape) == whole:
                        selected[key] = keep(selected[key], cut)
        return selected


def find_pruned_type(kind: type) -> type | None:
    """The pruned type of a detector's type: itself, where it is one; None where there is none."""
    if issubclass(kind, Pruned):
        return kind
    return PRUNED.get(kind)


def _is_served(kind: Any) -> bool:
    return (isinstance(kind, type) and issubclass(kind, (SingleStageDetector, TwoStageDetector, DetectionTransformer))
            and not issubclass(kind, KnowledgeDistillationSingleStageDetector))


# By the detector's own type.
PRUNED = {kind: MODELS.register_module(module=type(f'Pruned{name}', (Pruned, kind), dict(
    __module__=__name__, __doc__=f'A {name} of MMDetection with fewer channels, see :class:`Pruned`.')))
    for name, kind in vars(detectors).items() if _is_served(kind)}
globals().update({kind.__name__: kind for kind in PRUNED.values()})  # as pickle looks for them
