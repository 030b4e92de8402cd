"""What ``--cfg-options`` change in a config, once it is made; in an ensemble of teachers, of all or of one."""
from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from kd_det.config import ConfigurationError, suggest_names
from kd_det.config.composition import repeat_term, share_weight
from kd_det.config.files import TOP_KEYS, get_type_name, is_distillation, load_config, refuse_object, set_data_root

TERM_KEY = re.compile(r'model\.distill\.(?P<name>[^.]+)(?P<rest>.*)')
TEACHER_KEY = re.compile(r'model\.teacher\.(?P<rest>(?!\d+(\.|$)).+)')  # of a teacher, whose index is not said
AMOUNT = re.compile(r'\.weight(\.value)*(\.ratio(\.value)*)?')  # of a weight: the number, however deep it lies

# By the type of a hook: what it counts in epochs, from the first one or from the last.
EPOCHS_OF_HOOKS = dict(PipelineSwitchHook='switch_epoch', YOLOXModeSwitchHook='num_last_epochs', EMAHook='begin_epoch')

Members = dict[str, list[str]]  # the terms that an ensemble repeats for each teacher, by the name that they share


def resolve_config(config: str | Path | Config, data_root: str | None = None, options: dict | None = None) -> Config:
    """Returns a config of its own, as the arguments of a command or of a Python call name it.

    Args:
        config: As :func:`~kd_det.config.files.load_config` takes it; or a config, which stays as it is.
        data_root: See :func:`~kd_det.config.files.set_data_root`.
        options: See :func:`merge_options`.
    """
    config = copy.deepcopy(config) if isinstance(config, Config) else load_config(config)
    if data_root:
        set_data_root(config, data_root)
    merge_options(config, options or {})
    return config


def resolve_distillation(config: str | Path | Config, data_root: str | None = None,
                         options: dict | None = None) -> Config:
    """As :func:`resolve_config`, of a distillation.

    Raises:
        ConfigurationError: Its model is a plain detector.
    """
    resolved = resolve_config(config, data_root, options)
    if not is_distillation(resolved):
        name = config.filename if isinstance(config, Config) else config
        raise ConfigurationError(f"The model of '{name}' is a plain detector: give the config of a distillation, such "
                                 'as one that kd-det distill saved.')
    return resolved


def set_seed(config: Config, seed: int) -> Config:
    """Lets a config train from a seed; what else it says of random numbers stays. Returns the config."""
    config.randomness = dict(config.get('randomness') or {}, seed=seed)
    return config


def set_epochs(config: Config, epochs: int) -> None:
    """Lets a config train for so many epochs, and all that it counts in epochs is stretched with them.

    That are the learning rate's schedules and the terms', the epochs of validation, and those in which MMDetection's
    hooks change the pipeline or the head. What had an epoch of its own keeps one, however few there are.

    Raises:
        ConfigurationError: It does not count in epochs; or a hook is given as an object, whose epochs nobody knows.
    """
    for index, hook in enumerate(config.get('custom_hooks') or ()):
        if not isinstance(hook, dict):
            refuse_object(f'custom_hooks[{index}]', hook)
    before = (config.get('train_cfg') or {}).get('max_epochs')
    if before is None:
        raise ConfigurationError(f"--epochs: the config '{config.filename}' does not count in epochs.")
    train, share = config.train_cfg, epochs / before
    train.update(max_epochs=epochs, val_interval=min(train.get('val_interval', 1), epochs))
    if train.get('val_begin', 1) > 1:
        train.val_begin = min(max(1, round(train.val_begin * share)), epochs)
    if train.get('dynamic_intervals'):
        begins = _stretch_points([begin for begin, _ in train.dynamic_intervals], share)
        train.dynamic_intervals = [(begins[begin], interval) for begin, interval in train.dynamic_intervals]
    schedulers = config.get('param_scheduler') or []
    _stretch_schedulers([schedulers] if isinstance(schedulers, dict) else schedulers, share)
    for hook in config.get('custom_hooks') or ():
        key = EPOCHS_OF_HOOKS.get(get_type_name(hook))
        if key and hook.get(key):
            hook[key] = max(1, round(hook[key] * share))
    _stretch_weights(config.get('model'), share)


