"""``kd-det benchmark`` from its command line to its results, on trainings of two steps."""
import json
import os
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject

import kd_det
from kd_det.checks.environment import DiagnosisError
from kd_det.cli.benchmark import add_arguments
from kd_det.cli.main import main
from kd_det.compat import load_checkpoint
from kd_det.config import ConfigurationError
from kd_det.config.files import load_config, student_config
from kd_det.study import fidelity
from kd_det.study.benchmark import prepare
from kd_det.study.identity import hash_data
from kd_det.study.pair import Pair
from kd_det.study.runs import TrainingRecorder, train
from kd_det.study.series import TeacherTrainingError
from kd_det.study.variants import expand_grid, parse_variants, variant_config
from kd_det.study.worker import Training

BROKEN = 'fgd@model.distill.fgd.tap=nowhere'


@pytest.fixture
def benchmark(run_config, retinanet, tmp_path, monkeypatch):
    """Runs the command for one seed, and gives its exit status and what results.json holds."""
    monkeypatch.chdir(tmp_path)
    for name, model in dict(student=retinanet(), teacher=retinanet(depth=50)).items():
        config = run_config(model, epochs=1, val=True).to_dict()
        del config['default_hooks']['distill'], config['work_dir'], config['experiment_name'], config['visualizer']
        Config(config).dump(f'{name}.py')

    def run(*options: str, command: str = 'benchmark'):
        status = main([command, '--student', 'student.py', '--teacher', 'teacher.py', '--seeds', '1', '--threads',
                       '1', '--work-dir', 'work', '--cfg-options', 'default_hooks.distill.preflight=None', *options])
        return status, json.loads((tmp_path / 'work' / 'results.json').read_text())

    return run


def test_types_that_are_classes_are_written_by_their_names(run_config, retinanet):
    config = run_config(retinanet(), epochs=1, val=True)
    config.visualizer = dict(type=LazyObject('mmdet.visualization', 'DetLocalVisualizer'))
    train('plain', config, 'identity', log=lambda text: None)
    saved = next(Path(config.work_dir).glob('*/vis_data/config.py'))
    assert "type='mmdet.visualization.DetLocalVisualizer'" in saved.read_text() and load_config(saved)


def test_weights_of_a_teacher_that_are_not_finite_are_refused_before_anything_trains(run_config, retinanet, tmp_path):
    config = run_config(retinanet(), epochs=1, val=True)
    config.dump(tmp_path / 'teacher.py')
    torch.save(dict(state_dict={'neck.bias': torch.tensor([1.0, float('nan')])}), tmp_path / 'teacher.pth')
    with pytest.raises(DiagnosisError, match=r'teacher checkpoint: .* not finite: 1 of 1 tensors, first neck.bias'):
        kd_det.benchmark(student=config, teacher=str(tmp_path / 'teacher.py'), methods='none',
                         teacher_checkpoints=[str(tmp_path / 'teacher.pth')], work_dir=tmp_path / 'work')
    assert not (tmp_path / 'work' / 'none').exists()


