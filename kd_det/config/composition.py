"""Makes a distillation config out of a student's: what ``kd-det distill`` trains.

In the order in which it is made: the terms of the methods, what they need of the student, the config, and that of
several teachers. What ``--cfg-options`` change in it at last, :mod:`kd_det.config.options` does.
"""
from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from torch import Tensor

from kd_det.compat.process import preserved_randomness
from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError, suggest_names
from kd_det.config.choices import PAPER, RATIO
from kd_det.config.detectors import (
    DETECTORS,
    HeadClasses,
    check_student,
    extract_plain_detector,
    find_family,
    find_head_classes,
    has_one_level,
    read_guide_config,
    read_model_config,
)
from kd_det.config.files import (
    DISTILLER,
    SCOPED_DISTILLER,
    SCOPED_HOOK,
    build_own,
    explain_build_error,
    get_type_name,
    is_distillation,
    list_imports,
    load_config,
    student_model,
)
from kd_det.config.methods import PARTS, find_files, split_family
from kd_det.heads import ROI_HEAD, HeadError, HeadRequest, check_head, check_sampling
from kd_det.registry import HOME, build_detector, get_scope, within_scope

if TYPE_CHECKING:
    from kd_det.losses import DistillTerm

NO_METHOD = 'none'  # no terms: the student may still inherit
DEFAULT_RATIO = 0.5  # of a Balance that is given none


def find_model_family(model: dict) -> str:
    """Tells to which of :data:`~kd_det.config.choices.FAMILIES` a detector belongs, from its model dict.

    Raises:
        ConfigurationError: It has neither a RoI head nor a dense head.
    """
    return find_family(get_type_name(model), find_head_classes(model))


class LoadedMethod(NamedTuple):
    """What a method's file holds.

    Attributes:
        terms: Their configs by name.
        imports: The modules that it imports, which may register terms and masks of its own.
    """
    terms: ConfigDict
    imports: list[str]


def load_method(file: Path) -> LoadedMethod:
    """Reads a method's file, as a config.

    Raises:
        ConfigurationError: The file can not be read, or holds no terms under the method's name.
    """
    config, name = load_config(file), split_family(file)[0]
    terms = config.get(name)
    if not isinstance(terms, dict) or not terms or not all(get_type_name(term) for term in terms.values()):
        others = ', '.join(f"'{key}'" for key in config) or 'nothing'
        raise ConfigurationError(f"The method's file '{file}' holds no method: expected {name} = dict(NAME=dict("
                                 f'type=…, …)), a dict of terms by name; it defines {others}.')
    return LoadedMethod(terms, list_imports(config))


def load_methods(methods: str, family: str) -> dict[str, LoadedMethod]:
    """Reads the files of one method, or of a sum such as ``'fgd+my_method.py'``, that are made for a family.

    Args:
        methods: The name or names, see :func:`~kd_det.config.methods.find_files`; ``'none'`` for none.
        family: One of :data:`~kd_det.config.choices.FAMILIES`.

    Raises:
        ConfigurationError: There is no such method, a sum names one or a term twice, a file holds no method, or none
            fits the family.
        FileNotFoundError: There is no such file.
    """
    names = methods.split('+') if methods != NO_METHOD else []
    loaded: dict[str, LoadedMethod] = {}
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"The sum '{methods}' names '{name}' twice; its weight is set with --cfg-options.")
        files = find_files(name)
        file = files.get(family, files.get(''))
        if file is None:
            raise ConfigurationError(f"The method '{name}' has no weights for {family} detectors, only for "
                                     f"{', '.join(files)}. Choose others with --family.")
        loaded[name] = load_method(file)
        for other in list(loaded)[:-1]:
            twice = loaded[name].terms.keys() & loaded[other].terms.keys()
            if twice:
                raise ConfigurationError(f"The sum '{methods}': '{other}' and '{name}' both have a term "
                                         f"'{min(twice)}'. Give one of them another name in its file.")
    return loaded


def method_terms(methods: str, family: str, balance: float | str | None = PAPER) -> ConfigDict:
    """The distillation terms of one method, or of a sum of methods such as ``'fgd+dkd'``; of ``'none'`` no terms.

    Args:
        methods: See :func:`load_methods`.
        family: One of :data:`~kd_det.config.choices.FAMILIES`.
        balance: See :func:`balance_terms`.

    Raises:
        ConfigurationError, FileNotFoundError: See :func:`load_methods`.
    """
    return balance_terms(load_methods(methods, family), balance)


