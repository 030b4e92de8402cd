"""Reads configs and derives others from them: the plain student's, or the same on another data root."""
from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from mmdet.registry import MODELS, TASK_UTILS
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.hub import get_config
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import Runner

from kd_det.compat.process import find_place, is_raised_by_user
from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError, check_keys, join_place, refuse, suggest_names
from kd_det.config.choices import CONFIG_ROOT
from kd_det.registry import HOME, find_class

UNKNOWN_ARGUMENT = re.compile(r"got an unexpected keyword argument '(\w+)'")
UNKNOWN_TYPE = re.compile(r'(\w+) is not in the \S+ registry')

# Types of this package. It writes them with the scope of the registries that hold them, for a config may have another
# default_scope; :func:`get_type_name` reads them, however they are written.
DISTILLER = 'DetectionDistiller'
DISTILL_HOOK = 'DistillHook'
SCOPED_DISTILLER, SCOPED_HOOK = f'mmdet.{DISTILLER}', f'mmdet.{DISTILL_HOOK}'

# What a run reads at the top of its config. Any other name there is of use only while the file itself is read.
TOP_KEYS = frozenset(signature(Runner.__init__).parameters) - {'self', 'cfg'} | {
    'activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'find_unused_parameters',
    'init_weights_for_test_or_val', 'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model',
    'tta_pipeline'}

OF_MMCV = ('nms', 'nms_cfg', 'roi_layer')  # where MMDetection takes the bare name of one of mmcv's operators


def load_config(name: str | Path) -> Config:
    """Reads a config.

    Args:
        name: A file, or ``'package::folder/file.py'`` for one that a package ships, such as
            ``'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'`` or ``'kd_det::fgd_r101_r18.py'``.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: The file, or one of its bases, has an error; the message says which and where.
    """
    name = str(name)
    scope, _, path = name.rpartition('::')
    if scope == 'kd_det':  # MMEngine refuses names without a folder
        path = str(CONFIG_ROOT / path)
    if scope in ('', 'kd_det') and not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file '{path}'"
                                + (': it is a folder.' if Path(path).is_dir() else '.'))
    try:
        config = Config.fromfile(path) if scope in ('', 'kd_det') else get_config(name)
        _restore_types(config._cfg_dict)
        return config
    except SyntaxError as error:
        raise ConfigurationError(f"The config '{name}' is not valid Python: {error}") from error
    except BaseException as error:  # a config is code, its bases too: whatever it raises is a fault of the config
        if isinstance(error, KeyboardInterrupt) and not is_raised_by_user(error):  # Ctrl-C
            raise
        raise ConfigurationError(f"The config '{name}' can not be read: {_describe_failure(error)}") from error


def _describe_failure(error: BaseException) -> str:
    """What reading a config raised, and where."""
    if isinstance(error, ImportError) and str(error).startswith('Failed to import custom modules'):
        while isinstance(error.__cause__ or error.__context__, Exception):  # what failed, and not the whole sys.path
            error = error.__cause__ or error.__context__
        if not find_place(error):  # the module itself
            return (f'custom_imports: {type(error).__name__}: {error}. Set PYTHONPATH to the folder that holds the '
                    'module.')
    if isinstance(error, SystemExit):
        said = f'it calls sys.exit({error.code!r})'
    else:
        said = f'{type(error).__name__}: {" ".join(str(error).split())}'.rstrip(': ')
    place = find_place(error)
    if isinstance(error, RecursionError) and not place:
        place = 'does a _base_ name a file that names this one?'
    return f'{said} ({place})' if place else said


def _restore_types(node: Any, key: str = '') -> None:
    """Makes the types of a pure-Python config, once it was saved as text, what they were: classes and functions.

    ``type=Resize`` is saved as ``'mmdet.datasets.transforms.Resize'``, which registries know how to find. Some types
    MMDetection looks up elsewhere, by their bare names alone: those get them at once, so that it reads what is saved.
    """
    for name, value in dict.items(node) if isinstance(node, dict) else ():
        _restore_types(value, name)
    for value in node if isinstance(node, (list, tuple)) else ():
        _restore_types(value, key)
    kind = dict.get(node, 'type') if isinstance(node, dict) else None
    if isinstance(kind, (LazyObject, LazyAttr)):
        kind.build()  # what can not be imported is told here, with its line, and not when a run is under way
        module, name = kind.module, str(kind)
    elif isinstance(kind, str) and kind.count('.') > 1:
        module, _, name = kind.rpartition('.')
        try:
            if callable(getattr(import_module(module), name, None)):
                dict.__setitem__(node, 'type', LazyObject(module, name))
        except ImportError:  # a name in a registry that looks like one in a module
            return
    else:
        return
    if name == 'PretrainedInit' or key in OF_MMCV and module.startswith('mmcv.ops') or (
            name == 'LoadImageFromFile' and module.startswith('mmcv.')):  # which DetInferencer looks for
        dict.__setitem__(node, 'type', 'Pretrained' if name == 'PretrainedInit' else name)


