"""Wrong input: each key and value here is refused by its place, before anything trains, by doctor and by a run."""
from __future__ import annotations

import copy
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from torch.optim import SGD

from kd_det.checks.arguments import inspect_arguments
from kd_det.checks.doctor import check_config, inspect_config
from kd_det.checks.environment import DiagnosisError
from kd_det.config.files import load_config

LACKS = Ellipsis  # the key is not there
TERMS = dict(
    fgd=dict(type='FGD', tap='neck'),
    cwd=dict(type='CWD', tap='neck', temperature=1.0, weight=10.0),
    mgd=dict(type='MGD', tap='neck'),
    fkd=dict(type='FKD', tap='neck'),
    mimic=dict(type='FeatureImitation', tap='neck', mask=dict(type='BoxForeground')),
    near=dict(type='FeatureImitation', tap='neck', mask=dict(type='NearAnchorForeground')),
    sum=dict(type='FeatureImitation', tap='neck', mask=dict(type='MaskSum', masks=['BoxForeground', 'BoxBackground'])),
    quality=dict(type='FeatureImitation', tap='neck', mask=dict(type='PredictionQuality')),
    difference=dict(type='FeatureImitation', tap='neck', mask=dict(type='PredictionDifference')),
    attention=dict(type='FeatureImitation', tap='neck', mask=dict(type='SpatialAttention')),
    classes=dict(type='DenseClassification'),
    boxes=dict(type='DenseRegression'),
    crosskd=dict(type='CrossKD'),
    relations=dict(type='DIST'),
    roi=dict(type='RoIClassification', weight=0),  # of weight 0, and looked at all the same
    queries=dict(type='QueryClassification', weight=0),
    late=dict(type='PKD', weight=dict(type='Warmup', value=1.0, epochs=1)),
    balanced=dict(type='PKD', weight=dict(type='Decay', epochs=3, value=dict(type='Balance', ratio=0.5))),
)
OF_TERMS = [  # key within model.distill; values that do not fit
    ('fgd.temperature', -1.0, 0, nan, inf, '1', True, None, [0.5]), ('fgd.alpha', -1e-3, nan), ('fgd.beta', -1, inf),
    ('fgd.gamma', 'much', nan), ('fgd.lambda_', -1), ('fgd.weight', -1, nan, inf, 'much', True, None, [1.0]),
    ('fgd.levels', True, 0, -1, 2.5, [0, 0], [], ['0'], [0.5], 'all'), ('fgd.tap', 3, '', None, ['neck']),
    ('fgd.tap', dict(student='neck'), dict(student='neck', teacher='neck', other='neck')),
    ('fgd.adapter', 'conv', None, 1), ('fgd.resize', 1, 'yes', None), ('fgd.pad_aware', 0, 'False'),
    ('fgd.teacher', -1, 1, 0.0, '0', True), ('fgd.type', 'FDG', 'BoxForeground', 'Warmup'),
    ('cwd.temperature', 0), ('mgd.ratio', 1, 1.5, -0.1, nan), ('fkd.temperature', 0), ('mimic.distance', 'cosin'),
    ('mimic.mask.weighting', 'half'), ('near.mask.phi', 1, -0.1, nan),
    ('sum.mask.weights', [1.0], [1.0, nan], 1.0), ('quality.mask.xi', 2, -1, nan), ('quality.mask.top_k', 0, -1, 2.5),
    ('difference.mask.anchors', 'sum'), ('attention.mask.temperature', 0, -0.5, nan),
    ('attention.mask.source', 'students'), ('classes.temperature', 0), ('classes.weighting', 'every'),
    ('classes.beta', -1, 0.5), ('boxes.form', 'iou'), ('boxes.margin', -1), ('crosskd.remaining', -1, 1.5),
    ('crosskd.box_weight', -1), ('relations.inter', -1), ('roi.temperature', 0), ('roi.form', 'simple'),
    ('queries.layers', 0, 1.5), ('queries.background', -1),
    ('late.weight.value', -1, nan), ('late.weight.epochs', -1, nan),
    ('late.weight.begin', -1), ('late.weight.start', -1), ('balanced.weight.end', -1),
    ('balanced.weight.value.ratio', -0.5, nan), ('balanced.weight.value.interval', 0, 2.5),
    ('balanced.weight.value.momentum', 1, -0.1, nan), ('balanced.weight.value.start', 0, -1, 1.5),
]
OF_OTHERS = [
    ('model.task_weight', -1, nan, 'much', dict(type='Balance')), ('model.inherit', 3, True, '', ['neck', 'neck'], [3]),
    ('model.policy', 'random', 3), ('model.policy.type', 'Randon', 'Balance'), ('model.policy.interval', 0, 1.5),
    ('model.policy.gamma', 0, nan), ('default_hooks.distill.probe', 'loss', dict(metric='accuracy'), dict(images=3)),
    ('model.inherit_by', 'grown', 3, None), ('model.inherit_by.noise', -0.1, nan, '0'),
    ('model.distill', None, ['fgd']), ('model.student', None), ('model.teacher', None, [], 'teacher.py'),
    ('model.teacher.config', LACKS, 3), ('model.teacher.checkpoint', 3, ''),
    ('model.teacher.allow_missing', 5, 'bbox_head', [5]), ('model.teacher.allow_unexpected', True),
    ('model.teacher.classes', 'cat', [1, 2], ['cat', 'cat']), ('model.teacher.precision', 'float8', None),
    ('model.teacher.fuse', 'no'), ('model.teacher.compile', 'max'), ('model.teacher.shard', 1),
    ('model.teacher.random_teacher', 'no'), ('model.teacher.cache', 'cache', True),
    ('model.teacher.cache.dir', '', LACKS, 3), ('model.teacher.cache.dtype', 'int8'),
    ('model.teacher.cache.max_gb', 0, -1, nan, '20'), ('model.pseudo_labels.score', 2, -0.1, nan, '0.5'),
    ('model.pseudo_labels.iou', 1.5), ('model.pseudo_labels.mode', 'joined'),
    ('model.pseudo_labels.images', 'labelled'),
    ('model.pseudo_labels.weight', -1, 1.5, nan, dict(type='Balance')), ('model.pseudo_labels.teacher', 1, -1),
    ('default_hooks.distill.preflight', True, 64), ('default_hooks.distill.preflight.images', 0, -1, 2.5),
    ('default_hooks.distill.preflight.min_map', nan, -0.1, 1.5, '0.01'), ('default_hooks.checkpoint.interval', 0, 1.5),
    ('default_hooks.checkpoint.max_keep_ckpts', 0, -2), ('default_hooks.logger.interval', 0),
    ('default_hooks.logger.type', 'LogerHook'),
    ('model.student.type', 'RetinaNett'), ('model.student.neck.type', 'FPNN'),
    ('model.student.bbox_head.loss_cls.type', 'FocalLos'), ('model.student.train_cfg.assigner.type', 'MaxIoUAsigner'),
    ('optim_wrapper.type', 'OptimWraper'),
    ('optim_wrapper.accumulative_counts', 0), ('optim_wrapper.optimizer.type', 'Adamm', 'SDG'),
    ('optim_wrapper.optimizer.lr', nan, -1, inf, '0.01'), ('optim_wrapper.optimizer.weight_decay', -1, nan),
    ('optim_wrapper.optimizer.momentum', 1.5, nan), ('param_scheduler[0].type', 'LinearRL'),
    ('param_scheduler[1].milestones', [0, 3], 5), ('train_cfg.max_epochs', 0, -1, 1.5, '12', nan),
    ('train_cfg.val_interval', 0, -1, 1.5), ('train_cfg.type', 'EpochBasedTrainLop'),
    ('randomness.seed', -1, 2**32, 'a'),
    ('train_dataloader.batch_size', 0, -2, 2.5), ('train_dataloader.num_workers', -1, '2'),
    ('train_dataloader.dataset.type', 'CocoDatset'), ('train_dataloader.dataset.pipeline[0].type', 'LoadImage'),
    ('train_dataloader.sampler.type', 'DefaultSamplr'), ('val_evaluator.type', 'CocoMetrc'), ('resume', 'yes', 1),
    ('load_from', 3, ''), ('visualizer.type', 'DetLocalVisualiser'), ('auto_scale_lr.base_batch_size', 0, -8),
]
MISSPELT = [  # a key; what it should have been
    ('model.teacher.chekpoint', 'checkpoint'), ('model.teacher.cach', 'cache'), ('model.teacher.cache.dirs', 'dir'),
    ('model.distil', 'distill'), ('model.inherits', 'inherit'), ('model.pseudo_label', 'pseudo_labels'),
    ('model.pseudo_labels.scor', 'score'), ('model.distill.fgd.temprature', 'temperature'),
    ('model.distill.fgd.tapp', 'tap'), ('model.distill.fgd.wieght', None),
    ('model.distill.mimic.mask.weigting', 'weighting'),
    ('model.distill.late.weight.epoch', 'epochs'), ('model.distill.balanced.weight.value.intervall', 'interval'),
    ('model.student.backbone.dept', 'depth'), ('model.student.bbox_head.loss_cls.gama', 'gamma'),
    ('default_hooks.distil', 'distill'), ('default_hooks.loger', 'logger'),
    ('default_hooks.checkpoint.intervall', 'interval'),
    ('default_hooks.distill.prefligth', 'preflight'), ('default_hooks.distill.preflight.min_mpa', 'min_map'),
    ('optim_wrapper.optimiser', 'optimizer'), ('optim_wrapper.clip_gard', 'clip_grad'),
    ('optim_wrapper.optimizer.momentun', 'momentum'), ('param_scheduler[1].milestone', 'milestones'),
    ('train_cfg.max_epoch', 'max_epochs'), ('train_cfg.val_intervall', 'val_interval'),
    ('train_dataloader.batch_sise', 'batch_size'), ('train_dataloader.num_worker', 'num_workers'),
    ('train_dataloader.dataset.ann_fil', 'ann_file'), ('train_dataloader.dataset.pipeline[1].with_bboxs', 'with_bbox'),
    ('val_evaluator.ann_fle', 'ann_file'), ('train_datloader', 'train_dataloader'), ('optim_wraper', 'optim_wrapper'),
    ('custom_hook', 'custom_hooks'), ('load_form', 'load_from'),
]
ALL = [*((f'model.distill.{key}', *values) for key, *values in OF_TERMS), *OF_OTHERS]
WRONG = [(key, value) for key, *values in ALL for value in values]


