"""Checkpoints load without running code from the file.

A pickle can call anything. ``torch.load(weights_only=True)``, the default since torch 2.6, calls only what is allowed:
tensors and plain containers. mmengine also saves its logging history, numpy numbers and a scheduler's method.
:func:`install_safe_loading` allows these, none of which runs code of the file's choosing; all else stays refused.
"""
import codecs
import copy
import importlib.util
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CAN_ALLOW_GLOBALS = hasattr(torch.serialization, 'add_safe_globals')  # torch >= 2.4

# Where the messages of torch's unpickler, from 2.0 on, name what they refuse.
REFUSED = re.compile(r'(?:GLOBAL|Unsupported class|unrecognized function|add_safe_globals`,? but got) '
                     r'(.+?)(?: was | whose |$)', re.MULTILINE)

STATISTICS = ('running_mean', 'running_var')  # buffers that training fills

PICKLED_BY_TORCH = b'\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19.'  # the magic number with which torch < 1.6 began


class CheckpointError(RuntimeError):
    """A file is not a checkpoint, not all of one, or not one of this detector."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint would run code when loaded, and was refused."""


class NotFiniteError(CheckpointError):
    """Weights of a checkpoint are NaN or infinite."""


def load_checkpoint(path_or_url: str | Path, map_location: Any = 'cpu', mmap: bool = False) -> dict[str, Any]:
    """Loads a checkpoint and never runs code from it.

    Args:
        path_or_url: a file, or anything that mmengine's ``CheckpointLoader`` knows (``https://``, ``torchvision://``).
        map_location: as for :func:`torch.load`.
        mmap: read tensors of a file, which must be one of ``torch.save``'s today, only when they are used.

    Returns:
        What the file holds. Its ``meta``, where it has one or names classes elsewhere, is a dict; ``dataset_meta``
        within, where anything told it, is a dict too, and its ``classes``, where anything named them, are those.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is damaged, is no checkpoint, or cannot be downloaded.
        UnsafeCheckpointError: the file refers to code.
    """
    install_safe_loading()
    name = str(path_or_url)
    if '://' in name:
        from mmengine.runner.checkpoint import CheckpointLoader
        load = CheckpointLoader.load_checkpoint
    else:
        load = partial(_load_file, mmap=mmap)
    with _weights_only(name):
        checkpoint = load(name, map_location)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{name} holds a {type(checkpoint).__name__}, not the dict of a checkpoint.')
    meta = _meta(checkpoint)
    if meta or 'meta' in checkpoint:
        checkpoint['meta'] = meta
    return checkpoint


def describe_not_finite(state: Mapping[str, Tensor], parameters: Container[str] | None = None) -> str | None:
    """Describes which of some weights are not finite.

    NaN is never right, and neither is an infinite parameter; a buffer may be infinite, as a mask of attention is, but
    not a statistic.

    Args:
        state: Tensors by key; those that are not floating-point numbers are passed over.
        parameters: The keys of those that are parameters; all by default.

    Returns:
        How many they are, the first, and how much of it; None where all are finite.

    Example:
        >>> describe_not_finite({'neck.weight': torch.tensor([1.0, float('nan')]), 'neck.bias': torch.zeros(2)})
        '1 of 2 tensors, first neck.weight (1 of 2 numbers is nan)'
    """
    state = {key: value.detach() for key, value in state.items() if value.is_floating_point()}
    if not state:
        return None
    # A sum is finite where all are: one pass over the memory, and one answer of the device for all tensors.
    sums = [value.sum(dtype=torch.float32) for value in state.values()]
    totals = torch.stack([total.to(sums[0].device) for total in sums]).tolist()
    suspects = [key for key, total in zip(state, totals) if not math.isfinite(total)]
    found = {}
    for key in suspects:
        value = state[key]
        wrong = {'nan': value.isnan()}
        if parameters is None or key in parameters or key.endswith(STATISTICS):
            wrong['infinite'] = value.isinf()
        counts = {kind: int(each.sum()) for kind, each in wrong.items() if each.any()}
        if counts:
            kind, count = next(iter(counts.items()))
            found[key] = f"{count} of {value.numel()} numbers {'is' if count == 1 else 'are'} {kind}"
    if not found:
        return None
    first, detail = next(iter(found.items()))
    return f"{len(found)} of {len(state)} tensors, first {first} ({detail})"


def require_finite(state: Mapping[str, Tensor], checkpoint: str | Path, role: str,
                   parameters: Container[str] | None = None) -> None:
    """Refuses weights of a checkpoint that are not finite, see :func:`describe_not_finite`.

    Args:
        state: The weights.
        checkpoint: The file, for the message.
        role: What the detector is, likewise.
        parameters: See :func:`describe_not_finite`.

    Raises:
        NotFiniteError: Some are not.
    """
    found = describe_not_finite(state, parameters)
    if found:
        raise NotFiniteError(f"The checkpoint '{checkpoint}' of the {role} holds weights that are not finite: {found}. "
                             'Its training diverged, or the file is damaged: give another, such as that of an earlier '
                             'epoch.')


