"""Where the student's weights come from: pretrained files, the first teacher, a checkpoint, or chance."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmcv.cnn import is_norm
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint_with_prefix
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Weight, at, check_arguments, declared, refuse
from kd_det.config.choices import InheritanceRule
from kd_det.config.composition import find_part_keys
from kd_det.distillers.resizing import check_growth, find_spread_layers, grow, match_tensors, select
from kd_det.teachers.loading import is_pretrained
from kd_det.teachers.teacher import Teacher

AUTO = ('auto', )  # in place of parts
OF_RULES = ('selected', 'grown')  # what is not the teacher's weight as it is
ORIGINS = ('random', 'pretrained', 'inherited', *OF_RULES, 'checkpoint')
BRANCH = re.compile(r'(bbox_head\.(?:cls|reg)_branches)\.(\d+)\.(.+)')


class WeightOrigins:
    """Keeps, for each parameter of a model, the last source that set it: the answer to «why is my student random?».

    Args:
        model: The model; all its parameters start as ``'random'``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        self._origins = dict.fromkeys(self._sizes, 'random')

    def mark(self, names: Iterable[str], origin: str) -> None:
        """Notes that ``origin`` (one of :data:`ORIGINS`) set these parameters; unknown names are passed over."""
        if origin not in ORIGINS:
            raise ValueError(f"origin='{origin}': expected one of {', '.join(ORIGINS)}.")
        self._origins.update(dict.fromkeys(self._sizes.keys() & set(names), origin))

    def count_by_part(self) -> dict[str, dict[str, int]]:
        """Counts the weights by part (``backbone``, ``neck``, …) and origin."""
        parts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(ORIGINS, 0))
        for name, origin in self._origins.items():
            parts[name.split('.')[0]][origin] += self._sizes[name]
        return dict(parts)


@declared
@dataclass(frozen=True)
class Inheritance:
    """How a student inherits: ``model.inherit_by``.

    Args:
        rule: ``'shape'``: layers of the student's shapes are copied. ``'selection'``, for a smaller student: of the
            larger ones entries at even distances, see :func:`~kd_det.distillers.resizing.select`. ``'growth'``, for a
            larger student: it computes what the teacher does, see :func:`~kd_det.distillers.resizing.grow`.
        noise: How unequally copies of a channel share what it had, with ``'growth'``; so they learn to differ.
        layers: Which layers of the teacher's a shallower student takes, with ``'selection'``: of each stage the
            ``'first'``, or layers at ``'even'`` distances, see
            :func:`~kd_det.distillers.resizing.find_spread_layers`.
    """
    rule: InheritanceRule = 'shape'
    noise: Weight = 0.1
    layers: Literal['first', 'even'] = 'first'


def build_inheritance(by: str | dict[str, Any]) -> Inheritance:
    """Builds what ``model.inherit_by`` says: a rule, or a dict of arguments.

    Raises:
        ArgumentError: An argument is wrong.
    """
    with at('model.inherit_by'):
        given = dict(rule=by) if isinstance(by, str) else by
        check_arguments(Inheritance, given)
        if given.get('layers', 'first') != 'first' and given.get('rule') != 'selection':
            refuse('layers', given['layers'], "it beside rule='selection' alone")
        return Inheritance(**given)