@pytest.fixture(scope='module')
def whole() -> Config:
    config = load_config('kd_det::fgd_retinanet_r101_r18.py')
    config.model.distill = copy.deepcopy(TERMS)
    config.model.update(pseudo_labels=dict(score=0.5), inherit_by=dict(rule='selection'),
                        policy=dict(type='Bandit', arms='terms'))
    config.model.teacher.cache = dict(dir='cache')
    config.randomness = dict(seed=0)
    return config


def change(config: Config, key: str, value: Any) -> Config:
    """A config in which one key, ``a.b[0].c``, has another value, or lacks."""
    config = copy.deepcopy(config)
    *path, last = key.replace('[', '.').replace(']', '').split('.')
    node: Any = config
    for name in path:
        node = node[int(name) if isinstance(node, list) else name]
    if value is LACKS:
        del node[last]
    else:
        node[last] = value
    return config


def test_what_all_start_from_fits(whole):
    assert not list(inspect_arguments(whole))
    assert len(WRONG) + len(MISSPELT) >= 250


@pytest.mark.parametrize(('key', 'value'), WRONG, ids=[f'{key}={value!r:.30}' for key, value in WRONG])
def test_a_value_that_does_not_fit(whole, key, value):
    findings = list(inspect_arguments(change(whole, key, value)))
    assert findings and all(finding.fault for finding in findings)
    first = findings[0]
    assert first.subject.startswith(key.removesuffix('.type')), first  # an item of a list, or a key within
    assert 'expected ' in first.found and ', got ' in first.found or 'there is no ' in first.found, first
    assert len(findings) == 1 or key in ('model.teacher', 'model.distill', 'model.student'), findings