def _meta(checkpoint: dict) -> dict:
    """What a checkpoint tells beside its weights, in the form of MMDetection 3, whoever wrote it."""
    meta = copy.copy(checkpoint['meta']) if isinstance(checkpoint.get('meta'), dict) else {}
    told = meta.get('dataset_meta')
    if isinstance(told, (list, tuple)):  # of data sets joined: one whose parts differ tells nothing
        parts = [each for each in told if isinstance(each, dict)]
        told = parts[0] if parts and all(_classes(each) == _classes(parts[0]) for each in parts) else None
    told = copy.copy(told) if isinstance(told, dict) else {}
    classes = _classes(told) or _classes(meta) or _classes(checkpoint)
    if classes:
        told['classes'] = classes
    if told or 'dataset_meta' in meta:
        meta['dataset_meta'] = told
    return meta


def _classes(holder: dict) -> tuple[str, ...] | None:
    """The names of classes, by label, under any of the keys that programs use; MMDetection's are the first two."""
    for key in ('classes', 'CLASSES', 'class_names', 'names'):
        names = holder.get(key)
        if isinstance(names, dict) and sorted(names) == list(range(len(names))):
            names = [names[label] for label in range(len(names))]
        if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
            return tuple(names)
    return None


def install_safe_loading() -> None:
    """Lets torch load what mmengine saves, and gives mmengine's own loading the errors of :func:`load_checkpoint`."""
    if not CAN_ALLOW_GLOBALS or importlib.util.find_spec('mmengine') is None:
        return
    from mmengine.runner import checkpoint
    torch.serialization.add_safe_globals(_safe_globals())
    for scheme, loader in list(checkpoint.CheckpointLoader._schemes.items()):
        loader = getattr(loader, '__wrapped__', loader)  # installed before
        checkpoint.CheckpointLoader.register_scheme(scheme, _clear_errors(loader), force=True)


@cache
def _safe_globals() -> list:
    """What mmengine 0.10's checkpoints refer to beyond torch's own list. Calling any of it only builds data."""
    from mmengine.config import ConfigDict
    from mmengine.logging import HistoryBuffer
    from mmengine.optim import OneCycleParamScheduler

    methods = {
        HistoryBuffer: ('min', 'max', 'mean', 'current'),
        OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
    }

    def attribute(owner, name):
        """In place of ``getattr``, by which pickle refers to methods and which could reach anything."""
        for cls, names in methods.items():
            if owner is cls and name in names:
                return getattr(cls, name)
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr({getattr(owner, "__name__", owner)},{name})')

    reconstruct, scalar = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    codes = np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?SU'
    return [
        ConfigDict, HistoryBuffer, OneCycleParamScheduler, _alias(attribute, 'builtins', 'getattr'),
        codecs.encode,  # bytes; torch 2.4 does not allow it itself
        np.ndarray, np.dtype, *{type(np.dtype(code)) for code in codes},
        *(_alias(function, module, function.__name__)
          for function in (reconstruct, scalar)
          for module in ('numpy.core.multiarray', 'numpy._core.multiarray')),  # numpy 1, numpy 2
    ]  # yapf: disable


def _alias(function: Callable, module: str, name: str) -> Callable:
    """``function`` as torch's allow-list finds it: by the module and name that the pickle holds."""

    def alias(*args):
        return function(*args)

    alias.__module__, alias.__name__, alias.__qualname__ = module, name, name
    return alias


def _load_file(name: str, map_location: Any, mmap: bool) -> Any:
    path = Path(name).expanduser()
    if path.is_dir():
        within = ', '.join(sorted(file.name for file in path.glob('*.pth'))[-3:])
        raise FileNotFoundError(f'{path.absolute()} is a folder: give a checkpoint file'
                                + (f' within it, such as {within}.' if within else '.'))
    if not path.is_file():
        raise FileNotFoundError(f'No checkpoint at {path.absolute()}.')
    return torch.load(path, map_location=map_location, weights_only=True, **(dict(mmap=True) if mmap else {}))


def _clear_errors(loader: Callable) -> Callable:
    """One of mmengine's loaders, safe and with the errors of :func:`load_checkpoint`."""

    @wraps(loader)
    def load(filename, *args, **kwargs):
        with _weights_only(filename):
            return loader(filename, *args, **kwargs)

    return load


@contextmanager
def _weights_only(name: str) -> Iterator[None]:
    """Forces ``weights_only`` on every ``torch.load`` inside and says what is wrong with the checkpoint ``name``."""
    forced, forbidden = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
    before = {key: os.environ.pop(key, None) for key in (forced, forbidden)}
    os.environ[forced] = '1'
    try:
        yield
    except (FileNotFoundError, PermissionError, MemoryError, ImportError, CheckpointError):
        raise
    except Exception as error:
        advises = isinstance(error, pickle.UnpicklingError) or 'weights_only' in str(error)
        raise _explain(name, error) from (None if advises else error)  # torch advises to give up weights_only
    finally:
        del os.environ[forced]
        os.environ.update({key: value for key, value in before.items() if value is not None})


