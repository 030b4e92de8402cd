"""Inspects the installation."""
from __future__ import annotations

import locale
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Iterator, Optional, Tuple

import torch

from kd_det.console import files_are_utf8
from kd_det.diagnosis.finding import Finding
from kd_det import __version__

# The distributions that provide a module: MMDetection's stack is published under several names.
DISTRIBUTIONS = {
    'torchvision': ('torchvision', ),
    'cv2': ('opencv-python', 'opencv-python-headless'),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'pycocotools': ('pycocotools', ),
}
INSTALL = "pip install 'kd-det[mmdet]'"
# OpenCV's desktop build needs the libraries of a screen.
HEADLESS = 'pip install --force-reinstall --no-deps opencv-python-headless'


def inspect_environment() -> Iterator[Finding]:
    """Versions, who serves mmcv's operators, and the accelerator."""
    yield Finding('Python', platform.python_version())
    if not files_are_utf8():
        yield Finding('encoding', f'files are read as {locale.getpreferredencoding(False)}: names outside ASCII in '
                      'annotation files come out wrong', 'Set PYTHONUTF8=1 in the environment')
    yield Finding('kd_det', __version__)
    yield Finding('torch', torch.__version__)
    for module, names in DISTRIBUTIONS.items():
        yield _inspect_module(module, names)
    yield _inspect_operators()
    yield _inspect_device()


def installed(names: Tuple[str, ...]) -> Optional[str]:
    """Name and version of the first of these distributions that is installed."""
    for name in names:
        try:
            return f'{name} {version(name)}'
        except PackageNotFoundError:
            continue
    return None


def _inspect_module(module: str, names: Tuple[str, ...]) -> Finding:
    if find_spec(module) is None:
        return Finding(module, 'not installed', INSTALL, fault=True)
    try:
        loaded = import_module(module)
    except Exception as error:  # an import that fails may raise anything
        remedy = HEADLESS if 'libGL' in str(error) else INSTALL
        return Finding(module, f'can not be imported ({type(error).__name__}: {error})', remedy, fault=True)
    found = installed(names) or f'{getattr(loaded, "__version__", "?")} (from {loaded.__file__})'
    if module == 'mmengine' and found.startswith('mmengine') and find_spec('pkg_resources') is None:
        return Finding(module, f'{found}, which needs pkg_resources', "pip install 'setuptools<81'", fault=True)
    return Finding(module, found)


def _inspect_operators() -> Finding:
    try:
        from kd_det.compat import operator_backend
        return Finding('operators', operator_backend())
    except Exception as error:  # whatever stops it here would stop the run
        return Finding('operators', f'{type(error).__name__}: {error}', INSTALL, fault=True)


def _inspect_device() -> Finding:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding('GPU', ', '.join(names))
    return Finding('GPU', 'none; runs use the CPU, which is enough for small data only')
