"""Makes a distillation config out of a student's: what ``kd-det distill`` trains."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Dict, Optional, Sequence, Union

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict

from kd_det.configuration import (CONFIG_ROOT, DISTILL_HOOK, DISTILLER, ConfigurationError, is_distillation,
                                  load_config, student_model)

METHOD_ROOT = CONFIG_ROOT / '_base_' / 'methods'

# Published weights differ between these families of heads, so a method has one file for each, <method>_<family>.py, or
# one for all, <method>.py.
FAMILIES = ('two_stage', 'one_stage', 'anchor_free')
ANCHOR_FREE_HEADS = ('AnchorFreeHead', 'YOLOXHead', 'CenterNetHead')


def available_methods() -> Dict[str, Dict[str, Path]]:
    """The methods that have configs: name -> family (or ``''`` where one file serves all) -> file."""
    methods: Dict[str, Dict[str, Path]] = {}
    for file in sorted(METHOD_ROOT.glob('*.py')):
        family = next((family for family in FAMILIES if file.stem.endswith(f'_{family}')), '')
        name = file.stem[:-len(family) - 1] if family else file.stem
        methods.setdefault(name, {})[family] = file
    return methods


def head_family(model: dict) -> str:
    """Tells to which of :data:`FAMILIES` a detector belongs, by its heads.

    Raises:
        ConfigurationError: It has neither a RoI head nor a dense head.
    """
    if model.get('roi_head'):
        return 'two_stage'
    head = model.get('bbox_head')
    if not head:
        raise ConfigurationError(
            f"A {model.get('type')} has neither roi_head nor bbox_head: its family is not known. Choose "
            f"the weights yourself with --family {{{','.join(FAMILIES)}}}.")
    with MODELS.switch_scope_and_registry(head.get('_scope_')) as registry:
        head_class = registry.get(head['type']) if isinstance(head['type'], str) else head['type']
    ancestors = {ancestor.__name__ for ancestor in getattr(head_class, '__mro__', ())}
    return 'anchor_free' if ancestors.intersection(ANCHOR_FREE_HEADS) else 'one_stage'


def method_terms(method: str, family: str) -> ConfigDict:
    """The distillation terms of one method, or of a sum of methods such as ``'fgd+dkd'``.

    Raises:
        ConfigurationError: There is no such method, or none of its files fits the family.
    """
    methods = available_methods()
    terms = ConfigDict()
    for name in method.split('+'):
        if name not in methods:
            raise ConfigurationError(f"There is no method '{name}'. Choose from {', '.join(methods)}, or a sum: a+b.")
        file = methods[name].get(family, methods[name].get(''))
        if file is None:
            raise ConfigurationError(f"The method '{name}' has no weights for {family} detectors, only for "
                                     f"{', '.join(methods[name])}. Choose others with --family.")
        terms.update(load_config(file)[name])
    return terms


def distillation_config(student: Union[str, Config], teacher_config: str, teacher_checkpoint: str, method: str,
                        inherit: Sequence[str] = (), family: str = '', balance: Optional[float] = None) -> Config:
    """Makes the config that distils a teacher into a student.

    The student's config alone decides data, classes, schedule and evaluation; nothing of that changes.

    Args:
        student: Config of the detector to train: a file, ``'mmdet::…'``, or a config.
        teacher_config: Config of the teacher: a file or ``'mmdet::…'``.
        teacher_checkpoint: The teacher's weights: a file or an address.
        method: Name of a method, or a sum of names, see :func:`available_methods`.
        inherit: Parts of the student, such as ``'neck'``, that start from the teacher's weights where shapes agree.
        family: Whose published weights to use, one of :data:`FAMILIES`; told by the student's heads by default.
        balance: The ratio of each term's gradient to the task's, in place of its published weight, see
            :class:`~kd_det.distillers.Balance`. Weights of the parts within a term stay.

    Raises:
        ConfigurationError: The student is a distiller already, or the method does not serve.
    """
    config = copy.deepcopy(student) if isinstance(student, Config) else load_config(student)
    if is_distillation(config):
        raise ConfigurationError(
            f"The student's config '{config.filename}' is a distillation already (its model is a "
            f'{DISTILLER}): give the config of a plain detector, or train this one with kd-det train.')
    model = student_model(config)
    terms = method_terms(method, family or head_family(model))
    for term in terms.values() if balance is not None else ():
        term['weight'] = dict(type='Balance', ratio=balance)
    config.model = dict(
        type=DISTILLER,
        student=model,
        teacher=dict(config=teacher_config, checkpoint=teacher_checkpoint),
        distill=terms,
        inherit=tuple(inherit))
    config.setdefault('default_hooks', ConfigDict())['distill'] = dict(
        type=DISTILL_HOOK, preflight=dict(images=64, min_map=0.01))
    imports = config.get('custom_imports', {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    config.custom_imports = dict(imports=list(dict.fromkeys([*imports, 'kd_det'])), allow_failed_imports=False)
    return config
