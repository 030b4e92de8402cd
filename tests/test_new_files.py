"""A term or a mask is found by where it lies: a new file of its package is all that it takes."""
import importlib
import sys

import pytest
from mmdet.registry import MODELS

from kd_det.registry import import_registered

MASK = '''
from mmdet.registry import MODELS
from kd_det.masks import CellMask
from kd_det.masks.boxes import BoxForeground

@MODELS.register_module()
class EverywhereForTest(CellMask):
    def cells(self, level):
        return level.valid.float()

class NotRegisteredForTest(CellMask):
    pass
'''
TERM = '''
from mmdet.registry import MODELS
from kd_det.losses import FeatureTerm

@MODELS.register_module()
class NothingForTest(FeatureTerm):
    def compare(self, level, position):
        return dict(nothing=0 * level.student.sum())
'''


@pytest.mark.parametrize('package, name, text', [('kd_det.masks', 'EverywhereForTest', MASK),
                                                 ('kd_det.losses', 'NothingForTest', TERM)])
def test_a_new_file_is_imported_and_its_class_registered(package, name, text, tmp_path, monkeypatch):
    (tmp_path / 'new_file_for_test.py').write_text(text)
    module = importlib.import_module(package)
    monkeypatch.setattr(module, '__path__', [*module.__path__, str(tmp_path)])
    assert name not in MODELS.module_dict
    try:
        found = import_registered(package)
        assert set(found) - set(module.__all__) == {name}  # of those that are no bases
        assert found[name] is MODELS.get(name) and found[name].__module__ == f'{package}.new_file_for_test'
    finally:
        MODELS.module_dict.pop(name, None)
        sys.modules.pop(f'{package}.new_file_for_test', None)


@pytest.mark.parametrize('package', ['kd_det.losses', 'kd_det.masks'])
def test_registered_classes_are_names_of_their_package(package):
    module = importlib.import_module(package)
    own = {name: value for name, value in MODELS.module_dict.items() if value.__module__.startswith(f'{package}.')}
    assert own and set(own) <= set(module.__all__)
    assert {name: getattr(module, name) for name in own} == own
