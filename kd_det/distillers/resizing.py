"""Weights for a student of other widths and depths than the detector it starts from: a selection of them, or copies.

One map carries both, :func:`spread`. It asks for two widths and nothing else, so that a channel is the same one
wherever it is shared: in residual sums, norms, the inputs of the next layer, the levels of a pyramid. By it halves that
are concatenated, groups of a GroupNorm and heads of an attention keep their own channels, too.

Selection (Xu et al., ICLR 2024, arXiv 2311.18823): a smaller student takes channels at even distances, and of each
stage the first layers, or such at even distances. Growth (Net2Net, Chen et al., ICLR 2016, arXiv 1511.05641): a larger
one takes each channel several times, and its further layers are identities; it computes what the small one does.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.necks.ssd_neck import L2Norm
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import ArgumentError
from kd_det.distillers.quantization_plan import DENSE_HEADS, find_predictors
from kd_det.heads.request import ROI_HEAD
from kd_det.teachers.probe import PROBE_SIZE, find_input_channels, find_prior_strides, make_shape_samples

TOLERANCE = 1e-5  # of what a part puts out, in units of the largest number there
ABSENT = 'the teacher has none'
BRANCHES = ('cls_branches', 'reg_branches', 'fc_cls', 'fc_reg')  # of a DETR's head
STACKS = ('cls_convs', 'reg_convs', '.blocks', 'encoder.layers')  # lists of layers that run one after the other
ALIKE = ('groups', 'num_heads', 'num_levels', 'num_points')  # how layers part their channels


def spread(count: int, size: int) -> Tensor:
    """Spreads channels evenly over others: to the i-th of ``size`` belongs i · count // size.

    Args:
        count: How many there are to take from.
        size: How many are wanted. Of more than that fewer are taken, at even distances; of less each several times.

    Returns:
        (size,), for each channel that is wanted the one that it is taken from.

    Example:
        >>> spread(8, 3).tolist(), spread(2, 4).tolist()
        ([0, 2, 5], [0, 0, 1, 1])
    """
    return torch.arange(size) * count // size


def spread_cells(count: int, size: int, cells: int = 1) -> Tensor:
    """:func:`spread` for the inputs of a linear layer, which a map of so many cells was flattened to.

    Example:
        >>> spread_cells(8, 4, cells=2).tolist()
        [0, 1, 4, 5]
    """
    return (spread(count // cells, size // cells)[:, None] * cells + torch.arange(cells)).flatten()


def resize(tensor: Tensor, shape: Sequence[int], cells: int = 1) -> Tensor:
    """Takes entries of a tensor by :func:`spread`, along each dimension that is of another size.

    Args:
        tensor: Such as the weight (C_out, C_in, …) of a layer.
        shape: The sizes that are wanted.
        cells: See :func:`spread_cells`, for the second dimension.
    """
    for dim, (count, size) in enumerate(zip(tensor.shape, shape)):
        if count != size:
            index = spread_cells(count, size, cells if dim == 1 else 1)
            tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor


def share_inputs(tensor: Tensor, index: Tensor, dim: int, noise: float = 0.0) -> Tensor:
    """Divides the weights of copied inputs among the copies, so that their sum is what the one had.

    Copies that do alike get the same gradient and never part. With unequal shares they do, and the sum stays: the noise
    of Net2Wider without its error.

    Args:
        tensor: A weight whose inputs are copies already.
        index: (C_in,), which input each was copied from.
        dim: The dimension of the inputs.
        noise: How unequal, as the standard deviation of a share in units of its mean; drawn for each weight, from
            PyTorch's generator.
    """
    index = index.to(tensor.device)
    copies = torch.bincount(index)[index].to(tensor).view([-1 if each == dim else 1 for each in range(tensor.dim())])
    shares = torch.ones_like(tensor)
    if noise:
        drawn = torch.randn(tensor.shape).to(tensor)
        sums = torch.zeros_like(drawn).index_add_(dim, index, drawn)
        shares += noise * torch.where(copies > 1, drawn - sums.index_select(dim, index) / copies, 0)
    return tensor * shares / copies


# ---------------------------------------------------------------------------------- what a layer has in the teacher


class Match(NamedTuple):
    """What a tensor of the student has in the teacher.

    Attributes:
        key: Of the student's state dict.
        source: The teacher's tensor that does the same there; None where there is none.
        place: Where the two part, if they do: a module of the student, or the key.
        problem: How; empty where :func:`resize` serves.
    """
    key: str
    source: Tensor | None
    place: str = ''
    problem: str = ''


def match_tensors(student: nn.Module, teacher: nn.Module, counterparts: Mapping[str, str | None],
                  source: Mapping[str, Tensor]) -> Iterator[Match]:
    """Finds for each tensor of the student that of the teacher which it may be made from, or why there is none.

    Args:
        student: The detector that is to start.
        teacher: The one that it starts from.
        counterparts: For each key of the student's state dict, the teacher's key.
        source: The teacher's state dict.
    """
    state, fixed = student.state_dict(), find_fixed_outputs(student)
    own, theirs = (dict(model.named_modules(remove_duplicate=False)) for model in (student, teacher))
    for key, counterpart in counterparts.items():
        path, other = key.rpartition('.')[0], (counterpart or key).rpartition('.')[0]
        found = None if counterpart is None else source.get(counterpart)
        place, problem = _compare_modules(path, other, own, theirs)
        if not problem and found is None:
            place, problem = key, ABSENT
        if not problem:
            place, problem = key, _compare_shapes(state[key].shape, found.shape, own[path] in fixed, own[path])
        yield Match(key, found, place, problem) if problem else Match(key, found)


def _compare_modules(path: str, other: str, own: Mapping[str, nn.Module],
                     theirs: Mapping[str, nn.Module]) -> tuple[str, str]:
    """The outermost module on the way to a layer that is another's in the teacher, and what it is there."""
    steps = zip(*(accumulate(each.split('.'), '{}.{}'.format) for each in (path, other)))
    for place, its_place in steps if path else ():
        here, there = own[place], theirs.get(its_place)
        if there is None:
            return place, ABSENT
        kinds = [_BatchNorm if isinstance(each, _BatchNorm) else type(each) for each in (here, there)]
        if kinds[0] is not kinds[1]:
            return place, f'{_name(there)} in the teacher, {_name(here)} here'
        for name in ALIKE if not isinstance(here, ConvModule) else ():  # which says what its convolution does
            numbers = [getattr(each, name, None) for each in (here, there)]
            if numbers[0] != numbers[1] and not (is_depthwise(here) and is_depthwise(there)):
                return place, f'{name}={numbers[1]} in the teacher, {numbers[0]} here'
    return '', ''


