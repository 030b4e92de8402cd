"""What a benchmark measures of fidelity, and when it measures again."""
import json

import pytest
import torch
from mmengine.config import Config

from kd_det.study import fidelity
from kd_det.study.fidelity import FIDELITY_FILE, FidelityMetric, add_fidelity


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Adds the fidelity to one plain student, and tells what was measured for it."""
    asked = []

    def count(config, checkpoint, teacher, split):
        asked.append(split)
        return dict(found=float(len(asked)))

    monkeypatch.setattr(fidelity, 'measure_fidelity', count)
    monkeypatch.setattr(fidelity, 'load_config', lambda file: None)
    Config(dict(model=dict(type='RetinaNet'))).dump(tmp_path / 'teacher.py')

    def add(teacher, splits=('val', ), identity='a'):
        asked.clear()
        (tmp_path / 'none').mkdir(exist_ok=True)
        entry = dict(variant='none', seed=0, status='finished', folder='none', identity=identity, checkpoint='a.pth')
        guide = dict(config=str(tmp_path / 'teacher.py'), checkpoint=str(teacher))
        add_fidelity([entry], tmp_path, guide, splits, lambda text: None)
        assert set(entry['fidelity']) == set(splits)
        return list(asked)

    return add


def test_what_was_measured_is_kept_while_run_and_teacher_are_the_same(measured, tmp_path):
    first, second = tmp_path / 'first.pth', tmp_path / 'second.pth'
    torch.save(dict(state_dict={}), first)
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), second)
    assert measured(first) == ['val']
    assert measured(first, ['val', 'train']) == ['train']
    assert measured(first) == []
    assert measured(second, ['val', 'train']) == ['val', 'train']
    assert measured(second, identity='b') == ['val']
    Config(dict(model=dict(type='RetinaNet', test_cfg=dict(score_thr=0.9)))).dump(tmp_path / 'teacher.py')
    assert measured(second, identity='b') == ['val']  # the same weights in another model are another teacher
    first.write_bytes(second.read_bytes())  # where it lies does not count, what is in it does
    assert measured(first, identity='b') == []


def test_what_was_measured_in_other_settings_is_measured_again(measured, tmp_path, monkeypatch):
    assert measured('https://host/teacher.pth') == ['val']
    kept = json.loads((tmp_path / 'none' / FIDELITY_FILE).read_text())
    assert kept['settings'].items() >= dict(confidence=0.3, min_iou=0.5, calibrated_from=0.05, bins=15).items()
    monkeypatch.setattr(FidelityMetric, 'settings', dict(confidence=0.5))
    assert measured('https://host/teacher.pth') == ['val']


@pytest.mark.parametrize('content', [b'', b'{"splits": {', b'\xff', b'[]', b'{}', 'SPLITS', 'NUMBERS'])
def test_what_can_not_be_read_is_measured_again(content, measured, tmp_path):
    file = tmp_path / 'none' / FIDELITY_FILE
    assert measured('https://host/teacher.pth') == ['val']
    stored = json.loads(file.read_text())
    texts = dict(SPLITS=dict(stored, splits=['val']), NUMBERS=dict(stored, splits=dict(val=dict(found='much'))))
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(texts[content]).encode())
    assert measured('https://host/teacher.pth') == ['val']
    assert measured('https://host/teacher.pth') == []
