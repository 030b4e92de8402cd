"""The wheel holds what users, MMEngine and mim look for, and works where there is no source tree."""
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import mmdet
import pytest
import torch

from kd_det.compat import operator_backend

ROOT = Path(__file__).parents[2]
SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'model-index.yml', 'kd_det', 'configs', 'tools')


STARTUP = {'kd_det_startup.pth', 'kd_det_startup.py'}


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """A copy to build from, so that the source tree stays clean."""
    source = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / name, source / name)
    return source


@pytest.fixture(scope='module')
def wheel(source) -> Path:
    """The wheel, built offline."""
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
    assert {f'kd_det/study/report/{name}' for name in ('template.html', 'style.css', 'script.js')} <= content
    assert not [name for name in content if 'tests' in name or '__pycache__' in name]


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {Path(name).name: archive.read(name).decode() for name in archive.namelist()
            if name.endswith(('METADATA', 'entry_points.txt', 'LICENSE'))}
    metadata = read['METADATA'].splitlines()
    assert 'Name: kd-det' in metadata and 'Requires-Python: >=3.10' in metadata
    required = {line.partition(': ')[2] for line in metadata if line.startswith('Requires-Dist')}
    assert {name for name in required if 'extra' not in name} == {
        'torch>=2.4', 'torchvision>=0.19', 'numpy', 'scipy', 'filelock', 'rich', 'matplotlib', 'jinja2', 'shtab',
        'pydantic>=2.7', 'annotated-types', 'typing_extensions', 'submitit>=1.5', 'safetensors'}
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


@pytest.fixture(scope='module')
def environment(wheel, tmp_path_factory) -> Path:
    """The site-packages of a virtual environment with that wheel, on top of this one's packages."""
    folder = tmp_path_factory.mktemp('environment')
    venv.create(folder, symlinks=True)
    site = Path(sysconfig.get_path('purelib', vars=dict(base=str(folder), platbase=str(folder))))
    zipfile.ZipFile(wheel).extractall(site)
    others = Path(sysconfig.get_path('purelib'))
    distutils = others / 'distutils-precedence.pth'  # setuptools' own, in place of what Python 3.12 no longer has
    (site / 'others.pth').write_text(f"{others}\n{distutils.read_text() if distutils.is_file() else ''}")
    return site


@pytest.fixture
def run(environment, tmp_path):
    """Runs that environment's Python outside of any source tree; returns what it printed, errors too."""

    def run_python(*command, check=True, **variables) -> str:
        kept = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'KD_DET_NO_COMPAT')}
        result = subprocess.run([environment.parents[2] / 'bin' / 'python', *command], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env={**kept, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', **variables})
        assert not check or result.returncode == 0, result.stdout
        return result.stdout

    return run_python


def _recorded(wheel: Path) -> set:
    archive = zipfile.ZipFile(wheel)
    record, = (name for name in archive.namelist() if name.endswith('.dist-info/RECORD'))
    return {line.split(',')[0] for line in archive.read(record).decode().splitlines()}


def test_startup_file_is_installed_and_uninstalled_with_the_package(wheel, source, tmp_path):
    """Also by an editable install, whose wheel holds no module of the package itself."""
    program = f'from setuptools.build_meta import build_editable; build_editable({str(tmp_path)!r})'
    subprocess.run([sys.executable, '-c', program], check=True, cwd=source, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    editable, = tmp_path.glob('*.whl')
    for built in (wheel, editable):
        assert STARTUP <= _recorded(built)
        written = zipfile.ZipFile(built).read('kd_det_startup.py')
        assert written == (ROOT / 'kd_det' / 'compat' / 'startup.py').read_bytes()
    assert not any(name.startswith('kd_det/') for name in _recorded(editable))


def test_start_of_python_loads_nothing_else_and_can_be_left_alone(run):
    program = 'import sys; print(*sys.modules); print(*(type(finder).__name__ for finder in sys.meta_path))'
    (loaded, finders), (others, untouched) = (
        run('-c', program, KD_DET_NO_COMPAT=value).splitlines() for value in ('', '1'))
    assert 'StartupFinder' in finders and 'StartupFinder' not in untouched
    assert set(loaded.split()) == set(others.split()) and not {'torch', 'kd_det', 'importlib.util'} & set(
        loaded.split())


def test_start_of_python_survives_an_uninstall_by_halves(run, environment):
    package, module = environment / 'kd_det', environment / 'kd_det_startup.py'
    ask = 'import mmcv, importlib.util; print(importlib.util.find_spec("mmcv._ext"))'
    try:
        package.rename(environment / 'away')
        (package / '__pycache__').mkdir(parents=True)
        assert operator_backend() != 'torchvision' or run('-c', ask).split() == ['None']
        module.rename(environment / 'away.py')
        assert run('-c', 'print(1)') == '1\n'
        module.write_text('raise SystemError\n')
        assert run('-c', 'print(1)') == '1\n'
    finally:
        shutil.rmtree(package)
        (environment / 'away').rename(package)
        (environment / 'away.py').replace(module)


def test_mmdetections_own_tool_tests_a_checkpoint(run, tmp_path):
    """It imports mmcv's operators before the config, and the checkpoint holds a history, as mmengine's do."""
    from mmdet.registry import MODELS
    from mmengine.logging import HistoryBuffer

    from kd_det.config.files import load_config
    from kd_det.datasets import generate_shapes
    generate_shapes(tmp_path / 'demo' / 'data', 1, 2, 32)
    config = load_config('kd_det::demo/baseline_retinanet_r18.py')
    state = MODELS.build(config.model).state_dict()
    config.pop('custom_imports')  # a user's own config has none
    config.dump(tmp_path / 'plain.py')
    history = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))
    torch.save(dict(state_dict=state, message_hub=history), tmp_path / 'x.pth')
    tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'test.py'
    assert 'coco/bbox_mAP' in run(tool, 'plain.py', 'x.pth', '--work-dir', 'work')
    if operator_backend() == 'torchvision':
        assert "No module named 'mmcv._ext'" in run(tool, 'plain.py', 'x.pth', check=False, KD_DET_NO_COMPAT='1')


def test_what_mmdetection_imported_first_becomes_kd_dets(run):
    """A distillation's config imports kd_det after mmdet; and init_detector, taken before that, knows its config."""
    program = ("from mmdet.apis import init_detector; import sys; print('kd_det' in sys.modules);"
               "detector = init_detector(sys.argv[1], device='cpu');"
               "import kd_det, kd_det.compat; from mmdet.registry import MODELS;"
               "print(type(detector).__name__, kd_det.MMDETECTION_ERROR, MODELS.get('FGD').__name__,"
               "kd_det.compat.CheckpointError.__name__)")
    config = ROOT / 'configs' / 'demo' / 'fgd_faster_rcnn_r101_r18.py'
    lines = run('-c', program, config).splitlines()
    assert [lines[0], lines[-1]] == ['False', 'FasterRCNN None FGD CheckpointError']
