"""kd_det distils large object detectors into small ones, inside MMDetection 3.x.

Importing it is all that a config needs (``custom_imports = dict(imports=['kd_det'])``): MMDetection gets operators and
checkpoint loading that work on today's PyTorch, and the distiller, terms, masks and hooks join MMDetection's
registries. Without MMDetection :mod:`kd_det.functional`, which needs PyTorch alone, is still there.
"""
import warnings
from importlib.util import find_spec

from kd_det.version import __version__

MMDETECTION_ERROR: Exception | None = None  # why an installed MMDetection can not be imported

if find_spec('mmengine') and find_spec('mmcv') and find_spec('mmdet'):
    try:
        from kd_det import compat
        compat.install()  # before anything imports mmcv.ops
        compat.mend_mmdetection()

        from kd_det.registry import register_config_scope
        register_config_scope()

        from kd_det import datasets, distillers, losses, masks, training  # noqa: F401  registers their classes
        from kd_det.study import fidelity  # noqa: F401
    except Exception as error:  # a library lacks its system files, versions do not fit: the doctor must still run
        MMDETECTION_ERROR = error
        warnings.warn(f'kd_det registered nothing, for MMDetection can not be imported: {type(error).__name__}: '
                      f'{error}. Run `kd-det doctor`.')

__all__ = ['MMDETECTION_ERROR', '__version__']
