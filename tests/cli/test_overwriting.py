"""Nothing of the user's is overwritten: each command that writes refuses a file that it did not write."""
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

import kd_det
from kd_det.cli.demo import DISTILLED_CONFIG
from kd_det.cli.main import main
from kd_det.compat.writing import WritingError, locked_folder
from kd_det.config import ConfigurationError
from kd_det.datasets import generate_shapes
from kd_det.study import demo
from kd_det.study.demo import DemoSettings, run_demo
from kd_det.study.identity import identify_run
from kd_det.study.pair import Pair
from kd_det.study.report import page
from kd_det.study.runs import RESULT_FILE
from kd_det.study.scheduling import Failure, Job, JobPool
from kd_det.study.series import Series
from kd_det.study.variants import parse_variants
from kd_det.teachers.cache import TensorStore
from kd_det.training import runs
from kd_det.training.pictures import save_figure

MINE = 'the work of a week'


@pytest.fixture
def student(run_config, retinanet, tmp_path, monkeypatch):
    """A config file and a checkpoint of its detector, in the folder where the commands are called."""
    monkeypatch.chdir(tmp_path)
    config = run_config(retinanet(), val=True).to_dict()
    for name in ('work_dir', 'experiment_name', 'visualizer'):
        del config[name]
    Path('student.py').write_text(f'# {MINE}\n{Config(config).pretty_text}')
    torch.save(dict(state_dict=MODELS.build(retinanet()).state_dict(), meta={}), 'epoch_1.pth')
    return tmp_path


