import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook

from kd_det.config import ConfigurationError
from kd_det.config.files import load_config
from kd_det.study.identity import hash_data, hash_model, identify_run
from kd_det.study.pair import adapt_config, read_pair


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


@pytest.mark.parametrize('name, epochs, expected', [
    ('yolox_l_s', 12, dict(ends=[1, 11, 12], T_max=11, hook=1)),
    ('yolox_l_s', 2, dict(ends=[1, 2, 3], T_max=2, hook=1)),  # what there is no time for lies behind the end
    ('yolox_l_s', 600, dict(ends=[10, 570, 600], T_max=570, hook=30)),
    ('rtmdet_l_s', 12, dict(ends=[12], T_max=6, hook=11, dynamic=11)),
    ('rtmdet_l_s', 3, dict(ends=[3], T_max=1, hook=3, dynamic=3)),
])
def test_whatever_counts_in_epochs_stretches_with_them(name, epochs, expected):
    """Warm-up, the last epochs of another pipeline, and how often they are validated, and nothing has no length."""
    config = adapt_config(read_pair(f'kd_det::_base_/pairs/{name}.py').student, epochs=epochs)
    schedulers = [each for each in config.param_scheduler if each.get('by_epoch')]
    assert [each.end for each in schedulers] == expected['ends']
    assert all(each.begin < each.end for each in schedulers)
    assert [each.T_max for each in schedulers if 'T_max' in each] == [expected['T_max']]
    hooks = [hook.get('switch_epoch', hook.get('num_last_epochs')) for hook in config.custom_hooks]
    assert [each for each in hooks if each] == [expected['hook']]
    assert [begin for begin, _ in config.train_cfg.get('dynamic_intervals', ())] == (
        [expected['dynamic']] if 'dynamic' in expected else [])


def test_hooks_that_are_objects_are_refused():
    """What they count in epochs would stay as it is."""
    config = Config(dict(train_cfg=dict(max_epochs=12), custom_hooks=[dict(type='EMAHook', begin_epoch=4),
                                                                      EMAHook(begin_epoch=4)]))
    with pytest.raises(ConfigurationError, match=r'custom_hooks\[1\]: .* got an object of EMAHook. Give dict\('):
        adapt_config(config, epochs=3)


def test_validation_begins_within_the_epochs():
    config = Config(dict(train_cfg=dict(max_epochs=4, val_begin=3), param_scheduler=[]))
    assert [adapt_config(config, epochs=epochs).train_cfg.val_begin for epochs in (1, 2, 8)] == [1, 2, 6]


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
    before = hash_data(run_config(retinanet(), val=True))
    copied = shutil.copytree(coco_folder, tmp_path / 'copy')
    config = run_config(retinanet(), val=True)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = str(copied)
    assert hash_data(config) == before  # wherever it lies
    (copied / 'all.json').write_text((copied / 'all.json').read_text() + ' ')
    changed = hash_data(config)
    for name in ('.DS_Store', '._0.png', 'Thumbs.db'):  # which desktops leave
        (copied / name).touch()
    assert hash_data(config) == changed
    (copied / '0.png').unlink()
    assert len({before, changed, hash_data(config)}) == 3
    with suppress(OSError):  # where names have to be UTF-8
        (copied / os.fsdecode(b'caf\xe9.jpg')).touch()
    assert hash_data(config)


def test_images_in_folders_are_seen_and_what_else_lies_there_is_not(run_config, retinanet, coco_folder, tmp_path):
    root = tmp_path / 'data'
    (root / 'images' / 'a').mkdir(parents=True)
    content = json.loads((coco_folder / 'all.json').read_text())
    for image in content['images']:
        shutil.copy(coco_folder / image['file_name'], root / 'images' / 'a')
        image['file_name'] = f"a/{image['file_name']}"
    (root / 'all.json').write_text(json.dumps(content))
    config = run_config(retinanet(), val=True)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.update(data_root=str(root), ann_file='all.json', data_prefix=dict(img='images/'))
    before = hash_data(config)
    (root / 'images' / 'work_dir').mkdir()
    (root / 'images' / 'work_dir' / 'log.txt').write_text('epoch 1')
    assert hash_data(config) == before
    (root / content['images'][0]['file_name'].join(['images/', ''])).write_bytes(b'another')
    assert hash_data(config) != before


