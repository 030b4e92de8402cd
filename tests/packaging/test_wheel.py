"""The wheel holds what users, MMEngine and mim look for, and works where there is no source tree."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'model-index.yml', 'kd_det', 'configs', 'tools')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """A wheel built offline, from a copy, so that the source tree stays clean."""
    source = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, source / name)
    subprocess.run([
        sys.executable, '-m', 'pip', 'wheel',
        str(source), '--no-deps', '--no-build-isolation', '--no-index', '-q', '-w',
        str(source / 'dist')
    ],
                   check=True)
    file, = (source / 'dist').glob('*.whl')
    return file


def files_under(folder: str, *patterns: str) -> set:
    return {str(file.relative_to(ROOT)) for pattern in patterns for file in (ROOT / folder).rglob(pattern)}


def test_wheel_holds_every_module_config_and_tool(wheel):
    content = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith('kd_det-') and wheel.name.endswith('-py3-none-any.whl')
    assert {str(file.relative_to(ROOT)) for file in (ROOT / 'kd_det').rglob('*.py')} <= content
    shipped = {*files_under('configs', '*.py', '*.yml'), *files_under('tools', '*.py', '*.sh'), 'model-index.yml'}
    assert {f'kd_det/.mim/{file}' for file in shipped} <= content
    assert {f'kd_det/report/{name}' for name in ('template.html', 'style.css', 'script.js')} <= content
    assert not [name for name in content if 'tests' in name or '__pycache__' in name]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {Path(name).name: archive.read(name).decode() for name in archive.namelist()
            if name.endswith(('METADATA', 'entry_points.txt', 'LICENSE'))}
    metadata = read['METADATA'].splitlines()
    assert 'Name: kd-det' in metadata and 'Requires-Python: >=3.8' in metadata
    required = {line.partition(': ')[2] for line in metadata if line.startswith('Requires-Dist')}
    assert {name for name in required if 'extra' not in name} == {'torch', 'torchvision', 'numpy', 'scipy', 'filelock',
                                                                  'rich', 'matplotlib', 'jinja2'}
    assert sum("extra == 'mmdet'" in name.replace('"', "'") for name in required) == 4
    assert 'Apache License' in read['LICENSE']
    assert 'kd-det = kd_det.cli.main:main' in read['entry_points.txt']


def test_installed_wheel_finds_its_configs_and_runs_its_tools(wheel, tmp_path):
    site = tmp_path / 'site'
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, 'PYTHONPATH': str(site)}
    program = ("import kd_det; from mmengine.config import Config; from mmengine.hub import get_config;"
               "print(kd_det.__file__, get_config('kd_det::_base_/methods/fgd_two_stage.py').fgd.fgd.type)")
    printed = subprocess.run([sys.executable, '-c', program],
                             check=True,
                             text=True,
                             stdout=subprocess.PIPE,
                             cwd=tmp_path,
                             env=environment).stdout.split()
    assert printed == [str(site / 'kd_det' / '__init__.py'), 'mmdet.FGD']
    tool = site / 'kd_det' / '.mim' / 'tools' / 'train.py'
    result = subprocess.run([sys.executable, tool, 'nowhere.py'],
                            text=True,
                            stderr=subprocess.PIPE,
                            cwd=tmp_path,
                            env=environment)
    assert result.returncode == 2 and "no config file 'nowhere.py'" in result.stderr
