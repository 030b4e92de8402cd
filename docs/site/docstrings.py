"""Lets the reference show docstrings that are written with Sphinx's roles: an extension of griffe, which reads them."""
from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))
from markup import convert_literals, convert_roles, convert_tables

PACKAGE = 'kd_det'


class SphinxMarkup(griffe.Extension):
    """Roles become cross-references that the build checks; tables and literal blocks become Markdown."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        """Converts all docstrings of the package, once it is loaded."""
        if pkg.path == PACKAGE:
            self._convert(pkg, loader.modules_collection)

    def _convert(self, obj: griffe.Object, modules: griffe.ModulesCollection) -> None:
        if obj.docstring is not None:
            text = convert_roles(obj.docstring.value, lambda name: find_object(name, obj, modules))
            text = re.sub(r'^( *)Example:$', r'\1Examples:', text, flags=re.MULTILINE)  # the section that griffe knows
            obj.docstring.value = convert_literals(convert_tables(text))
        for member in obj.members.values():
            if not member.is_alias:
                self._convert(member, modules)


def find_object(name: str, scope: griffe.Object, modules: griffe.ModulesCollection) -> str | None:
    """The full path of what a docstring names.

    Args:
        name: As written: a full path, or one from the object, its class or its module on.
        scope: The object whose docstring it is.
        modules: All that were read.

    Returns:
        Where it is defined; None for what the reference does not show: the private, the undocumented, other packages'.
        A name that does not exist is returned as it is, so that the strict build fails.
    """
    path = name
    if name.partition('.')[0] != PACKAGE:
        first, dot, rest = name.partition('.')
        owner: griffe.Object | griffe.Alias | None = scope
        while owner is not None and first not in owner.all_members:
            owner = owner.parent
        if owner is None:  # a dotted name is one of another package
            return None if dot else name
        member = owner.all_members[first]
        path = (member.target_path if member.is_alias else member.path) + dot + rest
    if path.partition('.')[0] != PACKAGE or any(part.startswith('_') for part in path.split('.')):
        return None
    found = look_up(path, modules)
    if found is None:
        return path
    return found.canonical_path if found.has_docstring else None


def look_up(path: str, modules: griffe.ModulesCollection) -> griffe.Object | griffe.Alias | None:
    """Finds an object by its path, which may be one that its package fills in when asked for a name.

    The package kd_det names such modules in ``_PUBLIC``; other packages take names from the modules that they hold.
    """
    try:
        return modules[path]
    except (KeyError, griffe.AliasResolutionError):
        pass
    parent, _, name = path.rpartition('.')
    try:
        package = modules[parent]
    except KeyError:
        return None
    if '_PUBLIC' in package.members:
        module = ast.literal_eval(str(package.members['_PUBLIC'].value)).get(name)
        return None if module is None else look_up(f'{module}.{name}', modules)
    holders = [each for each in package.modules.values() if name in each.members and not each.members[name].is_alias]
    return holders[0].members[name] if holders else None
