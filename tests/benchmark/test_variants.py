import pytest
from mmengine.config import Config

from kd_det.benchmark.pair import Pair
from kd_det.benchmark.variants import Variant, parse_variants, variant_config
from kd_det.configuration import ConfigurationError


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
    assert paper.balance is None and ratio.balance == 2
    assert (inherit.method, inherit.inherit, inherit.is_plain) == ('none', 'auto', False)
    assert (summed.method, summed.inherit, summed.settings) == ('fgd+pkd', (), {'model.distill.fgd.levels': [0, 1]})
    assert summed.folder == 'fgd+pkd@inherit=none@model.distill.fgd.levels=_0,1_'


@pytest.mark.parametrize('text, message', [
    ('fdg', "no method 'fdg'"),
    ('fgd@papers', "no setting '@papers'"),
    ('fgd@balance=much', "a number, got 'much'"),
    ('fgd,pkd,fgd', "names 'fgd' 2 times"),
])
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_variants(text)


def test_options_reach_the_student_and_those_of_the_distillation_its_terms(pair):
    common = Variant('', 'none', settings={'model.bbox_head.stacked_convs': 2, 'model.distill.fgd.temperature': 0.8})
    configs = {variant.name: variant_config(variant, pair, 'teacher.pth')
               for variant in parse_variants('none,fgd@paper', common)}
    assert configs['none'].model.type == 'RetinaNet' and configs['none'].model.bbox_head.stacked_convs == 2
    assert 'distill' not in configs['none'].model
    assert configs['fgd@paper'].model.student == configs['none'].model
    assert configs['fgd@paper'].model.distill.fgd.temperature == 0.8
    assert configs['fgd@paper'].model.teacher.checkpoint == 'teacher.pth'
    assert pair.student.model.bbox_head.stacked_convs == 1  # as it was


def test_inheriting_alone_has_no_terms(pair):
    config = variant_config(parse_variants('inherit')[1], pair, 'teacher.pth')
    assert config.model.type == 'DetectionDistiller' and config.model.distill == {} and config.model.inherit == 'auto'
