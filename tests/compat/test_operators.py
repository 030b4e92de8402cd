import importlib.util
import os
import pkgutil
import subprocess
import sys
import warnings
from pathlib import Path

import mmcv
import pytest
import torch

import kd_det.compat
from kd_det.compat import OperatorNotServedError, operator_backend, operators, served_operators

REPOSITORY = Path(kd_det.compat.__file__).parents[2]

pytestmark = pytest.mark.skipif(operator_backend() != 'torchvision', reason='compiled mmcv is installed')


def run_python(code, *path):
    """Runs ``code`` in a fresh interpreter that finds modules in ``path`` first; returns what it printed."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [*path, REPOSITORY])))
    process = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_operator_of_mmcv_can_be_imported():
    import mmcv.ops
    assert len(mmcv.ops.__all__) > 80


def test_extension_is_found_as_mmengine_and_mmcv_look_for_it():
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils import mmcv_full_available
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # pkgutil.find_loader, from Python 3.12 on
        assert pkgutil.find_loader('mmcv._ext') is not None
        assert check_ops_exist() and mmcv_full_available()
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec.name == 'mmcv._ext' and spec.loader is not None and 'torchvision' in spec.origin


def test_environment_report_of_mmcv_names_no_compiler():
    from mmcv.utils import collect_env
    assert 'torchvision' in collect_env()['MMCV Compiler']


def test_other_operators_refuse_by_name():
    from mmcv.ops import carafe_naive
    feature = torch.zeros(1, 4, 2, 2)
    with pytest.raises(OperatorNotServedError, match="'carafe_naive_forward'.*needs compiled mmcv"):
        carafe_naive(feature, torch.zeros(1, 9, 4, 4), 3, 1, 2)


def test_python_may_ask_the_extension_for_its_own_attributes():
    from mmcv import _ext
    assert not hasattr(_ext, '__wrapped__') and not hasattr(_ext, '_repr_html_')


def test_served_operators_are_those_that_do_not_refuse():
    from mmcv import _ext
    assert {'nms', 'softnms', 'nms_match', 'roi_align_forward', 'roi_pool_backward', 'ms_deform_attn_forward',
            'carafe_backward', 'deform_roi_pool_forward', 'masked_im2col_forward', 'masked_col2im_forward',
            'sync_bn_backward_data'} <= set(served_operators())
    assert set(served_operators()) == {name for name in vars(_ext) if not name.startswith('_')}


def test_installing_twice_adds_one_finder():
    kd_det.compat.install()
    kd_det.compat.install()
    assert sum(isinstance(finder, operators.OperatorFinder) for finder in sys.meta_path) == 1


def test_backend_is_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda line, **options: lines.append(line))
    operators.log_operator_backend.cache_clear()
    operators.log_operator_backend()
    operators.log_operator_backend()
    assert len(lines) == 1 and 'torchvision' in lines[0]


def test_compiled_mmcv_is_left_alone(tmp_path):
    # The installed mmcv with an extension beside it, whose operators say who they are.
    package = tmp_path / 'mmcv'
    package.mkdir()
    for entry in Path(mmcv.__file__).parent.iterdir():
        (package / entry.name).symlink_to(entry)
    (package / '_ext.py').write_text('def __getattr__(name):\n'
                                     '    if name.startswith("_"): raise AttributeError(name)\n'
                                     '    return lambda *args, **kwargs: f"compiled {name}"\n')
    output = run_python(
        'import sys, kd_det.compat\n'
        'kd_det.compat.install()\n'
        'from mmcv import _ext\n'
        'from mmcv.ops import get_compiler_version\n'
        'from kd_det.compat.operators import OperatorFinder\n'
        'print(kd_det.compat.operator_backend(), _ext.__file__, get_compiler_version(), sep="\\n")\n'
        'print(any(isinstance(finder, OperatorFinder) for finder in sys.meta_path))\n',
        tmp_path)
    assert output.splitlines()[-4:] == [
        'compiled mmcv', str(package / '_ext.py'), 'compiled get_compiler_version', 'False']


def test_without_mmcv_nothing_is_installed():
    output = run_python(
        'import sys\n'
        'for name in ("mmcv", "mmdet", "mmengine"): sys.modules[name] = None\n'
        'import kd_det.compat\n'
        'from kd_det.compat.operators import OperatorFinder\n'
        'kd_det.compat.install()\n'
        'print(any(isinstance(finder, OperatorFinder) for finder in sys.meta_path), '
        'kd_det.compat.operator_backend())\n')
    assert output.split() == ['False', 'None']
