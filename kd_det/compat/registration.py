"""Registers all types of kd_det: MMDetection's registries import this module at their first look-up.

Where MMDetection or what is to be registered can not be imported, as where a library lacks its system files or versions
do not fit, this warns, and the registries are left without: the doctor must still run.
"""
from __future__ import annotations

import traceback
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

# Of types, within kd_det.
HOLDERS = ('datasets', 'deploy.joined', 'deploy.prediction', 'deploy.pruned', 'distillers', 'losses', 'masks',
           'study.fidelity', 'teachers', 'training')

PACKAGE = Path(__file__).parents[1]


def _is_of_kd_det(error: Exception) -> bool:
    """Whether a mistake in a file of kd_det's own raised it, and not what the file imports."""
    if isinstance(error, ImportError) and (error.name or '').split('.')[0] != 'kd_det':
        return False
    frames = traceback.extract_tb(error.__traceback__)
    file = error.filename if isinstance(error, SyntaxError) else frames[-1].filename
    return PACKAGE in Path(file or '').parents


MMDETECTION_ERROR: Exception | None = None  # why an installed MMDetection can not be imported

if find_spec('mmengine') and find_spec('mmcv') and find_spec('mmdet'):
    try:
        for holder in HOLDERS:
            import_module(f'kd_det.{holder}')
    except Exception as error:
        if _is_of_kd_det(error):  # a new term or mask with a mistake: say where
            raise
        MMDETECTION_ERROR = error
        warnings.warn(f'kd_det registered nothing, for MMDetection can not be imported: {type(error).__name__}: '
                      f'{error}. Run `kd-det doctor`.', stacklevel=2)
