"""Finds a teacher's config, weights and class names; weights are loaded strictly: no key lacks, is left or misfits."""
from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kd_det.compat import CheckpointError, load_checkpoint, require_finite
from kd_det.config.classes import Names, find_dataset_classes, get_first_metainfo
from kd_det.config.detectors import ModelConfig, TeacherError
from kd_det.config.files import get_type_name, list_leaf_datasets, load_config
from kd_det.registry import get_scope, within_scope

# Where programs keep a model's weights, in the order in which they are looked for. MMEngine's EMA is in the first.
WEIGHTS = ('state_dict', 'model', 'model_state_dict', 'model_state', 'net', 'network', 'weights', 'params')
# What else in a checkpoint holds tensors.
OTHERS = ('meta', 'message_hub', 'optimizer', 'optimizers', 'param_schedulers', 'scheduler', 'lr_scheduler', 'distill')
WRAPPERS = re.compile(r'^(?:module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.')  # of data-parallel training, torch.compile
COUNTERS = ('steps', 'n_averaged')  # of the wrappers that average weights


@contextmanager
def explain_model_errors(config: ModelConfig) -> Iterator[None]:
    """Names the teacher's config, which is another file than the run's, where its model can not be built.

    Raises:
        TeacherError: A type is in no registry, or takes other arguments.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        if type(error).__module__.split('.')[0] == 'kd_det':
            raise
        reason = error.args[0] if isinstance(error, KeyError) else error
        remedy = (' Import the package that has it with custom_imports in that config, and write types of other '
                  'packages with their scope, such as mmdet.ResNet.' if ' registry' in str(reason) else '')
        raise TeacherError(f"The model of the teacher's config {config!r:.200} can not be used: "
                           f'{type(error).__name__}: {reason}.{remedy}') from error


def remove_pretrained(config: Any) -> Any:
    """Copies a model dict without what would load weights from somewhere: each ``Pretrained``, and ``pretrained=``."""
    if isinstance(config, (list, tuple)):
        return type(config)(remove_pretrained(each) for each in config if not is_pretrained(each))
    if not isinstance(config, dict):
        return config
    return type(config)({key: remove_pretrained(value) for key, value in config.items()
                         if key != 'pretrained' and not is_pretrained(value)})


def is_pretrained(config: Any) -> bool:
    """Whether a part of a model dict is an ``init_cfg`` that loads a checkpoint; PVT's and its kin's have no type."""
    if get_type_name(config):
        return get_type_name(config) in ('Pretrained', 'PretrainedInit')
    return isinstance(config, dict) and 'checkpoint' in config and 'config' not in config


def load_strictly(model: nn.Module, checkpoint: str, allow_missing: Sequence[str] = (),
                  allow_unexpected: Sequence[str] = (), role: str = 'teacher',
                  checkpoint_prefix: str | None = None,
                  convert: Callable[[OrderedDict[str, Tensor]], OrderedDict[str, Tensor]] | None = None) -> dict:
    """Loads a checkpoint into a detector, and refuses what does not fit to the last key.

    Args:
        model: The detector.
        checkpoint: A file, or an address that mmengine's ``CheckpointLoader`` knows.
        allow_missing: Shell patterns (``'roi_head.*'``) of keys that the file may lack.
        allow_unexpected: Shell patterns of keys in the file that the model need not have.
        role: What the detector is, for the message.
        checkpoint_prefix: Loads only the keys that begin with it, without it: ``'teacher.'`` of a file that holds
            ``teacher.backbone…`` and ``student.backbone…``, or has weights in entries ``teacher`` and ``student``;
            ``'ema_'`` also undoes MMDetection 2's ``ema_backbone_conv1_weight``.
        convert: Gives the weights the names that the model has for them.

    Returns:
        The checkpoint's ``meta``, see :func:`~kd_det.compat.load_checkpoint`.

    Raises:
        CheckpointError: The file has no weights, or several and no prefix tells which, or none with the prefix; or keys
            are missing, unexpected or of another shape; or weights are not finite. The message names what there is.
    """
    loaded = _read_file(checkpoint)
    expected = model.state_dict()
    state = find_weights(loaded, checkpoint, role, checkpoint_prefix, expected)
    if convert is not None:
        state = convert(state)
    misshapen = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    whole = list(state)
    shapes = {key: f'{key} (file {tuple(state.pop(key).shape)}, model {tuple(expected[key].shape)})'
              for key in misshapen}
    # Only PyTorch's own loading knows the keys that a module renames from older versions of itself.
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Very old checkpoints lack BatchNorm's step counters, which inference does not read.
    missing = [key for key in missing if key not in shapes and not key.endswith('num_batches_tracked')]
    place = {key: index for index, key in enumerate(state)}  # a key that its module renamed has none
    unexpected = sorted(unexpected, key=lambda key: place.get(key, len(place)))
    faults = {'missing from the file': _filter_disallowed(missing, allow_missing),
              'unexpected in the file': _filter_disallowed(unexpected, allow_unexpected),
              'of another shape': list(shapes.values())}
    if any(faults.values()):
        lines = [f'{len(keys)} keys {fault}: {_abbreviate(keys)}' for fault, keys in faults.items() if keys]
        advice = _suggest_prefix(whole, expected, role, not missing and not shapes)
        raise CheckpointError(f"The checkpoint '{checkpoint}' does not fit the {role} {type(model).__name__}.\n  "
                              + '\n  '.join([*([advice] if advice else []), *lines])
                              + '\nUse the config that the checkpoint was trained with'
                              + ('; if these keys do not matter, allow them with teacher.allow_missing / '
                                 'teacher.allow_unexpected (shell patterns).' if role == 'teacher' else '.'))
    # What is missing may be whatever the memory held.
    given = {key: value for key, value in model.state_dict().items() if key not in missing}
    require_finite(given, checkpoint, role, dict(model.named_parameters()))
    return loaded.get('meta', {})


def _read_file(checkpoint: str) -> dict:
    """Reads a checkpoint; of one in safetensors, which holds nothing but weights, those."""
    path = Path(checkpoint).expanduser()
    if path.suffix != '.safetensors' or not path.is_file():
        return load_checkpoint(checkpoint, map_location='cpu')
    from safetensors import SafetensorError  # comes with timm
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f'{checkpoint} cannot be read as safetensors: {error}. If it should be one, it is '
                              'damaged: copy or download it again.') from error


def check_some_fit(model: nn.Module, checkpoint: str) -> None:
    """Checks that a training has something to start from: MMEngine loads what fits, which may be nothing.

    Args:
        model: The student. It stays as it is.
        checkpoint: See :func:`load_strictly`.

    Raises:
        CheckpointError: The file has no weights, or none with the name and the shape of one of the student's; or those
            that have are not finite.
    """
    expected = model.state_dict()
    state = find_weights(load_checkpoint(checkpoint, map_location='cpu'), checkpoint, 'student', None, expected)
    fitting = {key: state[key] for key, value in expected.items() if key in state and state[key].shape == value.shape}
    require_finite(fitting, checkpoint, 'student', dict(model.named_parameters()))
    if any(value.dim() for value in fitting.values()):
        return
    advice = (_suggest_prefix(list(state), expected, 'student', False)
              or f'Its keys begin with {_format_counts(_count_first_parts(state))}.')
    raise CheckpointError(f"load_from: the checkpoint '{checkpoint}' has no weight of the student "
                          f'{type(model).__name__}, so training would not start from it. {advice}')


def find_weights(loaded: dict, checkpoint: str, role: str, prefix: str | None,
                 expected: Iterable[str]) -> OrderedDict[str, Tensor]:
    """Finds the weights within a checkpoint, without the prefixes that wrappers add and the one that is asked for.

    Args:
        loaded: What the file holds.
        checkpoint: See :func:`load_strictly`.
        role: See :func:`load_strictly`.
        prefix: See ``checkpoint_prefix`` of :func:`load_strictly`.
        expected: The keys of the model.

    Raises:
        CheckpointError: There are none, or those of several models, or none with the prefix.
    """
    entries = {place: _rename_keys({'': state}, _strip_wrappers) for place, state in _find_state_dicts(loaded).items()}
    if not entries:
        there = ', '.join(f"'{key}' ({'None' if value is None else type(value).__name__})"
                          for key, value in list(loaded.items())[:12])
        raise CheckpointError(f"The checkpoint '{checkpoint}' holds no weights: "
                              + (f'it has the entries {there}.' if there else 'it is empty.'))
    entry, prefix = _find_main_entry(entries), _strip_wrappers(prefix or '')
    if prefix:
        found = _select_prefixed(entries, entry, prefix)
        if not found:
            begins = _count_first_parts(entries.get(entry or '', {})) + Counter(
                {place: len(state) for place, state in entries.items() if place != entry})
            raise CheckpointError(f"teacher.checkpoint_prefix='{prefix}': no key in the checkpoint '{checkpoint}' "
                                  f'begins with it. They begin with {_format_counts(begins)}.')
        old = {key.replace('.', '_'): key for key in expected}  # MMDetection 2's averaged copies have no dots
        return _rename_keys({'': found}, lambda key: key if '.' in key else old.get(key, key))
    if entry is None:
        raise CheckpointError(f"The checkpoint '{checkpoint}' holds the weights of several models, under "
                              + _format_counts(Counter({place: len(state) for place, state in entries.items()}))
                              + f': {_suggest_choice(entries, role)}')
    return entries[entry]


class ClassNamesError(TeacherError):
    """``teacher.classes`` names no classes of this teacher."""


def find_class_names(count: int | None, names: Sequence[str], meta: dict, config: ModelConfig) -> Names | None:
    """Finds the names of a teacher's classes, by label.

    Args:
        count: How many classes its head tells apart; None where that is not known.
        names: Those that ``teacher.classes`` gives, or none.
        meta: The checkpoint's ``meta``, where mmengine keeps the names of the training data.
        config: The teacher's, which may also name its data; as for
            :func:`~kd_det.config.detectors.read_model_config`.

    Returns:
        The first of these that has ``count`` names; None where none has.

    Raises:
        ClassNamesError: As many names are given as the teacher has not, one twice, or a text.
    """
    if isinstance(names, str) or names and len(set(names)) != len(names):
        raise ClassNamesError(f'teacher.classes={names!r} is no list of names: name each class once, by label.')
    if names and count not in (None, len(names)):
        raise ClassNamesError(f'teacher.classes gives {len(names)} names, but the teacher tells {count} classes apart: '
                           'name all of them, by label.')
    for candidate in _list_candidates(names, meta, config):
        if candidate and not isinstance(candidate, str) and count in (None, len(candidate)):
            return tuple(map(str, candidate))
    return None


def _select_prefixed(entries: Mapping[str, dict], entry: str | None, prefix: str) -> OrderedDict[str, Tensor]:
    """Selects the weights after a prefix: of keys within the main entry, or else the name of an entry."""

    def remove(start: str, key: str) -> str | None:
        return _strip_wrappers(key[len(start):]) if key.startswith(start) else None

    for states in ({'': entries.get(entry or '', {})}, entries):
        for start in (prefix if prefix.endswith('.') else f'{prefix}.', prefix):
            found = _rename_keys(states, partial(remove, start))
            if found:
                return found
    return OrderedDict()


def _rename_keys(states: Mapping[str, dict], rename: Callable[[str], str | None]) -> OrderedDict[str, Tensor]:
    """Joins state dicts by their place to one, each key after its place renamed, or left out where that gives None."""
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    metadata: dict[str, dict] = {}  # versions of the modules, by which they rename keys themselves
    for place, state in states.items():
        # An average over training steps counts them beside the model that it wraps.
        average = all(key.startswith('module.') for key in state if key not in COUNTERS)
        for key, value in state.items():
            name = rename(place + key) if isinstance(value, Tensor) else None
            if name is not None and not (average and key in COUNTERS):
                renamed[name] = value
        for key, value in (getattr(state, '_metadata', None) or {}).items():
            name = rename(f'{place}{key}.')
            if name is not None:
                metadata[name[:-1]] = value
    renamed._metadata = metadata  # type: ignore[attr-defined]  # as PyTorch's own state dicts have it
    return renamed


def _strip_wrappers(key: str) -> str:
    return WRAPPERS.sub('', key)


def _find_state_dicts(loaded: dict) -> dict[str, dict]:
    """Finds each dict of tensors in a checkpoint, by place: ``'state_dict.'``, ``'ema.module.'``, ``''`` for itself."""
    found = {}
    for key, value in loaded.items():
        if key in OTHERS or not isinstance(value, dict):
            continue
        if _is_state_dict(value):
            found[f'{key}.'] = value
        else:
            found.update({f'{key}.{name}.': each for name, each in value.items() if _is_state_dict(each)})
    loose = [value for value in loaded.values() if isinstance(value, Tensor)]
    named = any(place.partition('.')[0] in WEIGHTS for place in found)
    if loose and not named and (not found or any(value.dim() for value in loose)):  # a mere counter is no weight
        return {'': loaded}
    return found


def _is_state_dict(value: Any) -> bool:
    values = list(value.values()) if isinstance(value, dict) and all(isinstance(key, str) for key in value) else []
    return any(isinstance(each, Tensor) for each in values) and not any(isinstance(each, dict) for each in values)


def _find_main_entry(entries: Collection[str]) -> str | None:
    """Finds the place of the weights that a checkpoint is about; None where that is not clear."""
    for name in WEIGHTS:
        within = [place for place in entries if place.startswith(f'{name}.')]
        if within:
            return within[0] if len(within) == 1 else None
    return next(iter(entries)) if len(entries) == 1 else None


def _suggest_prefix(keys: Sequence[str], expected: Iterable[str], role: str, complete: bool) -> str | None:
    """Says what to do where keys of a file are the model's after a prefix; None where none are.

    ``complete`` tells that the model's own keys are there too.
    """
    known = {*expected, *(key.replace('.', '_') for key in expected)}
    weights = [key for key in expected if not key.endswith('num_batches_tracked')]
    found: Counter[str] = Counter()
    for key in keys:
        ends = (match.end() for match in re.finditer(r'[._]', key))
        end = next((end for end in ends if key[end:] in known), None)
        if end and key not in known:
            found[key[:end]] += 1
    fitting = Counter({prefix: count for prefix, count in found.items() if count >= len(weights) / 2})
    if fitting and complete and role == 'teacher':
        return (f"The file holds the model's weights, and once more after {_format_counts(fitting)}. Leave those out "
                f"with teacher.allow_unexpected={[f'{prefix}*' for prefix in fitting]}, or load them instead: "
                f"teacher.checkpoint_prefix='{next(iter(fitting))}'.")
    if fitting:
        return f"Keys of the file are the model's after {_format_counts(fitting)}: {_suggest_choice(fitting, role)}"
    begins = _count_first_parts(keys)
    shared = next(iter(begins), '')
    if len(begins) == 1 and not any(key.startswith(shared) for key in expected):
        return (f"All keys of the file begin with '{shared}', and none of the model's does. If that is a wrapper "
                f'around the detector: {_suggest_choice(begins, role)}')
    return None


def _count_first_parts(keys: Iterable[str]) -> Counter:
    """Counts the keys that begin with each first part: ``'backbone.'``, or ``'ema_'`` of a key without dots."""
    return Counter(match[0] for match in map(re.compile(r'[^.]*\.|[^_]*_?').match, keys) if match)


def _format_counts(prefixes: Counter) -> str:
    return ' and '.join(f"'{prefix}' ({count} keys)" for prefix, count in prefixes.most_common(8))


def _suggest_choice(prefixes: Collection[str], role: str) -> str:
    prefix = min(prefixes, key=lambda prefix: 'teacher' not in prefix)  # of equals the first
    if role != 'teacher':
        return f"save those after '{prefix}' again, without it, as the state_dict of a checkpoint."
    chosen = 'load them' if len(prefixes) == 1 else 'say which to load, for example'
    return f"{chosen} with teacher.checkpoint_prefix='{prefix}'."


def _filter_disallowed(keys: Sequence[str], patterns: Sequence[str]) -> list:
    patterns = (patterns, ) if isinstance(patterns, str) else patterns
    return [key for key in keys if not any(fnmatch(key, pattern) for pattern in patterns)]


def _abbreviate(keys: Sequence[str], most: int = 12) -> str:
    rest = len(keys) - most
    return ', '.join(keys[:most]) + (f', … and {rest} more' if rest > 0 else '')


def _list_candidates(names: Sequence[str], meta: dict, config: ModelConfig) -> Iterator[Sequence[str] | None]:
    yield names
    trained = get_first_metainfo(meta.get('dataset_meta'))
    yield trained.get('classes', trained.get('CLASSES', meta.get('CLASSES')))  # capitals: mmdet 2 and early 3
    config = load_config(config) if isinstance(config, (str, Path)) else config
    for split in ('train', 'val', 'test'):
        loader = config.get(f'{split}_dataloader')
        for dataset in list_leaf_datasets(loader['dataset']) if loader else ():
            with within_scope(get_scope(config)):
                classes = find_dataset_classes(dataset)
            yield classes
