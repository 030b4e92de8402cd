"""Guides that give feature maps of their own: read at the student's cells, and tried before training."""
from __future__ import annotations

import copy
import math
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import DATASETS
from mmengine.dataset import pseudo_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import refuse
from kd_det.config.detectors import TeacherError
from kd_det.context import LevelSpec, find_partner
from kd_det.heads import StudentOutputs, TeacherOutputs
from kd_det.heads.dense import Stride
from kd_det.taps import Features
from kd_det.teachers.bridge import InputBridge, Shape
from kd_det.teachers.engine import hash_weights
from kd_det.teachers.guide import Guide, GuideForm, LearnerStep, Reading, ReadLevels
from kd_det.teachers.teacher import mark_unread

CONSTANT = 1e-8  # variance over mean square, under which a map says the same everywhere
LOW_RANK = 2.0  # effective rank, under which a map is almost one number a cell
ROUNDING = 1e-6  # of ratios of strides
MOST_CELLS = 256  # of an image that statistics are computed from, at even distances


class FeatureGuide(Guide):
    """A guide with feature maps of its own, whatever the modules of the student are called that a term taps.

    For each level of a tap of the student it answers the nearest of its maps by stride, resampled to the student's
    cells (:func:`resample`). A path that the student does not tap gets all maps, at their own strides.

    A kind tells the form of its maps (:meth:`find_specs`) and computes them (:meth:`compute_maps`).

    Attributes:
        bridge: From the student's batches to its own; set by :meth:`start`.
        weights: What it computes with, a module; None before :meth:`start`, and of a callable without.
    """
    bridge: InputBridge | None = None
    weights: nn.Module | None = None
    offers_features = True

    def __init__(self) -> None:
        self._sources: dict[str, list[tuple[int, Stride]]] = {}  # by path, for each level: which map, at which stride

    def find_specs(self, path: str) -> tuple[LevelSpec, ...]:
        """Tells the form of the maps that stand for a path."""
        raise NotImplementedError

    def compute_maps(self, images: Tensor, image_shapes: Sequence[Shape]) -> Mapping[str, Features]:
        """Computes the maps of a batch that has passed the bridge, all of it that :meth:`probe` was asked for.

        Returns:
            Path -> (N, C, h, w) of each of its maps, the h × w cells of which cover the whole batch evenly.
        """
        raise NotImplementedError

    def probe(self, reading: Reading, learners: Sequence[nn.Module],
              levels: Sequence[Mapping[str, tuple[LevelSpec, ...]]]) -> GuideForm:
        form, of_learners = {}, ChainMap(*map(dict, levels))  # the student's before those of its peers
        for path in reading.taps:
            own = self.find_specs(path)
            wanted = [level.stride for level in of_learners.get(path, own)]
            strides = [level.stride for level in own]
            places = [find_partner(wanted, index, strides) for index in range(len(wanted))]
            self._sources[path] = list(zip(places, wanted))
            form[path] = tuple(LevelSpec(own[index].channels, stride) for index, stride in self._sources[path])
        return GuideForm(form)

    def settle(self, weights: nn.Module | None, bridge: InputBridge, anchor: Tensor) -> None:
        """Takes frozen weights and the bridge, and moves both to the device and floating-point type of ``anchor``."""
        self.weights, self.bridge = weights, bridge
        if weights is not None:
            self.num_parameters = sum(parameter.numel() for parameter in weights.parameters())
        self._apply(lambda tensor: tensor.to(anchor.device, anchor.dtype if tensor.is_floating_point() else None))

    def fingerprint(self) -> str:
        return '' if self.weights is None else hash_weights(self.weights)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> FeatureGuide:
        for module in (self.weights, self.bridge):
            if module is not None:
                module._apply(function)
        return self

    @torch.no_grad()
    def observe(self,
                images: Tensor,
                image_shapes: Sequence[Shape],
                heads: Sequence[str] = (),
                student: StudentOutputs | None = None,
                taps: Sequence[str] | None = None,
                levels: ReadLevels | None = None,
                learners: Sequence[LearnerStep] = ()) -> tuple[dict[str, Features], TeacherOutputs]:
        paths = tuple(self._sources) if taps is None else tuple(taps)
        own_images = self.bridge(images, image_shapes)
        maps = self.compute_maps(own_images, image_shapes)
        features: dict[str, Any] = {}
        for path in paths:
            sources, theirs = self._sources[path], learners[0].features.get(path, ()) if learners else ()
            read = tuple((levels or {}).get(path, [True] * len(sources)))
            found = []
            for position, (index, stride) in enumerate(sources):
                if read[position]:
                    cells = (tuple(theirs[position].shape[-2:]) if len(theirs) == len(sources) else
                             tuple(math.ceil(side / stride) for side in images.shape[-2:]))
                    found.append(resample(maps[path][index], own_images.shape[-2:], stride, cells))
            features[path] = mark_unread(path, tuple(found), read)
        return features, {}

    def report(self, runner: Any, images: int, min_map: float) -> str | None:
        """Looks at the maps of a few images: what is constant teaches nothing.

        Raises:
            TeacherError: A map is constant, or not finite.
        """
        read = {path: sorted({index for index, _ in sources}) for path, sources in self._sources.items()}
        if not any(read.values()):
            return None
        statistics = {(path, index): MapStatistics() for path, indices in read.items() for index in indices}
        device, count = next(runner.model.parameters()).device, 0
        for batch, image_shapes in iterate_images(runner, images):
            with torch.no_grad():
                own_images = self.bridge(batch.to(device), image_shapes)
                maps = self.compute_maps(own_images, image_shapes)
            for (path, index), each in statistics.items():
                each.add(maps[path][index], own_images.shape[-2:], image_shapes)
            count += len(batch)
        if not count:
            raise TeacherError(f'Pre-flight: there are no images to look at the features of {self.described} '
                               'on: the data set is empty.')
        lines = []
        for (path, index), each in statistics.items():
            spec = self.find_specs(path)[index]
            place = f"'{path}', the map of stride {spec.stride}"
            found = each.summarize()
            if not found.finite:
                raise TeacherError(f'Pre-flight: the features of {self.described} ({place}) are not finite. '
                                   f'{self.advise_on_overflow()}')
            if found.is_constant:
                raise TeacherError(
                    f'Pre-flight: the features of {self.described} ({place}) are the same in all cells of {count} '
                    'images, so that they teach nothing. Is it given the images, normalised as in its training '
                    '(mean, std, bgr_to_rgb), and are its weights loaded?')
            if found.effective_rank < LOW_RANK:
                runner.logger.warning(
                    f'Pre-flight: the features of {self.described} ({place}) have an effective rank of '
                    f'{found.effective_rank:.2f}: they are almost one number a cell, and teach little more. Look at '
                    'its normalisation, or take another of its maps.')
            lines.append(f'{place}: variance over cells {found.over_cells:.3g}, over images {found.over_images:.3g}, '
                         f'effective rank {found.effective_rank:.1f} of {spec.channels}')
        return '\n  '.join([f'features of {self.described} on {count} images', *lines])


