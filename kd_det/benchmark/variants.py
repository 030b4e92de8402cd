"""What is compared: a method, or a method in a setting of its own."""
from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Optional, Tuple, Union

from mmengine.config import Config, DictAction

from kd_det.benchmark.pair import Pair
from kd_det.composition import NO_METHOD, RATIO, available_methods, distillation_config
from kd_det.configuration import ConfigurationError, merge_options

PLAIN = NO_METHOD

# Settings of the distillation; all others are the student's.
DISTILLATION_KEYS = ('model.teacher', 'model.distill', 'model.inherit', 'model.task_weight', 'default_hooks.distill')


@dataclass(frozen=True)
class Variant:
    """A method in a setting.

    Attributes:
        name: As the user wrote it: ``fgd@paper``.
        method: Name of a method, a sum of names, or ``none``: no terms.
        balance: Each method's gradient at this ratio of the task's; None for the published weights.
        inherit: Parts of the student that start from the teacher's weights; ``'auto'`` for all but the backbone.
        settings: Overrides of the student's config by dotted key; those of :data:`DISTILLATION_KEYS` reach the
            distillation.
    """
    name: str
    method: str
    balance: Optional[float] = RATIO
    inherit: Union[str, Tuple[str, ...]] = 'auto'
    settings: Dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name as the name of a folder."""
        return re.sub(r'[^\w.@+=,-]', '_', self.name)

    @property
    def is_plain(self) -> bool:
        """Whether the teacher plays no part."""
        return self.method == PLAIN and not self.inherit


def parse_variants(text: str, common: Variant = Variant('', PLAIN)) -> List[Variant]:
    """Reads ``--methods``.

    Args:
        text: Variants with commas between them: ``none,fgd,fgd@paper,inherit,fgd+dkd@balance=0.5@inherit=neck``. After
            the method each ``@`` begins a setting:

            - ``@paper``: the published weights;
            - ``@balance=RATIO``: each method's gradient at that ratio of the task's;
            - ``@inherit=neck+bbox_head``: the parts that start from the teacher's weights where shapes agree;
              ``@inherit=none`` for none, ``@inherit`` for all but the backbone. ``inherit`` as a method is that, without terms;
            - ``@dotted.key=value``: overrides the student's config, as ``--cfg-options`` does, or what the distillation
              adds to it: ``@model.distill.fgd.temperature=0.8``.
        common: The settings that hold unless a variant has its own; for the plain student only ``settings`` hold.

    Returns:
        The variants; the plain student first, whether it was named or not.

    Raises:
        ConfigurationError: A method or a setting is not known, or a variant is named twice.
    """
    variants = [_parse(each.strip(), common) for each in re.split(r',(?![^\[(]*[\])])', text) if each.strip()]
    plain = [variant for variant in variants if variant.name == PLAIN] or [_parse(PLAIN, common)]
    variants = plain + [variant for variant in variants if variant.name != PLAIN]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"--methods names '{name}' {names.count(name)} times.")
    return variants


def _parse(text: str, common: Variant) -> Variant:
    method, *settings = text.split('@')
    if method == 'inherit':
        method, settings = PLAIN, ['inherit', *settings]
    for name in method.split('+'):
        if method != PLAIN and name not in available_methods():
            raise ConfigurationError(f"--methods: there is no method '{name}'. Choose from none, inherit, "
                                     f"{', '.join(available_methods())}, or a sum: a+b.")
    if method == PLAIN:
        common = replace(common, balance=RATIO, inherit=())
    variant = replace(common, name=text, method=method)
    for setting in settings:
        variant = _with_setting(variant, setting)
    return variant


def _with_setting(variant: Variant, setting: str) -> Variant:
    key, given, value = setting.partition('=')
    if key == 'paper' and not given:
        return replace(variant, balance=None)
    if key == 'balance':
        try:
            return replace(variant, balance=float(value))
        except ValueError:
            raise ConfigurationError(f"--methods {variant.name}: expected @balance=RATIO, a number, got "
                                     f"'{value}'.") from None
    if key == 'inherit':
        return replace(variant, inherit='auto' if not given else () if value == 'none' else tuple(value.split('+')))
    if '.' in key and given:
        return replace(variant, settings={**variant.settings, key: DictAction._parse_iterable(value)})
    raise ConfigurationError(f"--methods {variant.name}: there is no setting '@{setting}'. Expected @paper, "
                             '@balance=RATIO, @inherit, @inherit=PART+PART or @dotted.key=value.')


def variant_config(variant: Variant, pair: Pair, checkpoint: Optional[str] = None) -> Config:
    """The config that trains a variant.

    Args:
        variant: The variant.
        pair: Student and teacher.
        checkpoint: The teacher's weights; the plain student needs none.
    """
    config = copy.deepcopy(pair.student)
    of_distillation = {key: value for key, value in variant.settings.items() if key.startswith(DISTILLATION_KEYS)}
    merge_options(config, {key: value for key, value in variant.settings.items() if key not in of_distillation})
    if variant.is_plain:
        return config
    config = distillation_config(config, pair.teacher, checkpoint, variant.method, variant.inherit,
                                 balance=variant.balance)
    merge_options(config, of_distillation)
    return config
