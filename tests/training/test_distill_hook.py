"""Distillation under mmengine's Runner: every saved file is the student's; a resumed run is the uninterrupted one."""
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner

from kd_det.compat import CheckpointError
from kd_det.distillers import Schedule
from kd_det.teachers import TeacherError
from kd_det.training.finiteness import count_batches
from kd_det.training.hooks import NotebookProgress, is_in_notebook


@pytest.fixture
def distilled(retinanet):
    """Makes the model dict of a distilled RetinaNet."""

    def make(teacher=None, **changes) -> dict:
        return dict(type='DetectionDistiller', student=retinanet(), distill=dict(fgd=dict(type='FGD', alpha=1e-2)),
                    teacher=teacher or dict(config=retinanet(neck=12), random_teacher=True), **changes)

    return make


@pytest.fixture
def teacher_checkpoint(retinanet, tmp_path):
    torch.manual_seed(7)
    model = MODELS.build(retinanet(neck=12))
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'teacher.pth')
    return str(tmp_path / 'teacher.pth')


def _load(path):
    return torch.load(path, weights_only=True, map_location='cpu')


class Interrupt(Hook):
    """Saves in the middle of an epoch and dies, as a user's Ctrl-C handler would."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:
            runner.save_checkpoint(runner.work_dir, 'interrupted.pth', save_optimizer=True, save_param_scheduler=True)
            raise KeyboardInterrupt


def test_every_checkpoint_is_a_plain_students(retinanet, distilled, make_runner):
    ema = dict(type='EMAHook', momentum=0.3)
    runner = make_runner(distilled(), epochs=2, val=True, custom_hooks=[ema],
                         **{'default_hooks.checkpoint.save_best': 'coco/bbox_mAP',
                            'default_hooks.checkpoint.rule': 'greater'})
    runner.train()
    with pytest.raises(KeyboardInterrupt):
        other = make_runner(distilled(), name='other', epochs=2)
        other.register_hook(Interrupt(), priority='LOWEST')
        other.train()
    plain = MODELS.build(retinanet())
    files = [*Path(runner.work_dir).glob('*.pth'), *Path(other.work_dir).glob('*.pth')]
    assert {file.stem.split('_')[0] for file in files} == {'epoch', 'best', 'interrupted'}
    for file in files:
        checkpoint = _load(file)
        assert list(checkpoint['state_dict']) == list(plain.state_dict())
        plain.load_state_dict(checkpoint['state_dict'], strict=True)
        assert set(checkpoint['distill']['terms']) == set(runner.model.terms.state_dict())
        assert file.stat().st_size < 3e6  # no teacher within


def test_stock_mmdet_loads_the_file_and_detects_the_same(retinanet, distilled, make_runner, coco_folder, capfd):
    runner = make_runner(distilled(), epochs=1, val=True)
    runner.train()
    student_config = Config(dict(runner.cfg.to_dict(), model=retinanet(),
                                 test_dataloader=runner.cfg.val_dataloader.to_dict()))
    capfd.readouterr()
    model = init_detector(student_config, f'{runner.work_dir}/epoch_1.pth', device='cpu')
    output = capfd.readouterr()
    assert 'missing keys' not in output.out + output.err and 'unexpected key' not in output.out + output.err
    image = str(coco_folder / '0.png')
    detected = inference_detector(model, image).pred_instances
    runner.model.eval()
    runner.model.cfg = student_config
    expected = inference_detector(runner.model, image).pred_instances
    assert len(detected) and torch.equal(detected.bboxes, expected.bboxes)
    assert torch.equal(detected.scores, expected.scores)


# Measured at iterations 0, 3 and 6; the run is resumed at 4.
BALANCE = dict(type='Balance', ratio=0.5, interval=3)


@pytest.mark.parametrize('family, weight, classes', [('retinanet', BALANCE, 'DenseClassification'),
                                                     ('faster_rcnn', 1.0, 'RoIClassification')])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(family, weight, classes, request, distilled, make_runner,
                                                             stop_after):
    make = request.getfixturevalue(family)  # Faster R-CNN samples its proposals at random
    model = dict(distilled(), student=make(), teacher=dict(config=make(neck=12), random_teacher=True))
    model['distill']['fgd']['weight'] = weight
    model['distill']['permuted'] = dict(type=classes, treatment='dkpp')  # at random
    make_runner(model, epochs=4, name='straight', val=True).train()
    first = make_runner(model, epochs=4, name='resumed', val=True)
    first.register_hook(stop_after(epochs=2), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = make_runner(model, epochs=4, name='resumed', val=True, resume=True)
    again.train()
    straight, resumed = (_load(Path(again.work_dir).parent / name / 'epoch_4.pth') for name in ('straight', 'resumed'))
    _assert_equal({key: straight[key] for key in ('state_dict', 'distill', 'optimizer', 'param_schedulers')},
                  {key: resumed[key] for key in ('state_dict', 'distill', 'optimizer', 'param_schedulers')})
    assert any('averages' in each for each in straight['distill']['weights'].values()) == (weight == BALANCE)
    assert 'student.backbone' in _table(again) and 'adapters of fgd' in _table(again)


@pytest.fixture
def make_iterating(run_config):
    """Makes the runner of a config that counts iterations: six, a checkpoint after three, validations between."""

    def make(model: dict, sampler: dict, **changes) -> Runner:
        config = run_config(model, val=True, **changes)
        config.train_cfg = ConfigDict(type='IterBasedTrainLoop', max_iters=6, val_interval=2)
        config.train_dataloader.update(sampler=ConfigDict(sampler), batch_size=2)
        config.train_dataloader.dataset.pipeline.insert(2, dict(type='PhotoMetricDistortion'))
        config.default_hooks.checkpoint.update(by_epoch=False, interval=3)
        return Runner.from_cfg(config)

    return make


class StopAfter(Hook):
    """Ends a run after so many iterations."""
    priority = 'LOWEST'

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        if runner.iter + 1 == self.iterations:
            raise KeyboardInterrupt


@pytest.mark.parametrize('batches', [None, dict(type='AspectRatioBatchSampler')])
@pytest.mark.parametrize('sampler, share', [
    (dict(type='InfiniteSampler'), 4), (dict(type='MultiSourceSampler', batch_size=2, source_ratio=[1, 1]), 4),
    (dict(type='DefaultSampler', shuffle=True), 1)])
def test_ranks_count_the_batches_of_an_epoch_by_their_share(sampler, share, batches, retinanet, run_config,
                                                            monkeypatch):
    """MMDetection's data sets have a sampler of batches, by which a loader's own is another."""
    config = run_config(retinanet())
    dataset = config.train_dataloader.dataset
    config.train_dataloader.dataset = ConfigDict(type='ConcatDataset', datasets=[dataset, dataset])
    config.train_dataloader.update(sampler=ConfigDict(sampler), batch_size=2,
                                   **({'batch_sampler': ConfigDict(batches)} if batches else {}))
    loader = Runner.build_dataloader(config.train_dataloader, seed=0)
    monkeypatch.setattr('kd_det.training.finiteness.get_world_size', lambda: 4)
    assert count_batches(SimpleNamespace(train_dataloader=loader)) == len(loader) / share


@pytest.mark.parametrize('sampler', [dict(type='InfiniteSampler'), dict(type='DefaultSampler', shuffle=True)])
def test_a_resumed_run_that_counts_iterations_sees_the_same_images(sampler, faster_rcnn, distilled, make_iterating,
                                                                   monkeypatch):
    """Without workers the images of a batch are changed at random in the process that trains, before its step."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)  # before a loader begins again
    model = dict(distilled(dict(config=faster_rcnn(neck=12), random_teacher=True)), student=faster_rcnn())
    make_iterating(model, sampler, name='straight').train()
    first = make_iterating(model, sampler, name='resumed')
    first.register_hook(StopAfter(3))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = make_iterating(model, sampler, name='resumed', resume=True)
    again.train()
    straight, resumed = (_load(Path(again.work_dir).parent / name / 'iter_6.pth') for name in ('straight', 'resumed'))
    _assert_equal({key: straight[key] for key in ('state_dict', 'distill', 'optimizer', 'param_schedulers')},
                  {key: resumed[key] for key in ('state_dict', 'distill', 'optimizer', 'param_schedulers')})


