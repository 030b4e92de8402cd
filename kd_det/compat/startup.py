"""Makes MMDetection's own tools work with mmcv-lite: they import it before any config, and kd_det with it, is read.

Installing kd_det lays a copy of this module, and a ``.pth`` file that calls :func:`install`, where Python looks for
them at its start. So it imports nothing that costs time before a program imports mmcv or MMDetection, and of kd_det
then :mod:`kd_det.compat` alone. Where kd_det is imported itself, :func:`mend_mmdetection` puts another finder in the
place of that one, which also makes kd_det's types and configs known.
"""
import os
import sys

REGISTRATION = 'kd_det.compat.registration'
OFF = 'KD_DET_NO_COMPAT'  # set to 1, this environment variable leaves Python's start alone
EXTENSION = 'mmcv._ext'


def install() -> None:
    """Makes this process ready for MMDetection's tools, once, unless it is switched off."""
    if os.environ.get(OFF, '') in ('', '0') and not any(hasattr(finder, 'is_of_kd_det') for finder in sys.meta_path):
        sys.meta_path.insert(0, StartupFinder(MENDS))


def mend_mmdetection() -> None:
    """Mends what is imported already of MMEngine and MMDetection, all else as soon as it is. May be called again."""
    if not any(getattr(finder, 'mends', None) is MENDS_OF_KD_DET for finder in sys.meta_path):
        # Python's start may have installed one, of another version even, that knows less.
        sys.meta_path[:] = [finder for finder in sys.meta_path if not hasattr(finder, 'is_of_kd_det')]
        sys.meta_path.insert(0, StartupFinder(MENDS_OF_KD_DET))
    for name, mend in MENDS_OF_KD_DET.items():
        module = sys.modules.get(name)
        if module and not getattr(module.__spec__, '_initializing', False):
            _try(mend, module)


class StartupFinder:
    """Provides ``mmcv._ext`` where there is no compiled one, and mends some modules as they are imported."""

    is_of_kd_det = True

    def __init__(self, mends) -> None:
        self.mends = mends

    def find_spec(self, fullname, path=None, target=None):
        mend = self.mends.get(fullname)
        if not mend and fullname != EXTENSION:
            return None
        from importlib.machinery import PathFinder, SourceFileLoader
        spec = PathFinder.find_spec(fullname, path, target)
        if not _is_there('kd_det'):  # uninstalled by halves
            return spec
        if fullname == EXTENSION and spec is None:
            _import_alone('kd_det.compat.ops')
            return _import_alone('kd_det.compat.operators').OperatorFinder().find_spec(fullname)
        if mend and spec and isinstance(spec.loader, SourceFileLoader):  # each serves one module alone
            spec.loader.exec_module = _then(spec.loader.exec_module, mend)
        return spec


def _then(execute, mend):

    def execute_and_mend(module) -> None:
        execute(module)
        _try(mend, module)

    return execute_and_mend


def _try(mend, module) -> None:
    try:
        mend(module)
    except (AttributeError, KeyError):  # another version, which lacks what is mended here
        pass


def _import_alone(name: str):
    """A module of kd_det, imported without what kd_det/__init__.py imports: mmdet may be half imported just now."""
    from importlib import import_module
    from importlib.util import find_spec, module_from_spec
    if 'kd_det' in sys.modules:
        return import_module(name)
    sys.modules['kd_det'] = module_from_spec(find_spec('kd_det'))  # a stand-in that has run no code
    try:
        return import_module(name)
    finally:
        del sys.modules['kd_det']


def defer_safe_loading(module) -> None:
    """Has mmengine's ``CheckpointLoader`` installed safely when MMDetection first loads a checkpoint."""
    loader = module.CheckpointLoader
    load = vars(loader)['load_checkpoint']

    def load_checkpoint(cls, *args, **kwargs):
        if 'mmdet' in sys.modules:  # other packages of mmengine's are left alone
            loader.load_checkpoint = load
            _import_alone('kd_det.compat').install_safe_loading()
        return load.__get__(None, cls)(*args, **kwargs)

    loader.load_checkpoint = classmethod(load_checkpoint)


def let_ssd_predict(module) -> None:
    """MMDetection 3.3's SSD head trains, but asks for its ``loss_cls``, which it has not, as soon as it predicts."""
    if not hasattr(module.SSDHead, 'loss_cls'):
        module.SSDHead.loss_cls = None


def let_init_detector_take_students(module) -> None:
    """``init_detector`` reads ``model.backbone``: of a distillation's config it is given the student's."""
    from functools import wraps
    from inspect import signature
    init_detector = module.init_detector
    if hasattr(init_detector, '__wrapped__'):
        return

    @wraps(init_detector)
    def init_student(*args, **kwargs):
        from kd_det.config.files import is_distillation, student_config
        arguments = signature(init_detector).bind(*args, **kwargs).arguments
        config = arguments['config']
        if isinstance(config, (str, os.PathLike)):
            config = module.Config.fromfile(config)
        if isinstance(config, module.Config) and is_distillation(config):
            given = set(config.model)
            config.merge_from_dict(arguments.pop('cfg_options', None) or {})  # they name parts of what was given,
            own = {name: config.model[name] for name in set(config.model) - given if name in config.model.student}
            config = student_config(config)
            config.merge_from_dict(dict(model=own))  # or of the plain student
        return init_detector(**{**arguments, 'config': config})

    module.init_detector = init_student
    if 'mmdet.apis' in sys.modules:  # imported before
        vars(sys.modules['mmdet.apis'])['init_detector'] = init_student


def load_safely(module) -> None:
    """Has PyTorch and mmengine load checkpoints safely: at once, for this program imports kd_det itself."""
    from kd_det.compat.checkpoint import install_safe_loading
    install_safe_loading()


def find_types(registries) -> None:
    """Has MMDetection's registries import kd_det's types at their next look-up, with what they import themselves."""
    for registry in vars(registries).values():
        locations = getattr(registry, '_locations', None)
        if locations is not None and registry.scope == 'mmdet' and REGISTRATION not in locations:
            locations.append(REGISTRATION)
            registry._imported = False


def find_configs(module) -> None:
    """Makes ``kd_det::folder/file.py`` known to MMEngine's configs, hub and registries.

    MMEngine keeps a fixed table from scope to distribution and looks up where that distribution is installed, which
    fails in an editable install. Where there is no distribution of that name it takes the folder of the module of that
    name: a module of kd_det leads there however it is installed. Configs of MMDetection (``mmdet::…``) need no help:
    by the same rule they are found under any distribution that provides the module ``mmdet``.
    """
    module.MODULE2PACKAGE.setdefault('kd_det', 'kd_det.registry')


def _is_there(package: str) -> bool:
    """Whether a package can be imported; what an uninstall left of its folder has no origin."""
    from importlib.util import find_spec
    try:
        return getattr(find_spec(package), 'origin', None) is not None
    except ValueError:  # it is being replaced
        return False


MENDS = {
    'mmengine.runner.checkpoint': defer_safe_loading,
    'mmdet.models.dense_heads.ssd_head': let_ssd_predict,
    'mmdet.apis.inference': let_init_detector_take_students,
}
MENDS_OF_KD_DET = {
    'mmengine.config.utils': find_configs,
    'mmengine.runner': load_safely,
    'mmdet.registry': find_types,
    'mmdet.models.dense_heads.ssd_head': let_ssd_predict,
    'mmdet.apis.inference': let_init_detector_take_students,
}