def balance_terms(loaded: dict[str, LoadedMethod], balance: float | str | None) -> ConfigDict:
    """Unites the terms of methods, with their weights.

    Args:
        loaded: The methods by name; their terms stay as they are.
        balance: The ratio of each method's gradient to the task's, which its terms share equally; None for each
            method's own: :data:`~kd_det.config.choices.RATIO`, unless its file balances it at another; ``'paper'`` for
            the weights in its file.
    """
    united = ConfigDict()
    for method in loaded.values():
        for name, term in method.terms.items():
            united[name] = copy.deepcopy(term)
            if balance != PAPER:
                united[name]['weight'] = balance_weight(term.get('weight', 1.0), balance, len(method.terms))
    return united


def balance_weight(weight: float | dict, ratio: float | None, terms: int) -> dict:
    """Returns a weight whose number gives way to :class:`~kd_det.distillers.Balance`; schedules around it stay.

    Args:
        weight: The weight in a method's file.
        ratio: Of the method's gradient to the task's; None for that of the file, else
            :data:`~kd_det.config.choices.RATIO`.
        terms: How many the method has; they share the ratio.
    """
    if not isinstance(weight, dict):
        return dict(type=f'{HOME}.Balance', ratio=(RATIO if ratio is None else ratio) / terms)
    if get_type_name(weight) == 'Balance':
        return weight if ratio is None else dict(weight, ratio=ratio / terms)
    return dict(weight, value=balance_weight(weight['value'], ratio, terms))


def build_term(config: dict) -> DistillTerm:
    """Builds a term from its config, which holds its weight, and who learns by it, too."""
    return build_own(MODELS, {key: value for key, value in config.items() if key not in ('weight', 'learner')})


def find_parts(terms: dict[str, dict]) -> list[str]:
    """Builds terms, and lists the parts of student and teacher that they read.

    Args:
        terms: Their configs by name.

    Returns:
        Parts such as those of :data:`~kd_det.config.methods.PARTS`, each once.
    """
    parts = []
    for term in map(build_term, terms.values()):
        requests = map(HeadRequest.parse, (*term.student_heads, *term.teacher_heads))
        parts += [path.split('.')[0] for path in term.student_taps]
        parts += [request if request in PARTS else request.head for request in requests]
    return list(dict.fromkeys(parts))


def find_served(terms: dict[str, dict], kinds: Collection[str]) -> list[str]:
    """Builds terms, and lists the kinds of detectors that they serve.

    Args:
        terms: Their configs by name.
        kinds: To choose from; of :data:`~kd_det.config.detectors.DETECTORS`.
    """

    def is_served(kind: str) -> bool:
        try:
            check_terms('', terms, kind, DETECTORS[kind])
        except ConfigurationError:
            return False
        return True

    return list(filter(is_served, kinds))


def check_terms(method: str, terms: dict[str, dict], detector: str, heads: HeadClasses) -> None:
    """Checks that a student has the heads that a method's terms read, in them what they read, and as many levels.

    Args:
        method: Its name, for the message.
        terms: See :func:`method_terms`.
        detector: The student's type, for the message.
        heads: See :func:`~kd_det.config.detectors.find_head_classes`.

    Raises:
        ConfigurationError: It has not, or a term can not be built.
    """
    for name, config in terms.items():
        try:
            term = build_term(config)
        except (TypeError, ValueError, KeyError) as error:  # of a file from outside, or a term of a user's own
            raise ConfigurationError(f"The method '{method}': its term '{name}' can not be built: "
                                     f'{explain_build_error(error, config)}') from error
        try:
            for head in term.student_heads:
                check_head(detector, heads, head)
                if head == ROI_HEAD:
                    check_sampling(heads[head])
            if term.least_levels > 1 and has_one_level(heads):
                raise HeadError(f'A {detector} has features of one level, not of {term.least_levels}.')
        except HeadError as error:
            raise ConfigurationError(f"The method '{method}' does not serve this student, by its term '{name}': "
                                     f'{error} kd-det methods shows which detectors each method serves.') from error


class Fit(NamedTuple):
    """How a method fits a student and its teacher.

    Attributes:
        name: The method's.
        terms: With their weights; empty where it does not fit.
        imports: Modules that they need.
        problem: Why it does not fit.
    """
    name: str
    terms: ConfigDict
    imports: tuple[str, ...] = ()
    problem: str = ''


