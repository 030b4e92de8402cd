import copy
from dataclasses import replace
from pathlib import Path

import pytest
from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from kd_det.config.files import ConfigurationError
from kd_det.study.pair import Pair, read_pair
from kd_det.study.series import count_teachers
from kd_det.study.variants import Variant, find_twin, parse_variants, variant_config


@pytest.fixture
def pair(retinanet, tmp_path):
    teacher = tmp_path / 'teacher.py'
    Config(dict(model=retinanet(depth=50))).dump(teacher)
    return Pair(Config(dict(model=retinanet())), str(teacher))


def test_plain_student_comes_first_whether_named_or_not():
    for text in ('fgd,pkd', 'fgd,none,pkd', 'none,fgd,pkd'):
        assert [variant.name for variant in parse_variants(text)] == ['none', 'fgd', 'pkd']


def test_settings_of_a_variant_win_over_the_common_ones():
    common = Variant('', 'none', balance=0.5, inherit=('neck', ))
    plain, fgd, paper, ratio, inherit, summed = parse_variants(
        'fgd,fgd@paper,fgd@balance=2,inherit,fgd+pkd@inherit=none@model.distill.fgd.levels=[0,1]', common)
    assert plain.is_plain and not plain.inherit
    assert (fgd.balance, fgd.inherit) == (0.5, ('neck', ))
    assert paper.balance == 'paper' and ratio.balance == 2
    assert (inherit.method, inherit.inherit, inherit.is_plain) == ('none', 'auto', False)
    assert (summed.method, summed.inherit, summed.settings) == ('fgd+pkd', (), {'model.distill.fgd.levels': [0, 1]})
    assert summed.folder == 'fgd+pkd@inherit=none@model.distill.fgd.levels=_0,1_'


@pytest.mark.parametrize('text, message', [
    ('fdg', "no method 'fdg'"),
    ('fgd@papers', "no setting '@papers'"),
    ('fgd@balance=much', "a number of at least 0, got 'much'"),
    ('fgd,pkd,fgd', "names 'fgd' 2 times"),
    ('fgd@teachers=0', "a number of 1 or more, got '0'"),
    ('fgd@teachers=few', "a number of 1 or more, got 'few'"),
    ('none@teachers=3', "none@teachers=3: only a method's terms learn from several teachers"),
    ('inherit@teachers=2', 'such as kd@teachers=2, or leave @teachers out'),
    ('fgd@teachers=2@policy=agnet', "expected @policy=uniform, .*, agent, got 'agnet'"),
    ('auto@teachers=2', 'auto chooses between the methods of one teacher'),
    ('auto:pkd+fdg', "no method 'fdg'"),
    ('fgd@policy=agent', 'fgd@policy=agent: a policy chooses between several teachers: give @teachers=N too'),
    ('fgd@epochs=long', "@epochs=N, a number of 1 or more, got 'long'"),
    ('fgd@augment=mosaik', "@augment=mosaic, mixup, a sum of them, or none, got 'mosaik'"),
])
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_variants(text)


def test_a_ratio_that_is_asked_for_wins_over_the_methods_own(pair):
    common = {text: parse_variants(text)[1] for text in ('rm', 'rm@balance=1', 'rm+pkd@balance=0.5')}
    weights = {text: variant_config(variant, pair, ['teacher.pth']).model.distill.rm.weight.ratio
               for text, variant in common.items()}
    assert weights == {'rm': 0.2, 'rm@balance=1': 1, 'rm+pkd@balance=0.5': 0.5}


def test_options_reach_the_student_and_those_of_the_distillation_its_terms(pair):
    common = Variant('', 'none', settings={'model.bbox_head.stacked_convs': 2, 'model.distill.fgd.temperature': 0.8})
    configs = {variant.name: variant_config(variant, pair, ['teacher.pth'])
               for variant in parse_variants('none,fgd@paper', common)}
    assert configs['none'].model.type == 'RetinaNet' and configs['none'].model.bbox_head.stacked_convs == 2
    assert 'distill' not in configs['none'].model
    assert configs['fgd@paper'].model.student == configs['none'].model
    assert configs['fgd@paper'].model.distill.fgd.temperature == 0.8
    assert configs['fgd@paper'].model.teacher.checkpoint == 'teacher.pth'
    assert pair.student.model.bbox_head.stacked_convs == 1  # as it was


