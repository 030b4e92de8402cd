"""The command line as a user meets it: help, runs, and one clear line for each mistake."""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyObject

from kd_det import doctor
from kd_det.cli import distill
from kd_det.cli import main as entry
from kd_det.cli.main import main, run_tool
from kd_det.compat import process
from kd_det.config.composition import PAPER
from kd_det.config.files import load_config
from kd_det.training.runs import _augment

ROOT = Path(__file__).parents[2]
CLASSES = ('blue', 'green', 'red')


@pytest.fixture
def workspace(coco_folder, tmp_path, monkeypatch, retinanet):
    """A folder with data, the configs of a teacher and of a student, and the teacher's weights; the current one."""
    from mmdet.registry import MODELS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.delenv('KD_DET_DEBUG', raising=False)
    shutil.copytree(coco_folder, tmp_path / 'coco')
    pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=(64, 64), keep_ratio=True),
                dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
    dataset = dict(type='CocoDataset', data_root='coco/', ann_file='all.json', data_prefix=dict(img=''),
                   metainfo=dict(classes=CLASSES), pipeline=pipeline)
    loader = dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
    validation = dict(loader, dataset=dict(dataset, test_mode=True))
    evaluator = dict(type='CocoMetric', ann_file='coco/all.json', metric='bbox')
    common = dict(default_scope='mmdet',
                  data_root='coco/',
                  train_dataloader=dict(loader, dataset=dataset),
                  val_dataloader=validation,
                  test_dataloader=validation,
                  val_evaluator=evaluator,
                  test_evaluator=evaluator,
                  train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
                  val_cfg=dict(type='ValLoop'),
                  test_cfg=dict(type='TestLoop'),
                  optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
                  randomness=dict(seed=0),
                  visualizer=dict(type='DetLocalVisualizer', name=str(tmp_path)),
                  log_level='WARNING',
                  default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1),
                                     visualization=dict(type='DetVisualizationHook')))
    models = dict(student=retinanet(), teacher=retinanet(depth=50))
    for name, model in models.items():
        Config(dict(common, model=model)).dump(f'{name}.py')
    torch.manual_seed(0)
    torch.save(dict(state_dict=MODELS.build(models['teacher']).state_dict()), 'teacher.pth')
    return tmp_path


DISTILL = ['distill', 'student.py', '--teacher', 'teacher.py', '--teacher-checkpoint', 'teacher.pth', '--method', 'fgd']
NO_PREFLIGHT = ['--cfg-options', 'default_hooks.distill.preflight=None']


def error_of(arguments, capsys) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert 'Traceback' not in captured.err
    assert captured.err.startswith('kd-det: error: ') and captured.err.count('kd-det:') == 1
    return captured.err


# ---------------------------------------------------------------- help


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(['--help'])
    assert exit_.value.code == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf'^    {command}( |$)', listed, re.MULTILINE) for command in entry.COMMANDS)


@pytest.mark.parametrize('command, options', [
    ('train', ['--work-dir', '--amp', '--resume', '--cfg-options', '--launcher', '--auto-scale-lr', '--data-root']),
    ('test',
     ['--work-dir', '--out', '--show-dir', '--wait-time', '--tta', '--cfg-options', '--launcher', '--data-root']),
    ('distill',
     ['--teacher', '--teacher-checkpoint', '--method', '--family', '--inherit', '--inherit-by', '--balance', '--resume',
      '--cfg-options', 'fgd']),
    ('prune', ['OUT.pth', '--macs', '--importance', '--batches', '--no-eval', '--steps', '--teacher-checkpoint']),
    ('export', ['OUT', '--size', '--dynamic', '--half', '--no-nms', '--cfg-options']),
    ('doctor', ['--teacher-checkpoint', '--data-root']),
    ('methods', []),
    ('benchmark', ['PAIR', '--methods', '--seeds', '--fidelity', '--paper-weights', '--executor', '--slurm',
                   '--devices', '--devices-per-run', '--jobs', '--threads', '--collect']),
    ('sweep', ['PAIR', '--method', '--set', '--seeds', '--fidelity']),
    ('inspect', ['--image', '--out', '--random-teacher', '--teacher-checkpoint', '--data-root', '--cfg-options']),
])
def test_help_of_each_command_lists_its_options(command, options, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, '--help'])
    assert exit_.value.code == 0
    listed = capsys.readouterr().out
    assert all(option in listed for option in [*options, '--debug'])


