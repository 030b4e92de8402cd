"""Finds a teacher's config and loads its weights, strictly: nothing is missing, left over or misshapen unnoticed."""
from __future__ import annotations

import copy
import re
from collections import OrderedDict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Sequence, Union

from mmengine.config import ConfigDict
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from kd_det.compat import CheckpointError, load_checkpoint
from kd_det.configuration import DISTILLER, imports_of, load_config, type_name
from kd_det.detectors import the_detector
from kd_det.scopes import scope_of

ModelConfig = Union[str, Path, dict]


class TeacherError(ValueError):
    """The teacher can not serve as its config says."""


def read_model_config(config: ModelConfig) -> ConfigDict:
    """Returns the model dict of a detector, with the scope of its config, see :mod:`kd_det.scopes`.

    Of a student that was itself distilled it is the student; of a model that holds one detector, as a semi-supervised
    pair or a tracker does, that one; of one that MMDetection's own distillation trains, the plain detector.

    Args:
        config: A config file, a name such as ``'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'``, a whole config
            as a dict (with a key ``model``), or a model dict (with a key ``type``), whose scope is that of the config
            that it stands in.

    Raises:
        TeacherError: The config holds no model.
        FileNotFoundError: There is no such file.
        ConfigurationError: The file has an error, or the model holds several detectors.
    """
    loaded = load_config(config) if isinstance(config, (str, Path)) else ConfigDict(config)
    model = loaded.get('model', loaded)
    if not type_name(model):
        raise TeacherError(f"The teacher's config {config!r:.200} holds no model: expected a key 'model', or a model "
                           "dict with a 'type'.")
    model = copy.deepcopy(model.student if type_name(model) == DISTILLER else model)  # building may write into it
    if 'model' in loaded:
        import_modules_from_strings(imports_of(loaded))  # a file's are imported as it is read, a dict's are not
        model.setdefault('_scope_', scope_of(loaded))
    return the_detector(model, f"The model of the teacher's config {config!r:.200}")


def without_pretrained(config: Any) -> Any:
    """The same model dict without what would load weights from somewhere: each ``Pretrained``, and ``pretrained=``."""
    if isinstance(config, (list, tuple)):
        return type(config)(without_pretrained(each) for each in config if not is_pretrained(each))
    if not isinstance(config, dict):
        return config
    return type(config)({key: without_pretrained(value) for key, value in config.items()
                         if key != 'pretrained' and not is_pretrained(value)})


def is_pretrained(config: Any) -> bool:
    """Whether a part of a model dict is an ``init_cfg`` that loads a checkpoint."""
    return type_name(config) in ('Pretrained', 'PretrainedInit')


def load_strictly(model: nn.Module, checkpoint: str, allow_missing: Sequence[str] = (),
                  allow_unexpected: Sequence[str] = (), role: str = 'teacher') -> dict:
    """Loads a checkpoint into a detector, and refuses what does not fit to the last key.

    Args:
        model: The detector.
        checkpoint: A file, or an address that mmengine's ``CheckpointLoader`` knows.
        allow_missing: Shell patterns (``'roi_head.*'``) of keys that the file may lack.
        allow_unexpected: Shell patterns of keys in the file that the model need not have.
        role: What the detector is, for the message.

    Returns:
        The checkpoint's ``meta``.

    Raises:
        CheckpointError: Keys are missing, unexpected or of another shape; the message names them.
    """
    loaded = load_checkpoint(checkpoint, map_location='cpu')
    state = _plain_state_dict(loaded)
    expected = model.state_dict()
    misshapen = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    shapes = {key: f'{key} (file {tuple(state.pop(key).shape)}, model {tuple(expected[key].shape)})'
              for key in misshapen}
    # Only PyTorch's own loading knows the keys that a module renames from older versions of itself.
    missing, unexpected = model.load_state_dict(state, strict=False)
    # Very old checkpoints lack BatchNorm's step counters, which inference does not read.
    missing = [key for key in missing if key not in shapes and not key.endswith('num_batches_tracked')]
    place = {key: index for index, key in enumerate(state)}  # a key that its module renamed has none
    unexpected = sorted(unexpected, key=lambda key: place.get(key, len(place)))
    faults = {'missing from the file': _not_allowed(missing, allow_missing),
              'unexpected in the file': _not_allowed(unexpected, allow_unexpected),
              'of another shape': list(shapes.values())}
    if any(faults.values()):
        lines = [f'{len(keys)} keys {fault}: {_shortened(keys)}' for fault, keys in faults.items() if keys]
        raise CheckpointError(f"The checkpoint '{checkpoint}' does not fit the {role} {type(model).__name__}.\n  "
                              + '\n  '.join(lines) + '\nUse the config that the checkpoint was trained with'
                              + ('; if these keys do not matter, allow them with teacher.allow_missing / '
                                 'teacher.allow_unexpected (shell patterns).' if role == 'teacher' else '.'))
    return loaded.get('meta', {})


def _plain_state_dict(checkpoint: dict) -> 'OrderedDict[str, Tensor]':
    """The weights within a checkpoint, without the prefix that data-parallel wrappers add."""
    state = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    plain = OrderedDict((re.sub(r'^module\.', '', key), value)
                        for key, value in state.items() if isinstance(value, Tensor))
    plain._metadata = getattr(state, '_metadata', None)  # versions of the modules, by which they rename keys
    return plain


def _not_allowed(keys: Sequence[str], patterns: Sequence[str]) -> list:
    patterns = (patterns, ) if isinstance(patterns, str) else patterns
    return [key for key in keys if not any(fnmatch(key, pattern) for pattern in patterns)]


def _shortened(keys: Sequence[str], most: int = 12) -> str:
    rest = len(keys) - most
    return ', '.join(keys[:most]) + (f', … and {rest} more' if rest > 0 else '')
