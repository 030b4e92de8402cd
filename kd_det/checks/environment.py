"""What a check found; the installation; and ``kd_det.doctor``, which must run where MMDetection can not be imported."""
from __future__ import annotations

import locale
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_det import __version__
from kd_det.compat.console import TextTable
from kd_det.compat.process import files_are_utf8
from kd_det.config.arguments import Index, declared

if TYPE_CHECKING:
    from mmengine.config import Config


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

    @property
    def mark(self) -> str:
        """``'fault'``, ``'note'`` where something may be done, or ``'ok'``."""
        return 'fault' if self.fault else 'note' if self.remedy else 'ok'


class DiagnosisError(ValueError):
    """A run would fail; the message lists why, and what to do."""


def raise_faults(findings: Iterable[Finding]) -> None:
    """Raises a :class:`DiagnosisError` that lists the faults and, once each, their remedies, if there are any."""
    faults = [finding for finding in findings if finding.fault]
    if faults:
        lines = [f'{finding.subject}: {finding.found}'
                 + ('' if '\n' in finding.found or finding.found.endswith('.') else '.') for finding in faults]
        remedies = dict.fromkeys(f'{finding.remedy}.' for finding in faults if finding.remedy)
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


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, what it is like, and what to do about it.

    Attributes:
        findings: One after the other; those with ``fault`` would stop a run.
    """
    findings: tuple[Finding, ...]

    @property
    def faults(self) -> int:
        """How many would stop a run."""
        return sum(finding.fault for finding in self.findings)

    def tabulate(self) -> TextTable:
        """Makes a table of the findings; of those of several lines the first."""
        rows = [(finding.mark, finding.subject, lines[0] + (' (below)' if lines[1:] else ''), finding.remedy)
                for finding in self.findings for lines in [finding.found.splitlines() or ['']]]
        return TextTable('', ('', 'Looked at', 'Found', 'What to do'), rows, words=range(4))

    def to_dict(self) -> dict[str, Any]:
        """Returns the findings as JSON can hold them."""
        return dict(faults=self.faults, findings=[asdict(finding) for finding in self.findings])

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def doctor(config: str | Path | Config | None = None, *, teacher_checkpoint: str | Path | None = None,
           check_images: Index | None = None, data_root: str | None = None,
           options: dict[str, Any] | None = None) -> Diagnosis:
    """Checks the installation, and a config: what would fail, and what to do about it.

    Args:
        config: Also look at this: a file, ``'package::folder/file.py'``, or a config.
        teacher_checkpoint: Check this file as the teacher's weights.
        check_images: Look at so many images of each data set; at all by default.
        data_root: Folder of the data, in place of the config's.
        options: Settings that override the config, by dotted key.
    """
    findings = list(inspect_environment())
    if config is not None and not any(finding.fault for finding in findings):
        from mmengine.config import Config

        from kd_det.checks.doctor import inspect_config  # needs MMDetection, which may be what is at fault
        from kd_det.config.files import ConfigurationError, is_distillation, load_config
        from kd_det.config.options import resolve_config
        from kd_det.registry import prepare_without_runner
        try:
            resolved = load_config(config) if not isinstance(config, Config) else config
            prepare_without_runner(resolved, seed=0)
            resolved = resolve_config(resolved, data_root, options)
            if teacher_checkpoint:
                if not is_distillation(resolved):
                    raise ConfigurationError(
                        '--teacher-checkpoint: the config has no teacher, its model is a plain detector')
                teacher = resolved.model.get('teacher')
                if not isinstance(teacher, dict):
                    raise ConfigurationError(f'--teacher-checkpoint is for one teacher, and this config has '
                                             f'{len(teacher or ())}')
                teacher['checkpoint'] = str(teacher_checkpoint)
            name = config.filename or 'Config' if isinstance(config, Config) else config
            findings += [Finding('config', str(name)), *inspect_config(resolved, check_images)]
        except (ConfigurationError, OSError) as error:
            findings.append(Finding('config', str(error), 'Correct the config', fault=True))
    return Diagnosis(tuple(findings))