def test_inheriting_alone_has_no_terms(pair):
    config = variant_config(parse_variants('inherit')[1], pair, ['teacher.pth'])
    assert config.model.type == 'mmdet.DetectionDistiller'
    assert config.model.distill == {} and config.model.inherit == 'auto'
    config = variant_config(parse_variants('inherit@model.inherit_by=selection')[1], pair, ['teacher.pth'])
    assert config.model.inherit_by == 'selection' and 'inherit_by' not in config.model.student


@pytest.mark.parametrize('name, twin', [
    ('fgd', 'none'),
    ('none', 'none'),
    ('inherit', 'none'),
    ('fgd@paper@teachers=3@model.distill.fgd.temperature=0.8', 'none'),
    ('fgd@augment=none', 'none'),
    ('fgd@teachers=3@augment=mosaic+mixup', 'none@augment=mosaic+mixup'),
    ('inherit@augment=mixup@train_cfg.max_epochs=8', 'none@augment=mixup@train_cfg.max_epochs=8'),
    ('none@augment=mixup', 'none'),
    ('fgd@epochs=24@paper', 'none@epochs=24'),
    ('none@epochs=24', 'none'),
    ('fgd@noise=0.20@augment=mixup+mosaic', 'none@noise=0.2@augment=mosaic+mixup'),
    ('none@shift=0.10', 'none@shift=0.1'),
])
def test_the_twin_is_the_plain_student_in_the_students_settings(name, twin):
    assert find_twin(name) == twin


def test_lists_within_lists_are_one_value():
    named = parse_variants('fgd@train_dataloader.x=[[1,2],[3]],kd@model.y=[(640,640),(320,320)],pkd')
    assert [variant.name for variant in named] == [
        'none', 'none@train_dataloader.x=[[1,2],[3]]', 'none@model.y=[(640,640),(320,320)]',
        'fgd@train_dataloader.x=[[1,2],[3]]', 'kd@model.y=[(640,640),(320,320)]', 'pkd']
    assert named[3].settings == {'train_dataloader.x': [[1, 2], [3]]}


def test_twins_take_part_whether_named_or_not():
    common = Variant('', 'none', balance=0.5, settings={'train_cfg.max_epochs': 2})
    variants = parse_variants('kd@augment=none,kd@augment=mosaic,pkd@augment=mosaic,none@augment=mixup', common)
    assert [variant.name for variant in variants] == [
        'none', 'none@augment=mosaic', 'kd@augment=none', 'kd@augment=mosaic', 'pkd@augment=mosaic',
        'none@augment=mixup']
    twin = variants[1]
    assert twin.is_plain and twin.augment == ('mosaic', ) and twin.settings == common.settings


def test_each_variant_is_there_for_each_length_with_a_twin_as_long(pair):
    pair.student.train_cfg = dict(max_epochs=4)
    variants = parse_variants('kd,kd@augment=mixup', Variant('', 'none', epochs=6), [12])
    assert {variant.name: find_twin(variant.name) for variant in variants} == {
        'none': 'none', 'none@augment=mixup': 'none', 'none@epochs=12': 'none',
        'none@augment=mixup@epochs=12': 'none@epochs=12',
        'kd': 'none', 'kd@augment=mixup': 'none@augment=mixup', 'kd@epochs=12': 'none@epochs=12',
        'kd@augment=mixup@epochs=12': 'none@augment=mixup@epochs=12'}
    for name in ('none@noise=0.5@epochs=12', 'none@epochs=12@optim_wrapper.optimizer.lr=0.1'):
        chain = [name]
        while chain[-1] != 'none':
            chain.append(find_twin(chain[-1]))
        assert chain == [name, 'none@epochs=12', 'none']  # what noise does is told of the one that trained as long
        assert [each.name for each in parse_variants(name)] == chain[::-1]
    lengths = {variant.name: variant_config(replace(variant, augment=()), pair, ['x.pth']).train_cfg.max_epochs
               for variant in variants}
    assert all(epochs == (12 if '12' in name else 6) for name, epochs in lengths.items())
    with pytest.raises(ConfigurationError, match='kd@epochs=3: it has an @epochs of its own beside several'):
        parse_variants('kd@epochs=3', Variant('', 'none', epochs=6), [12])


