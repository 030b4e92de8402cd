"""Builds what a distillation config asks for, and says where in it a mistake is."""
from __future__ import annotations

import copy
from typing import Dict, List, Sequence, Tuple, Union

from mmdet.registry import MODELS

from kd_det.configuration import ConfigurationError
from kd_det.distillers.mistakes import reason
from kd_det.distillers.weights import Weight, WeightConfig, build_weight
from kd_det.heads import ROI_HEAD
from kd_det.heads.keeping import can_be_kept
from kd_det.losses import DistillTerm
from kd_det.scopes import build_own
from kd_det.teachers import TeacherError


def checked_teachers(teacher: Union[dict, Sequence[dict]]) -> List[dict]:
    """The configs of the teachers as a list.

    Raises:
        TeacherError: There is none, or one lacks its config.
    """
    configs = [teacher] if isinstance(teacher, dict) else list(teacher)
    for config in configs:
        if 'config' not in config:
            raise TeacherError("model.teacher lacks 'config': a config file, 'mmdet::…' or a model dict.")
    if not configs:
        raise TeacherError('model.teacher is an empty list: at least one teacher is needed.')
    return configs


def check_cached(teacher: dict, heads: Sequence[str]) -> None:
    """Checks that a teacher's cache, if it has one, can keep what a term reads of its heads.

    Raises:
        ConfigurationError: It can not; the message says what.
    """
    unkept = [head for head in heads if not can_be_kept(head)] if teacher.get('cache') else []
    if unkept:
        reason = ', which depend on the regions that the student samples in each step' if unkept[0] == ROI_HEAD else ''
        raise ConfigurationError(f"it reads the outputs of the teacher's {unkept[0]}{reason}: a cache keeps features "
                                 'and the maps of dense heads alone. Remove model.teacher.cache, or this term.')


def build_terms(distill: Dict[str, dict], teachers: int) -> Tuple[Dict[str, Weight], Dict[str, DistillTerm]]:
    """Builds the terms whose weight is not 0 throughout, and their weights.

    Args:
        distill: Name -> term, with its weight.
        teachers: How many teachers there are.

    Raises:
        ConfigurationError: A term can not be built; the message says which and why.
    """
    weights, terms = {}, {}
    for name, config in distill.items():
        where = f'model.distill.{name}'
        if 'loss' in name:
            raise ConfigurationError(f"{where}: a term's name may not contain 'loss', which mmengine takes for a loss "
                                     f"to add; the term is logged as 'loss_{name}' by itself. Rename it.")
        if not isinstance(config, dict) or 'type' not in config:
            raise ConfigurationError(f"{where} = {config!r:.80}: expected a dict with a 'type', such as "
                                     "dict(type='FGD', tap='neck').")
        whole, config = config, copy.deepcopy(dict(config))
        try:
            weight = build_weight(config.pop('weight', 1.0))
            if weight.is_zero:
                continue
            term = build_own(MODELS, config)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f'{where}: {reason(error, whole)}') from error
        if not isinstance(term, DistillTerm):
            raise ConfigurationError(
                f"{where}: '{config['type']}' is a {type(term).__name__}, not a distillation term.")
        if not 0 <= term.teacher < teachers:
            raise ConfigurationError(
                f'{where}: teacher={term.teacher}, but there are {teachers} teachers, counted from 0.')
        weights[name], terms[name] = weight, term
    return weights, terms


def build_task_weight(config: WeightConfig) -> Weight:
    """Builds the weight of the student's own losses.

    Raises:
        ConfigurationError: It can not be built, or is balanced.
    """
    try:
        weight = build_weight(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(f'model.task_weight: {reason(error, config)}') from error
    if weight.balance is not None:
        raise ConfigurationError("model.task_weight: the task's gradient is what Balance measures terms by. Give a "
                                 'number or a schedule of numbers.')
    return weight
