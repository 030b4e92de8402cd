"""In whose registries the types of a config are looked up.

A config may name its types without their scope: its ``default_scope`` then says whose they are. A teacher's need not be
its student's. So a detector is built within the scope of its own config, which its model dict carries as
MMEngine's ``_scope_``; and what this package builds of its own is found from within every scope.
"""
from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

import mmdet.registry
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import set_random_seed
from torch import nn

from kd_det.compat.startup import REGISTRATION

HOME = 'mmdet'  # this package's classes join MMDetection's registries


def get_scope(config: Mapping[str, Any]) -> str:
    """The scope of a config: MMDetection's where it names none, as pure-Python configs do, whose types are classes."""
    return config.get('default_scope') or HOME


@contextmanager
def within_scope(scope: str | None) -> Iterator[None]:
    """Has names without a scope looked up in this one; None for the one that holds already."""
    if scope is not None:
        add_nodes(scope)
    with DefaultScope.overwrite_default_scope(scope):
        yield


def enter_scope(scope: str) -> None:
    """Has names without a scope looked up in this one from now on, as a Runner does for its config."""
    add_nodes(scope)
    DefaultScope.get_instance(f'{scope}_{time.time_ns()}', scope_name=scope)


def prepare_without_runner(config: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Does what a Runner would do before a single step: enters the config's scope, seeds; and logs warnings alone."""
    enter_scope(get_scope(config or {}))
    MMLogger.get_current_instance().setLevel('WARNING')  # or every weight that is initialised is announced
    set_random_seed(seed)
    for counter in ('iter', 'epoch'):  # some preprocessors, losses and assigners ask for them
        MessageHub.get_current_instance().update_info(counter, 0)


def add_nodes(scope: str) -> dict[str, Registry]:
    """Lets a scope look up in MMDetection's registries what it has no registry of its own for.

    A package with models of its own may leave data sets, metrics and hooks to MMDetection. MMEngine would look for
    those among its own alone.

    Returns:
        The nodes that were added, empty children of MMDetection's, by the name of that.
    """
    try:
        import_module(f'{scope}.registry')
    except ImportError:  # whatever the config imports itself has been imported with it
        pass
    lacking = {name: node for name, node in vars(mmdet.registry).items()
               if isinstance(node, Registry) and node.scope == HOME and node.root._search_child(scope) is None}
    if lacking:  # a child looks into its parent's table, but does not have it filled
        register_all_modules(init_default_scope=False)
    locations = ([scope] if find_spec(scope) else []) + [REGISTRATION]
    return {name: Registry(node.name, parent=node, scope=scope, locations=locations)
            for name, node in lacking.items()}


def find_class(registry: Registry, config: Mapping[str, Any], otherwise: str | None = None) -> Any | None:
    """What the ``type`` of a dict stands for: a class, or a function; None where no registry has it.

    Args:
        registry: One of MMDetection's.
        config: The dict, whose ``_scope_`` counts before the scope that holds.
        otherwise: The scope to look in where that one does not have it.
    """
    kind = config['type']
    if not isinstance(kind, str):
        return kind
    for scope in (config.get('_scope_'), *([otherwise] if otherwise else ())):
        with registry.switch_scope_and_registry(scope) as found:
            kind_found = found.get(kind)
        if kind_found is not None:
            return kind_found
    return None


def build_detector(model: Mapping[str, Any]) -> nn.Module:
    """Builds a detector from its model dict, which stays as it is, within the scope that the dict carries.

    Where it carries none, the scope that holds is that of its config: a run's, or :func:`within_scope`.
    """
    with within_scope(model.get('_scope_')):
        detector: nn.Module = MODELS.build(copy.deepcopy(model))  # building may write into a config
    return detector


def import_registered(package: str) -> dict[str, type]:
    """Imports every module of a package that is being imported, so that what they hold is registered.

    Who adds a term or a mask adds a file, and nothing else.

    Args:
        package: Its name.

    Returns:
        The classes that its own modules register as models, by name.
    """
    modules = [import_module(f'{package}.{each.name}') for each in iter_modules(sys.modules[package].__path__)]
    registered = MODELS.module_dict.values()
    return {name: value for module in modules for name, value in vars(module).items()
            if isinstance(value, type) and value.__module__ == module.__name__ and value in registered}


SCOPE = 'kd_det'
NODES = add_nodes(SCOPE)