def refused(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1 and line.startswith('kd-det: error: ')
    return line


# ---------------------------------------------------------------- export


@pytest.mark.parametrize('out, there', [
    ('epoch_1.pth', 'epoch_1.pth'),  # the checkpoint itself
    ('student.pth', 'student.py'),  # whose config would be that of the run
    ('other.pth', 'other.pth'),
    ('other.pth', 'other.py'),
])
def test_an_export_replaces_nothing_but_an_export(out, there, student, capsys):
    if there.startswith('other'):
        Path(there).write_text(MINE)
    before = Path(there).read_bytes()
    command = ['export', 'student.py', 'epoch_1.pth', out]
    assert f"'{there}' exists, and is not " in refused(command, capsys)
    assert Path(there).read_bytes() == before
    assert sorted(file.name for file in Path().glob('*.p*')) == sorted({'epoch_1.pth', 'student.py', there})
    assert main([*command, '--force']) == 0
    assert main(['export', 'student.py', out, 'plain.pth']) == main(['export', 'plain.py', out, 'plain.pth']) == 0
    assert Config.fromfile('plain.py').model.type == 'RetinaNet'


@pytest.mark.parametrize('out', ['model.py', 'folder', 'model.torchscript', 'model.engine', 'model.ONNX', 'model', '.'])
def test_an_export_needs_a_name_that_tells_what_it_is(out, student, capsys):
    Path('folder').mkdir()
    for command, said in (('export', '.pth (a checkpoint, the config comes beside it), .onnx or .xml'),
                          ('prune', 'a checkpoint, which ends in .pth')):
        line = refused([command, 'student.py', 'epoch_1.pth', out], capsys)
        assert f"'{out}': expected " in line and said in line
    assert sorted(file.name for file in Path().iterdir()) == ['epoch_1.pth', 'folder', 'student.py']


def test_an_export_may_be_named_pt(student):
    assert main(['export', 'student.py', 'epoch_1.pth', 'plain.pt']) == 0
    assert Path('plain.py').is_file() and Path('plain.pt').is_file()


# ---------------------------------------------------------------- training


@pytest.mark.parametrize('command', ['train', 'test'])
def test_a_run_does_not_save_its_config_over_one_written_by_hand(command, student, capsys):
    hand = Path('student.py' if command == 'train' else 'student_test.py')
    hand.write_text(Path('student.py').read_text())
    before = hand.read_text()
    checkpoint = ['epoch_1.pth'] if command == 'test' else []
    config = Config.fromfile('student.py')
    options = ['--cfg-options', 'default_hooks.distill=None']
    if command == 'test':
        config.update(test_dataloader=config.val_dataloader, test_evaluator=config.val_evaluator,
                      test_cfg=dict(type='TestLoop'))
        config.dump('student.py')
        options = []
    line = refused([command, 'student.py', *checkpoint, '--work-dir', '.', *options], capsys)
    assert f"'{hand}' exists, and is not a config of a run that kd_det wrote. Give another --work-dir" in line
    assert hand.read_text() == before


@pytest.fixture
def no_optimizer(monkeypatch):
    """Makes the last thing that is built fail."""

    def fail(runner):
        raise ValueError('no optimizer')

    monkeypatch.setattr(runs, 'build_optimizer', fail)


def test_an_error_while_building_leaves_the_config_of_before(student, no_optimizer):
    work_dir = Path('run')
    work_dir.mkdir()
    good = Config.fromfile('student.py').pretty_text
    (work_dir / 'student.py').write_text(good)
    (work_dir / 'other.txt').write_text(MINE)
    with pytest.raises(ConfigurationError, match='no optimizer'):
        kd_det.train('student.py', work_dir=work_dir, epochs=7)
    assert (work_dir / 'student.py').read_text() == good
    assert (work_dir / 'other.txt').read_text() == MINE and sorted(work_dir.glob('*.py')) == [work_dir / 'student.py']


@pytest.mark.parametrize('before', [True, False])
def test_a_distillation_that_can_not_be_built_saves_no_config(before, student, retinanet, no_optimizer):
    Config(dict(default_scope='mmdet', model=retinanet(neck=12))).dump('teacher.py')
    plain = Config.fromfile('student.py')
    plain.default_hooks.pop('distill')
    saved = Path('run/student_pkd.py')
    if before:
        saved.parent.mkdir()
        saved.write_text(plain.pretty_text)
    with pytest.raises(ConfigurationError, match='no optimizer'):
        kd_det.distill('student.py', 'teacher.py', 'epoch_1.pth', 'pkd', work_dir='run', on_config=pytest.fail)
    assert (saved.read_text() if saved.is_file() else None) == (plain.pretty_text if before else None)


def test_two_runs_in_one_work_dir(student, monkeypatch):
    from kd_det.compat import writing
    monkeypatch.setattr(writing.fcntl, 'lockf', lambda *_: (_ for _ in ()).throw(BlockingIOError(11, 'busy')))
    with pytest.raises(WritingError, match="'run' is in use by another run"):
        kd_det.train('student.py', work_dir='run', options={'default_hooks.distill': None})
    assert [file.name for file in Path('run').iterdir()] == ['.kd_det.lock']


# ---------------------------------------------------------------- benchmarks


def make_job(folder: Path, **settings) -> Job:
    return Job('fgd, seed 0', folder, Config(dict(settings)), ['data'])


@pytest.mark.parametrize('content, is_refused', [
    (lambda own: json.dumps(dict(identity=own)), False),
    (lambda own: json.dumps(dict(identity='other'), indent=2), True),
    (lambda own: MINE, True),
    (lambda own: '[]', True),
    (lambda own: json.dumps(dict(identity='other'), indent=2)[:-4], False),  # was never finished
    (lambda own: '', False),
])
def test_a_benchmark_trains_over_no_run_of_another(content, is_refused, tmp_path, monkeypatch):
    job = make_job(tmp_path / 'seed0', x=1)
    job.folder.mkdir()
    (job.folder / RESULT_FILE).write_text(content(identify_run(job.config, job.inputs)))
    monkeypatch.setattr(JobPool, '_find', lambda pool, job, log: Failure('trained', ''))
    if is_refused:
        with pytest.raises(WritingError, match='It was trained with other data, weights or settings.*--force'):
            JobPool(threads=1).run([job], print)
    else:
        assert JobPool(threads=1).run([job], print)[0].error == 'trained'
    assert JobPool(threads=1, force=True).run([job], print)[0].error == 'trained'


OWN_RESULTS = dict(command='kd-det benchmark', runs=[], summary={}, data=dict(hash='data'), pair=dict(student='a/s.py'))


@pytest.mark.parametrize('name, content, is_refused', [
    ('results.json', json.dumps(OWN_RESULTS), False),
    ('results.json', json.dumps(OWN_RESULTS, indent=2)[:-30], False),
    ('results.json', json.dumps(dict(version=2, **OWN_RESULTS), indent=2)[:-30], False),
    ('results.json', json.dumps(dict(OWN_RESULTS, data=dict(hash='others'))), True),
    ('results.json', json.dumps(dict(OWN_RESULTS, pair=dict(student='b.py'))), True),
    ('results.json', json.dumps(dict(gain=1)), True),
    ('results.json', '3', True),
    ('results.md', '| method | seeds |\n', False),
    ('results.md', MINE, True),
])
def test_a_benchmark_replaces_the_results_of_its_own_pair_alone(name, content, is_refused, tmp_path):
    (tmp_path / name).write_text(content)
    series = Series(tmp_path, Pair(Config(dict(), ' ', 's.py'), 'teacher.py'), parse_variants('fgd'))
    series.data = 'data'
    if is_refused:
        with pytest.raises(WritingError, match=name):
            series.refuse_to_replace(False)
    else:
        series.refuse_to_replace(False)
    series.refuse_to_replace(True)


# ---------------------------------------------------------------- other outputs


def test_a_report_replaces_a_report_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, 'read_studies', lambda folders: [])
    file = tmp_path / 'page.html'
    file.write_text(MINE)
    assert 'is not a report that' in refused(['report', str(tmp_path), '--out', str(file)], capsys)
    assert file.read_text() == MINE
    assert main(['report', str(tmp_path), '--out', str(file), '--force']) == 0
    assert main(['report', str(tmp_path), '--out', str(file)]) == 0 and file.read_text().startswith('<!DOCTYPE html>')