@pytest.mark.parametrize(('key', 'right'), MISSPELT)
def test_a_key_that_there_is_not(whole, key, right):
    finding, *others = inspect_arguments(change(whole, key, dict()))
    assert finding.fault and finding.subject == key and not others
    assert f'Nearest: {right}' in finding.found if right else 'Expected one of' in finding.found


@pytest.mark.parametrize(('key', 'value', 'advice'), [
    ('custom_hooks', [dict(type='EMAHook'), EMAHook(begin_epoch=4)], "dict(type='EMAHook', …)"),
    ('optim_wrapper.optimizer.type', SGD, "'SGD'"), ('data_root', Path('/data'), "'/data'"),
    ('train_dataloader.collate_fn', test_what_all_start_from_fits, "'test_what_all_start_from_fits'")])
def test_what_the_config_of_a_run_can_not_be_saved_with(key, value, advice, whole, tmp_path):
    """MMEngine would end in a SyntaxError, once the data and the model are built."""
    wrong = change(whole, key, value)
    with pytest.raises(SyntaxError):
        wrong.dump(tmp_path / 'config.py')
    finding, = inspect_arguments(wrong)
    assert finding.subject == key + ('' if not isinstance(value, list) else f'[{len(value) - 1}]') and finding.fault
    assert finding.found.startswith('expected what can be saved as text') and finding.found.endswith(
        f'Give {advice}.')