def _explain(name: str, error: Exception) -> CheckpointError:
    refused = REFUSED.search(str(error))
    if isinstance(error, pickle.UnpicklingError) and refused:
        code = refused.group(1)
        advice = ('If you trust its author, save it again with its state_dict alone; a class of your own can be '
                  'allowed with torch.serialization.add_safe_globals.')
        if not CAN_ALLOW_GLOBALS:
            advice = (f'torch {torch.__version__} refuses the training history in checkpoints of mmengine too: '
                      'use torch >= 2.4, or save the file again with its state_dict alone.')
        return UnsafeCheckpointError(f'{name} was refused, and nothing in it was run: it refers to {code}, and a '
                                     f'checkpoint that calls code can do anything to this machine. {advice}')
    if '://' in name and isinstance(error, KeyError):
        return CheckpointError(f'{name}: mmengine knows no weights of that name ({error}).')
    if '://' in name and isinstance(error, OSError):
        return CheckpointError(f'{name} cannot be downloaded ({error}). '
                               'Fetch it by hand and give the path of the file.')
    foreign = _foreign(name)
    if foreign:
        kind, advice = foreign
        return CheckpointError(f'{name} cannot be read as a PyTorch checkpoint: it holds something else, {kind}. '
                               f'{advice}')
    return CheckpointError(f'{name} cannot be read as a PyTorch checkpoint: {_damage(error)}. '
                           'If it should be one, it is damaged: copy or download it again.')


def _foreign(name: str) -> tuple[str, str] | None:
    """What a file is that is none of ``torch.save``'s, and what to do about it; None where that is not known."""
    path = Path(name).expanduser()
    if '://' in name:  # where torch and mmengine keep what they download
        path = Path(torch.hub.get_dir()) / 'checkpoints' / name.partition('?')[0].rpartition('/')[2]
    if not path.is_file():
        return None
    with path.open('rb') as file:
        head = file.read(512)
    origin = 'Give the checkpoint (.pth) that it was made from.'
    if head.startswith(b'version https://git-lfs'):
        return 'a Git LFS pointer', 'Run `git lfs pull` in its repository, which puts the file in its place.'
    if head.lstrip().lower().startswith((b'<!doctype', b'<html', b'<?xml', b'<head')):
        return 'a web page', ('The address leads to a page about the file, or to an error: download the file itself, '
                              'and delete this one.')
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size:
        return 'safetensors', ('Convert it once, with the package safetensors: torch.save(dict(state_dict='
                               f"safetensors.torch.load_file('{path.name}')), '{path.stem}.pth').")
    if path.suffix == '.onnx' or re.match(rb'\x08[\x01-\x1f](\x12.\w|\x3a|\x42)', head, re.DOTALL):
        return 'an ONNX model', origin
    if zipfile.is_zipfile(path):
        return _within_zip(zipfile.ZipFile(path).namelist(), origin)
    if head.startswith((b'\x1f\x8b', b'BZh', b'\xfd7zXZ', b"7z\xbc\xaf\x27\x1c", b'Rar!', b'\x28\xb5\x2f\xfd')) \
            or head[257:262] == b'ustar':
        return 'an archive', 'Unpack it, and give the checkpoint within.'
    if head.startswith(b'\x89HDF'):
        return 'HDF5, as Keras writes it', 'Its weights are of no PyTorch model.'
    if head.startswith(b'\x80') and PICKLED_BY_TORCH not in head:
        return ('a pickle that torch.save did not write', 'Such a file may run anything when it is read. If you trust '
                'its author, save its weights as tensors, with torch.save(dict(state_dict=…)).')
    if head.startswith(b'\x93NUMPY'):
        return 'a NumPy array', 'Give the checkpoint (.pth) of the model.'
    if head and re.fullmatch(rb'[\t\n\r\x20-\x7e]+', head):
        return f'text that begins with {head[:40].decode().splitlines()[0]!r}', 'Give the path of the checkpoint.'
    return None


def _within_zip(members: list, origin: str) -> tuple[str, str] | None:
    """As :func:`_foreign`, of a zip archive, which ``torch.save`` writes too."""
    names = {member.partition('/')[2] for member in members}
    if 'constants.pkl' in names or any(name.startswith('code/') for name in names):
        return 'a TorchScript archive, which is a program', origin
    if 'data.pkl' in names:
        return None
    if any('exported_program' in name or name == 'archive_format' for name in names):
        return 'a program that torch.export wrote', origin
    return (f"a zip archive of {', '.join(members[:3])}{', …' if len(members) > 3 else ''}",
            'Unpack it, and give the checkpoint within.')


def _damage(error: Exception) -> str:
    if isinstance(error, EOFError):
        return 'it is empty or ends early'
    if isinstance(error, pickle.UnpicklingError):
        return 'it holds something else'
    reason = str(error).partition('\n')[0].rstrip('.')
    return 'it holds something else' if 'weights_only' in reason else reason  # torch's advice is to give that up