def test_a_benchmark_from_beginning_to_end(benchmark, slurm, tmp_path, capsys):
    status, results = benchmark('--methods', f'none,fgd@inherit=none,{BROKEN}', '--fidelity', '--jobs', '2')
    assert status == 1  # for one run failed
    teacher = results['teacher']  # trained first, for there is no checkpoint
    assert (tmp_path / 'work' / teacher['checkpoint']).is_file()
    assert results['pair']['checkpoint'].endswith(teacher['checkpoint'])
    assert teacher['parameters'] > results['runs'][0]['parameters']
    plain, fgd, broken = results['runs']
    assert plain['status'] == fgd['status'] == 'finished'
    assert plain['same_start'] and fgd['same_start'] and fgd['same_order']
    assert plain['iterations'] == fgd['iterations'] == 2 and plain['flops'] == fgd['flops'] > 0
    assert plain['parameters'] == fgd['parameters'] > 0
    assert fgd['seconds_per_iteration'] > 0 and fgd['peak_memory'] > 2**20
    states = [load_checkpoint(tmp_path / 'work' / run['checkpoint'])['state_dict'] for run in (plain, fgd)]
    assert states[0].keys() == states[1].keys() and any((states[0][key] != states[1][key]).any() for key in states[0])
    assert (tmp_path / 'work' / fgd['scalars']).is_file()
    assert fgd['environment']['machine']['threads'] == 1 and fgd['environment']['versions'] == results['versions']
    assert set(fgd['fidelity']) == {'val'} and 'cka_8' in fgd['fidelity']['val']
    assert broken['status'] == 'failed' and 'nowhere' in broken['error']
    assert (tmp_path / 'work' / broken['log']).is_file()
    assert results['summary']['fgd@inherit=none']['bbox_mAP']['verdict'] == 'one seed, no statement'
    assert 'one seed, no statement' in (tmp_path / 'work' / 'results.md').read_text()

    # What has finished is kept, what was killed begins anew and ends in the same weights, wherever it runs.
    (tmp_path / 'work' / plain['folder'] / 'result.json').unlink()
    result = tmp_path / 'work' / fgd['folder'] / 'result.json'
    stored = json.loads(result.read_text())
    del stored['environment']  # as of a version that did not note it
    result.write_text(json.dumps(stored))
    capsys.readouterr()
    status, again = benchmark('--methods', 'fgd@inherit=none', '--executor', 'slurm', '--slurm', 'time=5')
    said = capsys.readouterr().out
    assert status == 0 and 'teacher: kept from before' in said and 'fgd@inherit=none, seed 0: kept from before' in said
    assert '\nnone, seed 0: handed to slurm as job 1' in said
    assert '#SBATCH --time=5\n' in (slurm / 'script1').read_text()
    assert again['runs'][1]['environment'] == {} and again['runs'][0]['environment']['versions']
    assert again['runs'][1]['identity'] == fgd['identity'] and again['runs'][0]['start'] == plain['start']
    state = load_checkpoint(tmp_path / 'work' / again['runs'][0]['checkpoint'])['state_dict']
    assert all(torch.equal(state[key], states[0][key]) for key in state)

    # The tables of what is there, without training.
    status, collected = benchmark('--methods', 'none,pkd@inherit=none', '--collect')
    said = capsys.readouterr().out
    assert status == 0 and collected['runs'][0] == again['runs'][0] and 'none, seed 0: kept from before' in said
    assert collected['runs'][1]['status'] == 'missing' and 'log' not in collected['runs'][1]
    table = (tmp_path / 'work' / 'results.md').read_text()
    assert '- pkd@inherit=none, seed 0 missing: it has not been trained' in table
    assert not (tmp_path / 'work' / collected['runs'][1]['folder']).exists() and 'begins' not in said


def test_what_can_not_be_collected_is_told(benchmark, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):  # there are no results
        benchmark('--methods', 'none', '--collect')
    assert "--collect: there is no folder 'work'." in capsys.readouterr().err
    (tmp_path / 'work').mkdir()
    with pytest.raises(FileNotFoundError):
        benchmark('--methods', 'none', '--collect')
    assert 'Without a teacher there is nothing to compare (it has not been trained).' in capsys.readouterr().out


@pytest.mark.parametrize('seeds, numbers', [('3', [0, 1, 2]), ('3,5', [3, 5]), ('7,', [7]), ('0,', [0])])
def test_seeds_are_a_number_or_a_list(seeds, numbers):
    parser = ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(['pair.py', '--seeds', seeds]).seeds == numbers


@pytest.mark.parametrize('seeds', ['0', 'many', '1,1', '-2', ','])
def test_seeds_that_are_none_are_named(seeds, capsys):
    with pytest.raises(SystemExit):
        main(['benchmark', 'pair.py', f'--seeds={seeds}'])
    assert 'expected a number of seeds' in capsys.readouterr().err


