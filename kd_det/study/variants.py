"""The variants of a benchmark: a method, or a method in a setting of its own, and the config that trains it."""
from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.config.arguments import Ratio, Share, check_value
from kd_det.config.choices import POLICIES, split_values
from kd_det.config.composition import NO_METHOD, PAPER
from kd_det.config.distillation import compose_distillation
from kd_det.config.files import TOP_KEYS
from kd_det.config.methods import available_methods, find_files, is_file
from kd_det.config.options import merge_options, read_value, set_epochs
from kd_det.config.policies import names_all_methods
from kd_det.study.identity import sha256
from kd_det.study.pair import Pair
from kd_det.study.training_data import AUGMENTATIONS, mix_images, spoil_labels
from kd_det.training.labels import Shift

PLAIN = NO_METHOD
LENGTH = 'epochs='
LONGEST = 200  # bytes of a folder's name; file systems take 255
PSEUDO_LABELS = 'pseudo_labels'
SURE = 0.5  # the score from which on a teacher's boxes are labels, where none is given

# Settings of the distillation; all others are the student's.
DISTILLATION_KEYS = ('model.teacher', 'model.distill', 'model.inherit', 'model.task_weight', 'model.policy',
                     'model.pseudo_labels', 'default_hooks.distill')

# Settings that change the student, and the values of them that do not.
OF_STUDENT = dict(epochs=(), augment=(PLAIN, ), noise=('0', '0.0'), shift=('0', '0.0'), without=(PLAIN, ))


@dataclass(frozen=True)
class Variant:
    """A method in a setting.

    Attributes:
        name: As the user wrote it: ``fgd@paper``.
        method: Name of a method, or its file, a sum of such, or ``none``: no terms.
        balance: Each method's gradient at this ratio of the task's; None for each method's own, ``'paper'`` for the
            published weights.
        inherit: Parts of the student that start from the teacher's weights; ``'auto'`` for all but the backbone.
        settings: Overrides of the student's config by dotted key; those of :data:`DISTILLATION_KEYS` reach the
            distillation.
        teachers: How many teachers it learns from, see :func:`~kd_det.config.composition.make_ensemble`.
        policy: Who of them teaches in a step, one of :data:`~kd_det.config.choices.POLICIES`; '' for all at once.
        augment: What is done to the training images beside the student's own pipeline, see
            :func:`~kd_det.study.training_data.mix_images`.
        epochs: For how long the student trains, its schedules stretched with it; None for its config's own.
        noise: The share of training boxes that get a wrong class, see :class:`~kd_det.training.NoisyLabels`.
        shift: By which share of their size training boxes move, see there.
        without: Classes that no training box has, see :class:`~kd_det.training.WithoutClasses`.
        pseudo_labels: The score from which on the teacher's boxes join the training boxes; None for none of them.
    """
    name: str
    method: str
    balance: float | str | None = None
    inherit: str | tuple[str, ...] = 'auto'
    settings: dict[str, Any] = field(default_factory=dict)
    teachers: int = 1
    policy: str = ''
    augment: tuple[str, ...] = ()
    epochs: int | None = None
    noise: float = 0.0
    shift: float = 0.0
    without: tuple[str, ...] = ()
    pseudo_labels: float | None = None

    @property
    def folder(self) -> str:
        """The name as the name of a folder; of a long one the beginning, and a hash of it all."""
        name = re.sub(r'[^\w.@+=,-]', '_', self.name)
        if len(name.encode()) <= LONGEST:
            return name
        return f"{name.encode()[:LONGEST - 9].decode(errors='ignore')}-{sha256(self.name.encode())[:8]}"

    @property
    def is_plain(self) -> bool:
        """Whether the teacher plays no part."""
        return self.method == PLAIN and not self.inherit and self.pseudo_labels is None

    @property
    def labels(self) -> dict[str, Any]:
        """What is changed in the training labels, by the names of the settings."""
        return {name: getattr(self, name) for name in ('noise', 'shift', 'without') if getattr(self, name)}


def find_twin(name: str) -> str:
    """The plain student that a variant is compared with, by their names.

    It has those of the variant's settings that would change the student without a teacher too: ``none@augment=mosaic``
    for ``fgd@paper@augment=mosaic``, so that augmentation does not count as the teacher's merit. The twin of a plain
    student in a setting is that without, trained as long: ``none@epochs=24`` for ``none@noise=0.2@epochs=24``; that of
    one which differs in its length alone is ``none``.
    """
    changes = [_spell(setting) for setting in name.split('@')[1:] if _changes_student(setting)]
    twin = '@'.join([PLAIN, *changes])
    if twin != name:
        return twin
    lengths = [setting for setting in changes if setting.startswith(LENGTH)]
    return '@'.join([PLAIN, *(lengths if len(lengths) < len(changes) else ())])


def _list_twins(names: Sequence[str]) -> list[str]:
    """The plain students that these variants are compared with, and those that these are compared with; first none."""
    found = [PLAIN]
    for name in names:
        chain = []
        while (name := find_twin(name)) != PLAIN:
            chain.append(name)
        found += reversed(chain)
    return list(dict.fromkeys(found))