def fit_methods(model: dict, names: Iterable[str], family: str = '', balance: float | str | None = None,
                strict: bool = False) -> Iterator[Fit]:
    """Tries which methods fit, by building the distillation of each, without weights.

    Args:
        model: Of a distillation, within whose scope this is called: its student, and its teacher if there is one.
        names: Of the methods.
        family: See :func:`load_methods`; told by the student's heads by default.
        balance: See :func:`balance_terms`.
        strict: Raise what keeps a method from fitting.
    """
    student, teacher = model['student'], model.get('teacher')
    kind, heads, family = get_type_name(student), find_head_classes(student), family or find_model_family(student)
    if teacher and 'type' not in teacher:
        theirs = read_model_config(teacher['config'])
        its_kind, its_heads = get_type_name(theirs), find_head_classes(theirs)
    for name in names:
        try:
            methods = load_methods(name, family)
            terms = balance_terms(methods, balance)
            check_terms(name, terms, kind, heads)
            if teacher:
                for request in (head for term in terms.values() for head in build_term(term).teacher_heads
                                if 'type' not in teacher):
                    check_head(f'{its_kind}, the teacher,', its_heads, request)
                with preserved_randomness():
                    MODELS.build({**model, 'distill': copy.deepcopy(terms), 'inherit': ()})
        except ValueError as error:
            if strict:
                raise
            yield Fit(name, ConfigDict(), problem=str(error))
            continue
        yield Fit(name, terms, tuple(each for file in methods.values() for each in file.imports))


def check_parts(model: dict, parts: Sequence[str]) -> None:
    """Checks that a detector has the parts that it is to inherit.

    Raises:
        ConfigurationError: It lacks one; the message says which there are.
    """
    if parts:
        with preserved_randomness():
            state = build_detector(model).state_dict()
        for part in parts:
            find_part_keys(state, part)


def find_part_keys(state: dict[str, Tensor], part: str) -> list[str]:
    """Finds the keys of a student's state dict that belong to a part of it.

    Raises:
        ConfigurationError: There is no such part.
    """
    keys = [key for key in state if f'{key}.'.startswith(f'{part}.')]
    if not keys:
        known = sorted({key.split('.')[0] for key in state})
        raise ArgumentError('inherit', f"the student has no part '{part}'; it has {', '.join(known)}. "
                                       f'{suggest_names(part, known)}'.rstrip())
    return keys


def distillation_config(student: str | Config, teacher_config: str | None, teacher_checkpoint: str | None, method: str,
                        inherit: str | Sequence[str] = 'auto', family: str = '',
                        balance: float | str | None = None, inherit_by: str = 'shape') -> Config:
    """Makes the config that distils a teacher into a student.

    The student's config alone decides data, classes, schedule and evaluation; nothing of that changes.

    Args:
        student: Config of the detector to train: a file, ``'mmdet::…'``, or a config.
        teacher_config: Config of the teacher: a file or ``'mmdet::…'``, of a detector, or with another guide as its
            ``teacher``; None for none, where peers are to be added.
        teacher_checkpoint: The teacher's weights: a file or an address.
        method: Name of a method, or its file, or a sum of such, see :func:`load_methods`; ``'none'`` for no terms.
        inherit: Parts of the student, such as ``('neck', 'bbox_head')``, that start from the teacher's weights where
            shapes agree; ``'auto'`` for all but the backbone that are of the same type in both; empty for none.
        family: Whose published weights to use, one of :data:`~kd_det.config.choices.FAMILIES`; told by the student's
            heads by default.
        balance: The ratio of each method's gradient to the task's, see :func:`balance_terms` and
            :class:`~kd_det.distillers.Balance`; weights of the parts within a term stay. Each method's own by default;
            ``'paper'`` for the published weights, which are made for COCO.
        inherit_by: How it starts from them, one of :data:`~kd_det.config.choices.INHERITANCE_RULES`.

    Raises:
        ConfigurationError: The student is a distiller already, holds detectors but is none, or lacks a part that it is
            to inherit, or the method does not serve it; or the teacher holds several detectors; or there is no such
            method.
        FileNotFoundError: There is no such file.
        TeacherError: The teacher's config holds no model.
    """
    config = copy.deepcopy(student) if isinstance(student, Config) else load_config(student)
    if is_distillation(config):
        raise ConfigurationError(
            f"The student's config '{config.filename}' is a distillation already (its model is a "
            f'{DISTILLER}): give the config of a plain detector, or train this one with kd-det train.')
    with within_scope(get_scope(config)):
        model = _find_student(config, str((config.filename or '') if isinstance(student, Config) else student))
        methods = load_methods(method, family or find_model_family(model))
        terms = balance_terms(methods, balance)
        check_terms(method, terms, get_type_name(model), find_head_classes(model))
        check_parts(model, () if inherit == 'auto' else (inherit, ) if isinstance(inherit, str) else inherit)
    teacher = () if teacher_config is None else read_guide_config(teacher_config) or dict(config=teacher_config)
    if teacher and 'type' not in teacher:
        read_model_config(teacher_config)  # before anything is built or written
    config.model = dict(
        type=SCOPED_DISTILLER,
        student=model,
        teacher=dict(teacher, checkpoint=teacher_checkpoint) if teacher else (),
        distill=terms,
        inherit=inherit if isinstance(inherit, str) else tuple(inherit),
        **(dict(inherit_by=dict(rule=inherit_by)) if inherit_by != 'shape' else {}))
    if not config.get('default_hooks'):  # may be None
        config.default_hooks = ConfigDict()
    config.default_hooks['distill'] = dict(type=SCOPED_HOOK, preflight=dict(images=64, min_map=0.01))
    config.custom_imports = dict(
        imports=list(dict.fromkeys([*list_imports(config), 'kd_det', *(name for each in methods.values()
                                                                     for name in each.imports)])),
        allow_failed_imports=(config.get('custom_imports') or {}).get('allow_failed_imports', False))
    return config