@pytest.mark.parametrize('epochs, numbers', [('12', 12), ('48,12,24', [12, 24, 48])])
def test_epochs_are_a_number_or_a_list(epochs, numbers, capsys):
    parser = ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(['pair.py', '--epochs', epochs]).epochs == numbers
    with pytest.raises(SystemExit):
        main(['benchmark', 'pair.py', '--epochs', '12,12'])
    assert "no two the same: '12,24', got '12,12'" in capsys.readouterr().err


def test_a_sweep_is_a_benchmark_of_a_grid():
    assert expand_grid('kd', [('teachers', ['1', '3']), ('augment', ['none', 'mosaic'])]) == [
        f'kd@teachers={number}@augment={kind}' for number in (1, 3) for kind in ('none', 'mosaic')]
    settings = [('kd.temperature', ['1', '2']), ('train_cfg.max_epochs', ['8', '16'])]
    assert expand_grid('kd', settings) == [
        f'kd@model.distill.kd.temperature={temperature}@train_cfg.max_epochs={epochs}'
        for temperature in (1, 2) for epochs in (8, 16)]


def test_a_sweep_sets_a_term_whose_method_the_pairs_config_defines():
    pair = Pair(student_config(load_config('kd_det::fgd_r101_r18.py')), 'kd_det::baseline_faster_rcnn_r101_r18.py')
    plain, variant = parse_variants(expand_grid('fgd', [('fgd.temperature', ['0.8'])])[0])
    assert plain.is_plain and variant_config(variant, pair, ['r101.pth']).model.distill.fgd.temperature == 0.8


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings in this process, which spares each one's imports; of ``--executor debug``."""

    def train_here(training):
        config, identity = training.command[-2:]
        train('run', load_config(config), identity, log=lambda text: None)
        return 0

    monkeypatch.setattr(Training, '__call__', train_here)


def test_ensembles_and_augmentation_are_swept(benchmark, in_this_process, tmp_path, capsys):
    setting = ('--method', 'pkd', '--teachers', '1,2', '--augment', 'mosaic+mixup', '--executor', 'debug')
    status, results = benchmark(*setting, command='sweep')
    assert status == 0
    mixed = '@augment=mosaic+mixup'
    runs = {run['variant']: run for run in results['runs']}
    assert list(runs) == ['none', f'none{mixed}', f'pkd@teachers=1{mixed}', f'pkd@teachers=2{mixed}']
    assert [run['twin'] for run in runs.values()] == ['none', 'none', *[f'none{mixed}'] * 2]
    assert all(run['same_order'] for run in runs.values()) and runs[f'none{mixed}']['same_start']
    twin = 100 * runs[f'none{mixed}']['metrics']['bbox_mAP']
    for name, run in runs.items():
        config = load_config(tmp_path / 'work' / run['folder'] / 'config.py')
        assert (config.train_dataloader.dataset.type == 'mmdet.MultiImageMixDataset') == (name != 'none')
        summary = results['summary'][name]['bbox_mAP']
        if name.startswith('pkd'):
            assert summary['by_seed'] == {'0': pytest.approx(100 * run['metrics']['bbox_mAP'] - twin)}
    assert [teacher.checkpoint for teacher in config.model.teacher] == [  # of the last: two teachers
        'work/teacher/epoch_1.pth', 'work/teacher_2/epoch_1.pth']
    assert [(term.teacher, term.weight.ratio) for term in config.model.distill.values()] == [(0, 0.5), (1, 0.5)]
    second, = results['further_teachers']
    assert second['run']['start'] != results['teacher']['start']  # a seed of its own
    assert second['checkpoint_hash'] != results['pair']['checkpoint_hash']
    capsys.readouterr()
    benchmark(*setting, command='sweep')
    assert capsys.readouterr().out.count('kept from before') == 6  # the second teacher too


