"""``kd_det::…`` and ``mmdet::…`` lead to configs, however the packages are installed."""
import os
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
from mmdet.registry import HOOKS, MODELS
from mmengine.config import Config
from mmengine.hub import get_config

METHOD = 'kd_det::_base_/methods/fgd_two_stage.py'


def test_a_config_builds_on_shipped_bases(tmp_path):
    file = tmp_path / 'mine.py'
    file.write_text(f"_base_ = ['kd_det::_base_/pairs/faster_rcnn_r101_r18.py', '{METHOD}']\n"
                    'model = dict(distill=_base_.fgd)\n')
    config = Config.fromfile(file)
    assert config.model.type == 'mmdet.DetectionDistiller'
    assert config.model.distill.fgd.alpha == 5e-5
    assert config.model.student.backbone.depth == 18


def test_hub_finds_a_shipped_config():
    assert get_config(METHOD).fgd.fgd.type == 'mmdet.FGD'


def test_scope_of_shipped_configs_is_mmdets():
    """MMEngine marks what comes from ``kd_det::`` with that scope, and builds it under it."""
    assert type(MODELS.build(dict(type='L1Loss', _scope_='kd_det'))).__module__.startswith('mmdet.')
    assert type(MODELS.build(dict(type='FGD', _scope_='kd_det'))).__name__ == 'FGD'
    assert type(HOOKS.build(dict(type='DistillHook', _scope_='kd_det'))).__name__ == 'DistillHook'
    assert type(HOOKS.build(dict(type='CheckpointHook', _scope_='kd_det'))).__module__.startswith('mmengine.')


@pytest.mark.parametrize('distribution', [None, 'onedl-mmdetection'])
def test_mmdet_is_found_by_its_module(tmp_path, distribution):
    """No distribution of the name mmdet: it comes from a source tree, or from the maintained fork."""
    site = Path(mmdet.__file__).parents[1]
    for entry in site.iterdir():
        if not entry.name.startswith('mmdet-'):
            (tmp_path / entry.name).symlink_to(entry)
    if distribution:
        metadata = tmp_path / f"{distribution.replace('-', '_')}-3.4.0.dist-info"
        metadata.mkdir()
        (metadata / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {distribution}\nVersion: 3.4.0\n')
        (metadata / 'top_level.txt').write_text('mmdet\n')
    program = (
        'import kd_det; from kd_det.config.files import load_config; from kd_det.checks import environment as e;'
        "print(load_config('kd_det::fgd_r101_r18.py').model.student.type, e.installed(e.DISTRIBUTIONS['mmdet']))")
    root = Path(__file__).parents[2]
    # -S leaves out the real site-packages.
    result = subprocess.run([sys.executable, '-S', '-c', program], capture_output=True, text=True, cwd=root,
                            env={**os.environ, 'PYTHONPATH': os.pathsep.join([str(root), str(tmp_path)])})
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ['FasterRCNN', *(['onedl-mmdetection', '3.4.0'] if distribution else ['None'])]
