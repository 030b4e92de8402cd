"""What is compared: a method, or a method in a setting of its own."""
from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Sequence, Tuple, Union

from mmengine.config import Config, DictAction

from kd_det.benchmark.augmentation import AUGMENTATIONS, mix_images
from kd_det.benchmark.pair import Pair
from kd_det.composition import NO_METHOD, PAPER, available_methods, distillation_config
from kd_det.configuration import ConfigurationError, merge_options
from kd_det.ensembles import ensemble

PLAIN = NO_METHOD

# Settings of the distillation; all others are the student's.
DISTILLATION_KEYS = ('model.teacher', 'model.distill', 'model.inherit', 'model.task_weight', 'default_hooks.distill')


@dataclass(frozen=True)
class Variant:
    """A method in a setting.

    Attributes:
        name: As the user wrote it: ``fgd@paper``.
        method: Name of a method, a sum of names, or ``none``: no terms.
        balance: Each method's gradient at this ratio of the task's; None for each method's own, ``'paper'`` for the
            published weights.
        inherit: Parts of the student that start from the teacher's weights; ``'auto'`` for all but the backbone.
        settings: Overrides of the student's config by dotted key; those of :data:`DISTILLATION_KEYS` reach the
            distillation.
        teachers: How many teachers it learns from, see :func:`~kd_det.ensembles.ensemble`.
        augment: What is done to the training images beside the student's own pipeline, see
            :func:`~kd_det.benchmark.augmentation.mix_images`.
    """
    name: str
    method: str
    balance: Union[float, str, None] = None
    inherit: Union[str, Tuple[str, ...]] = 'auto'
    settings: Dict[str, Any] = field(default_factory=dict)
    teachers: int = 1
    augment: Tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """The name as the name of a folder."""
        return re.sub(r'[^\w.@+=,-]', '_', self.name)

    @property
    def is_plain(self) -> bool:
        """Whether the teacher plays no part."""
        return self.method == PLAIN and not self.inherit


def twin_of(name: str) -> str:
    """The plain student that a variant is compared with, by their names.

    It has those of the variant's settings that would change the student without a teacher too: ``none@augment=mosaic``
    for ``fgd@paper@augment=mosaic``, so that augmentation does not count as the teacher's merit. The twin of a plain
    student in a setting is that without: ``none``.
    """
    twin = '@'.join([PLAIN, *(setting for setting in name.split('@')[1:] if _is_students(setting))])
    return PLAIN if twin == name else twin


def _is_students(setting: str) -> bool:
    if '.' in setting.partition('=')[0]:
        return not setting.startswith(DISTILLATION_KEYS)
    return setting.startswith('augment=') and setting != f'augment={PLAIN}'


def parse_variants(text: str, common: Variant = Variant('', PLAIN)) -> List[Variant]:
    """Reads ``--methods``.

    Args:
        text: Variants with commas between them: ``none,fgd,fgd@paper,inherit,fgd+dkd@balance=0.5@inherit=neck``. After
            the method each ``@`` begins a setting:

            - ``@paper``: the published weights;
            - ``@balance=RATIO``: each method's gradient at that ratio of the task's;
            - ``@inherit=neck+bbox_head``: the parts that start from the teacher's weights where shapes agree;
              ``@inherit=none`` for none, ``@inherit`` for all but the backbone. ``inherit`` as a method is that and no
              terms;
            - ``@teachers=3``: learns from an ensemble of so many;
            - ``@augment=mosaic+mixup``: mixes training images, as teacher and student see them; ``@augment=none``;
            - ``@dotted.key=value``: overrides the student's config, as ``--cfg-options`` does, or what the distillation
              adds to it: ``@model.distill.fgd.temperature=0.8``.
        common: The settings that hold unless a variant has its own; for the plain student only ``settings`` hold.

    Returns:
        The variants; the plain student and the twins of all others, see :func:`twin_of`, come first, whether they were
        named or not.

    Raises:
        ConfigurationError: A method or a setting is not known, or a variant is named twice.
    """
    variants = [_parse(each.strip(), common) for each in re.split(r',(?![^\[(]*[\])])', text) if each.strip()]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"--methods names '{name}' {names.count(name)} times.")
    twins = [PLAIN, *dict.fromkeys(twin for twin in map(twin_of, names) if twin != PLAIN)]
    return [_parse(twin, common) for twin in twins] + [variant for variant in variants if variant.name not in twins]