def _name(module: nn.Module) -> str:
    name = type(module).__name__
    return f"a{'n' * (name[0] in 'AEIOU')} {name}"


def _compare_shapes(shape: torch.Size, other: torch.Size, is_fixed: bool, layer: nn.Module) -> str:
    """Why a tensor can not be made from that of another shape; empty where it can."""
    if len(shape) != len(other) or shape[2:] != other[2:]:
        return _compare_numbers(other, shape)
    out = int(is_transposed(layer) and len(shape) > 1)
    if is_fixed and shape[out:out + 1] != other[out:out + 1]:
        return f'{other[out]} outputs in the teacher, {shape[out]} here'
    return ''


def _compare_numbers(there: Sequence[int], here: Sequence[int]) -> str:
    return f'{tuple(there)} in the teacher, {tuple(here)} here'


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of each channel by itself."""
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer's weight has its inputs first."""
    return bool(getattr(layer, 'transposed', False))


def find_fixed_outputs(detector: nn.Module) -> set[nn.Module]:
    """Finds the layers whose outputs are no channels but what is predicted, and embeddings of classes.

    Raises:
        ArgumentError: The detector can not be shown an image to find them by.
    """
    try:
        found = set(map(detector.get_submodule, find_predictors(detector)))
    except Exception as error:  # whatever heads raise that are not known
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ArgumentError('model.inherit_by', f'which layers of {_name(detector)} predict can not be told ({why}): '
                                                "expected 'shape'.") from error
    for path, module in detector.named_modules():
        name = path.rpartition('.')[2]
        if name in ('conv_logits', 'label_embedding'):  # of a mask head; of a DETR's denoising
            found.add(module)
        elif name in BRANCHES and hasattr(detector, 'decoder'):
            for branch in module if isinstance(module, nn.ModuleList) else [module]:
                found.add([layer for layer in branch.modules() if isinstance(layer, nn.Linear)][-1])
    return found