def test_only_the_asked_command_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(entry, 'import_module', lambda name: pytest.fail(f'{name} was imported'))
    with pytest.raises(SystemExit):
        main(['--help'])
    assert 'COMMAND' in capsys.readouterr().out


def test_no_command_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2 and 'COMMAND' in capsys.readouterr().err


def test_without_mmdetection_the_way_to_install_it_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'mmdet', None)  # as if it were not installed
    with pytest.raises(SystemExit) as exit_:
        main(['train', 'student.py'])
    assert exit_.value.code == 2
    assert "'train' needs MMDetection" in (said := capsys.readouterr().err) and "no module 'mmdet'" in said
    assert "pip install 'kd-det[mmdet]'" in said


# ---------------------------------------------------------------- runs


def test_weights_are_balanced_unless_the_published_ones_are_wanted():
    parser = ArgumentParser()
    distill.add_arguments(parser)

    def balance(*options):
        return parser.parse_args([*DISTILL[1:], *options]).balance

    assert (balance(), balance('--balance', '2'), balance('--paper-weights')) == (None, 2, PAPER)
    with pytest.raises(SystemExit):
        balance('--balance', '2', '--paper-weights')


def test_distill_then_test_then_export(workspace, capsys):
    """The whole way of a user: to a checkpoint and a config that stock MMDetection reads, without the distiller."""
    assert main([*DISTILL, '--balance', '0.5', '--work-dir', 'run', *NO_PREFLIGHT]) == 0
    assert "type='mmdet.DetectionDistiller'" in capsys.readouterr().out  # the config is shown
    made = load_config('run/student_fgd.py')
    assert made.model.type == 'mmdet.DetectionDistiller' and made.model.distill.fgd.alpha == 1e-3
    assert made.model.distill.fgd.weight == dict(type='mmdet.Balance', ratio=0.5)
    assert made.default_hooks.distill == dict(type='mmdet.DistillHook', preflight=None)

    assert main(['test', 'run/student_fgd.py', 'run/epoch_1.pth', '--out', 'predictions.pkl']) == 0
    assert Path('predictions.pkl').is_file()
    assert load_config('run/student_fgd.py').to_dict() == made.to_dict()  # testing keeps the config of the training

    assert main(['export', 'run/student_fgd.py', 'run/epoch_1.pth', 'plain/student.pth']) == 0
    exported = load_config('plain/student.py')
    assert exported.model.type == 'RetinaNet' and set(exported.default_hooks) == {'checkpoint', 'visualization'}
    assert not {'custom_imports', 'fgd'} & set(exported)
    checkpoint = torch.load('plain/student.pth', weights_only=True)
    assert set(checkpoint) == {'meta', 'state_dict'} and checkpoint['meta']['dataset_meta']['classes'] == CLASSES

    from mmdet.apis import inference_detector, init_detector
    image = 'coco/0.png'
    boxes = [inference_detector(init_detector(config, checkpoint, device='cpu'), image).pred_instances.bboxes
             for config, checkpoint in (('plain/student.py', 'plain/student.pth'), ('student.py', 'run/epoch_1.pth'))]
    assert torch.equal(*boxes)


def test_several_checkpoints_are_an_ensemble(workspace, monkeypatch):
    monkeypatch.setattr('mmengine.runner.Runner.train', lambda runner: None)
    several = ['--teacher-checkpoint', 'teacher.pth', 'teacher.pth']
    assert main([*DISTILL, *several, '--balance', '0.5', *NO_PREFLIGHT, 'model.distill.fgd.temperature=0.8']) == 0
    made = load_config('work_dirs/student_fgd_2_teachers/student_fgd_2_teachers.py').model
    assert [teacher.checkpoint for teacher in made.teacher] == ['teacher.pth'] * 2
    for index, name in enumerate(('fgd_1', 'fgd_2')):  # what was set holds for both
        term = made.distill[name]
        assert (term.teacher, term.temperature, term.weight.ratio) == (index, 0.8, 0.25)


