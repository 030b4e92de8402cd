"""Which channels of a detector go together, what they are worth, and which go first; torch-pruning's graph tells.

DepGraph (arXiv 2301.12900): a channel that one layer puts out others norm, add and take in, and all of them lose it
together. What reaches an output of the detector keeps its channels.
"""
from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.detectors import DetectionTransformer
from mmdet.models.necks.ssd_neck import L2Norm
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from kd_det.config import ConfigurationError
from kd_det.deploy.pruned import Kept, count_channels, find_cuts, is_depthwise, narrow, narrow_detector
from kd_det.teachers.probe import PROBE_SIZE, find_input_channels, find_prior_strides, make_shape_samples

Importance = Literal['group_norm', 'taylor', 'random']
MULTIPLE = 8  # of which the widths that are left are, where they can: what kernels of CPUs and GPUs are made for
PROPOSALS, DETECTIONS = 1000, 100  # regions that a RoI head sees where its config does not tell: MMDetection's own
ROUNDING = 1e-5


class GoalError(ConfigurationError):
    """As much as is asked for can not go."""


class Use(NamedTuple):
    """A side of a layer that loses channels when a group does.

    Attributes:
        path: Of the layer.
        side: ``'outputs'`` or ``'inputs'``.
        channels: The layer's channels that belong to the group.
        roots: For each of them that of the group which it goes with.
    """
    path: str
    side: str
    channels: tuple[int, ...]
    roots: tuple[int, ...]


class Group(NamedTuple):
    """Channels that layers lose together.

    Attributes:
        name: The path of the layer that makes them.
        count: How many.
        parts: They are in so many parts, one after the other, of which each loses the same: those of a GroupNorm.
        uses: Where they are.
        worth: The importance of each, 1 on average.
    """
    name: str
    count: int
    parts: int
    uses: tuple[Use, ...]
    worth: Tensor


class Costs(NamedTuple):
    """Multiply-accumulate operations for one image.

    Attributes:
        layers: Of each convolution and linear layer, by path; of those of RoI heads over all regions.
        rest: Of whatever else multiplies, as attention.
    """
    layers: dict[str, int]
    rest: int

    @property
    def total(self) -> int:
        return sum(self.layers.values()) + self.rest


# ------------------------------------------------------------------------------------------------ a forward to follow


def make_traceable(detector: nn.Module) -> nn.Module:
    """Copies a detector so that autograd sees all of its layers: what is frozen, or regions that indices cut out."""
    traced = copy.deepcopy(detector).eval().requires_grad_()
    traced.train = lambda mode=True: traced  # backbones freeze their stages again
    for module in traced.modules():
        for name in {'with_cp', 'inplace'}.intersection(vars(module)):
            setattr(module, name, False)  # a checkpointed block hides its layers; a view written over leads elsewhere
        if isinstance(module, BaseRoIExtractor):
            module.forward = _Pooling(module)  # on the instance, before the class's
    return traced


class _Pooling:
    """Stands in for a RoI extractor: like that it adds and averages cells, and leaves channels where they are."""

    def __init__(self, extractor: BaseRoIExtractor) -> None:
        self.levels, self.size = extractor.num_inputs, extractor.roi_layers[0].output_size

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        return reduce(torch.add, (F.adaptive_avg_pool2d(level, self.size) for level in features[:self.levels]))


def run_layers(traced: nn.Module, images: Tensor) -> list[Tensor]:
    """Runs backbone, neck and heads as far as maps and predictions, without choosing or suppressing any.

    Of a DETR neither encoder nor decoder runs, but the hidden layer of each of their blocks, by itself: all the rest
    adds to the tokens, whose width is that of queries and embeddings.

    Args:
        traced: See :func:`make_traceable`.
        images: (N, C, H, W), normalised.
    """
    features = traced.extract_feat(images)
    if isinstance(traced, DetectionTransformer):
        outputs = [features, *(each(images.new_zeros(1, 1, each.embed_dims)) for each in traced.modules()
                               if isinstance(each, FFN))]
    elif hasattr(traced, 'roi_head'):
        head, outputs = traced.roi_head, [traced.rpn_head(features)] if hasattr(traced, 'rpn_head') else []
        for name in ('bbox', 'mask'):
            extractors, heads = (_listed(getattr(head, f'{name}_{part}', None)) for part in ('roi_extractor', 'head'))
            for extractor, each in zip(extractors * len(heads) if len(extractors) == 1 else extractors, heads):
                regions = extractor(features)
                outputs.append(each(head.shared_head(regions) if head.with_shared_head else regions))
    else:
        outputs = [traced.bbox_head(features)]
    return list(_flatten(outputs))