def _changes_student(setting: str) -> bool:
    key, _, value = setting.partition('=')
    if '.' in key:
        return not setting.startswith(DISTILLATION_KEYS)
    return key in OF_STUDENT and value not in OF_STUDENT[key]


def _spell(setting: str) -> str:
    """A setting of the student in the one way that twins have it: ``noise=0.2`` for ``noise=0.20``."""
    key, _, value = setting.partition('=')
    if key in ('noise', 'shift'):
        with suppress(ValueError):  # which is refused where the setting is read
            return f'{key}={float(value):g}'
    order = [each for each in AUGMENTATIONS if each in value.split('+')]
    return f"augment={'+'.join(order)}" if key == 'augment' and order else setting


def without_length(name: str) -> str:
    """The name of a variant without the epochs in it, so that those that differ in them alone have the same."""
    return '@'.join(part for part in name.split('@') if not part.startswith(LENGTH))


def parse_variants(text: str | Sequence[str], common: Variant = Variant('', PLAIN),
                   lengths: Sequence[int] = ()) -> list[Variant]:
    """Reads ``--methods``.

    Args:
        text: Variants, or a text that has them with commas between:
            ``none,fgd,fgd@paper,inherit,fgd+dkd@balance=0.5@inherit=neck``. After the method each ``@`` begins a
            setting:

            - ``@paper``: the published weights;
            - ``@balance=RATIO``: each method's gradient at that ratio of the task's;
            - ``@inherit=neck+bbox_head``: the parts that start from the teacher's weights where shapes agree;
              ``@inherit=none`` for none, ``@inherit`` for all but the backbone. ``inherit`` as a method is that and no
              terms;
            - ``@teachers=3``: learns from an ensemble of so many; ``@policy=agent``: from those of them whom
              the policy chooses;
            - ``@epochs=24``: trains for so long, as its twin does;
            - ``@augment=mosaic+mixup``: mixes training images, as teacher and student see them; ``@augment=none``;
            - ``@noise=0.2``: that share of the training boxes has a wrong class; ``@shift=0.1``: they are moved by up
              to that share of their size; ``@without=CLASS+CLASS``: none is of these classes. The teacher has learnt
              from labels as they are;
            - ``@pseudo_labels``, ``@pseudo_labels=0.5``: boxes of which the teacher is that sure join the training
              boxes. ``pseudo_labels`` as a method is that and no terms;
            - ``@dotted.key=value``: overrides the student's config, as ``--cfg-options`` does, or what the distillation
              adds to it: ``@model.distill.fgd.temperature=0.8``.
        common: The settings that hold unless a variant has its own; for the plain student only ``settings`` and
            ``epochs`` hold.
        lengths: Further numbers of epochs, with each of which every variant is trained, too.

    Returns:
        The variants; the plain student and the twins of all others, see :func:`find_twin`, come first, whether they
        were named or not.

    Raises:
        ConfigurationError: A method or a setting is not known, or a variant is named twice.
    """
    written = split_values(text) if isinstance(text, str) else [each.strip() for each in text if each.strip()]
    if lengths:
        fixed = [each for each in written if without_length(each) != each]
        if fixed:
            raise ConfigurationError(f"--methods {fixed[0]}: it has an @epochs of its own beside several of --epochs. "
                                     'Leave one of the two out.')
        written = [each if length is None else f'{each}@{LENGTH}{length}' for length in (None, *lengths)
                   for each in dict.fromkeys((PLAIN, *written))]
    variants = [_parse_variant(each, common) for each in written]
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"--methods names '{name}' {names.count(name)} times.")
    twins = _list_twins(names)
    return [*(_parse_variant(twin, common) for twin in twins),
            *(variant for variant in variants if variant.name not in twins)]


def _parse_variant(text: str, common: Variant) -> Variant:
    method, *settings = text.split('@')
    if method in ('inherit', PSEUDO_LABELS):
        method, settings = PLAIN, [method, *settings]
    if names_all_methods(method):
        names = [each for each in method.partition(':')[2].split('+') if each]
    else:
        names = [method] if Path(method).is_file() else method.split('+')
    for name in names:
        if is_file(name):
            find_files(name)
        elif method != PLAIN and name not in available_methods():
            raise ConfigurationError(f"--methods: there is no method '{name}'. Choose from none, inherit, "
                                     f"{PSEUDO_LABELS}, {', '.join(available_methods())}, or a sum: a+b.")
    if method == PLAIN:
        common = replace(common, balance=None, inherit=())
    variant = replace(common, name=text, method=method)
    for setting in settings:
        variant = _apply_setting(variant, setting)
    if variant.method == PLAIN and variant.teachers > 1:
        raise ConfigurationError(f"--methods {text}: only a method's terms learn from several teachers, and here "
                                 f'are none. Name one, such as kd@teachers={variant.teachers}, or leave @teachers out.')
    if names_all_methods(method) and variant.teachers > 1:
        raise ConfigurationError(f'--methods {text}: auto chooses between the methods of one teacher.')
    if variant.policy and variant.teachers < 2 and not names_all_methods(method):
        raise ConfigurationError(f'--methods {text}: a policy chooses between several teachers: give @teachers=N too.')
    return variant