def _stretch_weights(value: Any, share: float) -> None:
    """Scales what schedules of weights count in epochs, wherever in a model they lie."""
    if isinstance(value, dict):
        if 'value' in value and isinstance(value.get('epochs'), (int, float)):
            value.update({key: value[key] * share for key in ('epochs', 'begin') if key in value})
        value = list(value.values())
    for each in value if isinstance(value, (list, tuple)) else ():
        _stretch_weights(each, share)


def _stretch_schedulers(schedulers: Iterable[dict], share: float) -> None:
    """Scales what schedulers count in epochs; those that count iterations, such as a warm-up, stay."""
    counting = [scheduler for scheduler in schedulers if scheduler.get('by_epoch', True)]
    ends = _stretch_points([scheduler[key] for scheduler in counting for key in ('begin', 'end')
                            if isinstance(scheduler.get(key), int)], share)
    for scheduler in counting:
        begin, end = (scheduler.get(key) for key in ('begin', 'end'))
        scheduler.update({key: ends[scheduler[key]] for key in ('begin', 'end') if scheduler.get(key) in ends})
        for key in ('T_max', 'total_steps', 'step_size'):
            period = scheduler.get(key)
            if isinstance(period, int):
                is_whole = key != 'step_size' and end is not None and period == end - (begin or 0)
                scheduler[key] = (scheduler['end'] - scheduler.get('begin', 0) if is_whole else
                                  max(1, round(period * share)))
        if scheduler.get('milestones'):
            points = _stretch_points(scheduler['milestones'], share)
            scheduler['milestones'] = [points[each] for each in scheduler['milestones']]
        if scheduler.get('periods'):
            restarts = [0, *accumulate(scheduler['periods'])]
            points = _stretch_points(restarts, share)
            scheduler['periods'] = [points[last] - points[first] for first, last in pairwise(restarts)]
        if get_type_name(scheduler).startswith('Exponential'):  # by its factor of each epoch
            scheduler['gamma'] = scheduler['gamma']**(1 / share)


def _stretch_points(points: Iterable[int], share: float) -> dict[int, int]:
    """Where points in time, in epochs, lie then: in the same order, and those that were apart still are."""
    moved = {0: 0}
    for point in sorted({*points} - {0}):
        moved[point] = max(round(point * share), 1 + max(moved.values()))
    return moved


def read_value(text: str, place: str) -> Any:
    """Reads a value as MMEngine's ``DictAction`` does: a number, True, None, a list, a tuple, or a text.

    Args:
        text: The value.
        place: The option that it is of.

    Raises:
        ConfigurationError: Its brackets do not match.
    """
    opened: list[str] = []
    is_nested = ',' in text or text.strip('\'"')[:1] in ('[', '(')  # brackets in the name of a file are no list
    for sign in text if is_nested else '':
        if sign in '[(':
            opened.append(sign)
        elif sign in '])' and (not opened or opened.pop() + sign not in ('[]', '()')):
            opened = [sign]
            break
    try:
        if not opened:
            return DictAction._parse_iterable(text)
    except RecursionError:  # of [0],[1], which it takes for one list
        pass
    raise ConfigurationError(f"{place}: expected one value or one list, whose brackets match, got '{text}'. Write "
                             'lists without white space, or in quotation marks: key="[a,b]".')


