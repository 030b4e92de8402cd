"""A cache that would find nothing is noticed, and the transforms that are the cause are named."""
import pytest
from mmdet.datasets.transforms import RandomFlip
from mmengine.config import Config

from kd_det.checks.data import inspect_cache, random_transforms
from kd_det.checks.doctor import check_config
from kd_det.checks.environment import DiagnosisError

LOAD = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
PACK = [dict(type='PackDetInputs')]
FLIP = dict(type='RandomFlip', prob=0.5)
REPLAYED_FLIP = dict(type='ReplayedRandomness', transforms=[FLIP])


@pytest.fixture
def config(retinanet):
    """Makes the config of a distillation with these transforms in training."""

    def make(*transforms, cache=dict(dir='x'), **changes) -> Config:
        config = Config(dict(
            model=dict(type='DetectionDistiller', student=retinanet(), distill=dict(),
                       teacher=dict(config=retinanet(), random_teacher=True, cache=cache)),
            train_dataloader=dict(batch_size=2, dataset=dict(type='RepeatDataset', times=2, dataset=dict(
                type='CocoDataset', metainfo=dict(classes=('a', 'b', 'c')), pipeline=[*LOAD, *transforms, *PACK]))),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=1),
            default_hooks=dict(distill=dict(type='DistillHook'))))
        config.merge_from_dict(changes)
        return config

    return make


def _notes(config) -> list:
    return [finding.found for finding in inspect_cache(config) if finding.remedy]


@pytest.mark.parametrize('transform, names', [
    (FLIP, 'RandomFlip'),
    (dict(type='PhotoMetricDistortion'), 'PhotoMetricDistortion'),
    (dict(type='RandomChoice', transforms=[[dict(type='RandomCrop', crop_size=(8, 8))],
                                           [dict(type='Resize', scale=(8, 8))]]),
     'RandomChoice, RandomCrop'),
    (dict(type='Albu', transforms=[]), 'Albu'),
    (dict(type='mmdet.Albu', transforms=[]), 'Albu'),
    (dict(type=RandomFlip, prob=0.5), 'RandomFlip'),
    (dict(type='CachedMosaic'), 'CachedMosaic')])
def test_random_transforms_are_named(config, transform, names):
    note, = _notes(config(transform))
    assert f'({names})' in note
    assert not _notes(config(transform, cache=None))


def test_the_pipeline_of_a_wrapper_counts(config):
    wrapped = config()
    wrapped.train_dataloader.dataset = dict(type='MultiImageMixDataset', dataset=wrapped.train_dataloader.dataset,
                                            pipeline=[dict(type='Mosaic'), dict(type='MixUp')])
    assert '(Mosaic, MixUp)' in _notes(wrapped)[0]


def test_a_pipeline_that_recurs(config):
    assert not _notes(config(REPLAYED_FLIP))
    assert not _notes(config(dict(type='Resize', scale=(64, 64), keep_ratio=False)))
    assert list(random_transforms([*LOAD, REPLAYED_FLIP, *PACK])) == []
    assert list(random_transforms([dict(REPLAYED_FLIP, type='mmdet.ReplayedRandomness')])) == []


def test_batches_whose_shape_depends_on_who_is_in_them(config):
    resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
    assert 'aspect ratio' in _notes(config(resize))[0]
    assert not _notes(config(resize, **{'train_dataloader.batch_size': 1}))
    padded = [dict(type='BatchFixedSizePad', size=(64, 64))]
    assert not _notes(config(resize, **{'model.student.data_preprocessor.batch_augments': padded}))


def test_a_replay_that_no_epoch_moves_is_a_fault(config):
    check_config(config(REPLAYED_FLIP), ('train', ))
    by_iteration = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=9)
    for change, message in (({'default_hooks.distill': None}, 'nothing tells it the epoch'),
                            ({'train_cfg': by_iteration}, 'counts iterations')):
        with pytest.raises(DiagnosisError, match=message):
            check_config(config(REPLAYED_FLIP, **change), ('train', ))