def _find_student(config: Config, file: str) -> ConfigDict:
    """The detector that a config is of, without what another distillation has added to it."""
    model = student_model(config)
    check_student(model, f"The model of the student's config '{file}'", file)
    plain = extract_plain_detector(model)
    if plain is not model:
        print_log(f"The model of the student's config '{file}' ({get_type_name(model)}) is MMDetection's own "
                  f'distillation. The student is its plain detector ({get_type_name(plain)} with '
                  f'{get_type_name(plain.bbox_head)}), without its teacher.', 'current')
    return plain


def make_ensemble(config: Config, checkpoints: Sequence[str], configs: Sequence[str] = (),
                  share: bool = True) -> Config:
    """Makes a distillation from one teacher into one from several.

    Each term is repeated for every teacher: ``fgd`` becomes ``fgd_1``, ``fgd_2``, …, each with adapters of its own,
    for features of detectors that were trained apart lie in different bases. Each has the n-th part of the weight, or
    of the ratio of a :class:`~kd_det.distillers.Balance`, so that n equal teachers pull as hard as one. Where a term is
    a forward KL divergence, the mean over the teachers has the gradient of the divergence from their mean prediction,
    which is how an ensemble is distilled (Hinton et al., arXiv 1503.02531); where it is a squared difference, that of
    the difference from their mean. (With Balance weights differ a little: every teacher pulls as hard as each other.)

    The first teacher is the one that is inherited from, and that pseudo-labels come from.

    Args:
        config: Config of a distillation with one teacher.
        checkpoints: Weights of each teacher: files or addresses.
        configs: Of each teacher, where they differ in more than their weights.
        share: Whether they share the weights of the terms; else each has the whole, which a policy shares out.

    Returns:
        A config of its own; that of the student is unchanged.

    Raises:
        ConfigurationError: There are less than two checkpoints, or the config has no teacher, or several already.
    """
    if len(checkpoints) < 2:
        raise ConfigurationError(f'An ensemble has two teachers at least, not {len(checkpoints)}.')
    if not is_distillation(config) or 'config' not in config.model.get('teacher', ()) or 'type' in config.model.teacher:
        raise ConfigurationError('An ensemble is made of a distillation with one teacher, a detector, which '
                                 f"'{config.filename}' is not.")
    config = copy.deepcopy(config)
    teacher, terms = config.model.teacher, config.model.distill
    for other in configs:
        read_model_config(other)  # before anything is built or written
    config.model.teacher = [dict(copy.deepcopy(teacher), config=other, checkpoint=checkpoint)
                            for other, checkpoint in zip(configs or [teacher.config] * len(checkpoints), checkpoints)]
    config.model.distill = ConfigDict()
    for name, term in terms.items():
        config.model.distill.update(repeat_term(name, term, len(checkpoints), share))
    return config


def repeat_term(name: str, term: ConfigDict, number: int, share: bool = True) -> dict[str, ConfigDict]:
    """Makes of a term one for each of so many teachers, with its part of the weight, or all; the term stays."""
    repeated = {f'{name}_{index + 1}': copy.deepcopy(term) for index in range(number)}
    for index, each in enumerate(repeated.values()):
        each.update(teacher=index, weight=share_weight(copy.deepcopy(term.get('weight', 1.0)), number if share else 1))
    return repeated


def share_weight(weight: float | dict, number: int) -> float | dict:
    """Divides a weight; schedules around it stay, and so does what is no weight, for the distiller to refuse."""
    if isinstance(weight, (float, int)):
        return weight / number
    if get_type_name(weight) == 'Balance':
        return dict(weight, ratio=share_weight(weight.get('ratio', DEFAULT_RATIO), number))
    if isinstance(weight, dict) and 'value' in weight:
        return dict(weight, value=share_weight(weight['value'], number))
    return weight
