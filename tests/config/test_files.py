"""Reading configs, and deriving the plain student's and the one on another data root."""
import pytest
from mmengine.config import Config

from kd_det.config.files import (
    CONFIG_ROOT,
    ConfigurationError,
    get_type_name,
    is_distillation,
    list_hooks,
    list_imports,
    list_leaf_datasets,
    load_config,
    rename_config,
    set_data_root,
    student_config,
    student_model,
    training_pipelines,
)
from kd_det.config.options import merge_options


@pytest.mark.parametrize('name', [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 'kd_det::fgd_r101_r18.py', CONFIG_ROOT / 'fgd_r101_r18.py',
])
def test_load_config_reads_files_and_packages(name):
    assert 'type' in load_config(name).model


def test_missing_config_names_the_file():
    with pytest.raises(FileNotFoundError, match="no config file 'nowhere.py'"):
        load_config('nowhere.py')
    with pytest.raises(FileNotFoundError, match='nowhere.py'):
        load_config('kd_det::nowhere.py')
    with pytest.raises(ConfigurationError, match='nowhere.py'):
        load_config('mmdet::retinanet/nowhere.py')
    with pytest.raises(ConfigurationError, match='nopackage'):
        load_config('nopackage::folder/file.py')


@pytest.mark.parametrize('text, said', [
    ('model = dict(\n', 'not valid Python.*line 1'),
    ('model = dict(depth=unknown)\n', "NameError: name 'unknown' is not defined"),
    ("_base_ = './nowhere.py'\n", 'nowhere.py'),
    ("_base_ = ['mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/schedules/schedule_2x.py']\n",
     'Duplicate key'),
    ("custom_imports = dict(imports=['no_such_module'])\n", 'no_such_module'),
    ('from mmdet.models import RetinaHed\nmodel = dict(type=RetinaHed)\n', 'Failed to import RetinaHed'),
    ('import torch.optim as optim\noptim_wrapper = dict(optimizer=dict(type=optim.Sdg))\n', 'Sdg'),
])
def test_malformed_config_is_one_clear_error(tmp_path, text, said):
    file = tmp_path / 'broken.py'
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=f'(?s)broken.py.*{said}'):
        load_config(file)


def test_student_config_is_the_twin():
    plain = student_config(load_config('kd_det::fgd_r101_r18.py')).to_dict()
    twin = load_config('kd_det::baseline_faster_rcnn_r101_r18.py').to_dict()
    assert {**twin, 'fgd': plain['fgd']} == plain


def test_student_config_leaves_a_plain_detector_and_its_argument_alone():
    config = load_config('kd_det::fgd_yolox_l_s.py')
    before = config.to_dict()
    assert [hook.type
            for hook in student_config(config).custom_hooks] == ['YOLOXModeSwitchHook', 'SyncNormHook', 'EMAHook']
    assert config.to_dict() == before
    plain = load_config('kd_det::baseline_yolox_l_s.py')
    assert student_config(plain).to_dict() == plain.to_dict()


def test_student_model_asks_for_a_model():
    with pytest.raises(ConfigurationError, match='no model'):
        student_model(Config(dict(train_cfg=None)))


@pytest.mark.parametrize('new', ['/new/place', '/new/place/'])
@pytest.mark.parametrize('old', ['data/coco/', 's3://bucket/coco/'])
def test_data_root_moves_every_path(old, new, data_config):
    config = data_config(old)
    set_data_root(config, new)
    assert config.to_dict() == data_config('/new/place/').to_dict()


def test_data_root_moves_all_of_mmdets_own_configs():
    config = load_config('mmdet::yolox/yolox_s_8xb8-300e_coco.py')
    set_data_root(config, '/new')
    assert 'data/coco' not in str(config.to_dict())
    assert config.val_evaluator.ann_file == '/new/annotations/instances_val2017.json'
    assert config.train_dataloader.dataset.dataset.data_root == '/new/'


def test_data_root_that_is_not_there():
    with pytest.raises(ConfigurationError, match='no data_root'):
        set_data_root(Config(dict(model=dict(type='RetinaNet'))), '/new')


def test_renamed_keeps_all_but_the_name(tmp_path):
    config = load_config('kd_det::fgd_r101_r18.py')
    other = rename_config(config, tmp_path / 'other.py')
    assert other.to_dict() == config.to_dict() and other.filename == str(tmp_path / 'other.py')
    other.dump(other.filename)
    assert load_config(other.filename).to_dict() == config.to_dict()