def test_a_sweep_over_nothing_is_told(benchmark, capsys):
    with pytest.raises(FileNotFoundError):  # there are no results
        benchmark('--method', 'pkd', command='sweep')
    assert 'nothing to try: give --set, --teachers, --augment, --noise, --shift or --without' in capsys.readouterr().err


def test_what_can_not_be_composed_is_told_before_anything_is_trained(benchmark, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):  # there are no results
        benchmark('--methods', 'none,unheard')
    assert "no method 'unheard'" in capsys.readouterr().err and not (tmp_path / 'work').exists()


@pytest.mark.parametrize('command, options, message', [
    ('benchmark', ['--methods', 'pkd,fgd@model.distill.fgd.temperature=-1'],
     'model.distill.fgd.temperature: expected a number above 0, got -1.'),
    ('benchmark', ['--methods', 'fgd@model.distill.fgd.temprature=1'],
     'model.distill.fgd.temprature: there is no such key. Nearest: temperature.'),
    ('benchmark', ['--methods', 'fgd@model.distill.fgd.weight=nan'],
     'model.distill.fgd.weight: expected a number of at least 0, or a schedule'),
    ('benchmark', ['--methods', 'fgd@model.teacher.chekpoint=x.pth'],
     'model.teacher.chekpoint: there is no such key. Nearest: checkpoint'),
    ('benchmark', ['--methods', 'fgd@train_cfg.max_epochs=0'],
     'train_cfg.max_epochs: expected an integer of at least 1, got 0.'),
    ('benchmark', ['--methods', 'fgd@balance=nan'], '--methods fgd@balance=nan: expected @balance=RATIO, a number'),
    ('benchmark', ['--methods', 'fgd@balance=-1'], '--methods fgd@balance=-1: expected @balance=RATIO, a number'),
    ('benchmark', ['--methods', 'fgd', '--cfg-options', 'optim_wrapper.optimizer.lr=nan'],
     'optim_wrapper.optimizer.lr: expected a number of at least 0, got nan.'),
    ('sweep', ['--method', 'cwd', '--set', 'cwd.temperature=1,0'],
     'model.distill.cwd.temperature: expected a number above 0, got 0.'),
    ('sweep', ['--method', 'cwd', '--set', 'optim_wrapper.optimizer.type=SGD,Adamm'],
     "optim_wrapper.optimizer.type: there is no 'Adamm'. Nearest: Adam"),
])
def test_what_does_not_fit_is_told_before_anything_is_trained(benchmark, tmp_path, capsys, command, options, message):
    with pytest.raises(FileNotFoundError):  # there are no results
        benchmark(*options, command=command)
    assert f'kd-det: error: {message}' in capsys.readouterr().err and not (tmp_path / 'work').exists()