def test_a_setting_of_a_term_holds_for_all_teachers(pair):
    variant = parse_variants('pkd@teachers=3@balance=0.6@model.distill.pkd.levels=2')[1]
    model = variant_config(variant, pair, ['a.pth', 'b.pth', 'c.pth', 'd.pth']).model
    assert [teacher.checkpoint for teacher in model.teacher] == ['a.pth', 'b.pth', 'c.pth']
    assert list(model.distill) == ['pkd_1', 'pkd_2', 'pkd_3'] and model.inherit == 'auto'
    for index, term in enumerate(model.distill.values()):
        assert (term.levels, term.teacher, term.weight.type) == (2, index, 'mmdet.Balance')
        assert term.weight.ratio == pytest.approx(0.2)
    first = variant_config(parse_variants('pkd')[1], pair, ['a.pth', 'b.pth']).model
    assert first.teacher.checkpoint == 'a.pth' and list(first.distill) == ['pkd']


def test_weights_of_other_than_the_teachers_that_are_needed_are_told():
    variants = parse_variants('kd@teachers=3,kd')
    assert count_teachers(variants, []) == count_teachers(variants, ['a', 'b', 'c']) == 3
    with pytest.raises(ConfigurationError, match='kd@teachers=3: 1 checkpoint is given. Give 3'):
        count_teachers(variants, ['a'])
    with pytest.raises(ConfigurationError, match='2 checkpoints are given, but no method asks for more than 1.*=2'):
        count_teachers(parse_variants('kd'), ['a', 'b'])


def test_a_policy_chooses_between_unlike_teachers(pair, faster_rcnn, tmp_path):
    Config(dict(model=faster_rcnn())).dump(tmp_path / 'other.py')
    pair = replace(pair, further=(str(tmp_path / 'other.py'), ), student=Config(dict(
        model=pair.student.model.to_dict(), train_dataloader=dict(dataset=dict(type='CocoDataset')))))
    _, shared, agent = parse_variants('pkd@teachers=2,pkd@teachers=2@policy=agent@model.policy.interval=7')
    assert find_twin(agent.name) == 'none' and (agent.policy, shared.policy) == ('agent', '')
    shared, agent = (variant_config(each, pair, ['a.pth', 'b.pth']) for each in (shared, agent))
    assert agent.model.policy == dict(type='Agent', interval=7) and 'policy' not in shared.model
    assert [each['config'] for each in agent.model.teacher] == [pair.teacher, pair.further[0]]
    assert agent.model.distill.pkd_2.weight.ratio == 2 * shared.model.distill.pkd_2.weight.ratio
    assert agent.train_dataloader.dataset.type == 'mmdet.HeldOut'
    auto = variant_config(parse_variants('auto:pkd+fgd')[1], pair, ['a.pth'])
    assert auto.model.policy == dict(type='Bandit', arms=dict(pkd=['pkd'], fgd=['fgd']))


@pytest.fixture
def labelled(pair, run_config, retinanet):
    """The pair whose student has data of the classes blue, green and red."""
    return replace(pair, student=run_config(retinanet(), val=True))


