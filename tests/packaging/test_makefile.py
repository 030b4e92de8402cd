"""``make demo`` and ``make test``: they install what they need, once."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTUP = 'kd_det/compat/startup.py'  # of which an install keeps a copy

# Stands for python3: `-m venv` makes an environment of such scripts, and everything is written to calls.txt.
PYTHON = '''#!/bin/sh
echo "$(basename "$0") $*" >> calls.txt
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/kd-det";;
    *"pip install"*) exit ${PIP_STATUS:-0};;
    "-c import cv2") exit ${CV2_STATUS:-0};;
esac
'''


@pytest.fixture
def make(tmp_path):
    """Runs make in a fresh clone with that Python and returns what was called."""
    for name in ('Makefile', 'setup.py', 'pyproject.toml', 'constraints.txt', '.ci'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / 'kd_det' / 'compat').mkdir(parents=True)
    shutil.copy(ROOT / STARTUP, tmp_path / STARTUP)
    (tmp_path / 'python3').write_text(PYTHON)
    (tmp_path / 'python3').chmod(0o755)

    def run(*command: str, check: bool = True, **environment: str) -> list:
        (tmp_path / 'calls.txt').write_text('')
        inherited = {key: value for key, value in os.environ.items() if not key.startswith('MAKE')}
        subprocess.run(command, cwd=tmp_path, check=check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**inherited, 'PATH': f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment})
        return (tmp_path / 'calls.txt').read_text().splitlines()

    run.folder = tmp_path
    return run


def test_first_run_installs_and_second_does_not(make):
    first = make('make', 'test')
    assert first[0] == 'python3 -m venv .venv'
    installs = [call for call in first if 'pip install' in call]
    assert installs[-1].endswith('--editable .[mmdet,test]')
    assert all('--constraint constraints.txt' in call for call in installs)
    assert first[-1] == 'python -m pytest -n 2 tests'
    assert make('make', 'test') == ['python -m pytest -n 2 tests']
    assert make('make', 'demo') == ['kd-det demo']


def test_a_change_of_what_is_installed_installs_again(make):
    make('make', 'install')
    for name in ('setup.py', 'constraints.txt', STARTUP):
        later = (make.folder / '.venv' / '.installed').stat().st_mtime + 10
        os.utime(make.folder / name, (later, later))
        assert any('pip install' in call for call in make('make', 'install'))
        os.utime(make.folder / name, (0, 0))
    assert make('make', 'install') == []


def test_a_failed_install_is_done_again(make):
    make('make', 'install', check=False, PIP_STATUS='1')
    assert any('pip install' in call for call in make('make', 'install'))


def test_without_libgl_opencv_is_headless(make):
    assert not any('headless' in call for call in make('make', 'install'))
    (make.folder / '.venv' / '.installed').unlink()
    assert 'opencv-python-headless' in make('make', 'install', CV2_STATUS='1')[-1]
    assert make('make', 'install', CV2_STATUS='1') == []


def test_continuous_integration_runs_the_tests(make):
    assert make('.ci/run')[-1] == 'python -m pytest -n 2 tests'


def test_python_can_be_chosen(make):
    shutil.copy(make.folder / 'python3', make.folder / 'python3.99')
    assert make('make', 'install', 'PYTHON=python3.99')[0] == 'python3.99 -m venv .venv'