@pytest.mark.parametrize('arguments, what', [
    (['benchmark-step', 'kd_det::fgd_r101_r18.py', '--out', 'notes.pkl'], 'the costs of a step'),
    (['test', 'student.py', 'epoch_1.pth', '--out', 'notes.pkl'], 'predictions'),
])
def test_an_output_file_of_another_kind_is_refused_before_anything_is_done(arguments, what, student, capsys):
    Path('notes.pkl').write_text(MINE)
    assert f"'notes.pkl' exists, and is not {what} that kd_det wrote. Give another name, or replace it with --force." \
        in refused(arguments, capsys)
    assert Path('notes.pkl').read_text() == MINE


def test_a_picture_replaces_a_picture_of_matplotlibs(tmp_path):
    figure, file = plt.figure(figsize=(1, 1)), tmp_path / '0_fgd.png'
    save_figure(figure, file, force=False)
    save_figure(figure, file, force=False)
    file.write_text(MINE)
    with pytest.raises(WritingError, match='is not a picture'):
        save_figure(figure, file, force=False)
    save_figure(figure, file, force=True)


@pytest.mark.parametrize('name', ['results.json', 'curves.png'])
def test_a_demo_replaces_a_demos_files_alone(name, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, '_train_and_compare', lambda settings, console: None)
    (tmp_path / name).write_text(json.dumps(dict(OWN_RESULTS)))
    with pytest.raises(WritingError, match="is not one of a demo's files"):
        run_demo(DemoSettings(tmp_path, DISTILLED_CONFIG))
    run_demo(DemoSettings(tmp_path, DISTILLED_CONFIG, force=True))
    (tmp_path / name).write_text('{"gain": "Matplotlib"}')
    run_demo(DemoSettings(tmp_path, DISTILLED_CONFIG))
    with locked_folder(tmp_path / 'other'):
        assert (tmp_path / 'log.txt').is_file()


def test_generated_data_replaces_generated_data_alone(tmp_path):
    assert generate_shapes(tmp_path, 1, 1, 32)
    assert generate_shapes(tmp_path, 2, 1, 32)  # other settings: its own
    file = tmp_path / 'annotations' / 'train.json'
    file.write_text(json.dumps(dict(images=[], annotations=[])))
    with pytest.raises(WritingError, match='is not the annotations of shapes'):
        generate_shapes(tmp_path, 1, 1, 32)
    assert json.loads(file.read_text()) == dict(images=[], annotations=[])


@pytest.mark.parametrize('name, content', [('size', MINE), ('lock', MINE)])
def test_a_cache_takes_no_folder_with_such_files(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(WritingError, match='Give another folder as model.teacher.cache.dir'):
        TensorStore(str(tmp_path), 10**6)
    assert (tmp_path / name).read_text() == content


def test_a_cache_removes_what_it_left_and_nothing_else(tmp_path):
    files = [tmp_path / name for name in ('ab/ab12.34.tmp', 'ab/mine.tmp', 'notes/ab12.34.tmp')]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(MINE)
        os.utime(file, (0, 0))
    TensorStore(str(tmp_path), 10**6)
    assert [file.exists() for file in files] == [False, True, True]
