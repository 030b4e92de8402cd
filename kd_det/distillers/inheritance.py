"""Where the student's weights come from: pretrained files, the first teacher, a checkpoint, or chance."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint_with_prefix
from torch import Tensor, nn

from kd_det.config.composition import find_part_keys
from kd_det.teachers.loading import is_pretrained

ORIGINS = ('random', 'pretrained', 'inherited', 'checkpoint')
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


def inherit(student: nn.Module, teacher: nn.Module, parts: Iterable[str]) -> tuple[list[str], list[str]]:
    """Starts parts of the student from the teacher's, wherever name and shape agree, see :func:`find_counterpart`.

    A pruned student takes the channels that it kept, where its own would agree had it not been pruned.

    Args:
        student: The detector that is written to.
        teacher: The detector that is read.
        parts: Names of modules of the student, e.g. ``('neck', 'rpn_head', 'roi_head')``.

    Returns:
        The state-dict keys that were inherited, and those that could not be.

    Raises:
        ConfigurationError: The student has no such part.
    """
    source, target = teacher.state_dict(), student.state_dict()
    if hasattr(student, 'select_kept'):
        source = student.select_kept(source)
    inherited, refused = [], []
    for part in parts:
        for key in find_part_keys(target, part):
            found = source.get(find_counterpart(key, target, source))
            fits = found is not None and found.shape == target[key].shape
            (inherited if fits else refused).append(key)
            if fits:
                target[key].copy_(found)
    return inherited, refused


def find_common_parts(student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """Finds the parts of two detectors that are of the same type and hold weights, without the backbones.

    A weight of the detector itself, as the level embeddings of a Deformable DETR, is a part too.
    """
    theirs = {**dict(teacher.named_children()), **teacher._parameters}
    modules = [name for name, part in student.named_children()
               if name != 'backbone' and type(part) is type(theirs.get(name)) and part.state_dict()]
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