def test_what_only_looks_like_an_object_can_be_saved(whole, tmp_path):
    right = change(change(whole, 'my_numbers', (np.float32(0.5), 1e-3, inf, None, {1, 2})), 'my_type', torch.float16)
    right.dump(tmp_path / 'config.py')
    assert not list(inspect_arguments(right))


def test_what_a_config_in_pure_python_imports_can_be_saved(tmp_path):
    (tmp_path / 'base.py').write_text('randomness = dict(seed=0)')
    (tmp_path / 'config.py').write_text('from mmengine.config import read_base\nfrom mmengine.hooks import EMAHook\n'
                                        'with read_base():\n    from .base import *\n'
                                        'custom_hooks = [dict(type=EMAHook, begin_epoch=2)]\n')
    assert not list(inspect_arguments(Config.fromfile(tmp_path / 'config.py')))


def test_several_mistakes_are_told_together(whole):
    wrong = change(change(change(whole, 'model.distill.fgd.temperature', 0), 'train_cfg.max_epochs', 0),
                   'model.teacher.chekpoint', 'teacher.pth')
    assert [finding.subject for finding in inspect_arguments(wrong)] == [
        'model.teacher.chekpoint', 'model.distill.fgd.temperature', 'train_cfg.max_epochs']


def test_doctor_says_the_same_as_the_run(whole):
    wrong = change(whole, 'model.distill.fgd.temperature', -1.0)
    message = 'model.distill.fgd.temperature: expected a number above 0, got -1.0.'
    with pytest.raises(DiagnosisError) as error:
        check_config(wrong, ('train', 'val'))
    assert str(error.value) == message
    assert [f'{finding.subject}: {finding.found}' for finding in inspect_config(wrong)] == [message]


def test_a_constructor_of_several_optimizers_reads_its_own_keys(whole):
    several = dict(constructor='DefaultOptimWrapperConstructor', backbone=dict(optimizer=dict(type='SGD', lr=0.1)))
    assert not list(inspect_arguments(change(whole, 'optim_wrapper', several)))
    several['constructor'] = 'DefaultOptimWraperConstructor'
    finding, = inspect_arguments(change(whole, 'optim_wrapper', several))
    assert finding.subject == 'optim_wrapper.constructor' and 'DefaultOptimWrapperConstructor' in finding.found


def test_variables_of_a_config_file_are_no_keys(whole):
    for name in ('train_pipeline', 'dataset_type', 'num_classes', 'my_hooks', 'data_root', 'img_scale', 'lr'):
        assert not list(inspect_arguments(change(whole, name, dict())))
