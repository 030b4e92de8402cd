"""Whether every key of a config is one that something reads, and every value within its declared range.

What is kd_det's own is looked at as a run would: each term, mask, schedule and hook is built from its arguments, which
needs neither data nor weights. Of MMEngine's and MMDetection's parts the names of types and of arguments are looked up,
and those values that end a run late, or never (:data:`RANGES`).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal, NoReturn

from annotated_types import Ge, Gt, Lt, MultipleOf
from mmdet import registry
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, Registry
from torch.utils.data import DataLoader

from kd_det.checks.environment import Finding
from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import (
    MISSPELT,
    ArgumentError,
    Count,
    Index,
    Name,
    Seed,
    Share,
    Weight,
    at,
    check_arguments,
    check_keys,
    check_value,
    join_place,
    suggest_names,
)
from kd_det.config.files import TOP_KEYS, find_objects, get_type_name, is_distillation, refuse_object
from kd_det.distillers.building import (
    build_guides,
    build_task_schedule,
    build_terms,
    check_terms_are_given,
    list_guide_configs,
)
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.inheritance import build_inheritance
from kd_det.distillers.policies import build_policy
from kd_det.distillers.rounding import Quantization
from kd_det.distillers.supervision import build_pseudo_labels
from kd_det.registry import HOME, find_class, get_scope, within_scope

OURS = 'kd_det.'
MISSPELT_AT_TOP = 0.885  # as alike as load_form and load_from, and not test_pipeline and tta_pipeline
HOOK_NAMES = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint', 'visualization',
              'distill')
READ_BY_RUNNER = {  # besides the arguments of what is built
    'hook': ('priority', ),
    'loop': ('by_epoch', ),
    'scheduler': ('convert_to_iter_based', ),
    'wrapper': ('constructor', 'optimizer', 'paramwise_cfg'),
}
Whole = Annotated[float, Ge(1), MultipleOf(1), 'an integer of at least 1']  # 5e3 counts too
Every = Count | Literal[-1]  # -1 turns it off, or sets no limit

# Values of MMEngine's parts with which a run ends late, or trains nothing and says nothing.
RANGES: dict[str, dict[str, Any]] = {
    'loop': dict(max_epochs=Count, max_iters=Count, val_begin=Index, val_interval=Whole),
    'loader': dict(batch_size=Count, num_workers=Index),
    'optimizer': dict(lr=Weight, weight_decay=Weight, momentum=Share),
    'wrapper': dict(accumulative_counts=Count),
    'scheduler': dict(begin=Index, end=Count, milestones=list[Count], gamma=Weight, factor=Weight),
    'hook': dict(interval=Every, max_keep_ckpts=Every, momentum=Annotated[float, Gt(0), Lt(1)], begin_iter=Index,
                 begin_epoch=Index),
}
NO_TYPE_OF_ITS_OWN = ('cfg', 'conv', 'dcn', 'plugins')  # the ends of keys whose dicts are read by their own rules


def inspect_arguments(config: Config) -> Iterator[Finding]:
    """Whether all keys and values of a config fit; a fault for each that does not, by its place."""
    faults: dict[str, Finding] = {}
    with within_scope(get_scope(config)), preserved_randomness():
        for check in _list_checks(config):
            try:
                check()
            except ArgumentError as error:
                faults.setdefault(error.place, Finding(error.place, error.problem, fault=True))
    yield from faults.values()


def locate_unknown_key(config: Config, key: str) -> None:
    """Refuses a key at its place in the model, of which a class has said that it is no argument.

    Raises:
        ArgumentError: It stands in the dict of a class that does not take it.
    """
    with within_scope(get_scope(config)):
        for check in _check_model('model', config.get('model'), key):
            check()


def _list_checks(config: Config) -> Iterator[Callable[[], None]]:
    """What there is to check, a function for each place, so that one mistake does not hide the next."""
    for key in config:
        yield partial(_check_top_key, key)
    yield partial(_check_values, '', dict(config), dict(load_from=Name | None, resume=bool, work_dir=Name | None))
    yield partial(_check_values, 'randomness', config.get('randomness'), dict(seed=Seed | None))
    yield partial(_check_values, 'auto_scale_lr', config.get('auto_scale_lr'), dict(base_batch_size=Count, enable=bool))
    model = config.get('model')
    if is_distillation(config):
        yield from _check_distillation(model)
        model = model.get('student')
        yield from _check_model('model.student', model)
    else:
        yield from _check_model('model', model)

    for split in ('train', 'val', 'test'):
        place = f'{split}_cfg'
        yield partial(_check_loop, place, config.get(place))
        yield from _check_loader(f'{split}_dataloader', config.get(f'{split}_dataloader'))
        yield from _check_evaluator(f'{split}_evaluator', config.get(f'{split}_evaluator'))
    wrapper, optimizers = config.get('optim_wrapper'), registry.OPTIMIZERS
    if isinstance(wrapper, Mapping) and wrapper.get('constructor') and 'optimizer' not in wrapper:
        wrapper = dict(constructor=wrapper['constructor'])  # which reads the rest, such as several optimizers, itself
    yield partial(_check_part, registry.OPTIM_WRAPPERS, 'optim_wrapper', wrapper, 'wrapper', default='OptimWrapper')
    if isinstance(wrapper, Mapping):
        yield partial(_check_part, optimizers, 'optim_wrapper.optimizer', wrapper.get('optimizer'), 'optimizer',
                      internal=('params', ))
        if wrapper.get('constructor'):
            yield partial(_check_type, OPTIM_WRAPPER_CONSTRUCTORS, 'optim_wrapper', dict(type=wrapper['constructor']),
                          'constructor')
    yield from _each('param_scheduler', config.get('param_scheduler'),
                     partial(_check_part, registry.PARAM_SCHEDULERS, kind='scheduler', internal=('optimizer', )))
    hooks = config.get('default_hooks')
    for name, hook in dict(hooks or {}).items():
        yield partial(_check_hook_name, name)
        yield partial(_check_hook, f'default_hooks.{name}', hook)
    yield from _each('custom_hooks', config.get('custom_hooks'), _check_hook)
    yield partial(_check_part, registry.VISUALIZERS, 'visualizer', config.get('visualizer'))
    for place, value in find_objects(config.to_dict()):  # as it is saved: without what it imports
        yield partial(refuse_object, place, value)


def _stands_for_learner(guide: Any) -> bool:
    """Whether a guide's config adds a learner; of what is no config another check tells."""
    kind = find_class(registry.MODELS, guide) if isinstance(guide, Mapping) and 'type' in guide else None
    return getattr(kind, 'stands_for_learner', False)