def test_the_saved_config_repeats_the_run(workspace):
    """With tools/train.py, in a process of its own, to identical weights."""
    assert main([*DISTILL, '--work-dir', 'run', *NO_PREFLIGHT]) == 0
    first = torch.load('run/epoch_1.pth', weights_only=True)['state_dict']
    result = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'train.py', 'run/student_fgd.py', '--work-dir', 'again'],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    second = torch.load('again/epoch_1.pth', weights_only=True)['state_dict']
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_distillation_is_resumed(workspace, capsys):
    assert main([*DISTILL, '--work-dir', 'run', *NO_PREFLIGHT]) == 0
    again = ['train', 'run/student_fgd.py', '--work-dir', 'run', '--resume', '--cfg-options']
    assert main([*again, 'train_cfg.max_epochs=2']) == 0
    assert torch.load('run/epoch_2.pth', weights_only=True)['meta']['epoch'] == 2
    said = error_of([*again, 'train_cfg.max_epochs=3', 'model.student.backbone.base_channels=8',
                     'model.student.neck.in_channels=[8,16,32,64]'], capsys)
    assert "'run/epoch_2.pth' does not fit the student" in said.replace(f'{workspace}/', '')


def test_a_runner_that_builds_its_model_late_trains_and_tests(workspace):
    flexible = ['--work-dir', 'run', '--cfg-options', 'runner_type=FlexibleRunner', 'env_cfg.cudnn_benchmark=False']
    assert main(['train', 'student.py', *flexible]) == 0
    assert main(['test', 'student.py', 'run/epoch_1.pth', *flexible]) == 0


def test_train_takes_mmdets_options(workspace):
    assert main(['train', 'student.py', '--data-root', str(workspace / 'coco'), '--work-dir', 'run',
                 '--cfg-options', 'train_dataloader.batch_size=2']) == 0
    config = load_config('run/student.py')
    assert config.train_dataloader.batch_size == 2
    assert config.train_dataloader.dataset.data_root == f'{workspace}/coco/'
    assert config.val_evaluator.ann_file == f'{workspace}/coco/all.json'

    assert main(['train', 'student.py', '--resume', '--work-dir', 'run', '--cfg-options',
                 'train_cfg.max_epochs=2']) == 0
    assert torch.load('run/epoch_2.pth', weights_only=True)['meta']['epoch'] == 2
    assert load_config('run/student.py').resume is True

    assert main(['train', 'student.py', '--auto-scale-lr', '--cfg-options', 'auto_scale_lr.base_batch_size=8']) == 0
    assert load_config('work_dirs/student/student.py').auto_scale_lr.enable is True


def test_test_never_builds_a_teacher(workspace, monkeypatch):
    assert main([*DISTILL, '--work-dir', 'run', *NO_PREFLIGHT]) == 0
    Path('teacher.pth').unlink(), Path('teacher.py').unlink()
    assert main(['test', 'run/student_fgd.py', 'run/epoch_1.pth', '--tta', '--show-dir', 'painted']) == 0
    assert load_config('run/student_fgd_test.py').model.module.type == 'RetinaNet'
    assert list(Path('run').glob('*/painted/*.png'))


def damage_annotations(**values):
    content = json.loads(Path('coco/all.json').read_text())
    content['annotations'][3].update(values)
    Path('coco/all.json').write_text(json.dumps(content))


def test_damaged_annotations_stop_every_command_before_it_writes(workspace, capsys):
    damage_annotations(bbox=[1, 2, math.inf, 4])
    benchmark = ['benchmark', '--student', 'student.py', '--teacher', 'teacher.py', '--teacher-checkpoint',
                 'teacher.pth', '--methods', 'fgd', '--work-dir', 'run', '--devices', 'cpu']
    for command in (['train', 'student.py', '--work-dir', 'run'], [*DISTILL, '--work-dir', 'run'], benchmark,
                    ['test', 'student.py', 'teacher.pth', '--work-dir', 'run']):
        said = error_of(command, capsys)
        assert "data: 'coco/all.json': annotation 3 (id 4): its bbox is [1, 2, inf, 4], which is not finite." in said
        assert said.count('annotation 3') == 1 and 'take them out (entries are counted from 0).' in said
        assert not Path('run').exists()
    assert main(['doctor', 'student.py']) == 1
    fault, = (finding for finding in doctor('student.py').findings if finding.fault)
    assert fault.found == "'coco/all.json': annotation 3 (id 4): its bbox is [1, 2, inf, 4], which is not finite"