def test_labels_of_the_training_images_alone_are_spoiled(labelled):
    variants = parse_variants('kd@noise=0.2@shift=0.1,kd@without=red+blue,kd@noise=0')
    assert [variant.name for variant in variants] == [
        'none', 'none@noise=0.2@shift=0.1', 'none@without=red+blue', 'kd@noise=0.2@shift=0.1', 'kd@without=red+blue',
        'kd@noise=0']
    before = labelled.student.to_dict()
    configs = {each.name: variant_config(each, labelled, ['teacher.pth'], seed=5) for each in variants}
    assert labelled.student.to_dict() == before
    noise = dict(type='mmdet.NoisyLabels', share=0.2, classes=3, shift=0.1, seed=5)
    for name, spoiled in (('noise=0.2@shift=0.1', [noise]),
                          ('without=red+blue', [dict(type='mmdet.WithoutClasses', labels=[0, 2])]), ('noise=0', [])):
        for config in (configs[f'kd@{name}'], configs.get(f'none@{name}', configs['none'])):
            of_config = config.to_dict()
            pipeline = of_config['train_dataloader']['dataset'].pop('pipeline')
            expected = before['train_dataloader']['dataset']['pipeline']
            assert pipeline == [*expected[:2], *(spoiled if config is not configs['none'] else []), *expected[2:]]
            assert of_config['val_dataloader'] == before['val_dataloader']
    assert configs['kd@noise=0'].model.teacher.config == labelled.teacher


@pytest.mark.parametrize('name, twin', [
    ('kd@noise=0.2@paper', 'none@noise=0.2'), ('none@noise=0.2', 'none'), ('kd@noise=0', 'none'),
    ('kd@shift=0.0', 'none'), ('kd@without=none', 'none'), ('pseudo_labels@without=red', 'none@without=red'),
    ('kd@pseudo_labels=0.5', 'none'), ('kd@model.pseudo_labels.weight=0.5@pseudo_labels', 'none')])
def test_spoiled_labels_are_the_twins_too(name, twin):
    assert find_twin(name) == twin


def test_labels_are_spoiled_before_images_are_mixed(labelled):
    variant = parse_variants('none@noise=0.2@augment=mosaic')[1]
    dataset = variant_config(variant, labelled).train_dataloader.dataset
    assert [each.type for each in dataset.dataset.pipeline] == ['LoadImageFromFile', 'LoadAnnotations',
                                                                'mmdet.NoisyLabels']
    labelled.student.train_dataloader.dataset.pipeline.insert(2, dict(type='NoisyLabels', shift=0.1))
    own = variant_config(parse_variants('none@augment=mosaic')[1], labelled).train_dataloader.dataset
    assert [each.type for each in own.dataset.pipeline] == ['LoadImageFromFile', 'LoadAnnotations', 'NoisyLabels']


def test_boxes_of_the_teacher_are_a_method_of_their_own(pair):
    plain, alone, both = parse_variants('pseudo_labels,kd@pseudo_labels=0.7@model.pseudo_labels.iou=0.4')
    assert plain.is_plain and not alone.is_plain and (alone.method, alone.inherit, alone.balance) == ('none', (), None)
    config = variant_config(alone, pair, ['teacher.pth'])
    assert config.model.pseudo_labels == dict(score=0.5) and config.model.distill == {} and not config.model.inherit
    config = variant_config(both, pair, ['teacher.pth'])
    assert config.model.pseudo_labels == dict(score=0.7, iou=0.4) and list(config.model.distill) == ['kd']
    assert 'pseudo_labels' not in variant_config(plain, pair).model


@pytest.mark.parametrize('text, message', [
    ('kd@noise=1.5', r"expected @noise=SHARE, a number from 0 to 1, got '1.5'"),
    ('kd@noise', "@noise=SHARE, a number from 0 to 1, got ''"),
    ('kd@shift=0.6', "@shift=SHARE, a number from 0 to 0.5, got '0.6'"),
    ('kd@pseudo_labels=sure', "@pseudo_labels=SHARE, a number from 0 to 1, got 'sure'"),
    ('kd@without', "no setting '@without'"),
    ('kd@without=rde', "@without=rde: the training data has no class 'rde'. Nearest: red"),
    ('kd@without=red+red', r"@without=red\+red names 'red' 2 times"),
    ('kd@without=red+blue+green', 'the training data has no other class, so nothing would be left'),
])
def test_what_is_wrong_of_labels_is_named(text, message, labelled):
    with pytest.raises(ConfigurationError, match=message):
        variant_config(parse_variants(text)[-1], labelled, ['teacher.pth'])


