import json
import re

import cv2
import pytest
import torch

from kd_det.cli.main import main
from kd_det.config.files import load_config

TINY = ['--images', '8', '--val-images', '4', '--size', '64', '--epochs', '2', '--teacher-epochs', '1']


@pytest.fixture(scope='module')
def unchecked_config(tmp_path_factory):
    """The demo's distillation without its pre-flight: after one step a teacher detects nothing."""
    path = tmp_path_factory.mktemp('config') / 'distilled.py'
    path.write_text("_base_ = 'kd_det::demo/fgd_faster_rcnn_r101_r18.py'\n"
                    'default_hooks = dict(distill=dict(preflight=None))\n')
    return path


@pytest.fixture(scope='module')
def demo(tmp_path_factory, unchecked_config):
    """The folder of a finished demo of two seeds."""
    folder = tmp_path_factory.mktemp('demo')
    assert main(['demo', '--out', str(folder), '--seeds', '2', '--config', str(unchecked_config), *TINY]) == 0
    return folder


def test_results_hold_every_run_and_the_gain(demo):
    results = json.loads((demo / 'results.json').read_text())
    runs = results['runs']
    assert {kind: len(group) for kind, group in runs.items()} == dict(teacher=1, plain=2, distilled=2)
    for plain, distilled, gain in zip(runs['plain'], runs['distilled'], results['gain']['bbox_mAP']['by_seed']):
        assert gain == pytest.approx(100 * (distilled['metrics']['bbox_mAP'] - plain['metrics']['bbox_mAP']), abs=0.01)
        assert plain['parameters'] == distilled['parameters'] < runs['teacher'][0]['parameters']
        assert plain['iterations'] == distilled['iterations'] == 2
        assert plain['seconds_per_iteration'] > 0
    assert results['versions']['torch'] and results['data']['size'] == 64


def test_students_of_a_seed_see_the_images_in_one_order_and_seeds_differ(demo):
    runs = json.loads((demo / 'results.json').read_text())['runs']
    (plain_0, plain_1), (distilled_0, distilled_1) = runs['plain'], runs['distilled']
    assert plain_0['order'] == distilled_0['order'] != plain_1['order'] == distilled_1['order']
    assert len({run['start'] for run in (plain_0, plain_1, distilled_0, distilled_1)}) == 4  # the distilled inherit


def test_distillation_changes_the_student_and_saves_a_plain_one(demo):
    plain, distilled = (torch.load(demo / 'runs' / f'{kind}_0' / 'epoch_2.pth', map_location='cpu')['state_dict']
                        for kind in ('plain', 'distilled'))
    assert plain.keys() == distilled.keys()
    assert any((plain[key] != distilled[key]).any() for key in plain)


def test_pictures_are_drawn(demo):
    for name in ('curves.png', 'detections.png', 'attention.png'):
        picture = cv2.imread(str(demo / name))
        assert picture.shape[0] > 300 and picture.shape[1] > 900 and picture.std() > 10, name


def test_a_second_call_trains_nothing_and_gives_the_same(demo, unchecked_config, capsys):
    before = (demo / 'results.json').read_text()
    checkpoints = {file: file.stat().st_mtime_ns for file in demo.glob('runs/*/*.pth')}
    assert main(['demo', '--out', str(demo), '--seeds', '2', '--config', str(unchecked_config), *TINY]) == 0
    assert {file: file.stat().st_mtime_ns for file in demo.glob('runs/*/*.pth')} == checkpoints
    shown = ' '.join(capsys.readouterr().out.split())  # a long path breaks lines
    assert shown.count('kept from before') == 6  # the data and five trainings
    for text in ('model', 'mAP', 'AP50', 'parameters', 'teacher', 'plain student', 'distilled student',
                 'distilled - plain'):
        assert text in shown
    assert json.loads((demo / 'results.json').read_text())['runs'] == json.loads(before)['runs']


def test_a_damaged_run_is_trained_again_and_gives_the_same_weights(demo, unchecked_config, capsys):
    checkpoint = demo / 'runs' / 'plain_1' / 'epoch_2.pth'
    before = torch.load(checkpoint, map_location='cpu')['state_dict']
    checkpoint.unlink()
    assert main(['demo', '--out', str(demo), '--seeds', '2', '--config', str(unchecked_config), *TINY]) == 0
    shown = ' '.join(capsys.readouterr().out.split())  # a long path breaks lines
    assert shown.count('kept from before') == 5
    assert re.search(r'plain student, seed 1: epoch 2/2, loss \d', shown)
    after = torch.load(checkpoint, map_location='cpu')['state_dict']
    assert all((before[key] == after[key]).all() for key in before)


def test_bad_options_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['demo', '--seeds', '0'])
    assert "integer of at least 1, got '0'" in capsys.readouterr().err


def test_configs_differ_in_the_distillation_alone():
    plain = load_config('kd_det::demo/baseline_faster_rcnn_r18.py')
    distilled = load_config('kd_det::demo/fgd_faster_rcnn_r101_r18.py')
    assert distilled.model.student == plain.model
    for key in plain:
        if key not in ('model', 'default_hooks', 'custom_imports'):
            assert distilled[key] == plain[key], key
