"""Training labels that are wrong, moved or missing on purpose, to see what a student makes of them, and its teacher."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le, MinLen, Predicate
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes

from kd_det.config import ConfigurationError
from kd_det.config.arguments import ArgumentError, Index, Seed, Share, declared, is_distinct
from kd_det.datasets import FIRST_ROW

LABEL_TRANSFORMS = ('NoisyLabels', 'WithoutClasses')  # which follow the loading of labels at once
Shift = Annotated[float, Ge(0), Le(0.5)]  # with more a box might leave its image
ClassCount = Annotated[int, Ge(2)]
Labels = Annotated[Sequence[Index], MinLen(1), Predicate(is_distinct)]


@TRANSFORMS.register_module()
class NoisyLabels(BaseTransform):
    """Gives a share of the boxes a wrong class, and moves all a little: what people who label do wrong.

    It stands right after ``LoadAnnotations`` of the training pipeline. What becomes of a box depends on its image, its
    place among the image's boxes and the seed alone. So it is the same in every epoch, on every worker and rank, and
    in a run that is resumed; no other transform's random numbers move; and a box that is wrong at one share is so at
    every larger one, and takes the same class.

    - Its class becomes another with probability ``share``, each of the others as likely.
    - Its centre moves by up to ``shift`` of its width and height, and each of these becomes larger or smaller by up to
      that share of itself, all uniformly; what leaves the image is cut off.

    Ignored regions stay as they are, and so do the boxes of a file, see :class:`~kd_det.teachers.Detections`.

    Args:
        share: Of the boxes that get a wrong class, expected.
        classes: How many there are; for a ``share`` above 0.
        shift: At most half.
        seed: Another one makes other boxes wrong.

    Raises:
        ArgumentError: An argument does not fit.
        ConfigurationError: In a pipeline: no labels are loaded before, one is of none of the classes, boxes are not
            horizontal, or there are masks, which do not move with the boxes.

    Example:
        >>> labels = np.array([0, 1, 2, 0, 1, 2])
        >>> image = dict(img_id=7, gt_bboxes_labels=labels, gt_bboxes=HorizontalBoxes(np.ones((6, 4))))
        >>> noisy = NoisyLabels(share=0.5, classes=3)
        >>> noisy(dict(image))['gt_bboxes_labels']
        array([0, 1, 2, 2, 2, 2])
    """

    @declared
    def __init__(self, share: Share = 0.0, classes: ClassCount | None = None, shift: Shift = 0.0,
                 seed: Seed = 0) -> None:
        if share and classes is None:
            raise ArgumentError('classes', 'a share above 0 is drawn among the classes: give their number.')
        self.share, self.classes, self.shift, self.seed = share, classes or 0, shift, seed

    def transform(self, results: dict) -> dict:
        labels = _read_labels(results, self)
        changes = (labels < FIRST_ROW) & ~np.asarray(results.get('gt_ignore_flags', np.zeros(len(labels), bool)))
        drawn = self._draw(results, len(labels))
        if self.share:
            if (labels[changes] >= self.classes).any():
                raise ConfigurationError(f'NoisyLabels: classes={self.classes}, and the data has the label '
                                         f'{labels[changes].max()}: give the number of its classes.')
            others = labels + 1 + (drawn[:, 1] * (self.classes - 1)).astype(labels.dtype)
            results['gt_bboxes_labels'] = np.where(changes & (drawn[:, 0] < self.share), others % self.classes, labels)
        if self.shift:
            self._move(results, changes, 2 * drawn[:, 2:] - 1)
        return results

    def _draw(self, results: dict, count: int) -> np.ndarray:
        """(count, 6) numbers from 0 to 1, of each box its own."""
        image = results['img_id'] if 'img_id' in results else Path(results['img_path']).name
        digests = b''.join(hashlib.sha256(repr((self.seed, image, place)).encode()).digest() for place in range(count))
        return np.frombuffer(digests, '>u4').reshape(count, 8)[:, :6] / 2**32

    def _move(self, results: dict, changes: np.ndarray, directions: np.ndarray) -> None:
        """Moves boxes by (n, 4) of ± 1: centre and size, along x and y."""
        boxes = results['gt_bboxes']
        if 'gt_masks' in results or not isinstance(boxes, (HorizontalBoxes, np.ndarray)):
            raise ConfigurationError('NoisyLabels: shift moves horizontal boxes, without their masks. Leave with_mask '
                                     'out of LoadAnnotations, or shift.')
        corners = boxes.tensor.numpy() if isinstance(boxes, HorizontalBoxes) else boxes
        sizes = corners[:, 2:] - corners[:, :2]
        centres = corners[:, :2] + sizes * (0.5 + self.shift * directions[:, :2])
        halves = sizes * (1 + self.shift * directions[:, 2:]) / 2
        moved = np.concatenate([centres - halves, centres + halves], 1)
        if 'img_shape' in results:
            height, width = results['img_shape'][:2]
            moved = moved.clip(0, (width, height, width, height))
        moved = np.where(changes[:, None], moved, corners).astype(corners.dtype)
        results['gt_bboxes'] = moved if boxes is corners else HorizontalBoxes(moved)

    def __repr__(self) -> str:
        return (f'{type(self).__name__}(share={self.share}, classes={self.classes}, shift={self.shift}, '
                f'seed={self.seed})')


@TRANSFORMS.register_module()
class WithoutClasses(BaseTransform):
    """Takes the boxes of some classes out of the labels; images and classes stay: a student never sees them labelled.

    It stands right after ``LoadAnnotations`` of the training pipeline. What lies there is background for the student's
    own loss; what it may know of these classes comes from its teacher.

    Args:
        labels: Of the classes, as the data numbers them.

    Raises:
        ArgumentError: An argument does not fit.
        ConfigurationError: In a pipeline: no labels are loaded before.

    Example:
        >>> boxes = HorizontalBoxes(np.eye(3, 4))
        >>> image = dict(gt_bboxes=boxes, gt_bboxes_labels=np.array([2, 0, 1]), gt_ignore_flags=np.zeros(3, bool))
        >>> WithoutClasses(labels=[0])(image)['gt_bboxes_labels']
        array([2, 1])
    """

    @declared
    def __init__(self, labels: Labels) -> None:
        self.labels = tuple(labels)

    def transform(self, results: dict) -> dict:
        kept = ~np.isin(_read_labels(results, self), self.labels)
        for name in ('gt_bboxes', 'gt_bboxes_labels', 'gt_ignore_flags', 'gt_masks'):
            if name in results:
                results[name] = results[name][kept]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(labels={self.labels})'


def _read_labels(results: dict, transform: BaseTransform) -> np.ndarray:
    if 'gt_bboxes_labels' not in results:
        raise ConfigurationError(f"The transform '{type(transform).__name__}' changes the labels that LoadAnnotations "
                                 'has loaded: put it right after that.')
    return results['gt_bboxes_labels']
