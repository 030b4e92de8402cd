"""Distillation configs made out of a student's."""
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from kd_det.config.composition import (
    PAPER,
    RATIO,
    balance_weight,
    distillation_config,
    find_model_family,
    method_terms,
)
from kd_det.config.files import ConfigurationError, load_config, student_config
from kd_det.config.methods import METHOD_ROOT, available_methods

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
TEACHER = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'


def test_every_method_file_is_found_and_holds_its_method():
    methods = available_methods()
    assert set(methods['fgd']) == {'two_stage', 'one_stage', 'anchor_free'}
    assert sorted(file for files in methods.values() for file in files.values()) == sorted(METHOD_ROOT.glob('*.py'))
    for method, files in methods.items():
        for file in files.values():
            terms = load_config(file)[method]
            assert terms and all('type' in term for term in terms.values())


@pytest.mark.parametrize('config, family', [
    ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 'two_stage'),
    ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', 'two_stage'),
    ('retinanet/retinanet_r18_fpn_1x_coco.py', 'one_stage'),
    ('gfl/gfl_r50_fpn_1x_coco.py', 'one_stage'),
    ('rtmdet/rtmdet_s_8xb32-300e_coco.py', 'one_stage'),
    ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 'anchor_free'),
    ('reppoints/reppoints-moment_r50_fpn_1x_coco.py', 'anchor_free'),
    ('yolox/yolox_s_8xb8-300e_coco.py', 'anchor_free'),
    ('detr/detr_r50_8xb2-150e_coco.py', 'detr'),
    ('dino/dino-4scale_r50_8xb2-12e_coco.py', 'detr'),
    ('ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', 'detr'),
])
def test_family_is_told_by_the_heads(config, family):
    assert find_model_family(load_config(f'mmdet::{config}').model) == family


def test_family_of_something_else():
    with pytest.raises(ConfigurationError, match='SOLO has neither roi_head nor bbox_head'):
        find_model_family(dict(type='SOLO', mask_head=dict(type='SOLOHead')))


@pytest.mark.parametrize('method, pair', [('fgd', 'retinanet_r101_r18'), ('querykd', 'dino_r50_r18')])
def test_composed_config_is_the_shipped_one(method, pair):
    shipped = load_config(f'kd_det::{method}_{pair}.py')
    teacher = shipped.model.teacher
    made = distillation_config(
        f'kd_det::baseline_{pair}.py', teacher.config, teacher.checkpoint, method, inherit=(), balance=PAPER)
    assert made.model.pop('inherit') == ()
    assert shipped.pop(method) == made.model.distill
    assert made.to_dict() == shipped.to_dict()


def test_nothing_of_the_students_training_changes():
    student = load_config('mmdet::yolox/yolox_s_8xb8-300e_coco.py')
    before = student.to_dict()
    made = distillation_config(student, TEACHER, 'teacher.pth', 'fgd')
    assert student.to_dict() == before
    assert made.pop('custom_imports').imports == ['kd_det']
    assert student_config(made).to_dict() == before


def test_a_users_imports_stay():
    student = load_config(RETINANET)
    student.custom_imports = dict(imports='json')
    assert distillation_config(student, TEACHER, 'x.pth', 'fgd').custom_imports.imports == ['json', 'kd_det']


@pytest.mark.parametrize('given, written', [
    (None, dict(imports=['kd_det'], allow_failed_imports=False)),
    (dict(imports='json'), dict(imports=['json', 'kd_det'], allow_failed_imports=False)),
    (dict(imports=['kd_det', 'json'], allow_failed_imports=True),
     dict(imports=['kd_det', 'json'], allow_failed_imports=True))])
def test_what_a_student_sets_to_none_is_filled_in(given, written):
    student = load_config(RETINANET)
    student.custom_imports, student.default_hooks = given, None
    made = distillation_config(student, TEACHER, 'x.pth', 'fgd')
    assert made.custom_imports == written and list(made.default_hooks) == ['distill']


def test_family_can_be_chosen():
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'fgd', family='two_stage', inherit=['neck'])
    assert made.model.distill.fgd.alpha == 5e-5
    assert made.model.inherit == ('neck', ) and 'inherit_by' not in made.model


def test_the_rule_of_inheriting_is_written_where_options_reach_its_arguments():
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'none', inherit_by='growth')
    made.merge_from_dict({'model.inherit_by.noise': 0.0})
    assert made.model.inherit_by == dict(rule='growth', noise=0.0) and made.model.inherit == 'auto'