def test_lists_of_names_stand_for_all_files_of_these_names(run_config, retinanet, coco_folder, tmp_path):
    """As VOC has them: the boxes are in XML."""
    root = tmp_path / 'VOC2007'
    for folder in ('ImageSets', 'JPEGImages', 'Annotations', 'work_dir'):
        (root / folder).mkdir(parents=True)
    (root / 'ImageSets' / 'train.txt').write_text('0\n1\n')
    for name in '012':
        shutil.copy(coco_folder / '0.png', root / 'JPEGImages' / f'{name}.png')
        (root / 'Annotations' / f'{name}.xml').write_text('<annotation><xmin>1</xmin></annotation>')
    config = run_config(retinanet(), val=True)
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.update(type='VOCDataset', data_root=str(tmp_path), ann_file='VOC2007/ImageSets/train.txt',
                              data_prefix=dict(sub_data_root='VOC2007/'))
    before = hash_data(config)
    (root / 'work_dir' / 'log.txt').write_text('epoch 1')
    (root / 'Annotations' / '2.xml').write_text('of no image in the list')
    assert hash_data(config) == before
    (root / 'Annotations' / '1.xml').write_text('<annotation><xmin>2</xmin></annotation>')
    changed = hash_data(config)
    (root / 'JPEGImages' / '0.png').write_bytes(b'another')
    assert len({before, changed, hash_data(config)}) == 3


def test_weights_that_a_run_begins_from_count_by_their_content(tmp_path):

    def identify(name):
        backbone = dict(type='ResNet', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / name)))
        return identify_run(Config(dict(model=dict(type='RetinaNet', backbone=backbone))))

    assert identify('a.pth') != identify('b.pth')  # where there are none, their names
    for name in ('a.pth', 'b.pth'):
        (tmp_path / name).write_bytes(b'weights')
    first = identify('a.pth')
    assert first == identify('b.pth')
    (tmp_path / 'b.pth').write_bytes(b'others')
    assert first == identify('a.pth') != identify('b.pth')


def test_identity_is_of_what_counts():
    model = dict(type='DetectionDistiller', teacher=dict(config='a.py', checkpoint='a.pth'))
    first = identify_run(Config(dict(work_dir='a', model=model)), ['data'])
    moved = Config(dict(work_dir='b', model=dict(model, teacher=dict(config='a.py', checkpoint='b.pth'))))
    assert identify_run(moved, ['data']) == first != identify_run(moved, ['other data'])
    moved.model.teacher.config = 'elsewhere/a.py'
    assert identify_run(moved, ['data']) == first  # what is in it, the inputs say
    moved.model.teacher.fuse = False
    assert identify_run(moved, ['data']) != first


def test_identity_is_not_of_where_the_data_lies():

    def identify(root, more='', **changes):
        dataset = dict(data_root=root, ann_file='train.json', data_prefix=dict(img='train/'))
        joined = dict(type='ConcatDataset', datasets=[dataset, dict(dataset, data_root=f'{root}{more}')])
        return identify_run(Config(dict(
            data_root=root, train_dataloader=dict(dataset=joined), val_dataloader=dict(dataset=dataset),
            val_evaluator=dict(ann_file=f"{root.rstrip('/')}/val.json"), **changes)), ['data'])

    first = identify('/data/coco/')
    assert first == identify('coco data') == identify('..') == identify('./coco') == identify('a//b/../coco/')
    assert first != identify('coco', more='_2')  # another folder, whose name begins alike
    assert identify('coco', more='_2') == identify('/elsewhere', more='/too')
    assert identify('coco', load_from='coco.pth') == identify('data', load_from='coco.pth') != first


def test_a_teacher_is_known_by_its_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = dict(type='RetinaNet', test_cfg=dict(score_thr=0.05))
    for name, content in (('a.py', model), ('b.py', model), ('c.py', dict(model, test_cfg=dict(score_thr=0.9)))):
        Config(dict(model=content, train_cfg=dict(max_epochs=len(name)))).dump(name)
    Path('d.py').write_text("_base_ = './a.py'\nwork_dir = 'elsewhere'\n")
    assert hash_model('a.py') == hash_model(str(tmp_path / 'b.py')) == hash_model('d.py') != hash_model('c.py')