def find_flattened(detector: nn.Module) -> dict[str, int]:
    """Finds the linear layers that take in flattened maps of regions, and how many cells these have."""
    found = {}
    for path, head in detector.named_modules():
        if isinstance(head, BBoxHead) and not head.with_avg_pool:
            for task in ('cls', 'reg'):
                layers = [f'{path}.{name}.0' for name in ('shared_fcs', f'{task}_fcs') if len(getattr(head, name, ()))]
                found[(layers or [f'{path}.fc_{task}'])[0]] = head.roi_feat_area
    return found


# --------------------------------------------------------------------------------------------------- a smaller student

def find_spread_layers(student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    """Finds for each tensor of a shallower student that of the layer at the same share of the teacher's depth.

    Of a stack of n layers for which the teacher has m, the i-th takes the i · m // n-th, the first the first. A stack
    is what runs one after the other and is of one kind: the blocks of a stage, the convolutions of a head's tower, the
    layers of an encoder. Those of a decoder, whose heads belong to them, and of pyramids, whose layers are levels, keep
    their places.

    Returns:
        Key of the student's state dict -> key of the teacher's, for those that differ.
    """
    theirs, moved = dict(teacher.named_modules(remove_duplicate=False)), dict[str, str]()
    for path, stack in student.named_modules(remove_duplicate=False):
        here, there = (_list_stack(path, each) for each in (stack, theirs.get(path)))
        if here and len({type(each) for _, each in (*here, *there)}) == 1 and len(there) > len(here):
            for (name, layer), origin in zip(here, spread(len(there), len(here)).tolist()):
                moved.update({f'{path}.{name}.{key}': f'{path}.{there[origin][0]}.{key}' for key in layer.state_dict()
                              if name != there[origin][0]})
    return moved


def _list_stack(path: str, module: nn.Module | None) -> list[tuple[str, nn.Module]]:
    """The layers of what may be a stack, with their names; none for what is none."""
    listed = isinstance(module, nn.ModuleList) and path.endswith(STACKS)
    return [*module.named_children()] if isinstance(module, nn.Module) and (
        listed or isinstance(module, nn.Sequential)) else []


def select(student: nn.Module, matches: Iterable[Match]) -> tuple[dict[str, Tensor], list[str]]:
    """Selects weights of a larger detector.

    Args:
        student: The detector that is to start; it is only read.
        matches: See :func:`match_tensors`.

    Returns:
        State-dict key -> tensor of the student's shape, where there is one; and what stays as it is, each with why.
        Where blocks of a backbone are of another kind all of it does, for its layers know each other alone.
    """
    state, cells, matches = student.state_dict(), find_flattened(student), list(matches)
    selected, refused = dict[str, Tensor](), dict[str, str]()
    others = [match for match in matches if match.key.startswith('backbone.') and match.problem not in ('', ABSENT)
              and match.place != match.key]
    if others:
        refused['backbone'] = f'{others[0].place}: {others[0].problem}'
    for key, found, place, problem in matches:
        if others and key.startswith('backbone.'):
            continue
        if problem or found is None:
            refused.setdefault(place, problem)
        elif any(map(int.__lt__, found.shape, state[key].shape)):
            refused[key] = _compare_numbers(found.shape, state[key].shape)
        else:
            selected[key] = resize(found, state[key].shape, _count_cells(key, cells))
    return selected, [f'{place} ({problem})' for place, problem in refused.items()]


def _count_cells(key: str, cells: Mapping[str, int]) -> int:
    return cells.get(key.rpartition('.')[0], 1)


# ---------------------------------------------------------------------------------------------------- a larger student


def grow(student: nn.Module, teacher: nn.Module, matches: Iterable[Match], noise: float = 0.0) -> dict[str, Tensor]:
    """Makes the weights of a larger detector that computes what a small one does, in eval mode.

    Args:
        student: The larger detector; it is only read.
        teacher: The small one.
        matches: See :func:`match_tensors`, of all its tensors.
        noise: See :func:`share_inputs`.

    Returns:
        State-dict key -> tensor of the student's shape. In further residual blocks all but the last norm is left out:
        that is 0, and so is what they add.

    Raises:
        ArgumentError: It can not compute the same; the message names the layer and says why.
    """
    state, cells = student.state_dict(), find_flattened(student)
    modules, grown, added = dict(student.named_modules(remove_duplicate=False)), dict[str, Tensor](), dict[str, None]()
    for key, found, place, problem in matches:
        if problem == ABSENT and place != key:
            added[place] = None
        elif problem or found is None:
            refuse_growth(place, problem)
        elif found.shape == state[key].shape:
            grown[key] = found
        else:
            grown[key] = _widen(key, found, state[key].shape, modules[key.rpartition('.')[0]], _count_cells(key, cells),
                                noise)
    for place, norm in teacher.named_modules():
        groups = getattr(modules.get(place), 'num_groups', None)
        if isinstance(norm, nn.GroupNorm) and groups != norm.num_groups:
            refuse_growth(place, f'num_groups={norm.num_groups} in the teacher, {groups} here')
    for key in teacher.state_dict().keys() - state.keys():
        refuse_growth(key, 'the teacher has it, and the student lacks it')
    for place in added:
        grown.update(_make_identity(place, modules))
    return grown


def refuse_growth(place: str, problem: str) -> NoReturn:
    """Says which part of a student keeps it from computing what the teacher does."""
    raise ArgumentError('model.inherit_by', f"by 'growth' the student computes what the teacher does, which {place} "
                                            f'can not: {problem}.')


def _widen(key: str, found: Tensor, shape: torch.Size, layer: nn.Module, cells: int, noise: float) -> Tensor:
    """Widens a tensor of a layer; see :func:`grow`."""
    place = key.rpartition('.')[0]
    if any(map(int.__gt__, found.shape, shape)):
        refuse_growth(key, _compare_numbers(found.shape, shape))
    if isinstance(layer, (nn.GroupNorm, L2Norm)) and shape[0] % found.shape[0]:
        refuse_growth(place, f'{_name(layer)} needs each channel as often as the others, so a multiple of '
                             f'{found.shape[0]} channels instead of {shape[0]}')
    if not isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm, nn.GroupNorm, L2Norm)):
        refuse_growth(place or key, f'{_name(layer)} does not do the same with copied channels')
    widened = resize(found, shape, cells)
    if isinstance(layer, L2Norm):  # it divides by the root of a sum over them
        widened *= math.sqrt(shape[0] / found.shape[0])
    if isinstance(layer, (_ConvNd, nn.Linear)) and len(shape) > 1:
        dim = 0 if is_transposed(layer) else 1
        if found.shape[dim] != shape[dim]:
            widened = share_inputs(widened, spread_cells(found.shape[dim], shape[dim], cells if dim == 1 else 1), dim,
                                   noise)
    return widened


