"""Write images whose bytes depend on nothing but their pixels."""
from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes, HorizontalBoxes
from mmengine.structures import InstanceData

from kd_det.compat.writing import refuse_to_replace
from kd_det.config.files import ConfigurationError


def write_bitmap(path: str | Path, image: np.ndarray) -> None:
    """Writes an uncompressed 24-bit Windows bitmap, which every image reader understands.

    PNG and JPEG files depend on the version of the compressor that wrote them; a bitmap does not.

    Args:
        path: File to write.
        image: (H, W, 3) uint8 pixels, red first.

    Raises:
        ValueError: If ``image`` is not an (H, W, 3) uint8 array.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f'expected (H, W, 3) uint8 pixels, got {image.shape} of {image.dtype}')
    height, width = image.shape[:2]
    row_bytes = (3 * width + 3) // 4 * 4
    rows = np.zeros((height, row_bytes), np.uint8)
    rows[:, :3 * width] = image[::-1, :, ::-1].reshape(height, -1)
    offset = 14 + 40
    header = struct.pack('<2sIHHI', b'BM', offset + rows.size, 0, 0, offset)
    header += struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, rows.size, 0, 0, 0, 0)
    Path(path).write_bytes(header + rows.tobytes())


UNIT = 1024  # the radius of a shape in its own coordinates
SUPERSAMPLING = 2  # shapes are drawn at twice the resolution, then averaged

# cos of 0, 1/64, ..., 16/64 of a turn, times UNIT. A table, for the last bit of math.cos differs between machines.
_COSINES = (1024, 1019, 1004, 980, 946, 903, 851, 792, 724, 650, 569, 483, 392, 297, 200, 100, 0)
_TURN = 64


class Stream:
    """Random integers that do not change with the version of NumPy.

    Args:
        *seed: Whole numbers of at least 0; streams of different seeds are independent.
    """

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.MT19937(np.random.SeedSequence(seed))

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Integers from ``low`` to ``high``, both included, as an int64 array of ``shape``."""
        raw = self._bits.random_raw(int(np.prod(shape))).astype(np.int64)
        return (low + raw % (high - low + 1)).reshape(shape)

    def integer(self, low: int, high: int) -> int:
        """One integer from ``low`` to ``high``, both included."""
        return int(self.integers(low, high))

    def choice(self, options: tuple):
        """One of ``options``, all equally likely."""
        return options[self.integer(0, len(options) - 1)]


# A shape tells which points (u, v) it covers; the unit circle has radius UNIT.
SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    'disc': lambda u, v: u * u + v * v <= UNIT * UNIT,
    'block': lambda u, v: np.maximum(abs(u), abs(v)) <= 850,
    'wedge': lambda u, v: (v <= 560) & (7 * abs(u) <= 4 * (v + UNIT)),
    'cross': lambda u, v: (np.minimum(abs(u), abs(v)) <= 330) & (np.maximum(abs(u), abs(v)) <= 950),
    'ring': lambda u, v: (u * u + v * v <= UNIT * UNIT) & (u * u + v * v >= 550 * 550),
    'star': lambda u, v: abs(u * v) <= 200 * (UNIT - np.maximum(abs(u), abs(v))),
    'bar': lambda u, v: np.maximum(abs(u), abs(v)) <= UNIT,
}

