"""Reading configs, and deriving the plain student's and the one on another data root."""
import re

import pytest
from mmengine.config import Config

from kd_det.configuration import (CONFIG_ROOT, ConfigurationError, leaf_datasets, load_config, merge_options, renamed,
                                  set_data_root, student_config, student_model)


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


def data_config(root: str) -> Config:
    return Config(dict(
        data_root=root,
        train_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=dict(data_root=root, ann_file='train.json'))),
        val_evaluator=[dict(ann_file=f'{root}val.json')],
        other='elsewhere/val.json'))


@pytest.mark.parametrize('new', ['/new/place', '/new/place/'])
@pytest.mark.parametrize('old', ['data/coco/', 's3://bucket/coco/'])
def test_data_root_moves_every_path(old, new):
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


def test_options_override_and_data_root_reaches_all():
    config = data_config('data/coco/')
    merge_options(config, {'data_root': '/new', 'train_dataloader.batch_size': 4, 'val_evaluator.0.metric': 'bbox'})
    assert config.train_dataloader.batch_size == 4
    assert config.val_evaluator == [dict(ann_file='/new/val.json', metric='bbox')]


@pytest.mark.parametrize('options, said', [
    ({'val_evaluator.0.ann_file.key': 1}, '--cfg-options'),
    ({'val_evaluator.7.metric': 'bbox'}, '--cfg-options'),
    ({'other': 1}, "'other' is a variable of the config file"),
    ({'train_dataloder.batch_size': 1}, "Did you mean 'train_dataloader'?"),
    ({'quite_another': 1}, "no run reads a key 'quite_another'."),
])
def test_options_that_lead_nowhere(options, said):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        merge_options(data_config('data/coco/'), options)


def test_renamed_keeps_all_but_the_name(tmp_path):
    config = load_config('kd_det::fgd_r101_r18.py')
    other = renamed(config, tmp_path / 'other.py')
    assert other.to_dict() == config.to_dict() and other.filename == str(tmp_path / 'other.py')
    other.dump(other.filename)
    assert load_config(other.filename).to_dict() == config.to_dict()


def test_leaf_datasets_look_through_wrappers():
    first, second = dict(type='CocoDataset', ann_file='a'), dict(type='CocoDataset', ann_file='b')
    wrapped = dict(type='MultiImageMixDataset', dataset=dict(type='ConcatDataset', datasets=[first, second]))
    assert leaf_datasets(wrapped) == [first, second]
    assert leaf_datasets(first) == [first]