def rename_config(config: Config, path: str | Path) -> Config:
    """The same config under another file name, which is where MMEngine's Runner writes it within the work dir."""
    made = copy.deepcopy(config)
    object.__setattr__(made, '_filename', str(path))  # past Config.__setattr__, which would add a key
    object.__setattr__(made, '_text', config.text or config.pretty_text)
    return made


def is_distillation(config: Config) -> bool:
    """Whether the config's model is a distiller."""
    return get_type_name(config.get('model')) == DISTILLER


def find_quantization(config: Config) -> dict | None:
    """``model.quantize`` of a distillation, by which its student computes in integers; None where it is float.

    Raises:
        ConfigurationError: It is no dict.
    """
    settings = config.model.get('quantize') if is_distillation(config) else None
    if settings is not None and not isinstance(settings, dict):
        raise ConfigurationError(f"model.quantize: expected None or dict(bits=8, …), got {settings!r}.")
    return settings


def student_model(config: Config) -> ConfigDict:
    """The model dict of the detector that a run of this config yields."""
    if not get_type_name(config.get('model')):
        raise ConfigurationError(f"The config '{config.filename}' has no model: expected model=dict(type=…, …).")
    return config.model.student if is_distillation(config) else config.model


def student_config(config: Config) -> Config:
    """The config without distillation: the plain student as the model, the rest unchanged.

    A test run on it never builds a teacher, and its checkpoints are the same.
    """
    plain = copy.deepcopy(config)
    plain.model = student_model(plain)
    for name, hook in list((plain.get('default_hooks') or {}).items()):
        if get_type_name(hook) == DISTILL_HOOK:
            del plain.default_hooks[name]
    if plain.get('custom_hooks'):
        plain.custom_hooks = [hook for hook in plain.custom_hooks if get_type_name(hook) != DISTILL_HOOK]
    return plain


def list_hooks(config: Config) -> list[dict]:
    """The hooks of a config, those that it turns off left out."""
    return [hook for hook in (*(config.get('default_hooks') or {}).values(), *(config.get('custom_hooks') or ()))
            if hook]


def list_imports(config: Config) -> list[str]:
    """The modules that a config imports."""
    imports = (config.get('custom_imports') or {}).get('imports') or []
    return [imports] if isinstance(imports, str) else list(imports)