def test_a_run_that_counts_iterations_with_weights_of_zero_is_a_plain_run(faster_rcnn, distilled, make_iterating):
    states = []
    for name, model in dict(zero=dict(distilled(), student=faster_rcnn(), distill=dict(fgd=dict(type='FGD', weight=0))),
                            plain=faster_rcnn()).items():
        runner = make_iterating(model, dict(type='InfiniteSampler'), name=name)
        runner.train()
        states.append(runner.model.state_dict())
    _assert_equal(*states)


def _table(runner) -> str:
    from kd_det.training.hooks import build_origin_table
    return build_origin_table(runner.model)


def _assert_equal(a, b, path=''):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            _assert_equal(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b)):
            _assert_equal(x, y, f'{path}[{index}]')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def test_whole_runs_with_weights_of_zero_are_plain_runs(faster_rcnn, distilled, make_runner):
    zero = dict(distilled(), student=faster_rcnn(), distill=dict(fgd=dict(type='FGD', weight=0)),
                teacher=dict(config=faster_rcnn(neck=12), random_teacher=True), pseudo_labels=dict(weight=0.0))
    files = []
    for name, model in dict(zero=zero, plain=faster_rcnn()).items():
        runner = make_runner(model, name=name, val=True)  # made just before its training: making it sets the seed
        runner.train()
        files.append(_load(f'{runner.work_dir}/epoch_2.pth'))
    zero, plain = files
    _assert_equal({key: zero[key] for key in ('state_dict', 'optimizer')},
                  {key: plain[key] for key in ('state_dict', 'optimizer')})
    assert 'distill' not in plain