@pytest.mark.parametrize('options, message', [
    (['--data-root', 'nowhere'], "train annotations: 'nowhere/"),
    (['--teacher-checkpoint', 'nowhere.pth'], "--teacher-checkpoint: there is no file 'nowhere.pth'"),
    pytest.param(['--devices', '0,cpu'], '--devices 0,cpu: there is no GPU',
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one')),
])
def test_what_is_missing_is_told_before_anything_is_trained(benchmark, tmp_path, capsys, options, message):
    with pytest.raises(FileNotFoundError):  # there are no results
        benchmark('--methods', 'none', *options)
    assert f'kd-det: error: {message}' in capsys.readouterr().err and not (tmp_path / 'work').exists()


def test_what_is_spoiled_of_labels_is_swept(monkeypatch):
    asked = {}

    def sweep(pair, **arguments):
        asked.update(arguments)
        raise TeacherTrainingError('that is all')

    monkeypatch.setattr('kd_det.study.benchmark.sweep', sweep)
    options = ('--noise', '0,0.1', '--shift', '0.2', '--without', 'none,red')
    assert main(['sweep', 'pair.py', '--method', 'kd', *options]) == 1
    assert expand_grid('kd', asked['settings'])[1:3] == ['kd@noise=0@shift=0.2@without=red',
                                                         'kd@noise=0.1@shift=0.2@without=none']


def test_the_ap_of_each_class_is_noted_and_what_is_best_stays(run_config, retinanet):
    """Of no other metric: by the first one MMEngine tells what is best."""
    config = run_config(retinanet(), epochs=1, val=True)
    config.default_hooks.checkpoint.save_best = 'auto'
    run = train('plain', config, 'identity', log=lambda text: None)
    assert set(run.class_ap) == {'blue', 'green', 'red'}
    assert sum(run.class_ap.values()) / 3 == pytest.approx(run.metrics['bbox_mAP'], abs=1e-3)
    assert not any('precision' in name for name in run.metrics)
    assert [each.name for each in Path(config.work_dir).glob('best*')] == ['best_coco_bbox_mAP_epoch_1.pth']
    assert json.loads((Path(config.work_dir) / 'result.json').read_text())['class_ap'] == run.class_ap


def test_nothing_detected_is_no_accuracy_whatever_other_metrics_tell():
    recorder = TrainingRecorder('plain', print, lambda runner: None)
    recorder.measures_boxes = True
    recorder.after_val_epoch(None, {'fidelity/found': 0.4})
    assert recorder.metrics == {'bbox_mAP': 0.0, 'bbox_mAP_50': 0.0, 'bbox_mAP_75': 0.0, 'fidelity/found': 0.4}
    recorder.measures_boxes = False
    with pytest.raises(ConfigurationError, match='gives fidelity/found, but no bbox_mAP'):
        recorder.after_val_epoch(None, {'fidelity/found': 0.4})


def test_options_hold_where_the_student_and_its_data_are_looked_at(pair_files, pool_here, pool_of_writing):
    """Its config alone may name what is not there, or other data."""
    config = load_config('student.py')
    config.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='nowhere.pth')
    config.dump('student.py')
    (pair_files / 'start.pth').write_bytes(b'weights')
    dataset = config.train_dataloader.dataset
    other = pair_files / 'other.json'
    other.write_text(Path(dataset.data_root, dataset.ann_file).read_text() + ' ')
    with pytest.raises(DiagnosisError, match='nowhere.pth'):
        kd_det.benchmark(student='student.py', teacher='teacher.py', methods='none', check_images=0, work_dir='work')

    def train():
        pool = pool_here(pool_of_writing())
        kd_det.benchmark(student='student.py', teacher='teacher.py', seeds=1, check_images=0, work_dir='work',
                         methods=['none', f'none@train_dataloader.dataset.ann_file={other}'],
                         options={'model.backbone.init_cfg.checkpoint': 'start.pth'})
        return [name.partition('@')[0] for name in pool.trained]

    assert train() == ['teacher', 'none, seed 0', 'none'] and train() == []
    other.write_text(other.read_text() + ' ')  # the data of one of them
    assert train() == ['none']


@pytest.mark.parametrize('hook, message', [
    (None, 'default_hooks.checkpoint: expected a CheckpointHook, got None'),
    (dict(type='CheckpointHook', out_dir='/elsewhere'), 'default_hooks.checkpoint.out_dir: expected None'),
    (dict(type='CheckpointHook', save_last=False), 'default_hooks.checkpoint.save_last: expected True')])
@pytest.mark.parametrize('config', ['student', 'teacher'])
def test_a_run_whose_weights_would_be_nowhere_is_refused_before_it_begins(config, hook, message, pair_files, pool_here):
    changed = load_config(f'{config}.py')
    changed.default_hooks.checkpoint = hook
    changed.dump(f'{config}.py')
    pool = pool_here()
    with pytest.raises(ConfigurationError, match=message):
        kd_det.benchmark(student='student.py', teacher='teacher.py', methods='none', check_images=0, work_dir='work')
    assert not pool.trained


