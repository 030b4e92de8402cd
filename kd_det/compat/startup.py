"""Makes MMDetection's own tools work with mmcv-lite, where they import it before any config, and kd_det, is read.

Installing kd_det lays a copy of this module and a ``.pth`` file, which calls :func:`install`, where Python looks for
them at its start. Therefore it imports nothing that costs time: kd_det itself is not loaded before a program of
MMDetection first calls an operator, loads a checkpoint or makes a detector. Where kd_det has been imported first, its
own finder serves the operators, and :func:`mend_mmdetection` does the rest.
"""
import os
import sys

OFF = 'KD_DET_NO_COMPAT'  # set to 1, this environment variable leaves Python's start alone
EXTENSION = 'mmcv._ext'
ORIGIN = 'torchvision kernels, provided by kd_det.compat'


def install() -> None:
    """Makes this process ready for MMDetection's tools, once, unless it is switched off."""
    if os.environ.get(OFF, '') in ('', '0') and not any(hasattr(finder, 'is_of_kd_det') for finder in sys.meta_path):
        sys.meta_path.insert(0, StartupFinder())


def mend_mmdetection() -> None:
    """Lets SSD predict, and ``init_detector`` read the config of a distillation. Not before operators are served."""
    from mmdet.apis import inference
    from mmdet.models.dense_heads import ssd_head
    let_ssd_predict(ssd_head)
    let_init_detector_take_students(inference)
    sys.modules['mmdet.apis'].init_detector = inference.init_detector


class StartupFinder:
    """Provides ``mmcv._ext`` where there is no compiled one, and mends three modules as they are imported."""

    is_of_kd_det = True

    def find_spec(self, fullname, path=None, target=None):
        mend = MENDS.get(fullname)
        if not mend and fullname != EXTENSION:
            return None
        from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
        spec = PathFinder.find_spec(fullname, path, target)
        if not _is_there('kd_det'):  # uninstalled by halves
            return spec
        if fullname == EXTENSION:
            served = 'kd_det.compat.operators' in sys.modules  # whose finder is asked next
            return spec or (None if served else ModuleSpec(fullname, DeferredOperators(), origin=ORIGIN))
        if spec and isinstance(spec.loader, SourceFileLoader):  # each serves one module alone
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), mend(module))
        return spec


class DeferredOperators:
    """Fills ``mmcv._ext`` with operators each of which, when first called, has :mod:`kd_det.compat` fill it anew.

    kd_det can not be imported any earlier: mmcv asks for them while mmdet, which kd_det needs, is being imported.
    """

    def create_module(self, spec):
        return None  # Python's default module

    def exec_module(self, module) -> None:

        def defer(name: str):
            if name.startswith('_'):  # no operator, but a question of Python's
                raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')

            def call(*args, **kwargs):
                from kd_det.compat import install
                install()
                return getattr(module, name)(*args, **kwargs)

            return call

        module.__getattr__ = defer


def defer_safe_loading(module) -> None:
    """Has mmengine's ``CheckpointLoader`` installed safely when MMDetection first loads a checkpoint."""
    loader = module.CheckpointLoader
    load = vars(loader)['load_checkpoint']

    def load_checkpoint(cls, *args, **kwargs):
        if 'mmdet' in sys.modules:  # other packages of mmengine's are left alone
            loader.load_checkpoint = load
            from kd_det.compat import install_safe_loading
            install_safe_loading()
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
        from kd_det.configuration import is_distillation, student_config
        arguments = signature(init_detector).bind(*args, **kwargs).arguments
        config = arguments['config']
        if isinstance(config, (str, os.PathLike)):
            config = module.Config.fromfile(config)
        if isinstance(config, module.Config) and is_distillation(config):
            config.merge_from_dict(arguments.pop('cfg_options', None) or {})  # they name parts of what was given
            config = student_config(config)
        return init_detector(**{**arguments, 'config': config})

    module.init_detector = init_student


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