def test_the_tasks_weight_follows_the_runner_without_any_term(distilled, make_runner):
    runner, seen = make_runner(distilled(task_weight=dict(type='Warmup', value=1.0, epochs=2)) | dict(distill={}),
                               epochs=2), []
    runner.model.task_schedule.share_done = lambda progress: seen.append(progress.epoch) or 1.0
    runner.train()
    assert seen == [0.0, 0.5, 1.0, 1.5]


def test_schedules_follow_the_runner(distilled, make_runner):
    model = distilled()
    model['distill']['fgd']['weight'] = dict(type='Warmup', value=1.0, epochs=2)
    runner, seen = make_runner(model, epochs=3), []

    class Recorded(Schedule):

        def __call__(self, progress):
            seen.append(super().__call__(progress))
            return seen[-1]

    runner.model.schedules['fgd'] = Recorded(runner.model.schedules['fgd'])
    runner.train()
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]  # two iterations an epoch


@pytest.mark.parametrize('fault, message', [('partial', 'missing from the file: bbox_head.retina_cls.bias'),
                                            ('absent', 'No such file|no such file|not exist|nowhere.pth')])
def test_a_faulty_teacher_stops_the_run_before_the_first_step(retinanet, distilled, make_runner, teacher_checkpoint,
                                                              fault, message):
    path = teacher_checkpoint if fault == 'partial' else 'nowhere.pth'
    if fault == 'partial':
        checkpoint = _load(path)
        del checkpoint['state_dict']['bbox_head.retina_cls.bias']
        torch.save(checkpoint, path)
    runner = make_runner(distilled(dict(config=retinanet(neck=12), checkpoint=path)))
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        runner.train()
    assert runner.iter == 0 and not list(Path(runner.work_dir).glob('*.pth'))


@pytest.mark.parametrize('score_thr', [0.001, 0.9])  # useless boxes; no boxes at all
def test_preflight_stops_a_teacher_that_detects_nothing(retinanet, distilled, make_runner, teacher_checkpoint,
                                                        score_thr):
    teacher = retinanet(neck=12)
    teacher.test_cfg.score_thr = score_thr
    model = distilled(dict(config=teacher, checkpoint=teacher_checkpoint))
    runner = make_runner(model, val=True, preflight=dict(images=6))
    with pytest.raises(TeacherError, match='Pre-flight: .*mAP.*\n.*Likely causes'):
        runner.train()
    assert runner.iter == 0


def test_preflight_measures_the_teacher_as_stock_mmdet_does(retinanet, make_runner, coco_folder, tmp_path):
    from kd_det.checks.preflight import evaluate_teacher
    from kd_det.teachers import Teacher
    wide = dict(width=8, neck=16)
    runner = make_runner(retinanet(**wide), epochs=40, name='teacher', val=True, optimizer=dict(type='AdamW', lr=5e-3),
                         **{'train_cfg.val_interval': 40, 'default_hooks.checkpoint.interval': 40})
    runner.train()
    expected = runner.val_loop.run()
    caffe = dict(type='DetDataPreprocessor', mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], pad_size_divisor=32)
    student = make_runner(dict(retinanet(), data_preprocessor=caffe), val=True, name='student')
    teacher = Teacher(retinanet(**wide), f'{runner.work_dir}/epoch_40.pth', taps=['neck'],
                      student_preprocessor=student.model.data_preprocessor)
    state = torch.get_rng_state()
    skill = evaluate_teacher(student, teacher, images=64)
    measured = skill.metrics
    assert torch.equal(torch.get_rng_state(), state) and skill.shared == 1
    assert expected['coco/bbox_mAP'] > 0.05  # it has learnt something, so the comparison means something
    assert measured['coco/bbox_mAP'] == pytest.approx(expected['coco/bbox_mAP'], abs=0.005)
    part = evaluate_teacher(student, teacher, images=2).metrics
    assert part['coco/bbox_mAP'] > 0.3 * expected['coco/bbox_mAP']  # the other images are not counted as missed


