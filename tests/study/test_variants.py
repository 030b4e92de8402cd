from dataclasses import replace

import pytest
from mmengine.config import Config

from kd_det.config.files import ConfigurationError
from kd_det.study.pair import Pair
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
])
def test_the_twin_is_the_plain_student_in_the_students_settings(name, twin):
    assert find_twin(name) == twin


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
        'none@augment=mixup@epochs=12': 'none',
        'kd': 'none', 'kd@augment=mixup': 'none@augment=mixup', 'kd@epochs=12': 'none@epochs=12',
        'kd@augment=mixup@epochs=12': 'none@augment=mixup@epochs=12'}
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