def test_each_method_is_balanced_by_default_and_its_terms_share_the_ratio():
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'frs+mgd', balance=0.3).model.distill
    assert list(made) == ['frs_features', 'frs_classes', 'mgd']
    assert made.mgd.weight == dict(type='mmdet.Balance', ratio=0.3)
    half = dict(type='mmdet.Balance', ratio=0.15)
    assert made.frs_classes.weight == dict(type='mmdet.Warmup', iterations=500, value=half)
    assert distillation_config(RETINANET, TEACHER, 'x.pth', 'mgd').model.distill.mgd.weight.ratio == RATIO


def test_a_method_has_a_ratio_of_its_own_where_its_file_says_so():
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'rm+pkd').model.distill
    assert made.rm.weight == dict(type='mmdet.Balance', ratio=0.2)
    assert made.pkd.weight == dict(type='mmdet.Balance', ratio=RATIO)
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'rm+pkd', balance=RATIO).model.distill
    assert made.rm.weight == made.pkd.weight == dict(type='mmdet.Balance', ratio=RATIO)  # what is asked for wins
    late = dict(type='Start', epochs=1, value=dict(type='Balance', ratio=0.2, interval=5))
    assert balance_weight(late, None, terms=2) == late
    assert balance_weight(late, 0.5, terms=2) == dict(late, value=dict(type='Balance', ratio=0.25, interval=5))


def test_published_weights_on_demand():
    made = distillation_config(RETINANET, TEACHER, 'x.pth', 'frs+mgd', balance=PAPER).model.distill
    assert made.mgd.weight == 2e-5
    assert made.frs_classes.weight == dict(type='mmdet.Warmup', value=0.02, iterations=500)


def test_methods_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr('kd_det.config.methods.METHOD_ROOT', tmp_path)
    (tmp_path / 'a.py').write_text("a = dict(a=dict(type='A'))\n")
    (tmp_path / 'b_one_stage.py').write_text("b = dict(b=dict(type='B'), c=dict(type='C'))\n")
    assert list(method_terms('a+b', 'one_stage')) == ['a', 'b', 'c']
    assert list(method_terms('a', 'two_stage')) == ['a']
    with pytest.raises(ConfigurationError, match="'b' has no weights for two_stage detectors, only for one_stage"):
        method_terms('a+b', 'two_stage')


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigurationError, match="no method 'fgx'. Choose from .*fgd"):
        distillation_config(RETINANET, TEACHER, 'x.pth', 'fgx')


def test_a_sum_names_each_method_once():
    with pytest.raises(ConfigurationError, match="'fgd\\+pkd\\+fgd' names 'fgd' twice"):
        method_terms('fgd+pkd+fgd', 'one_stage')


@pytest.mark.parametrize('method, family, said', [
    ('fgd+ld', '', "'fgd.ld' does not serve this student, by its term 'ld': A RetinaHead predicts no distributions"),
    ('dkd', 'two_stage', "by its term 'dkd': A RetinaNet has no 'roi_head'; it has bbox_head"),
])
def test_a_method_that_does_not_serve_the_student_says_why(method, family, said):
    with pytest.raises(ConfigurationError, match=said):
        distillation_config(RETINANET, TEACHER, 'x.pth', method, family=family)


def test_a_head_that_is_in_no_registry_is_named():
    student = load_config(RETINANET)
    student.model.bbox_head.type = 'MyHead'
    with pytest.raises(ConfigurationError, match="model.bbox_head: there is no 'MyHead'.*custom_imports"):
        distillation_config(student, TEACHER, 'x.pth', 'fgd')


@pytest.mark.parametrize('inherit', ['nek', ['bbox_head', 'nek']])
def test_a_part_that_the_student_lacks_is_named(inherit, monkeypatch):
    monkeypatch.setattr(DefaultScope, '_instance_dict', {})  # as in a process of its own, before there is a run
    with pytest.raises(ConfigurationError,
                       match="no part 'nek'; it has backbone, bbox_head, neck. Nearest: neck."):
        distillation_config(RETINANET, TEACHER, 'x.pth', 'fgd', inherit=inherit)


def test_a_distillation_is_no_student():
    with pytest.raises(ConfigurationError, match='is a distillation already'):
        distillation_config('kd_det::fgd_r101_r18.py', TEACHER, 'x.pth', 'fgd')


def test_a_config_without_a_model_is_no_student():
    with pytest.raises(ConfigurationError, match='no model'):
        distillation_config(Config(dict(train_cfg=None)), TEACHER, 'x.pth', 'fgd')
