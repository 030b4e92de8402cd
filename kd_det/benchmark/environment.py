"""What trains: the code, the libraries and the machine."""
from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Optional

import torch

from kd_det import __version__

PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmdet', 'mmcv', 'mmcv-lite', 'numpy', 'pycocotools',
            'faster-coco-eval')
CHECKOUT = Path(__file__).resolve().parents[2]


def command_line() -> str:
    """The command that runs."""
    program = Path(sys.argv[0])
    program = ['python', sys.argv[0]] if program.suffix == '.py' and program.stem != '__main__' else ['kd-det']
    return shlex.join([*program, *sys.argv[1:]])


def environment(threads: Optional[int] = None) -> dict:
    """What a training depends on beside its config and data.

    Args:
        threads: PyTorch's threads of one training; those of this process by default.

    Returns:
        ``commit`` (see :func:`commit`), ``versions`` and ``machine``.
    """
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # mmcv or mmcv-lite, or a fork under another name
            pass
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return dict(
        commit=commit(),
        versions=dict(python=platform.python_version(), kd_det=__version__, **found),
        machine=dict(system=platform.platform(), processors=os.cpu_count(), devices=devices,
                     threads=threads or torch.get_num_threads()))


def commit(checkout: Path = CHECKOUT) -> Optional[str]:
    """The commit of the git checkout that kd_det is imported from.

    Returns:
        Its hash, with ``-dirty`` where files were changed, or added that git does not ignore; None without a checkout
        or without git.
    """
    if not (checkout / '.git').exists():  # a checkout around the environment that kd_det is installed in is another's
        return None
    said = [_git(checkout, *question) for question in (('rev-parse', 'HEAD'), ('status', '--porcelain'))]
    if None in said:
        return None
    return said[0] + ('-dirty' if said[1] else '')


def _git(checkout: Path, *arguments: str) -> Optional[str]:
    try:
        return subprocess.run(['git', '--no-optional-locks', '-C', str(checkout), *arguments], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, check=True, universal_newlines=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, no commit yet, or somebody else's checkout
        return None