def _listed(modules: nn.Module | None) -> list[nn.Module]:
    return [] if modules is None else list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _flatten(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    for each in outputs if isinstance(outputs, (list, tuple)) else ():
        yield from _flatten(each)


def make_image(detector: nn.Module, size: tuple[int, int] | None = None) -> Tensor:
    """Makes a normalised image of noise; one that fits the strides of the detector by default."""
    side = math.ceil(max((PROBE_SIZE, *find_prior_strides(detector))))
    return torch.randn(1, find_input_channels(detector), *(size or (side, side)),
                       generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ groups of channels


def find_groups(traced: nn.Module, importance: Importance) -> list[Group]:
    """Finds the groups of channels that can go, from the images on.

    Args:
        traced: See :func:`make_traceable`; for ``'taylor'`` with gradients.
        importance: ``'group_norm'`` by the norm of the weights, ``'taylor'`` by how the loss would change to first
            order (arXiv 1906.10771), ``'random'`` by PyTorch's generator.

    Raises:
        ConfigurationError: A layer is not reached by :func:`run_layers`, so that nothing is known of its channels.
    """
    import torch_pruning as tp
    names = {module: path for path, module in traced.named_modules()}
    graph = build_graph(traced, names)
    scorer = dict(group_norm=tp.importance.GroupMagnitudeImportance, taylor=tp.importance.GroupTaylorImportance,
                  random=tp.importance.RandomImportance)[importance]()
    groups = []
    for found in graph.get_all_groups(root_module_types=[_ConvNd, nn.Linear]):
        uses = _find_uses(graph, found, names)
        if uses:
            count = len(found[0].idxs)
            parts = math.lcm(*(_count_parts(traced.get_submodule(use.path), use.side) for use in uses))
            if _can_lose(uses, count, parts, traced):
                worth = scorer(found).detach()
                groups.append(Group(uses[0].path, count, parts, uses, worth / worth.mean().clamp(min=1e-30)))
    return groups


def build_graph(traced: nn.Module, names: dict[nn.Module, str]) -> Any:
    """Builds torch-pruning's dependency graph of all layers, those too whose outputs nothing reads.

    Raises:
        ConfigurationError: A layer does not run.
    """
    import torch_pruning as tp
    image, ran, unread = make_image(traced), {}, []
    pruners = {kind: _ChannelwisePruner() for kind in map(type, traced.modules())
               if issubclass(kind, (BaseRoIExtractor, L2Norm))}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        ran[module] = output

    def run(_: nn.Module, images: Tensor) -> list[Tensor]:
        outputs = run_layers(traced, images) + [ran[module] for module in unread]
        return [output * 1 for output in outputs]  # an operation of its own: what it leads to is an output

    handles = [module.register_forward_hook(note) for module in names if isinstance(module, (_ConvNd, nn.Linear))]
    try:
        while True:
            ran.clear()
            graph = tp.DependencyGraph()
            graph.build_dependency(traced, image, run, customized_pruners=pruners, verbose=False)
            found = [module for module in ran if module not in graph.module2node]
            if not found:
                break
            if set(found) & set(unread):
                raise ConfigurationError(f'autograd does not show what its {names[found[0]]} puts out')
            unread.extend(found)  # the last stages of a backbone: they run, and take in what others put out
    finally:
        for handle in handles:
            handle.remove()
    for module, path in names.items():
        outside = isinstance(traced, DetectionTransformer) and path.split('.')[0] not in ('backbone', 'neck')
        if isinstance(module, (_ConvNd, nn.Linear)) and module not in ran and not outside:
            raise ConfigurationError(f'how its {path} ({type(module).__name__}) takes part is not known')
    return graph


class _ChannelwisePruner:
    """What torch-pruning asks of a module that leaves each channel where it is: an L2Norm, a RoI extractor."""
    pruning_dim = 1

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        count = self.get_out_channels(layer)
        narrow(layer, (tuple(channel for channel in range(count) if channel not in set(idxs)), count))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> int:
        return count_channels(layer, 'outputs')

    get_in_channels = get_out_channels

    def get_in_channel_groups(self, layer: nn.Module) -> int:
        return 1

    get_out_channel_groups = get_in_channel_groups


def _find_uses(graph: Any, found: Any, names: dict[nn.Module, str]) -> tuple[Use, ...]:
    """Where a group's channels are; nowhere, if they reach an output or a weight that is no layer's."""
    import torch_pruning as tp
    uses = []
    for item in found:
        module = item.dep.target.module
        if isinstance(module, (tp.ops._OutputOp, nn.Parameter)) or None in item.root_idxs:
            return ()
        if module in names and not (isinstance(module, nn.PReLU) and module.num_parameters == 1):
            makes = graph.is_out_channel_pruning_fn(item.dep.handler)
            uses.append(Use(names[module], 'outputs' if makes else 'inputs', tuple(item.idxs), tuple(item.root_idxs)))
    return tuple(uses)


def _count_parts(layer: nn.Module, side: str) -> int:
    return layer.num_groups if isinstance(layer, nn.GroupNorm) else 1 if is_depthwise(layer) else getattr(
        layer, 'groups', 1)


def _can_lose(uses: Sequence[Use], count: int, parts: int, traced: nn.Module) -> bool:
    """Whether a group's channels can go one by one, or, in parts, one of each part."""
    everyone = tuple(range(count))
    for use in uses:
        if set(Counter(use.roots).values()) != {len(use.roots) // count} or len(set(use.roots)) != count:
            return False
        if _count_parts(traced.get_submodule(use.path), use.side) > 1 and not use.channels == use.roots == everyone:
            return False
    return count % parts == 0 and count >= 2 * parts


# ---------------------------------------------------------------------------------------------------------------- costs


@torch.no_grad()
def count_costs(detector: nn.Module, size: tuple[int, int]) -> Costs:
    """Counts the multiply-accumulate operations for one image of a size in pixels."""
    traced = make_traceable(detector).requires_grad_(False)
    image, layers, once = make_image(traced, size), Counter(), []

    def count(path: str, module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        counted = inputs[0] if getattr(module, 'transposed', False) else output
        once.append(counted.numel() * module.weight.numel() // module.weight.shape[0])
        layers[path] += once[-1] * _count_regions(traced, path)

    handles = [module.register_forward_hook(lambda *call, path=path: count(path, *call))
               for path, module in traced.named_modules() if isinstance(module, (_ConvNd, nn.Linear))]
    with FlopCounterMode(display=False) as counter:
        if isinstance(traced, DetectionTransformer):
            traced._forward(image, make_shape_samples(size, [size]))
        else:
            run_layers(traced, image)
    for handle in handles:
        handle.remove()
    return Costs(dict(layers), counter.get_total_flops() // 2 - sum(once))


def _count_regions(detector: nn.Module, path: str) -> int:
    """How many regions of an image a layer of a RoI head sees at most; 1 for any other."""
    if not path.startswith('roi_head.'):
        return 1
    config = detector.test_cfg or {}
    proposals = (config.get('rpn') or {}).get('max_per_img', PROPOSALS)
    return (config.get('rcnn') or {}).get('max_per_img', DETECTIONS) if 'mask' in path.split('.')[1] else proposals


# --------------------------------------------------------------------------------------------------------- what is kept


def choose_kept(traced: nn.Module, groups: Sequence[Group], costs: Costs, share: float) -> Kept:
    """Takes channels until a detector costs no more than a share of what it does.

    All groups become narrower by the same factor, eight channels at a time, the least important of a group first: so
    the widths that are left are multiples of eight, where a group has sixteen channels and more.

    Args:
        traced: See :func:`make_traceable`.
        groups: Its groups.
        costs: Its costs.
        share: Of its multiply-accumulate operations that are left at most.

    Raises:
        GoalError: What can go is not as much as that.
    """
    widths = {(use.path, use.side): count_channels(traced.get_submodule(use.path), use.side)
              for group in groups for use in group.uses}
    kept = {key: set(range(width)) for key, width in widths.items()}
    layers = {path: float(macs) for path, macs in costs.layers.items()}

    def move(change: Callable[[set, set], None], index: int, roots: frozenset[int]) -> float:
        """Takes channels of a group, or gives them back, and tells what the detector then costs."""
        for use in groups[index].uses:
            change(kept[use.path, use.side],
                   {channel for channel, root in zip(use.channels, use.roots) if root in roots})
            if use.path in layers:
                sides = [key for key in ((use.path, 'outputs'), (use.path, 'inputs')) if key in kept]
                layers[use.path] = costs.layers[use.path] * math.prod(len(kept[key]) / widths[key] for key in sides)
        return sum(layers.values()) + costs.rest

    queue = sorted(((order, index, roots) for index, group in enumerate(groups)
                    for order, roots in _list_blocks(group)), key=itemgetter(0))
    macs, goal, taken = costs.total, share * costs.total, []
    for _, index, roots in queue:
        if macs <= goal:
            break
        macs = move(set.difference_update, index, roots)
        taken.append((index, roots))
    if macs > goal:
        raise GoalError(f'--macs {share:g}: what can be pruned of this detector leaves '
                                 f'{math.ceil(macs / costs.total * 1000) / 1000:g} of its MACs at least.')
    final: set[int] = set()  # groups whose last channels are needed
    for index, roots in reversed(taken):  # what was taken for more than was asked
        if index not in final and move(set.update, index, roots) > goal:
            final.add(index)
            move(set.difference_update, index, roots)
    return {key: (tuple(sorted(left)), widths[key]) for key, left in kept.items() if len(left) < widths[key]}


def _list_blocks(group: Group) -> Iterator[tuple[tuple[float, float], frozenset[int]]]:
    """Lists the channels of a group in the order in which they go, some at a time; at least one of each part stays.

    Yields:
        By what they are ordered among those of all groups, the share of the group that is then gone and what they are
        worth; and the channels.
    """
    size = group.count // group.parts
    worth = group.worth.view(group.parts, size).mean(0)
    order = worth.argsort(stable=True).tolist()
    unit = math.lcm(MULTIPLE, group.parts) // group.parts
    unit = unit if size >= 2 * unit else 1
    first = size % unit or unit
    for start, end in zip([0, *range(first, size, unit)], range(first, size, unit)):
        offsets = order[start:end]
        yield ((end / size, worth[offsets].mean().item()),
               frozenset(offset + part * size for offset in offsets for part in range(group.parts)))


@torch.no_grad()
def check_kept(detector: nn.Module, kept: Kept) -> None:
    """Checks that each layer takes in what others still put out: the graph is drawn from one forward, and can err.

    With norms over several channels left out, the narrowed detector computes what the whole one does if its layers do
    not look at the channels that are gone.

    Raises:
        ConfigurationError: It does not.
    """
    whole, small = (make_traceable(detector).double() for _ in range(2))
    narrow_detector(small, kept)
    for (path, side), width in kept.items():
        layer = whole.get_submodule(path)
        if side == 'inputs':
            dim, (channels, count) = next((dim, cut) for dim, cut in find_cuts(layer, None, width)['weight'].items())
            gone = torch.tensor([channel for channel in range(count) if channel not in set(channels)], dtype=torch.long)
            layer.weight.index_fill_(dim, gone, 0)
        elif not isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm, nn.PReLU, BaseRoIExtractor)):
            for each in (layer, small.get_submodule(path)):
                each.forward = _pass
    image = make_image(whole).double()
    for expected, output in zip(run_layers(whole, image), run_layers(small, image)):
        if expected.shape != output.shape or not torch.allclose(expected, output, rtol=0, equal_nan=True, atol=ROUNDING
                                                                * expected.nan_to_num(0, 0, 0).abs().max().item()):
            raise ConfigurationError('its layers do not fit one another where torch-pruning says that they do')


def _pass(feature: Tensor) -> Tensor:
    return feature
