"""What a run notes of code, libraries and machine, what it evaluates with, and how it is found again."""
import json
import subprocess

import pytest
from mmdet.evaluation.metrics import coco_metric

from kd_det.study.runs import (
    CHECKOUT,
    Run,
    describe_environment,
    find_commit,
    load_finished_run,
    use_fast_coco_evaluation,
)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit, and git in it."""

    def git(*arguments: str) -> str:
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.org']
        return subprocess.run(['git', '-C', str(tmp_path), *identity, *arguments], check=True, stdout=subprocess.PIPE,
                              text=True).stdout.strip()

    try:
        git('init', '--quiet')
    except OSError:
        pytest.skip('there is no git')
    (tmp_path / 'code.py').write_text('a')
    git('add', 'code.py')
    git('commit', '--quiet', '--message', 'first')
    return tmp_path, git


def test_the_commit_is_that_of_the_checkout(checkout):
    folder, git = checkout
    assert find_commit(folder) == git('rev-parse', 'HEAD') and len(find_commit(folder)) == 40


@pytest.mark.parametrize('name', ['code.py', 'new.py'])
def test_what_no_commit_holds_is_marked(checkout, name):
    folder, git = checkout
    (folder / name).write_text('b')
    assert find_commit(folder) == git('rev-parse', 'HEAD') + '-dirty'


def test_a_folder_of_another_checkout_has_no_commit(checkout):
    folder, _ = checkout
    (folder / 'site-packages').mkdir()
    assert find_commit(folder / 'site-packages') is None


def test_a_checkout_without_a_commit_has_none(tmp_path):
    (tmp_path / '.git').mkdir()
    assert find_commit(tmp_path) is None


def test_without_git_there_is_none(checkout, monkeypatch):
    folder, _ = checkout
    monkeypatch.setenv('PATH', '')
    assert find_commit(folder) is None


def test_environment_tells_code_libraries_and_machine():
    found = describe_environment(threads=3)
    assert found['commit'] == find_commit(CHECKOUT) and (CHECKOUT / 'kd_det').is_dir()
    assert found['versions']['torch'] and found['machine']['threads'] == 3


def test_coco_metric_evaluates_with_the_faster_library_where_it_is_installed(tmp_path, monkeypatch):
    """A stand-in for the library: what counts is that MMDetection's metric takes its class."""
    monkeypatch.setattr(coco_metric, 'COCOeval', coco_metric.COCOeval)  # put back at the end
    (tmp_path / 'faster_coco_eval.py').write_text('class COCOeval_faster: pass\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert use_fast_coco_evaluation() and coco_metric.COCOeval.__name__ == 'COCOeval_faster'


def test_without_it_nothing_changes(monkeypatch):
    before = coco_metric.COCOeval
    monkeypatch.setattr('kd_det.study.runs.find_spec', lambda name: None)
    assert not use_fast_coco_evaluation() and coco_metric.COCOeval is before


STORED = dict(identity='i', start='', order='', checkpoint='epoch_1.pth', scalars='scalars.json', parameters=10,
              metrics=dict(bbox_mAP=0.3), flops=None, seconds_per_iteration=0.1, peak_memory=None,
              peak_device_memory=None, epochs=1, iterations=2, environment={}, class_ap={})
WHOLE = json.dumps(STORED, indent=2).encode()


@pytest.fixture
def finished(tmp_path):
    for name in ('epoch_1.pth', 'scalars.json'):
        (tmp_path / name).touch()

    def load(content: bytes):
        (tmp_path / 'result.json').write_bytes(content)
        said = []
        return load_finished_run(tmp_path, 'i', said.append), said

    return load


def test_a_finished_run_is_found_again(finished, tmp_path):
    run, said = finished(WHOLE)
    assert run == Run(**STORED).resolve_paths(tmp_path) and not said
    assert finished(json.dumps({**STORED, 'identity': 'j'}).encode()) == (
        None, ['The run that is there had other data, weights or settings.'])
    (tmp_path / 'epoch_1.pth').unlink()
    assert finished(WHOLE) == (None, [f"'{tmp_path / 'epoch_1.pth'}' is gone."])


@pytest.mark.parametrize('content, place', [
    (b'', 'cut off in line 1: no JSON'),
    (WHOLE[:60], 'cut off in line 5: no JSON'),
    (WHOLE.replace(b'"start"', b'"start'), 'line 3: no JSON'),
    (b'\xff\xfe\x00', 'expected JSON, got no text'),
    (b'[1, 2]', "expected an object of JSON, got [1, 2]"),
    (b'null', 'expected an object of JSON, got None'),
    (b'[' * 100000, 'can not be read'),
    (json.dumps({**STORED, 'parameters': 'many'}).encode(), "parameters: input should be a valid integer, got 'many'"),
    (json.dumps({**STORED, 'parameters': 10**400}).encode(), 'parameters: input should be a valid integer'),
    (json.dumps({**STORED, 'metrics': dict(bbox_mAP='')}).encode(), 'metrics.bbox_mAP: input should be a valid number'),
    (json.dumps({**STORED, 'metrics': {}}).encode(), 'metrics.bbox_mAP: input should be a valid number, got None'),
    (json.dumps({**STORED, 'checkpoint': 3}).encode(), 'checkpoint: input should be a valid string, got 3'),
], ids=range(12))
def test_a_result_that_can_not_be_read_is_named(content, place, finished):
    run, said = finished(content)
    assert run is None and len(said) == 1
    assert "result.json': " in said[0].replace("' can", "': can") and place in said[0]
