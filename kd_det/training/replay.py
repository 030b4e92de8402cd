"""Random augmentation that recurs: images in a few variants, in turn; batches that a resumed run draws once more."""
from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.runner import set_random_seed

from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Count, Seed, declared

Transform = Annotated[dict[str, Any] | Callable[[dict[str, Any]], Any], 'the dict of a transform']


@TRANSFORMS.register_module()
class ReplayedRandomness(BaseTransform):
    """Runs random transforms on numbers that depend on the image, the epoch and a seed alone.

    In epoch e each image comes in its variant ``e % period``, so that from epoch ``period`` on every image was seen
    before, pixel by pixel, and a teacher's cache (:class:`~kd_det.teachers.cache.TeacherCache`) holds it. A run that is
    resumed sees the images of one that was not, with persistent workers too. Random numbers of other transforms are not
    moved.

    The epoch is known from :class:`~kd_det.training.hooks.DistillHook`; where it is not in the config, and where
    training counts iterations, all images stay in their first variant.

    Args:
        transforms: Random transforms, in their order.
        period: The number of variants of each image; None for a new one in every epoch.
        seed: Another one gives other variants.

    Raises:
        ArgumentError: An argument does not fit.
        ValueError: A transform that mixes several images, as Mosaic and MixUp do.

    Example:
        >>> class Noise(BaseTransform):
        ...     def transform(self, results):
        ...         return dict(results, noise=random.random())
        >>> replayed = ReplayedRandomness([Noise()], period=2)
        >>> replayed(dict(img_id=7)) == replayed(dict(img_id=7)) != replayed(dict(img_id=8))
        True
    """

    @declared
    def __init__(self, transforms: Sequence[Transform], period: Count | None = 2, seed: Seed = 0) -> None:
        self.transforms = [TRANSFORMS.build(each) if isinstance(each, dict) else each for each in transforms]
        for each in self.transforms:
            if hasattr(each, 'get_indexes') or hasattr(each, 'results_cache'):
                raise ValueError(f'ReplayedRandomness: {type(each).__name__} mixes an image with others, which are '
                                 'drawn elsewhere, so it can not be replayed.')
        self.period, self.seed, self.epoch = period, seed, training_epoch()

    def transform(self, results: dict) -> dict | None:
        with preserved_randomness():
            self._set_seed(results)
            for each in self.transforms:
                results = each(results)
                if results is None:
                    return None
        return results

    def _set_seed(self, results: dict) -> None:
        """Seeds the generators of the CPU by image, variant and seed."""
        epoch = self.epoch.get()
        variant = epoch if self.period is None else epoch % self.period
        image = results['img_id'] if 'img_id' in results else results['img_path']
        digest = hashlib.sha256(repr((self.seed, image, variant)).encode()).digest()
        seed = int.from_bytes(digest[:4], 'big')
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)

    def __repr__(self) -> str:
        return f'{type(self).__name__}(transforms={self.transforms}, period={self.period}, seed={self.seed})'


class SharedEpoch:
    """The epoch of the training, in memory that data-loader workers share with the process that starts them."""

    def __init__(self) -> None:
        self._value = torch.zeros((), dtype=torch.long).share_memory_()

    def __deepcopy__(self, memo: dict) -> SharedEpoch:
        return self  # a copy of a data set is told the epoch, too

    def set(self, epoch: int) -> None:
        self._value.fill_(epoch)

    def get(self) -> int:
        return int(self._value)


@cache
def training_epoch() -> SharedEpoch:
    """The one shared epoch, which :class:`~kd_det.training.hooks.DistillHook` sets at the start of each."""
    return SharedEpoch()


OF_BATCHES = 2**31  # apart from the numbers of the steps, which would else be those of their images


def seed_of_step(seed: int, iteration: int) -> int:
    """The seed of a step's random numbers, by the seed of the run and the iteration, counted from 0."""
    return (seed * 1_000_003 + iteration) % 2**32


class SeededBatches:
    """The batches of a loop that counts iterations, each drawn from the seed of the run and its own place.

    Such a loop fetches a batch before the step is announced. Without workers the images would be transformed by what
    the step before has left of the random numbers, and a loader that begins again would draw the seed of its workers
    from that. A resumed run, which skips the batches of the steps that it does not make, had others.

    Args:
        batches: The loop's own.
        seed: Of the run.
    """

    def __init__(self, batches: Iterator[Any], seed: int) -> None:
        self.batches, self.seed, self.fetched = batches, seed, 0

    def __iter__(self) -> SeededBatches:
        return self

    def __next__(self) -> Any:
        set_random_seed((seed_of_step(self.seed, self.fetched) + OF_BATCHES) % 2**32)
        self.fetched += 1
        return next(self.batches)