def _parse(text: str, common: Variant) -> Variant:
    method, *settings = text.split('@')
    if method == 'inherit':
        method, settings = PLAIN, ['inherit', *settings]
    for name in method.split('+'):
        if method != PLAIN and name not in available_methods():
            raise ConfigurationError(f"--methods: there is no method '{name}'. Choose from none, inherit, "
                                     f"{', '.join(available_methods())}, or a sum: a+b.")
    if method == PLAIN:
        common = replace(common, balance=None, inherit=())
    variant = replace(common, name=text, method=method)
    for setting in settings:
        variant = _with_setting(variant, setting)
    if variant.method == PLAIN and variant.teachers > 1:
        raise ConfigurationError(f"--methods {text}: only a method's terms learn from several teachers, and here "
                                 f'are none. Name one, such as kd@teachers={variant.teachers}, or leave @teachers out.')
    return variant


def _with_setting(variant: Variant, setting: str) -> Variant:
    key, given, value = setting.partition('=')
    if key == PAPER and not given:
        return replace(variant, balance=PAPER)
    if key == 'balance':
        try:
            return replace(variant, balance=float(value))
        except ValueError:
            raise ConfigurationError(f"--methods {variant.name}: expected @balance=RATIO, a number, got "
                                     f"'{value}'.") from None
    if key == 'inherit':
        return replace(variant, inherit='auto' if not given else () if value == 'none' else tuple(value.split('+')))
    if key == 'teachers':
        if not value.isdigit() or int(value) < 1:
            raise ConfigurationError(f"--methods {variant.name}: expected @teachers=N, a number of 1 or more, got "
                                     f"'{value}'.")
        return replace(variant, teachers=int(value))
    if key == 'augment':
        augment = () if value == PLAIN else tuple(value.split('+'))
        if not set(augment) <= set(AUGMENTATIONS):
            raise ConfigurationError(f"--methods {variant.name}: expected @augment={', '.join(AUGMENTATIONS)}, a sum "
                                     f"of them, or none, got '{value}'.")
        return replace(variant, augment=augment)
    if '.' in key and given:
        return replace(variant, settings={**variant.settings, key: DictAction._parse_iterable(value)})
    raise ConfigurationError(f"--methods {variant.name}: there is no setting '@{setting}'. Expected @paper, "
                             '@balance=RATIO, @inherit, @inherit=PART+PART, @teachers=N, @augment=mosaic+mixup or '
                             '@dotted.key=value.')


def variant_config(variant: Variant, pair: Pair, checkpoints: Sequence[str] = ()) -> Config:
    """The config that trains a variant.

    Args:
        variant: The variant.
        pair: Student and teacher.
        checkpoints: The weights of as many teachers as the variant has, or more; the plain student needs none.
    """
    config = copy.deepcopy(pair.student)
    of_distillation = {key: value for key, value in variant.settings.items() if key.startswith(DISTILLATION_KEYS)}
    merge_options(config, {key: value for key, value in variant.settings.items() if key not in of_distillation})
    mix_images(config, variant.augment)
    if variant.is_plain:
        return config
    config = distillation_config(config, pair.teacher, checkpoints[0], variant.method, variant.inherit,
                                 balance=variant.balance)
    merge_options(config, of_distillation)  # before it is repeated: a setting of a term holds for all teachers
    return ensemble(config, checkpoints[:variant.teachers]) if variant.teachers > 1 else config
