import pytest
from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.config.files import load_config
from kd_det.study.pair import adapt_config, hash_data, read_pair
from kd_det.study.runs import identify_run


def test_a_distillation_gives_its_student_and_its_teacher():
    pair = read_pair('kd_det::fgd_retinanet_r101_r18.py')
    assert pair.student.model.type == 'RetinaNet' and 'distill' not in pair.student.default_hooks
    assert pair.teacher.startswith('mmdet::retinanet/retinanet_r101') and pair.checkpoints[0].startswith('https://')
    assert pair.teacher_config().model.backbone.depth == 101


def test_a_pair_and_a_student_may_be_config_objects():
    config = load_config('kd_det::fgd_retinanet_r101_r18.py')
    pair = read_pair(config)
    assert pair.student.model.type == 'RetinaNet' and config.model.type == 'mmdet.DetectionDistiller'
    student = load_config('kd_det::demo/baseline_retinanet_r18.py')
    assert read_pair(config, student=student).student.model == student.model
    with pytest.raises(ConfigurationError, match="PAIR '.*baseline_retinanet_r18.py' is no distillation"):
        read_pair(student)


def test_options_win_over_the_pair():
    pair = read_pair('kd_det::fgd_retinanet_r101_r18.py', student='kd_det::demo/baseline_retinanet_r18.py',
                     teacher='kd_det::demo/teacher_retinanet_r50.py')
    assert pair.student.model.neck.out_channels == 64 and pair.teacher.endswith('teacher_retinanet_r50.py')
    assert pair.checkpoints == ()  # the pair's is not of this teacher


def test_a_checkpoint_that_is_not_there_yet_is_to_be_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = 'kd_det::demo/fgd_faster_rcnn_r101_r18.py'
    assert read_pair(pair).checkpoints == ()
    assert read_pair(pair, checkpoints=['my.pth', 'mine.pth']).checkpoints == ('my.pth', 'mine.pth')


@pytest.mark.parametrize('arguments, message', [
    (dict(pair='kd_det::demo/baseline_retinanet_r18.py'), 'is no distillation'),
    (dict(student='kd_det::demo/baseline_retinanet_r18.py'), 'There is no pair'),
    (dict(), 'There is no pair'),
])
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        read_pair(**arguments)


def test_a_pair_has_one_teacher(tmp_path):
    teacher = dict(config='teacher.py', checkpoint='teacher.pth')
    model = dict(type='DetectionDistiller', student=dict(type='RetinaNet'), teacher=[teacher, teacher], distill=dict())
    Config(dict(model=model)).dump(tmp_path / 'pair.py')
    with pytest.raises(ConfigurationError, match='has 2 teachers: expected one.*--teacher-checkpoint.*@teachers=N'):
        read_pair(str(tmp_path / 'pair.py'))


def test_schedules_stretch_with_the_epochs():
    config = Config(dict(train_cfg=dict(max_epochs=12, val_interval=6), param_scheduler=[
        dict(type='LinearLR', by_epoch=False, begin=0, end=500),
        dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11]),
        dict(type='CosineAnnealingLR', T_max=12, by_epoch=True, convert_to_iter_based=True)]))
    changed = adapt_config(config, epochs=3)
    assert changed.train_cfg == dict(max_epochs=3, val_interval=3)
    warmup, steps, cosine = changed.param_scheduler
    assert warmup.end == 500 and (steps.end, steps.milestones, cosine.T_max) == (3, [2, 3], 3)
    assert config.train_cfg.max_epochs == 12
    with pytest.raises(ConfigurationError, match='does not count in epochs'):
        adapt_config(Config(dict(train_cfg=dict(max_iters=100))), epochs=3)


def test_so_do_those_of_terms():
    stop = dict(type='Stop', value=dict(type='Warmup', value=1.0, iterations=100, begin=4), epochs=9)
    model = dict(type='DetectionDistiller', task_weight=dict(type='Decay', value=1.0, epochs=12, begin=2),
                 distill=dict(fgd=dict(type='FGD', weight=stop), pkd=dict(type='PKD', weight=0.5)),
                 pseudo_labels=[dict(weight=dict(type='Start', value=1.0, epochs=6))])
    changed = adapt_config(Config(dict(train_cfg=dict(max_epochs=12), model=model)), epochs=8).model
    assert (changed.task_weight.epochs, changed.task_weight.begin) == pytest.approx((8, 4 / 3))
    assert changed.distill.fgd.weight == dict(stop, epochs=pytest.approx(6)) and changed.distill.pkd.weight == 0.5
    assert changed.pseudo_labels[0].weight.epochs == pytest.approx(4)


def test_data_is_known_by_its_annotations_and_images(run_config, retinanet, coco_folder, tmp_path):
    import shutil
    before = hash_data(run_config(retinanet(), val=True))
    copied = shutil.copytree(coco_folder, tmp_path / 'copy')
    config = run_config(retinanet(), val=True)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(copied)
    assert hash_data(config) == before  # wherever it lies
    (copied / 'all.json').write_text((copied / 'all.json').read_text() + ' ')
    changed = hash_data(config)
    (copied / '0.png').unlink()
    assert len({before, changed, hash_data(config)}) == 3


def test_identity_is_of_what_counts():
    model = dict(type='DetectionDistiller', teacher=dict(config='a.py', checkpoint='a.pth'))
    first = identify_run(Config(dict(work_dir='a', model=model)), ['data'])
    moved = Config(dict(work_dir='b', model=dict(model, teacher=dict(config='a.py', checkpoint='b.pth'))))
    assert identify_run(moved, ['data']) == first != identify_run(moved, ['other data'])
    moved.model.teacher.config = 'b.py'
    assert identify_run(moved, ['data']) != first
