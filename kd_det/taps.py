"""Reads what the modules of a model put out, and what their methods are given, without touching the model's code."""
from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Features = tuple[Tensor, ...]
ENCODER = 'encoder'  # of a DETR; puts out the tokens of several levels in a row


class TapError(RuntimeError):
    """A tap names no module, or saw no forward, more than one, or something that is not a feature."""


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Returns the submodule at ``path``.

    Args:
        model: The model to search.
        path: Dotted name as in ``model.named_modules()``, e.g. ``'neck'`` or ``'backbone.layer3'``.

    Raises:
        TapError: No module has that name; the message lists the nearest names.
    """
    modules = dict(model.named_modules())
    if path in modules and path:
        return modules[path]
    parent = path.rpartition('.')[0]
    siblings = [name for name in modules if name and name.rpartition('.')[0] == parent]
    nearest = difflib.get_close_matches(path, modules, n=5, cutoff=0.5) or siblings[:8] or list(modules)[1:9]
    raise TapError(f"{type(model).__name__} has no module '{path}'. Nearest names: {', '.join(nearest)}.")


class ForwardStopped(Exception):
    """Ends a forward of which nothing more is read, see ``stop`` of :meth:`Taps.capture`, which catches it."""


class Taps:
    """Reads the outputs of some modules of one model, each as a tuple of levels.

    The hooks are set once, at construction, because hooks set after a model was first compiled never fire; outside of
    :meth:`capture`, and for paths that it does not read, they do nothing. What a tap holds is the module's very output,
    on the path to the model's own losses, and is safe from later layers that work in place: these get a copy, until one
    forward of the same kind has shown that nothing writes to it.

    The tokens of a DETR's encoder, (N, ΣH·W, C), are read as the maps of the neck's levels that they stand for: the
    last ones that have as many cells.

    Args:
        model: The model to read.
        paths: Dotted module names, see :func:`find_module`.
        grouped: The modules return several such tuples, as a dense head does: class maps, box maps, … Each is read and
            checked like a feature, and a tap holds a tuple of them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
        >>> taps = Taps(model, ['0'])
        >>> with taps.capture() as features:
        ...     _ = model(torch.zeros(1, 3, 2, 2))
        >>> features['0'][0].shape
        torch.Size([1, 4, 2, 2])
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], grouped: bool = False) -> None:
        self.paths, self.grouped = tuple(dict.fromkeys(paths)), grouped
        self._seen: dict[str, list[_Reading]] = {}
        # Kind of forward: which taps read, and whether it ends when they have.
        self._kind: tuple[tuple[str, ...], bool] = self.paths, False
        self._written_later: dict[tuple[Any, str], bool] = {}  # by kind of forward and path
        self._token_shapes: list[torch.Size] = []
        if any(map(is_within_encoder, self.paths)):
            source = 'neck' if getattr(model, 'neck', None) is not None else 'backbone'
            find_module(model, source).register_forward_hook(self._note_token_shapes)
        self._model, self._tapped = model, dict[str, nn.Module]()
        self._was_used = False
        for path in self.paths:
            self._register(path)

    def _register(self, path: str) -> None:
        # A method of this object, so that a copy of the model has hooks that belong to the copy of this.
        self._tapped[path] = find_module(self._model, path)
        self._tapped[path].register_forward_hook(partial(self._read, path))

    def _follow(self) -> None:
        """Taps what has taken a normalisation's place since: MMEngine exchanges SyncBatchNorm when it wraps a model."""
        modules = set(map(id, self._model.modules()))
        for path, module in list(self._tapped.items()):
            if isinstance(module, _NormBase) and id(module) not in modules:
                self._register(path)
        self._was_used = True

    def _note_token_shapes(self, module: nn.Module, inputs: tuple[Any, ...], output: Features) -> None:
        self._token_shapes = [level.shape[-2:] for level in output]

    def awaits(self, path: str) -> bool:
        """Whether, in a forward that is being read, a tap at or within this module has seen nothing yet."""
        return any((tap == path or tap.startswith(f'{path}.')) and not seen for tap, seen in self._seen.items())

    def _read(self, path: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """The hook of a tap."""
        if path not in self._seen:
            return output
        tokens = is_within_encoder(path) and isinstance(output, Tensor) and output.dim() == 3
        if tokens:
            output = _split_tokens(path, output, self._token_shapes)
        reading = _Reading(path, output, self.grouped, copy=self._written_later.get((self._kind, path), True))
        self._seen[path].append(reading)
        _, stop = self._kind
        if stop and all(self._seen.values()):
            raise ForwardStopped
        return _join_tokens(reading.passed_on) if tokens else reading.passed_on

    @contextmanager
    def capture(self, paths: Iterable[str] | None = None,
                stop: bool = False) -> Iterator[dict[str, Any]]:
        """Reads one forward.

        Args:
            paths: Which of the taps read; all by default.
            stop: Leave the block as soon as each of them has read. The last tap's hook raises
                :class:`ForwardStopped`, which ends the forward there and is caught where the block ends: neither the
                rest of the model nor the statements of the block after the forward run.

        Yields:
            A dict that is filled when the block ends: path -> tuple of (N, C, H, W), one per level; or, ``grouped``, a
            tuple of those.

        Raises:
            TapError: A tapped module did not run, ran more than once, or returned no feature; or a later layer wrote
                into what it returned.
        """
        if not self._was_used:
            self._follow()
        features: dict[str, Any] = {}
        paths = self.paths if paths is None else tuple(dict.fromkeys(paths))
        self._seen, self._kind = {path: [] for path in paths}, (paths, stop)
        try:
            yield features
        except ForwardStopped:
            pass
        finally:
            seen, self._seen = self._seen, {}
        for path, readings in seen.items():
            if len(readings) != 1:
                raise TapError(f"Tap '{path}' saw {len(readings)} forwards where one was expected: "
                               + ('the module did not run. Tap one that the training forward calls.' if not readings
                                  else 'the module is shared. Tap the module that feeds it or collects its outputs.'))
            groups, self._written_later[self._kind, path] = readings[0].close()
            features[path] = groups if self.grouped else groups[0]


class _Reading:
    """One output of one module, with what is needed to tell whether a later layer wrote into it.

    Args:
        path: Of the module, for messages.
        output: What it returned.
        grouped: See :class:`Taps`.
        copy: Pass a copy on to the later layers.

    Attributes:
        groups: The output itself, as groups of levels.
        passed_on: What the later layers are given: the output, or its copy.
    """

    def __init__(self, path: str, output: Any, grouped: bool, copy: bool) -> None:
        self.path = path
        self.groups = _read_groups(path, output, grouped)
        self.passed_on = _copy_tensors(output) if copy else output
        self._watched = self.groups, _read_groups(path, self.passed_on, grouped)
        self._writes = [_count_writes(groups) for groups in self._watched]

    def close(self) -> tuple[tuple[Features, ...], bool]:
        """Returns the groups of levels, and whether a later layer wrote to what it was given.

        Raises:
            TapError: A later layer wrote to the output itself.
        """
        changed, written = (_count_writes(groups) != before for groups, before in zip(self._watched, self._writes))
        if changed:
            raise TapError(f"The output of '{self.path}' was changed in place by a later layer, though in no step "
                           'before or not through the copy that it was given. Tap the layer after it.')
        return self.groups, written


def is_within_encoder(path: str) -> bool:
    """Whether a path is that of a DETR's encoder, or of a module in it."""
    return path.split('.')[0] == ENCODER


def _split_tokens(path: str, tokens: Tensor, shapes: Sequence[torch.Size]) -> Features:
    """(N, ΣH·W, C) as (N, C, H, W) of the last levels that have as many cells."""
    for first in range(len(shapes)):
        cells = [shape.numel() for shape in shapes[first:]]
        if sum(cells) == tokens.shape[1]:
            return tuple(level.mT.unflatten(-1, shape) for level, shape in zip(tokens.split(cells, 1), shapes[first:]))
    raise TapError(f"Tap '{path}' read {tokens.shape[1]} tokens, which are not the cells of the neck's last levels "
                   f'{[tuple(shape) for shape in shapes]}.')


def _join_tokens(levels: Features) -> Tensor:
    """(N, C, H, W) each as (N, ΣH·W, C)."""
    return torch.cat([level.flatten(2).mT for level in levels], 1)


def _read_groups(path: str, output: Any, grouped: bool) -> tuple[Features, ...]:
    """A module's output as groups of levels: the several that it returned if ``grouped``, else one."""
    return tuple(_read_levels(path, group) for group in (output if grouped else (output, )))


def _read_levels(path: str, output: Any) -> Features:
    """A feature, or a tuple or list of them, as a tuple of (N, C, H, W)."""
    levels = tuple(output) if isinstance(output, (tuple, list)) else (output, )
    if not levels or not all(isinstance(level, Tensor) and level.dim() == 4 for level in levels):
        shapes = [tuple(level.shape) if isinstance(level, Tensor) else type(level).__name__ for level in levels]
        raise TapError(f"Tap '{path}' read {shapes}, not features of shape (N, C, H, W).")
    return levels


def _copy_tensors(output: Any) -> Any:
    """The same tensors, or tuples and lists of them, in memory of their own."""
    if isinstance(output, Tensor):
        return output.clone()
    return getattr(output, '_make', type(output))(map(_copy_tensors, output))  # so that a named tuple stays one


def _count_writes(groups: Sequence[Features]) -> list[int]:
    """Autograd's count of in-place writes to each tensor; those of inference mode have none, and count as constant."""
    return [0 if torch.is_inference(level) else level._version for levels in groups for level in levels]


# ------------------------------------------------------------------------------------------------ calls of methods


class Call(NamedTuple):
    """One call of a method: its arguments by name, and what it returned."""
    arguments: dict[str, Any]
    returned: Any


@contextmanager
def record_calls(module: nn.Module, method: str) -> Iterator[list[Call]]:
    """Records the calls of one method of one module while the block runs, and leaves the module as it was.

    For what no hook sees: methods other than ``forward``, and arguments by name.

    Args:
        module: The module.
        method: Name of the method.

    Yields:
        A list that grows with each call.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> with record_calls(norm, 'forward') as calls:
        ...     _ = norm(torch.zeros(1, 3, 2, 2))
        >>> list(calls[0].arguments), calls[0].returned.shape
        (['input'], torch.Size([1, 3, 2, 2]))
    """
    calls: list[Call] = []
    original = getattr(module, method)

    def record(*args: Any, **kwargs: Any) -> Any:
        returned = original(*args, **kwargs)
        calls.append(Call(signature(original).bind(*args, **kwargs).arguments, returned))
        return returned

    own = method in vars(module)  # an instance's method of its own, as an engine sets it
    setattr(module, method, record)  # on the instance, before the class's
    try:
        yield calls
    finally:
        if own:
            setattr(module, method, original)
        else:
            delattr(module, method)