def make_bridge(student: nn.Module, mean: Sequence[float], std: Sequence[float], bgr_to_rgb: bool,
                channels: int | None, divisor: int) -> InputBridge:
    """Makes the bridge from a student's batches to images normalised otherwise.

    Args:
        student: The student's data preprocessor.
        mean: Of each channel, of images from 0 to 255, in the order after ``bgr_to_rgb``.
        std: Likewise.
        bgr_to_rgb: Whether the channels are red, green and blue; else the reverse.
        channels: Of the images; as many as are given where that is not known.
        divisor: The batch is padded at its right and bottom to multiples of it, with the mean colour.
    """
    own = DetDataPreprocessor(list(mean), list(std), bgr_to_rgb=bgr_to_rgb, pad_size_divisor=divisor)
    return InputBridge(student, own, channels)


def check_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Checks mean and standard deviation of images from 0 to 255.

    Raises:
        ArgumentError: One without the other, of another length, or such as are meant for images from 0 to 1.
    """
    if (mean is None) != (std is None):
        refuse('std' if std is None else 'mean', None, 'the standard deviation of each channel beside mean'
               if std is None else 'the mean of each channel beside std')
    if mean is not None and std is not None and len(mean) != len(std):
        refuse('std', list(std), f'{len(mean)} numbers, as mean has')
    if std is not None and max(std) < 1:
        refuse('std', list(std), 'the standard deviation of images from 0 to 255',
               'This is one of images from 0 to 1: write mean and std 255 times as large.')


def resample(level: Tensor, covered: Shape, stride: Stride, cells: Shape) -> Tensor:
    """Reads a map at the cells of another stride, where they lie on the image.

    Args:
        level: (N, C, h, w).
        covered: Height and width in pixels that its cells cover evenly.
        stride: Of the other cells, in pixels.
        cells: How many of them in height and width, from the upper left corner on.

    Returns:
        (N, C, *cells), interpolated bilinearly between centres; of a map that is finer by two or more first the means
        of so many cells. Beyond the map its last cells go on.
    """
    sizes = [pixels / count for pixels, count in zip(covered, level.shape[-2:])]
    united = [max(1, math.floor(stride / size + ROUNDING)) for size in sizes]
    scale = [size * count / stride for size, count in zip(sizes, united)]
    is_same = all(math.isclose(each, 1.0, rel_tol=ROUNDING) for each in scale)
    # One more than needed where the number of cells is rounded down from a product of floats.
    below, right = (count * max(math.ceil(have / count), math.ceil(wanted / each - ROUNDING) + (not is_same)) - have
                    for have, count, wanted, each in zip(level.shape[-2:], united, cells, scale))
    if below or right:
        level = F.pad(level, (0, right, 0, below), mode='replicate')
    if max(united) > 1:
        level = F.avg_pool2d(level, united)
    if not is_same:
        level = F.interpolate(level, scale_factor=scale, mode='bilinear', align_corners=False,
                              recompute_scale_factor=False)
    return level[..., :cells[0], :cells[1]].contiguous()


class MapSummary(NamedTuple):
    """What a map holds over several images, in the mean over channels.

    Attributes:
        finite: Whether all of it is.
        over_cells: Variance within an image.
        over_images: Variance of the images' means.
        mean_square: What both are measured by.
        effective_rank: exp of the entropy of the squared singular values of its centred cells, normalised to a sum of 1
            (Roy and Vetterli, EUSIPCO 2007): how many directions the features use.
    """
    finite: bool
    over_cells: float
    over_images: float
    mean_square: float
    effective_rank: float

    @property
    def is_constant(self) -> bool:
        """Whether it says the same in all cells of all images."""
        return self.over_cells + self.over_images <= CONSTANT * self.mean_square


class MapStatistics:
    """Collects the cells of a map over batches, at most :data:`MOST_CELLS` of an image, without its padding."""

    def __init__(self) -> None:
        self._cells = 0
        self._sums = self._products = torch.zeros(())
        self._means: list[Tensor] = []
        self._variances: list[Tensor] = []

    def add(self, level: Tensor, covered: Shape, image_shapes: Sequence[Shape]) -> None:
        """Adds a batch: (N, C, h, w), which covers so many pixels, in which the images have these shapes."""
        for image, shape in zip(level.detach(), image_shapes):
            rows, columns = (max(1, round(side * count / whole))
                             for side, count, whole in zip(shape, image.shape[-2:], covered))
            cells = image[:, :rows, :columns].flatten(1).T.to('cpu', torch.float64)
            cells = cells[::math.ceil(len(cells) / MOST_CELLS)]
            self._cells += len(cells)
            self._sums = self._sums + cells.sum(0)
            self._products = self._products + cells.T @ cells
            self._means.append(cells.mean(0))
            self._variances.append(cells.var(0, unbiased=False))

    def summarize(self) -> MapSummary:
        """Sums up what was added."""
        if not self._products.isfinite().all():
            return MapSummary(False, math.nan, math.nan, math.nan, math.nan)
        means, variances = torch.stack(self._means), torch.stack(self._variances)
        over_cells, over_images = variances.mean(), means.var(0, unbiased=False).mean()
        mean_square = self._products.diagonal().mean() / self._cells
        mean = self._sums / self._cells
        energies = torch.linalg.eigvalsh(self._products / self._cells - mean[:, None] * mean).clamp(min=0)
        shares = energies / energies.sum().clamp(min=torch.finfo(torch.float64).tiny)
        return MapSummary(True, float(over_cells), float(over_images), float(mean_square),
                          float(torch.special.entr(shares).sum().exp()))


def iterate_images(runner: Any, most: int) -> Iterator[tuple[Tensor, list[Shape]]]:
    """The first validation images, or training images where there are none of these, in the student's batches.

    Args:
        runner: MMEngine's.
        most: At most so many images.

    Yields:
        (N, C, H, W), preprocessed for the student; and height and width of each image within.
    """
    loader = runner.cfg.get('val_dataloader') or runner.cfg['train_dataloader']
    preprocess = (runner.model.module if hasattr(runner.model, 'module') else runner.model).data_preprocessor
    with preserved_randomness():
        dataset = DATASETS.build(copy.deepcopy(loader['dataset']))
        images = Subset(dataset, range(min(most, len(dataset))))
        for batch in DataLoader(images, batch_size=loader.get('batch_size') or 1, collate_fn=pseudo_collate):
            data = preprocess(batch, False)
            yield data['inputs'], [tuple(sample.img_shape[:2]) for sample in data['data_samples']]


def to_stride(pixels: float) -> Stride:
    """The stride of cells of so many pixels: whole, where it is nearly that."""
    return round(pixels) if math.isclose(pixels, round(pixels), rel_tol=0.02) else pixels


def describe_value(value: Any) -> str:
    """What something is, for a message that says what came in place of maps or boxes."""
    if isinstance(value, Tensor):
        return f'a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix("torch.")}'
    if isinstance(value, (tuple, list)):
        shown = ', '.join(map(describe_value, value[:3])) or 'nothing'
        return f"a {type(value).__name__} of {len(value)} ({shown}{', …' if len(value) > 3 else ''})"
    return 'None' if value is None else f'a {type(value).__name__}'