def start_student(student: nn.Module, teacher: Teacher | None, parts: Sequence[str], by: Inheritance,
                  origins: WeightOrigins) -> tuple[tuple[str, ...], list[str]]:
    """Starts parts of the student from the first teacher, and notes which.

    Args:
        student: The detector that is written to.
        teacher: The first teacher, which has not run yet; None where the first guide is no detector.
        parts: As ``model.inherit`` names them.
        by: How.
        origins: Where the student's weights came from; it is told.

    Returns:
        The names of the parts; and what could not be inherited.

    Raises:
        ConfigurationError: There is no such part, no such teacher, or the student can not do what the rule asks for.
    """
    if by.rule != 'shape' and hasattr(student, 'select_kept'):
        refuse('model.inherit_by', by.rule, "'shape' for a pruned student, which takes the channels that it kept")
    if by.rule == 'growth' and tuple(parts) != AUTO:
        refuse('model.inherit', parts, "'auto' beside inherit_by='growth'", 'All parts grow, or none.')
    if tuple(parts) == AUTO:
        parts = find_common_parts(student, teacher.model, by.rule != 'shape') if teacher else ()
    if by.rule == 'growth' and teacher:
        parts = tuple(dict.fromkeys(key.split('.')[0] for key in student.state_dict()))
    if parts and teacher is None:
        refuse('model.inherit', tuple(parts), 'no parts, as the first guide is no frozen detector')
    if by.rule != 'shape' and not parts:
        refuse('model.inherit_by', by.rule, "'shape' where nothing is inherited",
               'model.inherit names parts, of a frozen detector that comes first in model.teacher.')
    if teacher is None:
        return tuple(parts), []
    inherited, refused = inherit(student, teacher, parts, by)
    for origin in set(inherited.values()):
        origins.mark((key for key, each in inherited.items() if each == origin), origin)
    return tuple(parts), refused


def inherit(student: nn.Module, teacher: Teacher | nn.Module, parts: Iterable[str],
            by: Inheritance = Inheritance()) -> tuple[dict[str, str], list[str]]:
    """Starts parts of the student from the teacher's, where the same name stands for it, see :func:`find_counterpart`.

    A layer is inherited whole or not at all: a bias says nothing of other weights. So are the statistics of a norm,
    with the layer that it follows; its scale and shift come over anyhow, for they say what the layers behind it expect.
    A pruned student takes the channels that it kept, where its own would agree had it not been pruned.

    Args:
        student: The detector that is written to.
        teacher: The detector that is read.
        parts: Names of modules of the student, e.g. ``('neck', 'rpn_head', 'roi_head')``.
        by: How.

    Returns:
        The state-dict keys that were inherited, each with its origin, see :data:`ORIGINS`; and what could not be: keys,
        or places with a reason in brackets.

    Raises:
        ConfigurationError: The student has no such part, or can not do what the rule asks for.
    """
    source, target = teacher.state_dict(), student.state_dict()
    if hasattr(student, 'select_kept'):
        source = student.select_kept(source)
    counterparts = {key: find_counterpart(key, target, source) for part in parts
                    for key in find_part_keys(target, part)}
    found = {key: source.get(counterpart) for key, counterpart in counterparts.items()}
    if by.rule == 'shape':
        made = {key: each for key, each in found.items() if each is not None and each.shape == target[key].shape}
        refused = [key for key in found if key not in made]
    else:
        model = getattr(teacher, 'model', teacher)
        if by.layers == 'even':
            spread = find_spread_layers(student, model)
            counterparts = {key: each and spread.get(key, each) for key, each in counterparts.items()}
            found = {key: source.get(counterpart) for key, counterpart in counterparts.items()}
        matches = list(match_tensors(student, model, counterparts, source))
        if by.rule == 'selection':
            made, refused = select(student, matches)
        else:
            with preserved_randomness():
                made, refused = grow(student, model, matches, by.noise), []
    torn = [] if by.rule == 'growth' else find_torn(student, found, made)  # what grows does so whole
    for key in torn:
        del made[key]
    refused += [f'{key} (its layer stays)' for key in torn]
    for key, each in made.items():
        target[key].copy_(each)
    if by.rule == 'growth':
        check_growth(student, model)
    changed = 'selected' if by.rule == 'selection' else 'grown'
    return {key: 'inherited' if each is found[key] else changed for key, each in made.items()}, refused