def test_what_mmdetection_leaves_out_is_a_note_at_the_start(workspace, capsys):
    damage_annotations(bbox=[1, 2, 0, 4])
    assert main(['train', 'student.py', '--work-dir', 'run']) == 0
    said = capsys.readouterr()
    note = "train data: 'coco/all.json': annotation 3 (id 4): its bbox is [1, 2, 0, 4], of less than a pixel, which MM"
    assert note in said.out + said.err


def test_augmentation_writes_types_that_are_classes_by_their_names(run_config, retinanet):
    config = run_config(retinanet(), val=True, test_dataloader=dict(dataset=dict(pipeline=[])))
    config.tta_model = dict(type=LazyObject('mmdet.models', 'DetTTAModel'), tta_cfg=dict(max_per_img=9))
    config.tta_pipeline = [dict(type=LazyObject('mmcv.transforms', 'TestTimeAug'), transforms=[])]
    _augment(config)
    assert '<' not in config.pretty_text and "type='mmdet.models.DetTTAModel'" in config.pretty_text
    assert config.model.module.type == 'RetinaNet' and config.model.tta_cfg.max_per_img == 9


def test_tools_are_the_commands(workspace, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['test.py', 'student.py', 'teacher.pth', '--out', 'x.json'])
    with pytest.raises(SystemExit) as exit_:
        run_tool('test')
    assert exit_.value.code == 2 and "'x.json' does not end in .pkl" in capsys.readouterr().err
    for tool in ('train', 'test'):
        assert f"run_tool('{tool}')" in (ROOT / 'tools' / f'{tool}.py').read_text()


@pytest.mark.parametrize('tool, arguments', [('train', ['student.py']), ('test', ['student.py', 'student.pth'])])
def test_distributed_tools_launch_one_process_per_gpu(tool, arguments, tmp_path):
    launcher = tmp_path / 'python'
    launcher.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    launched = subprocess.run([ROOT / 'tools' / f'dist_{tool}.sh', *arguments, '4', '--work-dir', 'a b'],
                              check=True,
                              text=True,
                              stdout=subprocess.PIPE,
                              env={
                                  **os.environ, 'PYTHON': str(launcher),
                                  'NNODES': '2'
                              }).stdout.splitlines()
    assert launched == ['-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=0', '--master_addr=127.0.0.1',
                        '--master_port=29500', '--nproc_per_node=4', str(ROOT / 'tools' / f'{tool}.py'), *arguments,
                        '--launcher', 'pytorch', '--work-dir', 'a b']