def merge_options(config: Config, options: dict) -> None:
    """Applies ``--cfg-options``.

    Unlike in plain MMEngine, ``data_root=…`` reaches every path that starts with it. And of an ensemble, see
    :func:`~kd_det.config.composition.make_ensemble`, options reach all teachers or one:
    ``model.distill.fgd.temperature=0.8`` sets that of ``fgd_1``, ``fgd_2``, … (a term that options add is repeated,
    too), ``model.teacher.fuse=False`` that of all teachers; ``model.distill.fgd_1.temperature=0.8`` and
    ``model.teacher.0.fuse=False`` those of one. A weight of ``fgd`` is shared out, unless there is
    a policy to do that; a weight of ``fgd_1`` is its own.

    Args:
        config: The config; changed.
        options: Values by dotted key.

    Raises:
        ConfigurationError: An option begins with a key that no run reads, goes through something that holds no keys, or
            past the end of a list, or is of a term that there is not.
    """
    options = dict(options)
    data_root = options.pop('data_root', None)
    _check_top_keys(config, options)
    terms = dict(config.model.get('distill') or {}) if is_distillation(config) else {}
    members = _find_members(config, terms)
    try:
        config.merge_from_dict(_address(options, config, members, terms))
    except (TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f'--cfg-options {options}: {error}') from error
    if is_distillation(config):
        added = [name for name in config.model.get('distill') or {} if name not in terms]
        _check_terms_have_types(config, added, members)
        if members and set(terms) == {name for each in members.values() for name in each}:
            _repeat_terms(config, added)
    if data_root is not None:
        set_data_root(config, data_root)


def _check_top_keys(config: Config, options: Iterable[str]) -> None:
    """Refuses what MMEngine would take and nothing ever read."""
    for option in options:
        key = option.split('.')[0]
        if key in TOP_KEYS:
            continue
        if key in config:
            raise ConfigurationError(f"--cfg-options {option}: '{key}' is a variable of the config file; when this "
                                     'option is applied its value has gone elsewhere already. Set that place, such as '
                                     'train_cfg.max_epochs, train_dataloader.dataset.pipeline or model.distill.')
        raise ConfigurationError(f"--cfg-options {option}: no run reads a key '{key}'. "
                                 f'{suggest_names(key, TOP_KEYS, most=1)}'.rstrip())


def _has_several_teachers(config: Config) -> bool:
    return is_distillation(config) and isinstance(config.model.get('teacher'), (list, tuple))


def _find_members(config: Config, terms: dict[str, dict]) -> Members:
    """Tells by names and teachers which terms were one before there were several teachers."""
    if not _has_several_teachers(config):
        return {}
    found: dict[str, dict[int, str]] = {}
    for name, term in terms.items():
        common, _, number = name.rpartition('_')
        if isinstance(term, dict) and number == str(term.get('teacher', 0) + 1):
            found.setdefault(common, {})[int(number)] = name
    return {common: [name for _, name in sorted(names.items())] for common, names in found.items()
            if len(names) == len(config.model.teacher)}


def _address(options: dict[str, Any], config: Config, members: Members, terms: dict[str, dict]) -> dict[str, Any]:
    """The options, those of an ensemble as a whole as options of each of its teachers or terms."""
    addressed: dict[str, Any] = {}
    for key, value in options.items():
        of_term, of_teacher = TERM_KEY.fullmatch(key), TEACHER_KEY.fullmatch(key)
        if of_term and of_term['name'] in members and of_term['name'] not in terms:
            names = members[of_term['name']]
            if AMOUNT.fullmatch(of_term['rest']) and not config.model.get('policy'):
                value = share_weight(value, len(names))
            addressed.update({f"model.distill.{name}{of_term['rest']}": value for name in names})
        elif of_teacher and _has_several_teachers(config):
            addressed.update({f"model.teacher.{index}.{of_teacher['rest']}": value
                              for index in range(len(config.model.teacher))})
        else:
            addressed[key] = value
    return addressed


def _check_terms_have_types(config: Config, added: Iterable[str], members: Members) -> None:
    """Refuses options of a term that there is not: they have made one that has no type."""
    for name in added:
        if not get_type_name(config.model.distill[name]):
            others = [other for other in (*config.model.distill, *members) if other != name]
            raise ConfigurationError(f"--cfg-options model.distill.{name}: there is no term '{name}', only "
                                     f"{', '.join(sorted(others)) or 'none'}. "
                                     f'{suggest_names(name, others, most=1)}'.rstrip())


def _repeat_terms(config: Config, added: Iterable[str]) -> None:
    """Has terms without a teacher of their own learn from each, as the others of an ensemble do."""
    for name in added:
        if 'teacher' not in config.model.distill[name]:
            repeated = repeat_term(name, config.model.distill.pop(name), len(config.model.teacher),
                                   share=not config.model.get('policy'))
            config.model.distill.update(repeated)