def find_torn(student: nn.Module, keys: Iterable[str], fitting: Container[str]) -> list[str]:
    """Finds the tensors that fit but belong to a layer of which another does not.

    Args:
        student: The detector.
        keys: Of its state dict, whose tensors are tried.
        fitting: Those that fit.

    Returns:
        Of the keys that fit those of layers that do not fit whole, and of the statistics of norms that follow such a
        layer in its module, as in a ConvModule or a block of a ResNet.
    """
    keys_of: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        keys_of[key.rpartition('.')[0]].append(key)
    torn = {path for path, its in keys_of.items() if any(key not in fitting for key in its)}
    found = {key for path in torn for key in keys_of[path]}
    for path, module in student.named_modules(remove_duplicate=False):
        before = ''
        for name, child in module.named_children():
            place = f'{path}.{name}'.lstrip('.')
            if is_norm(child):
                found |= {f'{place}.{buffer}' for buffer in child._buffers if before in torn}
            elif child.state_dict():  # an activation between the two parts nothing
                before = place
    return [key for key in keys if key in found and key in fitting]


def find_common_parts(student: nn.Module, teacher: nn.Module, with_backbone: bool = False) -> tuple[str, ...]:
    """Finds the parts of two detectors that are of the same type and hold weights, by default without the backbones.

    A weight of the detector itself, as the level embeddings of a Deformable DETR, is a part too.
    """
    theirs = {**dict(teacher.named_children()), **teacher._parameters}
    modules = [name for name, part in student.named_children()
               if (with_backbone or name != 'backbone') and type(part) is type(theirs.get(name)) and part.state_dict()]
    return (*modules, *(name for name in student._parameters if name in theirs))


def find_counterpart(key: str, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> str | None:
    """Finds the key of the teacher's weight that does what the student's of this key does; None where there is none.

    It is the same key but in the head of a two-stage DETR, which has a branch for each decoder layer and, as the last,
    one that makes proposals of the encoder's output: with another number of layers it stands elsewhere.

    Args:
        key: A key of the student's state dict.
        student: The student's state dict.
        teacher: The teacher's.
    """
    branch = BRANCH.fullmatch(key)
    own, theirs = (_find_proposal_branch(state) for state in (student, teacher)) if branch else (None, None)
    if own == theirs or int(branch[2]) not in (own, theirs):
        return key
    return f'{branch[1]}.{theirs}.{branch[3]}' if int(branch[2]) == own and theirs is not None else None


def _find_proposal_branch(state: dict[str, Tensor]) -> int | None:
    """Finds the index of the branch of a two-stage DETR's head that makes proposals; None if there is none."""
    branches, layers = ({re.match(path + r'\.(\d+)\.', key)[1] for key in state if key.startswith(f'{path}.')}
                        for path in ('bbox_head.cls_branches', 'decoder.layers'))
    return len(layers) if len(branches) == len(layers) + 1 else None


def find_pretrained_parameters(model: nn.Module) -> Iterator[str]:
    """Finds the names of the parameters that an ``init_cfg=dict(type='Pretrained', …)`` sets.

    mmengine loads such files without strictness, so what they hold decides, not the config.
    """
    for path, module in model.named_modules():
        init_cfg = getattr(module, 'init_cfg', None) or ()
        for config in (init_cfg, ) if isinstance(init_cfg, dict) else init_cfg:
            if is_pretrained(config):
                state = _load_pretrained(config)
                yield from (f'{path}.{name}'.lstrip('.') for name, parameter in module.named_parameters()
                            if name in state and state[name].shape == parameter.shape)


def _load_pretrained(config: dict) -> dict[str, Tensor]:
    if config.get('prefix'):
        return _load_checkpoint_with_prefix(config['prefix'], config['checkpoint'], map_location='cpu')
    loaded = CheckpointLoader.load_checkpoint(config['checkpoint'], map_location='cpu', logger='silent')
    return {re.sub(r'^module\.', '', key): value for key, value in loaded.get('state_dict', loaded).items()}
