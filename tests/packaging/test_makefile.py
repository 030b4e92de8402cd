"""``make demo``, ``test``, ``lint`` and ``docs``: they install what they need, once."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STARTUP = 'kd_det/compat/startup.py'  # of which an install keeps a copy

# How a make that runs these tests would steer the one that they run: its flags, and what its command line or the
# environment may set.
OUTER_MAKE = re.compile('|'.join(['MAKE.*', 'MFLAGS', 'GNUMAKEFLAGS',
                                  *re.findall(r'^(\w+) \?=', (ROOT / 'Makefile').read_text(), re.MULTILINE)]))

# Stands for python3: `-m venv` makes an environment of such scripts, and everything is written to calls.txt.
PYTHON = '''#!/bin/sh
echo "$(basename "$0") $*" >> calls.txt
case "$*" in
    "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/kd-det";;
    *"pip install"*) exit ${PIP_STATUS:-0};;
    "-m ruff "*) exit ${RUFF_STATUS:-0};;
    "-c import cv2") exit ${CV2_STATUS:-0};;
esac
'''


@pytest.fixture
def outer_make(request, monkeypatch):
    """Of a test that is told so: the environment of what a make runs that was called with variables and flags."""
    if hasattr(request, 'param'):
        for name, value in request.param.items():
            monkeypatch.setenv(name, value)


@pytest.fixture
def make(tmp_path, monkeypatch, outer_make):
    """Runs make in a fresh clone with that Python and returns what was called."""
    for name in ('Makefile', 'setup.py', 'pyproject.toml', 'constraints.txt', '.ci'):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / 'kd_det' / 'compat').mkdir(parents=True)
    shutil.copy(ROOT / STARTUP, tmp_path / STARTUP)
    (tmp_path / 'python3').write_text(PYTHON)
    (tmp_path / 'python3').chmod(0o755)

    for variable in filter(OUTER_MAKE.fullmatch, list(os.environ)):
        monkeypatch.delenv(variable)

    def run(*command: str, check: bool = True, **environment: str) -> list:
        (tmp_path / 'calls.txt').write_text('')
        subprocess.run(command, cwd=tmp_path, check=check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env={**os.environ, 'PATH': f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment})
        return (tmp_path / 'calls.txt').read_text().splitlines()

    run.folder = tmp_path
    return run


def test_first_run_installs_and_second_does_not(make):
    first = make('make', 'test')
    assert first[0] == 'python3 -m venv .venv'
    installs = [call for call in first if 'pip install' in call]
    assert installs[-1].endswith('--editable .[mmdet,test]')
    assert all('--constraint constraints.txt' in call for call in installs)
    assert first[-1] == 'python -m pytest -n 2 --dist worksteal tests'
    assert make('make', 'test') == ['python -m pytest -n 2 --dist worksteal tests']
    assert make('make', 'demo') == ['kd-det demo']


def test_lint_and_docs_install_their_own_extra(make):
    lint = make('make', 'lint')
    assert [call.split()[-1] for call in lint if '--editable' in call] == ['.[mmdet,test]', '.[lint]']
    assert all('--constraint constraints.txt' in call for call in lint if 'pip install' in call)
    assert lint[-2:] == ['python -m ruff check .', 'python -m mypy'] == make('make', 'lint')
    docs = make('make', 'docs')
    assert [call.split()[-1] for call in docs if '--editable' in call] == ['.[docs]']
    build = 'python -m mkdocs build --strict --config-file docs/site/mkdocs.yml'
    assert docs[-1] == build and make('make', 'docs') == [build]
    assert (ROOT / 'docs' / 'site' / 'mkdocs.yml').is_file()


def test_a_changed_setup_installs_the_tools_again(make):
    make('make', 'lint')
    later = (make.folder / '.venv' / '.installed-lint').stat().st_mtime + 10
    os.utime(make.folder / 'setup.py', (later, later))
    installs = [call for call in make('make', 'lint') if '--editable' in call]
    assert [call.split()[-1] for call in installs] == ['.[mmdet,test]', '.[lint]']


def test_a_style_error_is_the_status_of_lint(make):
    make('make', 'lint')
    assert 'python -m mypy' not in make('make', 'lint', check=False, RUFF_STATUS='1')


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


def test_continuous_integration_runs_lint_and_the_tests(make):
    assert make('.ci/run')[-3:] == ['python -m ruff check .', 'python -m mypy',
                                    'python -m pytest -n 2 --dist worksteal tests']


def test_every_target_is_explained(make):
    lines = subprocess.run(['make', 'help'], cwd=make.folder, check=True, capture_output=True, text=True).stdout
    assert re.findall('make ([a-z]+)  ', lines) == ['help', 'install', 'demo', 'test', 'soak', 'lint', 'docs', 'clean']


def test_python_can_be_chosen(make):
    shutil.copy(make.folder / 'python3', make.folder / 'python3.99')
    assert make('make', 'install', 'PYTHON=python3.99')[0] == 'python3.99 -m venv .venv'


@pytest.mark.parametrize('outer_make', [
    dict(MAKEFLAGS=' -- PYTHON=python3.99', MAKEOVERRIDES='${-*-command-variables-*-}', MAKELEVEL='1', MFLAGS='',
         PYTHON='python3.99'),
    dict(MAKEFLAGS='n -- WORKERS=4 VENV=elsewhere', MFLAGS='-n', WORKERS='4', VENV='elsewhere'),
    dict(GNUMAKEFLAGS='--dry-run')], indirect=True, ids=['python', 'workers', 'flags'])
def test_a_make_that_runs_these_tests_does_not_steer_theirs(outer_make, make):
    """``make test PYTHON=…`` hands its variables down, and those win over what a Makefile says."""
    calls = make('make', 'test')
    assert calls[0] == 'python3 -m venv .venv' and calls[-1] == 'python -m pytest -n 2 --dist worksteal tests'
    test_every_target_is_explained(make)