def test_what_a_setting_does_is_told_of_each_length(pair_files, pool_here, pool_of_writing):
    """Longer training gives 5 points and the noise none, so that the noise is at 0 both times."""
    pool_here(pool_of_writing(lambda job: 30 + 5 * job.config.train_cfg.max_epochs))
    found = kd_det.benchmark(student='student.py', teacher='teacher.py', methods='none@noise=0.5', seeds=2,
                             epochs=[2, 1], check_images=0, work_dir='work')
    summary = found.results['summary']
    assert list(summary) == ['none', 'none@epochs=2', 'none@noise=0.5', 'none@noise=0.5@epochs=2']
    assert summary['none']['bbox_mAP']['mean'] == 35  # the shortest goes by the plain name, in whatever order
    assert [summary[name]['bbox_mAP']['difference'] for name in [*summary][1:]] == [5, 0, 0]
    stored = json.loads((pair_files / 'work' / 'results.json').read_text())
    for run in stored['runs']:
        run['twin'] = 'none'  # as was told before
    (pair_files / 'work' / 'results.json').write_text(json.dumps(stored))
    assert kd_det.merge_results(['work']).results['runs'][-1]['twin'] == 'none@epochs=2'
    with pytest.raises(ConfigurationError, match='epochs'):
        kd_det.benchmark(student='student.py', teacher='teacher.py', epochs=[2, 2])


def test_a_run_is_kept_wherever_its_teacher_lies_and_not_where_that_is_another(pair_files, pool_here, pool_of_writing):
    (pair_files / 'teacher.pth').write_bytes(b'weights')
    pool = pool_here(pool_of_writing())

    def count(**arguments):
        before = len(pool.trained)
        series = prepare(None, 'student.py', arguments.pop('teacher', 'teacher.py'), ['teacher.pth'], 'pkd',
                         Path('work'), **{**dict(data_root=None, epochs=None, teacher_epochs=None, balance=None,
                                                 inherit='auto', options=None, fidelity=()), **arguments})
        series.data = hash_data(series.pair.student)
        series.train([0], pool, print)
        return len(pool.trained) - before

    assert count() == 2 and count() == 0
    os.rename('teacher.py', 'renamed.py')
    assert count(teacher=str(pair_files / 'renamed.py')) == 0
    root = load_config('student.py').train_dataloader.dataset.data_root
    assert count(teacher='renamed.py', data_root=os.path.relpath(root)) == 0
    with open('renamed.py', 'a', encoding='utf-8') as file:
        file.write("model['data_preprocessor']['mean'] = [0., 0., 0.]\n")
    assert count(teacher='renamed.py') == 1  # the plain student has no part in it


def test_fidelity_that_can_not_be_measured_costs_nothing_else(benchmark, in_this_process, capsys, monkeypatch):
    measure = fidelity.measure_fidelity

    def fail_once(config, checkpoint, *arguments):
        if 'pkd' in checkpoint:
            raise ConfigurationError('no name in common')
        return measure(config, checkpoint, *arguments)

    monkeypatch.setattr(fidelity, 'measure_fidelity', fail_once)
    status, results = benchmark('--methods', 'pkd', '--executor', 'debug', '--fidelity')
    assert status == 0 and 'pkd, seed 0: fidelity on val failed: no name in common' in capsys.readouterr().out
    assert list(results['fidelity']['val']) == ['none'] and len(results['runs']) == 2
    monkeypatch.setattr(fidelity, 'measure_fidelity', measure)
    assert list(benchmark('--methods', 'pkd', '--executor', 'debug', '--fidelity')[1]['fidelity']['val']) == [
        'none', 'pkd']


def test_a_run_that_was_never_evaluated_is_no_result(pair_files, pool_here):
    pool_here()
    with pytest.raises(ConfigurationError, match='It was never evaluated: train_cfg.val_begin'):
        kd_det.benchmark(student='student.py', teacher='teacher.py', methods='none', seeds=1, work_dir='work',
                         options={'train_cfg.val_begin': 5}, check_images=0)
    assert not Path('work/none/seed0/result.json').exists()
