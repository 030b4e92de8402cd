"""kd_det's types are found at the first look-up, whatever was imported before it, and checkpoints load safely."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

import kd_det

ROOT = Path(__file__).parents[2]
REGISTERED = re.compile(r'^@(\w+)\.register_module\(\)\nclass (\w+)', re.MULTILINE)
ORDERS = {
    'before MMDetection': 'import kd_det',
    'after its registries were filled': "from mmdet.registry import MODELS; MODELS.get('RetinaNet'); import kd_det",
    'after its tools': 'from mmdet.apis import init_detector; import kd_det',
    'by one of its modules': 'import kd_det.heads.dense',
}
PROGRAM = '''
import json, sys
import mmdet.registry
from mmengine.registry import HOOKS, DefaultScope
found = {f'{registry}.{name}': str(getattr(mmdet.registry, registry).get(scope + name))
         for scope in ('', 'mmdet.', 'kd_det.') for registry, name in json.loads(sys.argv[1])}
assert HOOKS.get('mmdet.DistillHook')  # from the root
import kd_det.registry
assert kd_det.registry.NODES['MODELS'].get('FGD')
from mmdet.apis import inference
assert inference.init_detector.__wrapped__
from mmdet.models import SSDHead
assert SSDHead.loss_cls is None
from mmengine.hub import get_config
assert get_config('kd_det::_base_/methods/fgd_two_stage.py').fgd.fgd.type == 'mmdet.FGD'
import mmengine.runner, torch
assert torch.load(sys.argv[2], weights_only=True)['history'].current() == 1
print(json.dumps([found, kd_det.MMDETECTION_ERROR, sum(hasattr(each, 'is_of_kd_det') for each in sys.meta_path)]))
'''


def run(program: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, '-c', program, *arguments], capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'})
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> str:
    """A file that holds a history, as mmengine's checkpoints do."""
    file = tmp_path_factory.mktemp('checkpoint') / 'history.pth'
    torch.save(dict(history=HistoryBuffer([1.0], [1])), file)
    return str(file)


@pytest.mark.parametrize('order', ORDERS)
def test_every_type_is_found_in_whatever_order_is_imported(order, checkpoint):
    types = [match for file in sorted((ROOT / 'kd_det').rglob('*.py'))
             for match in REGISTERED.findall(file.read_text(encoding='utf-8'))]
    assert len(types) > 40
    found, error, finders = json.loads(run(ORDERS[order] + PROGRAM, json.dumps(types), checkpoint).splitlines()[-1])
    assert error is None and finders == 1
    assert all(each.startswith("<class 'kd_det.") for each in found.values()), found


def test_a_checkpoint_loads_where_mmengine_was_not_imported(checkpoint):
    program = ("import sys; from kd_det.compat import load_checkpoint;"
               "print(load_checkpoint(sys.argv[1])['history'].current())")
    assert run(program, checkpoint) == '1.0\n'


def test_what_can_not_be_imported_is_told_when_asked_for(tmp_path):
    """MMDetection itself goes on to work as far as it can; so does what needs PyTorch alone."""
    (tmp_path / 'scipy').mkdir()
    (tmp_path / 'scipy' / '__init__.py').write_text("raise ImportError('no system library')")
    program = ("import sys, warnings; sys.path.insert(0, sys.argv[1]); import kd_det; import kd_det.functional\n"
               "with warnings.catch_warnings(record=True) as caught:\n"
               "    warnings.simplefilter('always'); error = kd_det.MMDETECTION_ERROR\n"
               "print(error, sum('kd_det registered nothing' in str(each.message) for each in caught))")
    assert run(program, str(tmp_path)) == 'no system library 1\n'


def test_rooms_and_public_names_come_when_asked_for():
    program = ("import sys, kd_det; print('kd_det.losses' in sys.modules, kd_det.losses.FGD.__name__, "
               "kd_det.MMDETECTION_ERROR, 'MMDETECTION_ERROR' in dir(kd_det))")
    assert run(program) == 'False FGD None True\n'
    assert set(kd_det.__all__) <= set(dir(kd_det)) and all(hasattr(kd_det, name) for name in kd_det.__all__)
    with pytest.raises(AttributeError, match="module 'kd_det' has no attribute 'nothing'"):
        kd_det.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from kd_det import nothing  # noqa: F401
    assert set(kd_det.compat.__all__) <= set(dir(kd_det.compat))
    with pytest.raises(AttributeError, match="module 'kd_det.compat' has no attribute 'nothing'"):
        kd_det.compat.nothing


@pytest.mark.parametrize('code, file, own', [
    ('1 / 0', 'masks/mine.py', True), ('1 / 0', '/elsewhere/mmdet/models.py', False),
    ('import a_package_that_is_not_there', 'masks/mine.py', False),
    ('from kd_det.masks import nothing_like_it', 'losses/mine.py', True)])
def test_mistakes_in_files_of_kd_det_are_told_from_those_of_mmdetection(code, file, own):
    from kd_det.compat.registration import PACKAGE, _is_of_kd_det
    with pytest.raises((ArithmeticError, ImportError)) as raised:
        exec(compile(code, str(PACKAGE / file), 'exec'))
    assert _is_of_kd_det(raised.value) == own