def test_mixed_precision_needs_a_gpu(workspace, capsys, monkeypatch):
    monkeypatch.setattr('kd_det.training.runs.get_device', lambda: 'cpu')
    assert '--amp needs a GPU' in error_of(['train', 'student.py', '--amp'], capsys)
    trained = []
    monkeypatch.setattr('kd_det.training.runs.get_device', lambda: 'cuda')
    monkeypatch.setattr('kd_det.training.runs._train', lambda config, *options: trained.append(config.optim_wrapper))
    assert main(['train', 'student.py', '--amp']) == 0
    assert trained[0].type == 'AmpOptimWrapper' and trained[0].loss_scale == 'dynamic'


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize('arguments, said', [
    (['train', 'nowhere.py'], "no config file 'nowhere.py'"),
    (['train', 'broken.py'], 'broken.py.*not valid Python.*line 1'),
    (['train', 'student.py', '--data-root', '/nowhere'], '/nowhere/all.json.*does not exist'),
    (['train', 'student.py', '--resume', 'nowhere.pth'], "no file 'nowhere.pth'"),
    (['train', 'student.py', '--auto-scale-lr'], 'base_batch_size'),
    (['train', 'student.py', '--cfg-options', 'model.bbox_head.num_classes=80'], 'num_classes=80, the data set has 3'),
    (['train', 'student.py', '--cfg-options', 'model.neck.type=FPNN'],
     "model.neck.type: there is no 'FPNN'. Nearest: FPN"),
    (['train', 'student.py', '--cfg-options', 'model.neck.unknown=1'],
     'model.neck.unknown: there is no such key. Expected one of '),
    (['train', 'student.py', '--cfg-options', 'model.type.x=1'], '--cfg-options'),
    (['train', 'student.py', '--cfg-options', 'optim_wrapper.optimizer.rate=1'],
     'optim_wrapper.optimizer.rate: there is no such key. Expected one of '),
    (['train', 'student.py', '--resume', 'teacher.pth'], 'does not fit the student RetinaNet'),
    (['train', 'student.py', '--cfg-options', 'resume=True', 'load_from=teacher.pth'],
     'does not fit the student RetinaNet'),
    (['test', 'student.py', 'nowhere.pth'], "no file 'nowhere.pth'"),
    (['test', 'student.py', 'teacher.pth'],
     'does not fit the student RetinaNet.*another shape: .*layer1.0.conv1.weight'),
    (['export', 'student.py', 'teacher.pth', 'out.pth'], 'is not of the student.*layer1.0.conv3.weight'),
    (['export', 'student.py', 'nowhere.pth', 'out.pth'], 'nowhere.pth'),
    ([*DISTILL[:-1], 'fgx'], "no method 'fgx'. Choose from .*fgd"),
    (['distill', 'run.py', *DISTILL[2:]], 'is a distillation already'),
    ([*DISTILL, '--cfg-options', 'model.distill.fgd.tap=nek', 'default_hooks.distill.preflight=None'
      ], "no module 'nek'.*neck"),
    ([*DISTILL, '--cfg-options', 'model.teacher.checkpoint=nowhere.pth'
      ], "teacher checkpoint: there is no file 'nowhere.pth'"),
    ([*DISTILL, '--cfg-options', 'model.teacher.config=student.py'], 'does not fit the teacher'),
    ([*DISTILL, '--cfg-options', 'model.teacher.config=nowhere.py'], "no config file 'nowhere.py'"),
])
def test_a_mistake_is_one_clear_line(arguments, said, workspace, capsys):
    Path('broken.py').write_text('model = dict(\n')
    Path('run.py').write_text("model = dict(type='DetectionDistiller')\n")
    assert re.search(said, error_of(arguments, capsys), re.DOTALL)
    assert not list(workspace.glob('**/*epoch*.pth')) and not Path('out.pth').exists()