def set_data_root(config: Config, data_root: str) -> None:
    """Moves the data: every path in the config that starts with the old data root starts with the new one.

    Raises:
        ConfigurationError: The config names no data root.
    """
    loader = config.get('train_dataloader') or {}
    old = config.get('data_root') or loader.get('dataset', {}).get('data_root')
    if not old:
        raise ConfigurationError(
            f"The config '{config.filename}' has no data_root to replace by '{data_root}': set the "
            'paths of its data sets with --cfg-options instead.')
    old, new = str(old).rstrip('/'), str(data_root).rstrip('/') or '/'

    def move(text: str) -> str:
        if text.rstrip('/') == old:
            return new + '/'
        return str(Path(new) / text[len(old) + 1:]) if text.startswith(old + '/') else text

    for key, value in dict.items(config._cfg_dict):
        dict.__setitem__(config._cfg_dict, key, map_strings(value, move))


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """The same with each text within dicts, lists and tuples as the function makes it."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):  # a ConfigDict's own items() would make classes of what pure-Python configs import
        return ConfigDict({key: map_strings(item, function) for key, item in dict.items(value)})
    if isinstance(value, (list, tuple)):
        return type(value)(map_strings(item, function) for item in value)
    return value


def find_objects(value: Any, place: str = '') -> Iterator[tuple[str, Any]]:
    """Finds what MMEngine can not save within a config, and where it is: it writes the config of each run as text.

    That are objects, such as hooks, in place of the dicts that build them, and classes, functions and paths.

    Args:
        value: A config as a plain dict, see ``Config.to_dict``, or a part of it.
        place: Of the part.
    """
    if isinstance(value, dict):
        for key, item in dict.items(value):
            yield from find_objects(item, join_place(place, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from find_objects(item, f'{place}[{index}]')
    elif not isinstance(value, (str, int, float)) and value is not None:
        try:
            ast.parse(str(value), mode='eval')
        except (SyntaxError, ValueError):
            yield place, value


def refuse_object(place: str, value: Any) -> NoReturn:
    """Refuses what :func:`find_objects` found.

    Raises:
        ArgumentError: Always.
    """
    is_named = isinstance(value, type) or callable(value) and hasattr(value, '__name__')
    name = value.__name__ if is_named else type(value).__name__
    advice = f"'{value}'" if isinstance(value, Path) else f"'{name}'" if is_named else f"dict(type='{name}', …)"
    raise ArgumentError(place, f"expected what can be saved as text, as the config of each run is, got "
                               f"{'' if is_named else 'an object of '}{name}. Give {advice}.")


def get_type_name(config: Any) -> str:
    """The name of what a config builds, without its scope or module.

    Returns:
        ``'Resize'`` for ``type='Resize'``, ``'mmdet.Resize'``, ``'mmdet.datasets.transforms.Resize'``, the class or a
        function; ``''`` for what is no dict or has no type.
    """
    kind = config.get('type') if isinstance(config, dict) else None
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def list_leaf_datasets(dataset: dict) -> list[dict]:
    """The data sets within wrappers such as ``RepeatDataset``, ``MultiImageMixDataset`` and ``ConcatDataset``."""
    inner = dataset.get('datasets', dataset.get('dataset'))
    if inner is None:
        return [dataset]
    return [leaf for item in (inner if isinstance(inner, (list, tuple)) else [inner])
            for leaf in list_leaf_datasets(item)]


def iterate_built_datasets(dataset: object) -> Iterator[object]:
    """As :func:`list_leaf_datasets`, of a data set that is built."""
    inner = getattr(dataset, 'datasets', None) or getattr(dataset, 'dataset', None)
    if not hasattr(inner, '__getitem__') or isinstance(inner, str):
        yield dataset
    else:
        for item in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from iterate_built_datasets(item)


def training_pipelines(config: Config) -> list[list[dict]]:
    """The transforms that the images of each training data set go through, those of wrappers last.

    With those that a hook exchanges them for in the course of the training.
    """
    loader = config.get('train_dataloader')
    exchanged = [list(hook['switch_pipeline']) for hook in list_exchanging_hooks(config)]
    return [*list_pipelines(loader['dataset']), *exchanged] if loader else []


def list_exchanging_hooks(config: Config) -> list[dict]:
    """The configs of the hooks that exchange the training pipeline for their ``switch_pipeline``."""
    return [hook for hook in config.get('custom_hooks') or () if isinstance(hook, dict) and hook.get('switch_pipeline')]


def list_pipelines(dataset: dict) -> list[list[dict]]:
    """The transforms that the images of each data set within one go through, those of wrappers last."""
    inner, own = dataset.get('datasets', dataset.get('dataset')), list(dataset.get('pipeline') or ())
    if inner is None:
        return [own]
    return [[*pipeline, *own] for each in (inner if isinstance(inner, (list, tuple)) else [inner])
            for pipeline in list_pipelines(each)]


def build_own(registry: Registry, config: Mapping[str, Any]) -> Any:
    """Builds a term, a mask or a schedule. One of this package need not be named with its scope, whatever scope holds.

    Raises:
        ArgumentError: Its type, or one of its arguments, does not exist, or does not fit.
    """
    if 'type' not in config:
        refuse('', dict(config), "a dict with a 'type'")
    kind = find_class(registry, config, HOME)
    if kind is None:
        own = (name for name, each in registry.module_dict.items() if each.__module__.startswith('kd_det.'))
        raise ArgumentError('type', ' '.join(filter(None, (
            f"there is no '{get_type_name(config)}'.", suggest_names(get_type_name(config), own),
            'If it is your own, import it with custom_imports.'))))
    check_keys(kind, config, besides=('type', '_scope_'))
    with nullcontext() if find_class(registry, config) is not None else DefaultScope.overwrite_default_scope(HOME):
        return registry.build(config)


def explain_build_error(error: Exception, config: Any) -> str:
    """Says why building failed.

    Args:
        error: What building raised.
        config: What was built: a dict with a ``type``, other such dicts perhaps within, or a class.

    Returns:
        For a name that does not exist, those like it; for anything else the error's own message.
    """
    message = str(error)
    argument, kind = UNKNOWN_ARGUMENT.search(message), UNKNOWN_TYPE.search(message)
    if isinstance(error, TypeError) and argument:
        others = _find_arguments(config) - {argument[1]}  # which another part, or a base class, may have
        return f"there is no argument '{argument[1]}'. {suggest_names(argument[1], others)}".rstrip()
    if isinstance(error, KeyError) and kind:
        own = (name for name, each in MODELS.module_dict.items() if each.__module__.startswith('kd_det.'))
        return (f"there is no '{kind[1]}'. {suggest_names(kind[1], own)} If it is your own, import it with "
                'custom_imports.')
    return message


def _find_arguments(config: Any) -> set[str]:
    """Finds the names of the arguments of all that a config names."""
    if isinstance(config, type):
        return {name for ancestor in config.__mro__[:-1] for name in signature(ancestor.__init__).parameters}
    if isinstance(config, (list, tuple)):
        return set().union(*map(_find_arguments, config))
    if not isinstance(config, dict):
        return set()
    kind = config.get('type')
    if isinstance(kind, str):
        kind = MODELS.get(kind) or TASK_UTILS.get(kind)
    return set().union(*map(_find_arguments, config.values()), _find_arguments(kind)) - {'self', 'args', 'kwargs'}