# A texture tells where the second colour shows; its pattern repeats every `period`.
TEXTURES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    'plain': lambda u, v, period: np.zeros_like(u, dtype=bool),
    'striped': lambda u, v, period: u % period < period // 2,
    'checked': lambda u, v, period: (u % period < period // 2) ^ (v % period < period // 2),
    'dotted': lambda u, v, period: (u % period - period // 2)**2 + (v % period - period // 2)**2 <= period**2 // 8,
}

CLASSES = ('striped_disc', 'dotted_block', 'checked_wedge', 'dotted_ring', 'checked_cross', 'striped_star')


@dataclass(frozen=True)
class Figure:
    """Something to draw; lengths are in cells of the supersampled canvas."""
    shape: str
    texture: str
    centre: tuple[int, int]
    radii: tuple[int, int]
    angle: int
    period: int
    colours: np.ndarray  # (2, 3)

    @property
    def category(self) -> int | None:
        """Index into ``CLASSES``; None for clutter."""
        name = f'{self.texture}_{self.shape}'
        return CLASSES.index(name) if name in CLASSES else None


class Instance(NamedTuple):
    """One annotated object: its class and the extent of what can be seen of it, in pixels."""
    category: int
    bbox: tuple[float, float, float, float]  # x, y, width, height
    area: float


def draw_scene(stream: Stream, height: int, width: int) -> tuple[np.ndarray, list[Instance]]:
    """Draws a scene: objects of ``CLASSES`` among clutter, partly hidden by each other, by bars and by the border.

    An object's class is decided by its outline and its texture together: clutter has the outline of a class with
    another texture. At least three fifths of every object can be seen.

    Args:
        stream: Source of all that is random.
        height: Height in pixels.
        width: Width in pixels.

    Returns:
        The (height, width, 3) uint8 image, red first, and its objects.
    """
    canvas = _background(stream, height, width).repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1)
    owner = np.zeros(canvas.shape[:2], np.int64)  # 1 + index of the figure seen in a cell, 0 for background
    figures: list[Figure] = []
    whole, seen = [], np.zeros(0, np.int64)  # cells of each figure: on a canvas without edges, and still to be seen
    kinds = [_object] * stream.integer(3, 7) + [_clutter] * stream.integer(1, 3)
    kinds = [kinds[i] for i in np.argsort(stream.integers(0, 2**31, (len(kinds), )), kind='stable')]
    for kind in kinds + [_bar] * stream.integer(0, 2):
        for _ in range(8):  # a figure that hides too much, or is hidden, is tried elsewhere
            figure = kind(stream, owner.shape[0], owner.shape[1])
            window, covered, colour = _render(figure, owner.shape)
            hidden = np.bincount(owner[window][covered], minlength=len(figures) + 1)[1:]
            candidates = [*figures, figure]
            candidates_whole, candidates_seen = [*whole, _whole_area(figure)], [*(seen - hidden), covered.sum()]
            if all(each.category is None or 5 * part >= 3 * all_of_it
                   for each, part, all_of_it in zip(candidates, candidates_seen, candidates_whole)):
                figures, whole, seen = candidates, candidates_whole, np.array(candidates_seen)
                canvas[window][covered] = colour[covered]
                owner[window][covered] = len(figures)
                break
    image = canvas.reshape(height, SUPERSAMPLING, width, SUPERSAMPLING, 3).sum((1, 3)) // SUPERSAMPLING**2
    image = image + stream.integers(-9, 9, image.shape)
    instances = [_instance(figure.category, owner == index + 1)
                 for index, figure in enumerate(figures) if figure.category is not None]
    return image.clip(0, 255).astype(np.uint8), instances


def _object(stream: Stream, height: int, width: int) -> Figure:
    texture, shape = stream.choice(CLASSES).split('_')
    return _figure(stream, height, width, shape, texture)


def _clutter(stream: Stream, height: int, width: int) -> Figure:
    """The outline of a class without its texture."""
    texture, shape = stream.choice(CLASSES).split('_')
    return _figure(stream, height, width, shape, stream.choice(tuple(other for other in TEXTURES if other != texture)))


def _bar(stream: Stream, height: int, width: int) -> Figure:
    side = min(height, width)
    radii = side * stream.integer(160, 500) // 1000, max(side * stream.integer(4, 16) // 1000, 1)
    return replace(_figure(stream, height, width, 'bar', 'plain'), radii=radii, angle=stream.integer(0, _TURN - 1))


