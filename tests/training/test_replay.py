"""Replayed transforms: each image in its few variants, whatever process loads it."""
import copy
import random

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from torch.utils.data import DataLoader, Dataset

from kd_det.training.replay import training_epoch


class Draw(BaseTransform):
    """Notes one number of each generator."""

    def transform(self, results):
        return dict(results, drawn=(random.random(), np.random.rand(), torch.rand(()).item()))


class Drop(BaseTransform):

    def transform(self, results):
        return None


@pytest.fixture(autouse=True)
def first_epoch():
    training_epoch().set(0)
    yield
    training_epoch().set(0)


def _replay(transforms=None, **options):
    return TRANSFORMS.build(dict(type='ReplayedRandomness', transforms=transforms or [Draw()], **options))


def _drawn(replay, image, epoch):
    training_epoch().set(epoch)
    return replay(dict(img_id=image))['drawn']


def test_an_image_recurs_after_a_period_and_others_differ():
    replay = _replay(period=3)
    first = [_drawn(replay, 7, epoch) for epoch in range(3)]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert [_drawn(replay, 7, epoch) for epoch in range(3, 9)] == first * 2
    others = [_drawn(replay, 8, 0), _drawn(_replay(period=3, seed=1), 7, 0)]
    assert len({*first, *others}) == 5
    assert _drawn(_replay(period=3), 7, 1) == first[1]
    endless = _replay(period=None)
    assert len({_drawn(endless, 7, epoch) for epoch in range(6)}) == 6


def test_all_generators_are_set_and_left_as_they_were():
    replay = _replay()
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        expected = random.random(), np.random.rand(), torch.rand(()).item()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        drawn = _drawn(replay, 0, 0)
        assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
        assert drawn == _drawn(replay, 0, 0) and not set(drawn) & set(expected)


class Images(Dataset):

    def __init__(self, replay):
        self.replay = replay

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.replay(dict(img_path=f'{index}.png'))['drawn'][1]


@pytest.mark.parametrize('options', [dict(num_workers=0), dict(num_workers=2),
                                     dict(num_workers=2, persistent_workers=True)])
def test_workers_follow_the_epoch(options):
    dataset = copy.deepcopy(Images(_replay(period=2)))
    loader, epochs = DataLoader(dataset, batch_size=2, **options), []
    for epoch in range(4):
        training_epoch().set(epoch)
        epochs.append(torch.cat(list(loader)).tolist())
    assert epochs[:2] == epochs[2:] and epochs[0] != epochs[1] and len(set(epochs[0])) == 4


def test_an_image_that_a_transform_drops_is_dropped():
    assert _replay([Drop(), Draw()])(dict(img_id=0)) is None


@pytest.mark.parametrize('config, message', [(dict(period=0), '^period: expected an integer of at least 1 or None'),
                                             (dict(transforms=3), '^transforms: expected a list'),
                                             (dict(transforms=[dict(type='Mosaic')]), 'Mosaic mixes'),
                                             (dict(transforms=[dict(type='CachedMosaic')]), 'CachedMosaic mixes')])
def test_what_can_not_be_replayed(config, message):
    with pytest.raises(ValueError, match=message):
        _replay(**config)