def _check_distillation(model: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    yield partial(_check_distiller, model)
    teachers, peers = model.get('teacher', ()), model.get('peers', 0)
    learners = 1 + (peers if isinstance(peers, int) else len(peers or ()))
    if isinstance(teachers, (Mapping, list, tuple)):
        yield partial(build_guides, teachers, learners)
        learners += sum(map(_stands_for_learner, list_guide_configs(teachers)))
    number = 1 if isinstance(teachers, Mapping) else len(teachers or ())
    terms = model.get('distill')
    yield partial(check_terms_are_given, terms, peers)
    for name, term in terms.items() if isinstance(terms, Mapping) else ():
        yield partial(build_terms, {name: term}, number, learners)
    yield partial(build_task_schedule, model.get('task_weight', 1.0))
    if isinstance(model.get('pseudo_labels'), Mapping) and number:
        yield partial(build_pseudo_labels, model['pseudo_labels'], None, [None] * number)
    if isinstance(model.get('quantize'), Mapping):
        yield partial(_check_quantization, model['quantize'])
    if isinstance(model.get('policy'), Mapping):
        yield partial(build_policy, model['policy'], (), {})
    if isinstance(model.get('inherit_by'), Mapping):
        yield partial(build_inheritance, model['inherit_by'])


def _check_quantization(config: Mapping[str, Any]) -> None:
    with at('model.quantize'):
        check_arguments(Quantization, config)


def _check_distiller(model: Mapping[str, Any]) -> None:
    with at('model'):
        check_arguments(DetectionDistiller, model, besides=('type', '_scope_'))


def _check_top_key(key: str) -> None:
    """Refuses what is one letter from a key that a run reads: anything else may be a variable of the file."""
    if key not in TOP_KEYS and get_close_matches(key, TOP_KEYS, n=1, cutoff=MISSPELT_AT_TOP):
        raise ArgumentError(key, f'no run reads this key. {suggest_names(key, TOP_KEYS, most=1)} A variable of the '
                                 'config file needs another name.')


def _check_hook_name(name: str) -> None:
    if name not in HOOK_NAMES and get_close_matches(name, HOOK_NAMES, n=1, cutoff=0.8):
        raise ArgumentError(f'default_hooks.{name}',
                            f'there is no such key. {suggest_names(name, HOOK_NAMES, most=1)}')


def _check_hook(place: str, hook: Any) -> None:
    found = _check_part(registry.HOOKS, place, hook, 'hook')
    if found is not None and found.__module__.startswith(OURS):
        with at(place):
            found(**{key: value for key, value in hook.items() if key not in ('type', '_scope_', 'priority')})


def _check_loop(place: str, loop: Any) -> None:
    default = {'train_cfg': 'EpochBasedTrainLoop', 'val_cfg': 'ValLoop', 'test_cfg': 'TestLoop'}[place]
    if place == 'train_cfg' and isinstance(loop, Mapping) and not loop.get('by_epoch', True):
        default = 'IterBasedTrainLoop'
    _check_part(registry.LOOPS, place, loop, 'loop', default=default, internal=('runner', 'dataloader', 'evaluator'))


def _check_loader(place: str, loader: Any) -> Iterator[Callable[[], None]]:
    if not isinstance(loader, Mapping):
        return
    yield partial(_check_keys_at, place, DataLoader, loader, besides=('num_batch_per_epoch', ))
    yield partial(_check_values, place, loader, RANGES['loader'])
    yield partial(_check_part, registry.DATA_SAMPLERS, f'{place}.sampler', loader.get('sampler'),
                  internal=('dataset', 'seed'))
    yield partial(_check_part, registry.DATA_SAMPLERS, f'{place}.batch_sampler', loader.get('batch_sampler'),
                  internal=('sampler', 'batch_size'))
    yield from _check_dataset(f'{place}.dataset', loader.get('dataset'))


def _check_evaluator(place: str, evaluator: Any) -> Iterator[Callable[[], None]]:
    if isinstance(evaluator, Mapping) and 'metrics' in evaluator:
        yield partial(_check_part, registry.EVALUATOR, place, evaluator, default='Evaluator')
        place, evaluator = f'{place}.metrics', evaluator['metrics']
    yield from _each(place, evaluator, partial(_check_part, registry.METRICS))


def _check_dataset(place: str, dataset: Any) -> Iterator[Callable[[], None]]:
    if not isinstance(dataset, Mapping):
        return
    yield partial(_check_part, registry.DATASETS, place, dataset)
    yield from _each(f'{place}.pipeline', dataset.get('pipeline'), partial(_check_part, registry.TRANSFORMS))
    yield from _check_dataset(f'{place}.dataset', dataset.get('dataset'))
    for index, each in enumerate(dataset.get('datasets') or ()):
        yield from _check_dataset(f'{place}.datasets[{index}]', each)


def _check_model(place: str, model: Any, key: str = '') -> Iterator[Callable[[], None]]:
    """The names of arguments of a detector's parts, however deep they lie; only this one if it is given.

    A part may take a key from the dict of another before that is built, as DETR's head does from its loss. So a key
    that looks like no other is left to the class, until that says that it does not know it.
    """
    if isinstance(model, Mapping):
        if 'type' in model and (not key or key in model):
            yield partial(_check_model_part, place, model, [key] if key else list(dict.keys(model)), bool(key))
        for name, value in dict.items(model):
            if name in ('train_cfg', 'test_cfg') or not str(name).endswith(NO_TYPE_OF_ITS_OWN):
                yield from _check_model(join_place(place, str(name)), value, key)
    elif isinstance(model, (list, tuple)):
        for index, value in enumerate(model):
            yield from _check_model(f'{place}[{index}]', value, key)


def _check_model_part(place: str, part: Mapping[str, Any], keys: list[str], exactly: bool) -> None:
    try:
        found = find_class(registry.MODELS, part, HOME)
        known = found is not None or find_class(registry.TASK_UTILS, part, HOME) is not None
    except Exception:  # MMEngine imports what a type of no registry might be the name of
        return
    scope = part['type'].rpartition('.')[0] if isinstance(part['type'], str) else ''
    names = () if known or scope not in ('', HOME) else _list_names(registry.MODELS, registry.TASK_UTILS)
    if get_close_matches(get_type_name(part), names, n=1, cutoff=MISSPELT):
        _refuse_type(place, part, 'type', registry.MODELS, registry.TASK_UTILS)
    if found is not None:
        with at(place):
            check_keys(found, keys, ('type', '_scope_'), exactly=exactly)


def _check_part(registry: Registry, place: str, part: Any, kind: str = '', *, default: str = '',
                internal: Iterable[str] = ()) -> Any:
    """Checks what a registry builds: its type, the names of its arguments, and the values in :data:`RANGES`.

    Args:
        registry: The registry.
        place: Of the dict.
        part: The dict; anything else, and None, is left to who builds it.
        kind: Key of :data:`RANGES`.
        default: Its type where it names none.
        internal: Names of arguments that the Runner gives.

    Returns:
        The class, or None.
    """
    if not isinstance(part, Mapping) or not (default or 'type' in part):
        return None
    found = _check_type(registry, place, part if 'type' in part else dict(part, type=default))
    _check_keys_at(place, found, part, READ_BY_RUNNER.get(kind, ()), internal)
    _check_values(place, part, RANGES.get(kind, {}))
    return found


def _check_type(registry: Registry, place: str, part: Mapping[str, Any], key: str = 'type') -> Any:
    found = find_class(registry, part, HOME)
    if found is None:
        _refuse_type(place, part, key, registry)
    return found


def _refuse_type(place: str, part: Mapping[str, Any], key: str, *registries: Registry) -> NoReturn:
    raise ArgumentError(join_place(place, key), ' '.join(filter(None, (
        f"there is no '{get_type_name(part)}'.", suggest_names(get_type_name(part), _list_names(*registries)),
        'If it is your own, import it with custom_imports.'))))


def _list_names(*registries: Registry) -> set[str]:
    return {name for each in registries for one in (each, each.root) for name in one.module_dict}


def _check_keys_at(place: str, found: Any, part: Mapping[str, Any], besides: Iterable[str] = (),
                   internal: Iterable[str] = ()) -> None:
    with at(place):
        check_keys(found, dict.keys(part), ('type', '_scope_', *besides), internal)


def _check_values(place: str, values: Any, ranges: Mapping[str, Any]) -> None:
    for name, annotation in ranges.items():
        if isinstance(values, Mapping) and values.get(name) is not None:
            check_value(join_place(place, name), values[name], annotation)


def _each(place: str, parts: Any, check: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """One check for each of a list, or for the only one."""
    if isinstance(parts, (list, tuple)):
        for index, part in enumerate(parts):
            yield partial(check, f'{place}[{index}]', part)
    else:
        yield partial(check, place, parts)