def _figure(stream: Stream, height: int, width: int, shape: str, texture: str) -> Figure:
    per_mille = stream.choice(((70, 100), (100, 160), (160, 260)))  # small, medium, large
    radius = min(height, width) * stream.integer(*per_mille) // 1000
    centre = stream.integer(0, width - 1), stream.integer(0, height - 1)
    radii = radius, radius * stream.integer(75, 100) // 100
    repeats = stream.integer(3, 4) + radius * 4 // min(height, width)
    dark, light = stream.integers(10, 100, (3, )), stream.integers(155, 245, (3, ))
    return Figure(shape, texture, centre, radii, stream.integer(-6, 6) % _TURN, 2 * UNIT // repeats,
                  np.stack([light, dark]))


def _cosine(angle: int) -> int:
    angle %= _TURN
    quarter = _TURN // 4
    if angle > 2 * quarter:
        angle = _TURN - angle
    return _COSINES[angle] if angle <= quarter else -_COSINES[2 * quarter - angle]


def _reach(figure: Figure) -> int:
    """How far from its centre a figure extends at most: half the diagonal of the square around its unit circle."""
    return max(figure.radii) * 3 // 2 + 1


def _local(figure: Figure, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Canvas coordinates to the figure's own."""
    cosine, sine = _cosine(figure.angle), _cosine(figure.angle - _TURN // 4)
    dx, dy = x - figure.centre[0], y - figure.centre[1]
    return (dx * cosine + dy * sine) // figure.radii[0], (dy * cosine - dx * sine) // figure.radii[1]


def _render(figure: Figure, shape: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The window of the canvas around a figure, the cells it covers there (h, w), and their colours (h, w, 3)."""
    reach = _reach(figure)
    (cx, cy), (height, width) = figure.centre, shape
    top, bottom = max(cy - reach, 0), min(cy + reach + 1, height)
    left, right = max(cx - reach, 0), min(cx + reach + 1, width)
    u, v = _local(figure, *np.meshgrid(np.arange(left, right), np.arange(top, bottom)))
    second = TEXTURES[figure.texture](u, v, figure.period)
    shade = 100 + (u + v).clip(-UNIT, UNIT) * 22 // UNIT  # per cent: lit from one side
    colour = figure.colours[second.astype(np.int64)] * shade[..., None] // 100
    return (slice(top, bottom), slice(left, right)), SHAPES[figure.shape](u, v), colour.clip(0, 255)


def _whole_area(figure: Figure) -> int:
    """Cells of a figure that nothing hides, on a canvas without edges."""
    offsets = np.arange(-_reach(figure), _reach(figure) + 1)
    u, v = _local(figure, *np.meshgrid(offsets + figure.centre[0], offsets + figure.centre[1]))
    return int(SHAPES[figure.shape](u, v).sum())


def _instance(category: int, seen: np.ndarray) -> Instance:
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    bbox = tuple(length / SUPERSAMPLING for length in (left, top, right - left, bottom - top))
    return Instance(category, bbox, int(seen.sum()) / SUPERSAMPLING**2)


def _background(stream: Stream, height: int, width: int) -> np.ndarray:
    """A smooth mixture of three colours with fine grain, (height, width, 3) int64."""
    colours = stream.integers(80, 175, (3, 3))
    coarse = _smooth_noise(stream, height, width, cells=3)[..., None]
    fine = _smooth_noise(stream, height, width, cells=stream.integer(8, 24))[..., None]
    mixed = colours[0] * (256 - coarse) + colours[1] * coarse
    return (mixed * (384 - fine) + colours[2] * 256 * fine) // (256 * 384)


def _smooth_noise(stream: Stream, height: int, width: int, cells: int) -> np.ndarray:
    """A random grid of about ``cells`` x ``cells`` values from 0 to 255, interpolated linearly to (height, width)."""
    step = max(height, width) // cells + 1
    grid = stream.integers(0, 255, (cells + 1, cells + 1))

    def interpolate(values: np.ndarray, length: int) -> np.ndarray:
        index, rest = np.divmod(np.arange(length), step)
        rest = rest[:, None]
        return (values[index] * (step - rest) + values[index + 1] * rest) // step

    return interpolate(interpolate(grid, height).T, width).T


_SPLITS = ('train', 'val')
_DESCRIPTION = 'kd_det shapes'
_VERSION = 1  # of the drawing; raise it when the same arguments give other pixels


def generate_shapes(root: str | Path,
                    train_images: int = 240,
                    val_images: int = 80,
                    size: int = 128,
                    seed: int = 0,
                    progress: Callable[[int, int], None] | None = None) -> bool:
    """Writes the shapes data set under ``root`` unless it is already there.

    The layout is COCO's: ``annotations/{train,val}.json`` beside ``train/*.bmp`` and ``val/*.bmp``. An image depends on
    the seed, its split and its index alone, so a larger set contains the smaller ones. The annotations of a split are
    written last; an interrupted call can be repeated.

    Args:
        root: Directory to write, made if needed.
        train_images: Images of the train split.
        val_images: Images of the val split.
        size: Height and width of the images in pixels.
        seed: Seed of the whole set, at least 0.
        progress: Called after each image with the number of images done and the number of all.

    Returns:
        Whether anything had to be written.

    Raises:
        ValueError: If a split would be empty, the images smaller than 32 pixels, or the seed negative.
        WritingError: The folder has annotations of other data.
    """
    if min(train_images, val_images) < 1 or size < 32 or seed < 0:
        raise ValueError('expected at least 1 image in each split, a size of at least 32 and a seed of at least 0, got '
                         f'train_images={train_images}, val_images={val_images}, size={size}, seed={seed}')
    counts = dict(zip(_SPLITS, (train_images, val_images)))
    for split in counts:
        refuse_to_replace(Path(root, 'annotations', f'{split}.json'), lambda content: _DESCRIPTION.encode() in content,
                          'the annotations of shapes', advice='Give another folder.')
    done, written = 0, False
    for split, count in counts.items():
        info = dict(description=_DESCRIPTION, split=split, images=count, size=size, seed=seed, version=_VERSION)
        annotation_file = Path(root, 'annotations', f'{split}.json')
        if _info(annotation_file) != info:
            written = True
            folder = Path(root, split)
            folder.mkdir(parents=True, exist_ok=True)
            annotation_file.parent.mkdir(exist_ok=True)
            annotation_file.unlink(missing_ok=True)
            images, annotations = [], []
            for index in range(count):
                image, instances = draw_scene(Stream(seed, _SPLITS.index(split), index), size, size)
                name = f'{index:06d}.bmp'
                write_bitmap(folder / name, image)
                images.append(dict(id=index + 1, file_name=name, height=size, width=size))
                annotations += [
                    dict(id=len(annotations) + number, image_id=index + 1, category_id=instance.category + 1,
                         bbox=instance.bbox, area=instance.area, iscrowd=0)
                    for number, instance in enumerate(instances, start=1)
                ]
                if progress:
                    progress(done + index + 1, sum(counts.values()))
            categories = [dict(id=index, name=name) for index, name in enumerate(CLASSES, start=1)]
            _write_json(annotation_file,
                        dict(info=info, images=images, annotations=annotations, categories=categories))
        done += count
    return written


def _info(annotation_file: Path) -> dict | None:
    try:
        return json.loads(annotation_file.read_bytes())['info']
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none yet, or damaged: it is written anew
        return None


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix('.partial')
    partial.write_bytes(json.dumps(content, sort_keys=True).encode())
    os.replace(partial, path)


UNLABELLED = 'unlabelled'  # in the metainfo of a data sample
CARRIED = 'carried_detections'  # there, too: how many boxes of a file stand last in the ground truth
FIRST_ROW = 1_000_000  # labels from here on are no classes but rows of that file; whole numbers in float32, too


@TRANSFORMS.register_module()
class Unlabelled(BaseTransform):
    """Says of an image that nobody knows what it shows: the last step of a pipeline, after ``PackDetInputs``.

    The distiller learns from such an image what the terms teach without boxes, and from the boxes that the teacher
    finds, with ``pseudo_labels``; the student's own loss does not take it for background. Boxes that the image has are
    dropped. A data set without annotations needs ``filter_cfg=dict(filter_empty_gt=False)``, or its images are passed
    over.

    Raises:
        ConfigurationError: It stands before ``PackDetInputs``.

    Example:
        >>> from mmdet.structures import DetDataSample
        >>> sample = DetDataSample(gt_instances=InstanceData(bboxes=torch.rand(3, 4)))
        >>> marked = Unlabelled()(dict(data_samples=sample))['data_samples']
        >>> marked.unlabelled, marked.gt_instances.bboxes.shape
        (True, torch.Size([0, 4]))
    """

    def transform(self, results: dict) -> dict:
        if 'data_samples' not in results:
            raise ConfigurationError("The transform 'Unlabelled' marks what PackDetInputs has packed: make it the "
                                     'last step of the pipeline.')
        sample = results['data_samples']
        truth = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        if 'masks' in sample.gt_instances:
            truth.masks = sample.gt_instances.masks[:0]
        sample.set_metainfo({UNLABELLED: True})
        carried = sample.metainfo.get(CARRIED, 0)  # boxes of a file are not the image's own
        sample.ignored_instances = truth.clone()
        sample.gt_instances = sample.gt_instances[len(sample.gt_instances) - carried:] if carried else truth
        return results


def is_unlabelled(leaf: object) -> bool:
    """Whether the pipeline of a built data set marks every image as unlabelled."""
    transforms = getattr(getattr(leaf, 'pipeline', None), 'transforms', ())
    return bool(transforms) and isinstance(transforms[-1], Unlabelled)


class LoadDetections(BaseTransform):
    """Loads an image's boxes of a file beside its ground truth: whatever moves this moves them as well.

    Args:
        load: The transform that loads the ground truth; None where nothing does.
        boxes: (R, 4) of the whole file: x1, y1, x2, y2 in pixels of the original images, float32.
        rows: (M, ) of rows of ``boxes``, those of an image one after the other.
        spans: (I, 2) of where in ``rows`` those of each image of the data set begin and end.
    """

    def __init__(self, load: Callable | None, boxes: np.ndarray, rows: np.ndarray, spans: np.ndarray) -> None:
        self.load, self.boxes, self.rows, self.spans = load, boxes, rows, spans

    def transform(self, results: dict) -> dict | None:
        results = self.load(results) if self.load else results
        if results is None:
            return None
        first, last = self.spans[results['sample_idx']]
        rows = self.rows[first:last]
        truth, found = results.get('gt_bboxes'), HorizontalBoxes(self.boxes[rows])
        if isinstance(truth, BaseBoxes):
            found = truth.cat([truth, found if isinstance(truth, HorizontalBoxes) else found.convert_to(type(truth))])
        elif truth is not None:  # box_type=None
            found = np.concatenate([truth, found.numpy()])
        labels, ignored = results.get('gt_bboxes_labels', rows[:0]), results.get('gt_ignore_flags', np.zeros(0, bool))
        return dict(results, gt_bboxes=found, gt_bboxes_labels=np.concatenate([labels, FIRST_ROW + rows]),
                    gt_ignore_flags=np.concatenate([ignored, np.zeros(len(rows), bool)]))


class PackDetections(BaseTransform):
    """Packs an image with ``pack``, and puts the boxes of a file that came with it behind its ground truth."""

    def __init__(self, pack: Callable) -> None:
        self.pack = pack

    def transform(self, results: dict) -> dict:
        packed = self.pack(results)
        sample = packed['data_samples']
        carried = sample.gt_instances.labels >= FIRST_ROW
        order = carried.long().argsort(stable=True)
        sample.gt_instances = InstanceData(**{name: each[order] for name, each in sample.gt_instances.items()})
        sample.set_metainfo({CARRIED: int(carried.sum())})
        return packed


def drop_detections(sample: DetDataSample) -> DetDataSample:
    """The data sample without the boxes of a file; itself where it came with none."""
    if CARRIED not in sample.metainfo:
        return sample
    other = sample.new()
    other.gt_instances = sample.gt_instances[:len(sample.gt_instances) - sample.metainfo[CARRIED]]
    delattr(other, CARRIED)
    return other