PURE_PYTHON = '''
from mmengine.config import read_base
from mmcv.ops import RoIAlign, nms
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import pseudo_collate
from mmengine.model import PretrainedInit
from mmdet.datasets import CocoDataset
from mmdet.models import FPN, RPNHead, ResNet, RetinaNet
from torch.optim import SGD
import torch.nn as nn

from kd_det.distillers import Balance, DetectionDistiller
from kd_det.training import DistillHook
from kd_det.losses import FGD

default_scope = None
model = dict(
    type=DetectionDistiller,
    student=dict(type=RetinaNet, backbone=dict(type=ResNet, depth=18, norm_cfg=dict(type=nn.BatchNorm2d),
                                               init_cfg=dict(type=PretrainedInit, checkpoint='weights.pth')),
                 neck=dict(type=FPN), roi_layer=dict(type=RoIAlign, output_size=7),
                 test_cfg=dict(nms=dict(type=nms, iou_threshold=0.5))),
    teacher=dict(config='teacher.py', checkpoint='old/teacher.pth'),
    distill=dict(fgd=dict(type=FGD, weight=dict(type=Balance))))
train_dataloader = dict(dataset=dict(type=CocoDataset, data_root='old/', pipeline=[dict(type=LoadImageFromFile)]),
                        collate_fn=dict(type=pseudo_collate))
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.1))
custom_hooks = [dict(type=DistillHook)]
train_cfg = dict(max_epochs=1)
'''


@pytest.fixture
def pure_python(tmp_path):
    (tmp_path / 'pure_python.py').write_text(PURE_PYTHON)
    return load_config(tmp_path / 'pure_python.py')


def test_a_pure_python_config_is_the_same_once_it_was_saved(pure_python, tmp_path):
    from mmdet.models import RetinaNet
    from mmengine.dataset import pseudo_collate
    merge_options(pure_python, {'data_root': '/new', 'train_cfg.max_epochs': 2})
    moved = rename_config(pure_python, tmp_path / 'saved.py')
    moved.dump(moved.filename)
    read = load_config(moved.filename)
    assert '<' not in moved.pretty_text and read.to_dict() == moved.to_dict() == pure_python.to_dict()
    for config in (pure_python, moved, read):
        assert config.model.student.type is RetinaNet and config.train_dataloader.collate_fn.type is pseudo_collate
        assert config.train_cfg.max_epochs == 2 and config.train_dataloader.dataset.data_root == '/new/'
        # What MMDetection looks up by its bare name alone, so that it reads the saved file, too.
        assert config.model.student.test_cfg.nms.type == 'nms' and config.model.student.roi_layer.type == 'RoIAlign'
        assert config.model.student.backbone.init_cfg.type == 'Pretrained'
        assert config.train_dataloader.dataset.pipeline[0].type == 'LoadImageFromFile'
        assert is_distillation(config) and student_model(config).type is RetinaNet
        assert student_config(config).custom_hooks == [] and not is_distillation(student_config(config))


def test_types_are_told_however_they_are_written(pure_python):
    from kd_det.losses import FGD
    for written in ('FGD', 'mmdet.FGD', 'kd_det.losses.FGD', 'kd_det.losses.fgd.FGD', FGD):
        assert get_type_name(dict(type=written)) == 'FGD'
    assert get_type_name(dict(type=len)) == 'len' and get_type_name(pure_python.model.distill.fgd) == 'FGD'
    assert [get_type_name(nothing) for nothing in (None, 'FGD', {}, dict(type=None), [dict(type='FGD')])] == [''] * 5


def test_a_type_that_only_looks_like_a_modules_stays(tmp_path):
    (tmp_path / 'config.py').write_text("model = dict(type='no_such_package.models.Own')\n")
    assert load_config(tmp_path / 'config.py').model.type == 'no_such_package.models.Own'


def test_what_a_config_may_leave_out_or_set_to_none():
    hook = dict(type='DistillHook')
    for nothing in ({}, dict(default_hooks=None, custom_hooks=None, custom_imports=None, train_dataloader=None)):
        config = Config(dict(model=dict(type='RetinaNet'), **nothing))
        assert list_hooks(config) == [] == list_imports(config)
        assert student_config(config).to_dict() == config.to_dict()
        with pytest.raises(ConfigurationError, match='no data_root'):
            set_data_root(config, '/new')
    config = Config(dict(default_hooks=dict(timer=None, distill=hook), custom_hooks=[hook]))
    assert list_hooks(config) == [hook, hook]
    assert list_imports(Config(dict(custom_imports=dict(imports='one')))) == ['one']
    with pytest.raises(ConfigurationError, match='no model'):
        student_model(Config(dict(model=None)))
    assert not is_distillation(Config(dict(model=None)))


def test_leaf_datasets_look_through_wrappers():
    first, second = dict(type='CocoDataset', ann_file='a'), dict(type='CocoDataset', ann_file='b')
    wrapped = dict(type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[first, second]))
    assert list_leaf_datasets(wrapped) == [first, second]
    assert list_leaf_datasets(first) == [first]


def test_training_pipelines_go_through_wrappers():
    first, second = (dict(type='CocoDataset', pipeline=[dict(type=name)]) for name in 'ab')
    mixed = dict(type='MultiImageMixDataset', dataset=first, pipeline=[dict(type='Mosaic')])
    joined = dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[mixed, second]))
    pipelines = training_pipelines(Config(dict(train_dataloader=dict(dataset=joined))))
    assert [[each['type'] for each in pipeline] for pipeline in pipelines] == [['a', 'Mosaic'], ['b']]
    assert training_pipelines(Config(dict(train_dataloader=None))) == []