def test_an_option_without_a_value_is_a_usage_error(workspace, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(['train', 'student.py', '--cfg-options', 'randomness.seed'])
    assert exit_.value.code == 2
    assert "--cfg-options: expected KEY=VALUE, got 'randomness.seed'" in capsys.readouterr().err


def test_empty_data_is_one_clear_line(workspace, capsys):
    Path('coco/all.json').write_text('{"images": [], "annotations": [], "categories": []}')
    assert 'lists no images' in error_of(['train', 'student.py'], capsys)


def test_data_without_the_configs_classes_is_one_clear_line(workspace, capsys):
    options = [f'{split}_dataloader.dataset.metainfo.classes=cat,dog,cow' for split in ('train', 'val', 'test')]
    said = error_of(['train', 'student.py', '--cfg-options', *options,
                     'train_dataloader.dataset.filter_cfg.filter_empty_gt=True'], capsys)
    assert 'cat, dog, cow' in said and 'blue, green, red' in said


def test_an_unreadable_image_is_one_clear_line(workspace, capsys):
    Path('coco/3.png').write_bytes(b'no image')
    assert '3.png' in error_of(['train', 'student.py'], capsys)
    assert not list(workspace.glob('work_dirs/**/*.pth'))


def test_debug_shows_the_traceback(workspace, capsys, monkeypatch):
    assert main(['train', 'nowhere.py', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err
    monkeypatch.setenv('KD_DET_DEBUG', '1')
    assert main(['train', 'nowhere.py']) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_an_unexpected_error_keeps_its_traceback(workspace, capsys, monkeypatch):
    monkeypatch.setattr('mmengine.runner.Runner.train', lambda self: 1 / 0)
    assert main(['train', 'student.py']) == 2
    said = capsys.readouterr().err
    assert 'Traceback' in said and said.endswith('kd-det: error: ZeroDivisionError: division by zero\n')


def test_a_workers_error_is_told_by_its_last_line():
    error = AssertionError(
        'Caught AssertionError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n'
        '  File "x.py", line 1\nAssertionError: failed to load image: 3.png\n')
    assert entry.describe(error) == 'AssertionError: AssertionError: failed to load image: 3.png'


def test_interruption_is_no_traceback(workspace, capsys, monkeypatch):

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr('mmengine.runner.Runner.train', interrupt)
    assert main(['train', 'student.py']) == 130
    assert capsys.readouterr().err == 'kd-det: interrupted\n'


# ---------------------------------------------------------------- methods and inspect


def test_a_command_leaves_the_process_group_it_joined_and_the_interpreter_with_it(capsys, monkeypatch):
    """Threads that outlive the interpreter abort the process now and then, after all the work is done."""
    registered = []
    monkeypatch.setattr('atexit.register', lambda function, *arguments: registered.append((function, *arguments)))
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert main(['methods']) == 0
    assert not torch.distributed.is_initialized() and registered == [(process._exit, 0)]


def test_methods_are_listed(capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    assert main(['methods']) == 0
    lines = [line.split('│') for line in capsys.readouterr().out.splitlines() if line.count('│') > 1]
    rows = {cells[1].strip(): cells for cells in lines}
    assert 'neck features' in rows['fgd'][3] and rows['fgd'][4].strip().startswith('all but DETR')
    assert 'arXiv 2111.11837' in rows['fgd'][5]
    assert 'Faster R-CNN' in rows['dkd'][4] and 'RoI head' in rows['dkd'][3] and 'all but FCOS' in rows['fgfi'][4]


def test_inspect_shows_a_batch_and_an_image(workspace, capsys, monkeypatch):
    from kd_det.config.composition import distillation_config
    monkeypatch.setenv('COLUMNS', '200')
    distillation_config('student.py', 'teacher.py', 'nowhere.pth', 'fgd+bckd').dump('run.py')
    assert main(['inspect', 'run.py', '--random-teacher', '--out', 'looks']) == 0
    shown = capsys.readouterr().out
    assert 'neck[0]' in shown and 'bckd_boxes' in shown and 'there are no boxes' not in shown
    assert len(list(Path('looks').glob('*.png'))) == 4 * 6  # images; two masks, two attentions to cells and channels

    from mmdet.registry import MODELS
    torch.save(dict(state_dict=MODELS.build(load_config('student.py').model).state_dict()), 'student.pth')
    assert main(['inspect', 'run.py', '--teacher-checkpoint', 'teacher.pth', '--checkpoint', 'student.pth',
                 '--image', 'coco/0.png', '--cfg-options', 'model.distill.fgd.levels=0,1']) == 0
    shown = capsys.readouterr().out
    assert 'neck[1]' in shown and 'neck[2]' not in shown and 'there are no boxes' in shown
    assert (workspace / 'work_dirs' / 'run' / 'inspection' / '0_fgd_foreground_BoxForeground.png').is_file()


@pytest.mark.parametrize('arguments, said', [
    (['student.py'], 'is a plain detector'),
    (['run.py'], "there is no file 'nowhere.pth'"),
    (['run.py', '--random-teacher', '--image', 'nowhere.png'], "no image 'nowhere.png'"),
    (['run.py', '--random-teacher', '--checkpoint', 'nowhere.pth'], 'kd-det: error: No checkpoint at /'),
    (['run.py', '--random-teacher', '--checkpoint', 'nowhere.pth'], '/nowhere.pth.'),
    (['run.py', '--random-teacher', '--checkpoint', 'teacher.pth'], '(file (64,), model (16,))'),
    (['two.py', '--teacher-checkpoint', 'teacher.pth'], 'is for one teacher, and this config has 2'),
    (['run.py', '--random-teacher', '--data-root', '/nowhere'], '/nowhere/all.json'),
    (['run.py', '--random-teacher', '--cfg-options', 'model.distill.fgd.tap=nek'], "no module 'nek'"),
])
def test_a_mistake_with_inspect_is_one_clear_line(arguments, said, workspace, capsys):
    from kd_det.config.composition import distillation_config
    config = distillation_config('student.py', 'teacher.py', 'nowhere.pth', 'fgd')
    config.dump('run.py')
    config.model.teacher = [config.model.teacher] * 2
    config.dump('two.py')
    assert said in error_of(['inspect', *arguments], capsys)


# ---------------------------------------------------------------- doctor


def test_doctor_finds_nothing(workspace, capsys):
    assert main(['doctor', 'student.py']) == 0
    assert 'No faults found' in capsys.readouterr().out


def test_doctor_of_the_installation_alone(capsys):
    assert main(['doctor']) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ('torchvision', 'mmengine', 'mmcv', 'mmdet', 'operators', 'GPU'))


@pytest.mark.parametrize('arguments, said', [
    (['student.py', '--data-root', '/nowhere'], '/nowhere/all.json'),
    (['student.py', '--teacher-checkpoint', 'teacher.pth'], 'has no teacher'),
    (['nowhere.py'], 'nowhere.py'),
    (['run.py', '--teacher-checkpoint', 'nowhere.pth'], 'nowhere.pth'),
    (['run.py', '--teacher-checkpoint', 'student.pth'], 'does not fit'),
])
def test_doctor_finds_faults(arguments, said, workspace, capsys, monkeypatch):
    from mmdet.registry import MODELS

    from kd_det.config.composition import distillation_config
    monkeypatch.setenv('COLUMNS', '300')
    distillation_config('student.py', 'teacher.py', 'teacher.pth', 'fgd').dump('run.py')
    torch.save(dict(state_dict=MODELS.build(load_config('student.py').model).state_dict()), 'student.pth')
    assert main(['doctor', *arguments]) == 1
    assert said in (listed := capsys.readouterr().out) and 'fault' in listed


def test_doctor_says_in_a_pipe_what_the_run_says(workspace, capsys):
    wrong = ['student.py', '--cfg-options', 'optim_wrapper.optimizer.lr=nan']
    assert main(['train', *wrong]) == 2
    message = capsys.readouterr().err.removeprefix('kd-det: error: ')
    assert message == 'optim_wrapper.optimizer.lr: expected a number of at least 0, got nan.\n'
    assert main(['doctor', *wrong]) == 1
    assert f'fault  {message}' in capsys.readouterr().out


@pytest.mark.parametrize('arguments', [['doctor', 'run.py'], ['export', 'teacher.py', 'teacher.pth', 'out/plain.pth']])
def test_what_runs_without_a_runner_finds_mmdetections_types(arguments, workspace, monkeypatch):
    """As in a process of its own, in which no test has set the default scope of the registries."""
    from mmengine.registry import DefaultScope

    from kd_det.config.composition import distillation_config
    distillation_config('student.py', 'teacher.py', 'teacher.pth', 'fgd').dump('run.py')
    monkeypatch.setattr(DefaultScope, '_instance_dict', {})
    assert main(arguments) == 0


def test_doctor_accepts_another_teacher_checkpoint(workspace, capsys):
    from kd_det.config.composition import distillation_config
    distillation_config('student.py', 'teacher.py', 'nowhere.pth', 'fgd').dump('run.py')
    assert main(['doctor', 'run.py']) == 1
    assert main(['doctor', 'run.py', '--teacher-checkpoint', 'teacher.pth']) == 0


def test_doctor_runs_where_mmdetection_can_not_be_imported(tmp_path):
    """OpenCV without the libraries of a screen is the most frequent broken installation."""
    (tmp_path / 'cv2').mkdir()
    (tmp_path / 'cv2' / '__init__.py').write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'COLUMNS': '200'}
    doctor, train = (subprocess.run([sys.executable, '-m', 'kd_det', *command], env=env, capture_output=True, text=True)
                     for command in (['doctor'], ['train', 'config.py']))
    assert doctor.returncode == 1 and 'opencv-python-headless' in doctor.stdout and 'Traceback' not in doctor.stderr
    assert train.returncode == 2 and 'libGL.so.1' in train.stderr and 'Run kd-det doctor' in train.stderr


def test_images_are_read_before_training_and_remembered(workspace, capsys):
    (workspace / 'coco' / '5.png').write_text('no image')
    train = ['train', 'student.py', '--work-dir', 'work [v1]']
    assert main(train) == 2
    assert "5.png' can not be read (it holds text: 'no image')" in capsys.readouterr().err
    memory = (workspace / 'work [v1]' / 'checked_images.json').read_text()
    known = sum(memory.count(f'{index}.png') for index in range(8))
    assert known == 7 and not list(workspace.glob('work */*.pth'))
    for count in ('0', '-1', 'some'):
        with pytest.raises(SystemExit):
            main([*train, '--check-images', count])
        assert f"expected all, none, or an integer of at least 1, got '{count}'" in capsys.readouterr().err
