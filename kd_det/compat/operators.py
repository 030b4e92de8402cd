"""``mmcv.ops`` without compiled mmcv: a finder that provides ``mmcv._ext`` from torchvision's kernels and PyTorch.

mmcv-lite, and wheels built without operators, lack the extension module ``mmcv._ext``. The finder stands last in
``sys.meta_path`` and therefore answers only where Python found no compiled one.
"""
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from .workers import install_in_child_processes

EXTENSION = 'mmcv._ext'
COMPILED, TORCHVISION = 'compiled mmcv', 'torchvision'


class OperatorNotServedError(NotImplementedError):
    """An operator of ``mmcv.ops`` was called that only compiled mmcv has."""


class OperatorFinder(MetaPathFinder):
    """Finds ``mmcv._ext`` where no compiled one exists."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        return ModuleSpec(fullname, OperatorLoader(), origin='torchvision kernels, provided by kd_det.compat')


class OperatorLoader(Loader):
    """Fills ``mmcv._ext`` with :mod:`kd_det.compat.ops`; any other operator refuses when called."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None  # Python's default module

    def exec_module(self, module: ModuleType) -> None:
        from . import ops
        for name in ops.OPERATORS:
            setattr(module, name, getattr(ops, name))
        module.__getattr__ = refuse_operator


def refuse_operator(name: str) -> Callable:
    """Stands for an operator that is not served: mmcv may import it, but not call it.

    Raises:
        AttributeError: for a name with a leading underscore, which is no operator but a question of Python's.
    """
    if name.startswith('_'):
        raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')

    def refuse(*args, **kwargs):
        raise OperatorNotServedError(
            f"mmcv's operator {name!r} has no counterpart in torchvision: it needs compiled mmcv. Install it in place "
            'of mmcv-lite (https://mmcv.readthedocs.io, or the package onedl-mmcv), and kd_det will leave it alone.')

    refuse.__name__ = name
    return refuse


def install_operators() -> None:
    """Makes ``mmcv.ops`` importable, here and in child processes. Does nothing without mmcv or with compiled mmcv."""
    if operator_backend() != TORCHVISION:
        return
    if not any(isinstance(finder, OperatorFinder) for finder in sys.meta_path):
        sys.meta_path.append(OperatorFinder())
        importlib.invalidate_caches()
    install_in_child_processes()


def operator_backend() -> str | None:
    """Who serves ``mmcv.ops``: ``'compiled mmcv'``, ``'torchvision'``, or None where mmcv is not installed.

    Imports nothing.
    """
    mmcv = importlib.util.find_spec('mmcv')
    if mmcv is None:
        return None
    compiled = PathFinder.find_spec(EXTENSION, mmcv.submodule_search_locations)
    return TORCHVISION if compiled is None else COMPILED


@cache
def log_operator_backend() -> None:
    """Logs, once in a process and in the run's own log, who serves ``mmcv.ops``."""
    import torchvision
    from mmengine.logging import print_log
    served_by = f'torchvision {torchvision.__version__}' if operator_backend() == TORCHVISION else operator_backend()
    print_log(f"mmcv's operators are served by {served_by}.", logger='current')


def served_operators() -> tuple[str, ...]:
    """Names of the operators of ``mmcv._ext`` that :mod:`kd_det.compat.ops` computes."""
    from . import ops
    return tuple(ops.OPERATORS)