def test_class_counts_that_differ_are_an_error(retinanet, distilled, make_runner, tmp_path):
    model = MODELS.build(retinanet(neck=12, classes=5))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'five.pth')
    runner = make_runner(distilled(dict(config=retinanet(neck=12, classes=5), checkpoint=str(tmp_path / 'five.pth'))),
                         val=True, preflight=dict(images=4))
    with pytest.raises(TeacherError, match='5 classes apart, but the data has 3'):
        runner.train()


def test_a_teacher_that_something_writes_to_is_noticed(distilled, make_runner):

    class Meddler(Hook):

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            runner.model.teacher.model.backbone.conv1.weight += 1

    runner = make_runner(distilled(), epochs=1)
    runner.register_hook(Meddler())
    with pytest.raises(RuntimeError, match='changed during training'):
        runner.train()


def test_table_of_origins(retinanet, distilled, make_runner, teacher_checkpoint):
    runner = make_runner(distilled(dict(config=retinanet(neck=12), checkpoint=teacher_checkpoint), inherit='bbox_head'),
                         epochs=1)
    runner.train()
    table = _table(runner)
    rows = {line.split('│')[1].strip(): [cell.strip() for cell in line.split('│')[2:-1]] for line in table.splitlines()
            if line.startswith('│')}
    weights = sum(parameter.numel() for parameter in MODELS.build(retinanet(neck=12)).parameters())
    assert rows['teacher'] == ['–', '–', '–', f'{weights:,}', f'{weights:,}']
    backbone = sum(parameter.numel() for parameter in runner.model.backbone.parameters())
    assert rows['student.backbone'][0] == rows['student.backbone'][-1] == f'{backbone:,}'
    assert 'Could not be inherited' in table and 'bbox_head.retina_cls.weight' in table
    assert 'Nothing is inherited: of bbox_head no layer' in table


def test_a_student_that_inherits_something_is_not_told_that_it_does_not(distilled, make_runner):
    runner = make_runner(distilled(inherit='backbone'), epochs=1)
    runner.train()
    assert 'Nothing is inherited' not in _table(runner)


def test_the_log_tells_what_distilling_costs(distilled, make_runner):
    runner = make_runner(distilled(), epochs=1)
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert scalars['train/kd_time'].current() > 0
    features = runner.model.teacher.observe(torch.zeros(4, 3, 64, 64), [(64, 64)] * 4)[0]['neck']
    assert scalars['train/kd_memory'].current() == sum(level.nbytes for level in features) / 2**20


@pytest.mark.parametrize('engine', [dict(precision='bfloat16'), dict(compile=dict(backend='aot_eager')),
                                    dict(fuse=False)])
def test_a_resumed_run_is_the_uninterrupted_one_with_every_option_of_the_engine(retinanet, distilled, make_runner,
                                                                                engine, stop_after):
    model = distilled(dict(config=retinanet(neck=12), random_teacher=True, **engine))
    make_runner(model, epochs=2, name='straight').train()
    first = make_runner(model, epochs=2, name='resumed')
    first.register_hook(stop_after(epochs=1), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = make_runner(model, epochs=2, name='resumed', resume=True)
    again.train()
    straight, resumed = (_load(Path(again.work_dir).parent / name / 'epoch_2.pth') for name in ('straight', 'resumed'))
    _assert_equal({key: straight[key] for key in ('state_dict', 'distill', 'optimizer')},
                  {key: resumed[key] for key in ('state_dict', 'distill', 'optimizer')})


def test_progress_is_told_from_the_first_iteration_to_the_last(retinanet, make_runner):
    lines = []
    runner = make_runner(retinanet(), epochs=2)
    progress = NotebookProgress(lines.append)
    progress.pause = 0.0
    runner.register_hook(progress)
    runner.train()
    counts = [int(line.split()[0]) for line in lines]
    assert counts[0] == 0 and counts[-1] == runner.max_iters and set(counts) == set(range(runner.max_iters + 1))
    assert lines[0].startswith(f'0 of {runner.max_iters} iterations, epoch 1 of 2')
    assert 'epoch 2 of 2, loss ' in lines[-1]
    assert not is_in_notebook()