def test_without_labels_there_is_nothing_to_spoil(labelled):
    labelled.student.train_dataloader.dataset.pipeline.pop(1)
    with pytest.raises(ConfigurationError, match='change the labels that LoadAnnotations loads'):
        variant_config(parse_variants('none@noise=0.1')[-1], labelled)
    labelled.student.train_dataloader.dataset.pipeline.insert(1, dict(type='LoadAnnotations', with_bbox=True))
    labelled.student.train_dataloader.dataset.metainfo.classes = ('one', )
    with pytest.raises(ConfigurationError, match='has one class, one: no label of it can be wrong'):
        variant_config(parse_variants('none@noise=0.1')[-1], labelled)
    moved = variant_config(parse_variants('none@shift=0.1')[-1], labelled).train_dataloader.dataset.pipeline[2]
    assert TRANSFORMS.build(moved).shift == 0.1  # of one class, too


def test_labels_stay_spoiled_where_a_hook_exchanges_the_pipeline(labelled):
    """As RTMDet's second stage does, whose last epochs would else see true labels, and the class that was left out."""
    first = labelled.student.train_dataloader.dataset.pipeline
    labelled.student.custom_hooks = [dict(type='EMAHook'), dict(type='PipelineSwitchHook', switch_epoch=2,
                                                                switch_pipeline=[*first, dict(type='RandomFlip')])]
    config = variant_config(parse_variants('none@noise=0.2@without=red')[-1], labelled, seed=3)
    spoiling, second = config.train_dataloader.dataset.pipeline[2:4], config.custom_hooks[1].switch_pipeline
    assert [each.type for each in spoiling] == ['mmdet.NoisyLabels', 'mmdet.WithoutClasses']
    assert second == [*first[:2], *spoiling, *first[2:], dict(type='RandomFlip')]
    rtmdet = variant_config(parse_variants('none@without=person')[-1], read_pair('kd_det::_base_/pairs/rtmdet_l_s.py'))
    pipelines = [rtmdet.train_dataloader.dataset.pipeline, rtmdet.custom_hooks[1].switch_pipeline]
    assert [[each.type for each in pipeline].count('mmdet.WithoutClasses') for pipeline in pipelines] == [1, 1]
    other = copy.deepcopy(labelled.student.train_dataloader.dataset)
    other.metainfo = dict(classes=('red', 'green', 'blue'))
    labelled.student.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        labelled.student.train_dataloader.dataset, other])
    with pytest.raises(ConfigurationError, match='PipelineSwitchHook gives all training data one pipeline'):
        variant_config(parse_variants('none@without=red')[-1], labelled)


def test_names_are_folders_however_long_or_odd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long = [f"none@model.backbone.depth={'1' * 200}{number}" for number in range(2)]
    folders = [each.folder for each in parse_variants(long)[1:]]
    for folder in folders:
        Path(folder).mkdir()  # and not twice
    assert [each.name for each in parse_variants(['none@without=red,blue', 'inherit'])] == [
        'none', 'none@without=red,blue', 'inherit']  # a list is not split at commas
    for digit in ('²', '0', '-1'):
        with pytest.raises(ConfigurationError, match=f"expected @epochs=N, a number of 1 or more, got '{digit}'"):
            parse_variants(f'none@epochs={digit}')


@pytest.mark.parametrize('settings', ['alpha=1@beta=0', 'alpha=0@beta=1', 'form=coupled@beta=1'])
def test_a_part_of_dkd_is_a_setting(settings, pair, faster_rcnn, tmp_path):
    Config(dict(model=faster_rcnn(depth=50))).dump(tmp_path / 'teacher.py')
    pair = Pair(Config(dict(model=faster_rcnn())), str(tmp_path / 'teacher.py'))
    name = 'dkd' + ''.join(f'@model.distill.dkd.{each}' for each in settings.split('@'))
    term = variant_config(parse_variants(name)[1], pair, ['teacher.pth']).model.distill.dkd
    assert all(str(term[key]) == value for key, value in (each.split('=') for each in settings.split('@')))
