"""What an inspection found, and the error that several of them make."""
from __future__ import annotations

import locale
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from kd_det import __version__
from kd_det.compat.process import files_are_utf8


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: What was looked at.
        found: What it is like.
        remedy: What to do about it; empty where all is well.
        fault: Whether a run would fail, or be worthless, as long as nothing is done.
    """
    subject: str
    found: str
    remedy: str = ''
    fault: bool = False


class DiagnosisError(ValueError):
    """A run would fail; the message lists why, and what to do."""


def raise_faults(findings: Iterable[Finding]) -> None:
    """Raises a :class:`DiagnosisError` that lists the faults and, once each, their remedies, if there are any."""
    faults = [finding for finding in findings if finding.fault]
    if faults:
        lines = [f'{finding.subject}: {finding.found}'
                 + ('' if '\n' in finding.found or finding.found.endswith('.') else '.') for finding in faults]
        remedies = dict.fromkeys(f'{finding.remedy}.' for finding in faults)
        raise DiagnosisError('\n  '.join([*lines, *remedies]))


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


def installed(names: tuple[str, ...]) -> str | None:
    """Name and version of the first of these distributions that is installed."""
    for name in names:
        try:
            return f'{name} {version(name)}'
        except PackageNotFoundError:
            continue
    return None


def _inspect_module(module: str, names: tuple[str, ...]) -> Finding:
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