def _make_identity(place: str, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Makes a further layer of a stack do nothing to what it is given: the outputs of a ReLU, which are not negative.

    Raises:
        ArgumentError: It can not.
    """
    layer, (stack, _, index) = modules[place], place.rpartition('.')
    before = modules.get(f'{stack}.{int(index) - 1}') if index.isdecimal() else None
    if before is None or type(before) is not type(layer):
        refuse_growth(place, ABSENT)
    if isinstance(layer, (BasicBlock, Bottleneck)):
        if layer.downsample is not None:
            refuse_growth(place, f'it changes what it passes on, and {ABSENT}')
        name = layer.norm3_name if isinstance(layer, Bottleneck) else layer.norm2_name
        return {f'{place}.{name}.{key}': torch.zeros_like(each)
                for key, each in getattr(layer, name).named_parameters()}
    if isinstance(layer, nn.Linear):
        return _fill_identity(place, layer)
    without = 'without ReLU' if isinstance(layer, ConvModule) else 'of this kind'
    if not isinstance(layer, ConvModule) or not isinstance(getattr(layer, 'activate', None), nn.ReLU):
        refuse_growth(place, f'{ABSENT}, and {_name(layer)} {without} can not be an identity')
    if layer.with_norm and not isinstance(layer.norm, _BatchNorm):
        refuse_growth(place, f'{ABSENT}, and with {_name(layer.norm)} no layer is an identity')
    identity = _fill_identity(f'{place}.conv', layer.conv)
    if layer.with_norm:
        norm, prefix = layer.norm, f'{place}.{layer.norm_name}'
        identity.update({f'{prefix}.weight': torch.full_like(norm.weight, math.sqrt(1 + norm.eps)),
                         f'{prefix}.bias': torch.zeros_like(norm.bias),
                         f'{prefix}.running_mean': torch.zeros_like(norm.running_mean),
                         f'{prefix}.running_var': torch.ones_like(norm.running_var)})
    return identity


def _fill_identity(place: str, layer: nn.Module) -> dict[str, Tensor]:
    """The weights of a convolution or linear layer that passes on what it takes in."""
    weight = torch.zeros_like(layer.weight)
    if isinstance(layer, nn.Linear):
        nn.init.eye_(weight)
    else:
        nn.init.dirac_(weight, layer.groups)
    bias = {} if layer.bias is None else {f'{place}.bias': torch.zeros_like(layer.bias)}
    return {f'{place}.weight': weight, **bias}


@torch.no_grad()
def check_growth(student: nn.Module, teacher: nn.Module) -> None:
    """Checks that two detectors compute the same of an image of noise, in float64; both are left as they are.

    What is no weight, such as strides, activations, anchors or the images' normalisation, may differ, too.

    Raises:
        ArgumentError: They do not; the message names the first part that differs.
    """
    size = math.ceil(max((PROBE_SIZE, *find_prior_strides(student))))
    image = torch.randint(0, 256, (find_input_channels(student), size, size), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    with preserved_randomness():
        outputs = [_run_parts(copy.deepcopy(each).cpu().double().eval(), image) for each in (teacher, student)]
    for part, expected in outputs[0].items():
        computed = outputs[1].get(part, [])
        if len(expected) != len(computed):
            refuse_growth(part, 'it puts out other things')
        for one, other in zip(expected, computed):
            one = resize(one, other.shape)
            largest = one.abs().max().item()
            if not torch.allclose(one, other, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
                refuse_growth(part, f'it puts out numbers up to {largest:.3g} that are {(one - other).abs().max():.3g} '
                                    'off on an image of noise; what is no weight must be the same in both')


def _run_parts(detector: nn.Module, image: Tensor) -> dict[str, list[Tensor]]:
    """What the parts of a detector put out; of a transformer nothing, for its weights are the same."""
    height, width = image.shape[-2:]
    samples = make_shape_samples((height, width), [(height, width)])
    images = detector.data_preprocessor(dict(inputs=[image], data_samples=samples), False)['inputs'].double()
    maps = detector.backbone(images)
    features = detector.neck(maps) if detector.with_neck else maps
    outputs: dict[str, Any] = dict(backbone=maps, neck=features)
    if not hasattr(detector, 'decoder'):
        for name in DENSE_HEADS:
            if hasattr(detector, name):
                outputs[name] = getattr(detector, name)(features)
        if hasattr(detector, ROI_HEAD):
            boxes = images.new_tensor([[0, 0, width / 2, height / 2], [width / 4, 0, width, height / 2]])
            regions = InstanceData(bboxes=boxes)
            outputs[ROI_HEAD] = detector.roi_head.forward(features, [regions], samples)
    return {name: [each for each in tree_leaves(found) if isinstance(each, Tensor)]
            for name, found in outputs.items()}