def _apply_setting(variant: Variant, setting: str) -> Variant:
    key, given, value = setting.partition('=')
    if key == PAPER and not given:
        return replace(variant, balance=PAPER)
    if key == 'balance':
        with suppress(ValueError):
            ratio = float(value)
            check_value('', ratio, Ratio)
            return replace(variant, balance=ratio)
        raise ConfigurationError(f"--methods {variant.name}: expected @balance=RATIO, a number of at least 0, got "
                                 f"'{value}'.")
    if key == 'inherit':
        return replace(variant, inherit='auto' if not given else () if value == 'none' else tuple(value.split('+')))
    if key == 'teachers':
        if not value.isdecimal() or int(value) < 1:
            raise ConfigurationError(f"--methods {variant.name}: expected @teachers=N, a number of 1 or more, got "
                                     f"'{value}'.")
        return replace(variant, teachers=int(value))
    if key == 'epochs':
        if not value.isdecimal() or int(value) < 1:
            raise ConfigurationError(f"--methods {variant.name}: expected @epochs=N, a number of 1 or more, got "
                                     f"'{value}'.")
        return replace(variant, epochs=int(value))
    if key == 'policy':
        if value not in POLICIES:
            raise ConfigurationError(f"--methods {variant.name}: expected @policy={', '.join(POLICIES)}, got "
                                     f"'{value}'.")
        return replace(variant, policy=value)
    if key == 'augment':
        augment = () if value == PLAIN else tuple(value.split('+'))
        if not set(augment) <= set(AUGMENTATIONS):
            raise ConfigurationError(f"--methods {variant.name}: expected @augment={', '.join(AUGMENTATIONS)}, a sum "
                                     f"of them, or none, got '{value}'.")
        return replace(variant, augment=augment)
    if key in ('noise', 'shift') or key == PSEUDO_LABELS:
        expected, kind = (f'@{key}=SHARE, a number from 0 to 0.5', Shift) if key == 'shift' else (
            f'@{key}=SHARE, a number from 0 to 1', Share)
        with suppress(ValueError):
            share = SURE if key == PSEUDO_LABELS and not given else float(value)
            check_value('', share, kind)
            return replace(variant, **{key: share})
        raise ConfigurationError(f"--methods {variant.name}: expected {expected}, got '{value}'.")
    if key == 'without' and value:
        return replace(variant, without=() if value == PLAIN else tuple(value.split('+')))
    if '.' in key and given:
        return replace(variant, settings={**variant.settings, key: read_value(value, f'--methods {variant.name}')})
    raise ConfigurationError(f"--methods {variant.name}: there is no setting '@{setting}'. Expected @paper, "
                             '@balance=RATIO, @inherit, @inherit=PART+PART, @teachers=N, @policy=POLICY, @epochs=N, '
                             '@augment=mosaic+mixup, @noise=SHARE, @shift=SHARE, @without=CLASS+CLASS, '
                             '@pseudo_labels=SCORE or @dotted.key=value.')


def expand_grid(method: str, settings: Sequence[tuple[str, Sequence]]) -> list[str]:
    """Names a variant for every combination of values, as :func:`parse_variants` reads them.

    Args:
        method: The method.
        settings: Key and values of each setting. A dotted key that begins with nothing that a run reads is a term's; a
            config may define the method under the same name.
    """
    keys = [f'model.distill.{key}' if '.' in key and key.split('.')[0] not in TOP_KEYS else key for key, _ in settings]
    return ['@'.join([method, *(f'{key}={value}' for key, value in zip(keys, values))])
            for values in product(*(values for _, values in settings))]


def variant_config(variant: Variant, pair: Pair, checkpoints: Sequence[str] = (), seed: int = 0) -> Config:
    """The config that trains a variant.

    Args:
        variant: The variant.
        pair: Student and teacher.
        checkpoints: The weights of as many teachers as the variant has, or more; the plain student needs none.
        seed: Which of the training labels are spoiled.
    """
    config = copy.deepcopy(pair.student)
    if variant.epochs is not None:
        set_epochs(config, variant.epochs)
    of_distillation = {key: value for key, value in variant.settings.items() if key.startswith(DISTILLATION_KEYS)}
    merge_options(config, {key: value for key, value in variant.settings.items() if key not in of_distillation})
    mix_images(config, variant.augment)
    spoil_labels(config, **variant.labels, seed=seed)
    if variant.is_plain:
        return config
    teachers = pair.teachers[:variant.teachers] if variant.teachers > 1 else ()
    config, _ = compose_distillation(config, teachers or (pair.teacher, ), checkpoints[:variant.teachers],
                                     variant.method, variant.inherit, balance=variant.balance,
                                     policy=variant.policy or None)
    if variant.pseudo_labels is not None:
        config.model.pseudo_labels = dict(score=variant.pseudo_labels)
    merge_options(config, of_distillation)  # of a term: for all its teachers, or for one
    return config
