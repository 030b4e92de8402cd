"""Adds a policy to a distillation, see :mod:`kd_det.distillers.policies`, and holds out images for it to learn by.

A policy chooses between teachers, or, with ``--method auto``, between the methods that fit a pair.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from mmdet.registry import TASK_UTILS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from kd_det.config import ConfigurationError, suggest_names
from kd_det.config.arguments import declared_arguments
from kd_det.config.choices import POLICIES
from kd_det.config.composition import fit_methods
from kd_det.config.files import get_type_name, is_distillation, list_leaf_datasets
from kd_det.config.methods import available_methods
from kd_det.registry import HOME, find_class, get_scope, within_scope

ALL_METHODS = 'auto'
HELD_OUT = f'{HOME}.HeldOut'
UNLABELLED = 'Unlabelled'  # the transform that says of images that nobody knows what they show


def add_policy(config: Config, policy: str | Mapping[str, Any], images: int = 64) -> Config:
    """Adds a policy to a distillation of several teachers.

    For one that learns from the student's evaluation, images of the training data are held out, evenly spaced: the
    student then trains on the others, and the rest of the config stays, epochs too.

    Args:
        config: Of a distillation whose terms have their whole weights, see ``share`` of
            :func:`~kd_det.config.composition.make_ensemble`.
        policy: One of :data:`~kd_det.config.choices.POLICIES`, or ``model.policy`` as a config has it.
        images: How many are held out.

    Returns:
        A config of its own.

    Raises:
        ConfigurationError: There is no such policy; or it needs images, and the training data has no labelled ones.
    """
    if isinstance(policy, str) and policy not in POLICIES:
        raise ConfigurationError(f"There is no policy '{policy}'. {suggest_names(policy, POLICIES)} Choose from "
                                 f"{', '.join(POLICIES)}.".replace('  ', ' '))
    if not is_distillation(config):
        raise ConfigurationError(f"A policy is added to a distillation, which '{config.filename}' is not.")
    config = copy.deepcopy(config)
    config.model.policy = ConfigDict(copy.deepcopy(POLICIES[policy] if isinstance(policy, str) else dict(policy)))
    kind = find_class(TASK_UTILS, config.model.policy, HOME)
    if getattr(kind, 'needs_probe', False) or config.model.policy.get('signal') == 'probe':
        hold_out(config, images)
    return config


def hold_out(config: Config, images: int) -> None:
    """Holds images out of a config's training data: of several labelled data sets within it equally many."""
    dataset = config.train_dataloader.dataset
    if any(get_type_name(each) == 'HeldOut' for each in _list_wrappers(dataset)):
        return
    labelled = [id(leaf) for leaf in list_leaf_datasets(dataset)
                if not any(get_type_name(each) == UNLABELLED for each in leaf.get('pipeline') or ())]
    if not labelled:
        raise ConfigurationError('A policy that learns needs labelled images to evaluate the student on, and '
                                 'train_dataloader.dataset has none.')
    share = -(-images // len(labelled))
    config.train_dataloader.dataset = _replace_leaves(
        dataset, lambda leaf: ConfigDict(type=HELD_OUT, images=share, dataset=leaf) if id(leaf) in labelled else leaf)


def _list_wrappers(dataset: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = dataset.get('datasets', dataset.get('dataset')) or ()
    return [dataset, *(each for item in (inner if isinstance(inner, (list, tuple)) else [inner])
                       for each in _list_wrappers(item))]


def _replace_leaves(dataset: ConfigDict, make: Callable[[ConfigDict], ConfigDict]) -> ConfigDict:
    """Puts something in the place of each data set that is no wrapper, within the wrappers."""
    for key in ('datasets', 'dataset'):
        inner = dataset.get(key)
        if inner is not None:
            dataset[key] = ([_replace_leaves(each, make) for each in inner] if isinstance(inner, (list, tuple)) else
                            _replace_leaves(inner, make))
            return dataset
    return make(dataset)


def names_all_methods(method: str) -> bool:
    """Whether ``--method`` says ``auto``, or ``auto:fgd+pkd`` for a choice between these."""
    return method.partition(':')[0] == ALL_METHODS


def add_methods(config: Config, method: str, policy: str | Mapping[str, Any] = 'bandit', family: str = '',
                balance: float | str | None = None) -> Config:
    """Lets a policy choose between methods: each is an arm, with all its terms at their whole weights.

    Args:
        config: Of a distillation with one teacher and no terms.
        method: See :func:`names_all_methods`. All that go by their names and fit student and teacher, or those named.
        policy: See :func:`add_policy`; one that weighs groups of terms.
        family: Whose published weights to use, one of :data:`~kd_det.config.choices.FAMILIES`; told by the student's
            heads by default.
        balance: See :func:`~kd_det.config.composition.balance_terms`.

    Returns:
        A config of its own.

    Raises:
        ConfigurationError: One that is named does not fit, or less than two do; or the policy chooses between teachers
            alone.
    """
    config = copy.deepcopy(config)
    named = [each for each in method.partition(':')[2].split('+') if each]
    model, arms, left_out = config.model, {}, []
    with within_scope(get_scope(config)):
        fits = list(fit_methods(model, named or available_methods(), family, balance, strict=bool(named)))
    for fit in fits:
        if fit.problem:
            left_out.append(fit.name)
            continue
        terms = {key if key == fit.name else f'{fit.name}_{key}': term for key, term in fit.terms.items()}
        arms[fit.name] = list(terms)
        model.distill.update(terms)
        config.custom_imports['imports'] = list(dict.fromkeys([*config.custom_imports['imports'], *fit.imports]))
    if len(arms) < 2:
        raise ConfigurationError(f"--method {method}: there is nothing to choose between: {', '.join(arms) or 'none'} "
                                 'fits this student and teacher. Name methods, as --method auto:fgd+pkd.')
    print_log(f"The policy chooses between {', '.join(arms)}."
              + (f" Of the others, which do not fit student and teacher: {', '.join(left_out)}." if left_out else ''),
              'current')
    policy = POLICIES[policy] if isinstance(policy, str) and policy in POLICIES else policy
    kind = find_class(TASK_UTILS, policy, HOME) if isinstance(policy, Mapping) else None
    if kind is not None and 'arms' not in declared_arguments(kind):
        raise ConfigurationError(f"--method {method}: a {kind.__name__} chooses between teachers, not between methods. "
                                 'Take bandit, random, uniform or sequence.')
    return add_policy(config, dict(policy, arms=arms) if isinstance(policy, Mapping) else policy)
