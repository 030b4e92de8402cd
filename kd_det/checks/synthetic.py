"""Noise for training data, of the sizes that a config trains on, and random weights for trained ones."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from mmcv.image import rescale_size
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData, PixelData
from torch import nn

from kd_det.config.classes import count_classes
from kd_det.config.detectors import list_members
from kd_det.config.files import get_type_name, list_pipelines, training_pipelines
from kd_det.context import Progress
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.schedules import Schedule
from kd_det.registry import build_detector
from kd_det.teachers.loading import remove_pretrained
from kd_det.teachers.probe import find_input_channels

Size = tuple[int, int]  # height and width, in pixels

LONGEST = 10**5  # pixels
USUAL_SIZES = ((480, 640), (640, 480))  # of images that are not at hand


def synthetic_batch(model: nn.Module, images: int, size: Size, boxes: int) -> dict:
    """A batch of noise as a data loader gives it.

    Args:
        model: The detector, whose number of classes the labels fit, and whose number of channels the images.
        images: Number of images.
        size: Their height and width.
        boxes: Number of objects in each, of random place and size. Where the detector learns masks, these are the
            boxes; where it learns a semantic map, that is 0.
    """
    (height, width), channels, samples = size, find_input_channels(model), []
    parts = ' '.join(name for name, _ in model.named_modules())
    for index in range(images):
        corners = torch.rand(boxes, 2) * 0.7
        extents = corners + 0.05 + torch.rand(boxes, 2) * 0.25
        corners = torch.cat([corners, extents], 1) * torch.tensor([width, height] * 2)
        sample = DetDataSample(metainfo=dict(img_id=index, img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=corners,
                                           labels=torch.randint(count_classes(model) or 1, (boxes, )))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        if 'mask' in parts or 'panoptic' in parts:
            sample.gt_instances.masks = BitmapMasks(_filled(corners, height, width), height, width)
        if 'semantic' in parts or 'panoptic' in parts:
            sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *size, dtype=torch.uint8))
        samples.append(sample)
    noise = [torch.randint(256, (channels, *size), dtype=torch.uint8) for _ in range(images)]
    return dict(inputs=noise, data_samples=samples)


def _filled(boxes: torch.Tensor, height: int, width: int) -> np.ndarray:
    """(n, H, W) of 0 and 1, each 1 in one box."""
    x1, y1, x2, y2 = boxes.T[..., None].numpy()
    rows, columns = np.arange(height), np.arange(width)
    inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
    return inside.astype(np.uint8)


# -------------------------------------------------------------------------------------------------- sizes of a training


def training_sizes(config: Config, originals: Sequence[Size] = USUAL_SIZES) -> list[Size]:
    """The sizes that images have after the training pipelines, as far as the transforms' arguments tell them.

    Of transforms that draw a size the extremes count. What a transform of another package does is not known: it is
    taken to leave the size alone.

    Args:
        config: The config.
        originals: Sizes of the images as they are loaded.
    """
    sizes = [size for pipeline in training_pipelines(config) or [[]] for size in _after(pipeline, list(originals))]
    return list(dict.fromkeys((max(height, 1), max(width, 1)) for height, width in sizes))


def evaluation_size(config: Config) -> Size:
    """The size that an image of 480 × 640 pixels has after the test pipeline, and padded, as the detector sees it."""
    loader = config.get('test_dataloader') or config.get('val_dataloader')
    sizes = _after(list_pipelines(loader['dataset'])[0] if loader else [], [USUAL_SIZES[0]])
    divisor = (config.model.get('data_preprocessor') or {}).get('pad_size_divisor') or 1
    return _padded((max(sizes[0][0], 1), max(sizes[0][1], 1)), dict(size_divisor=divisor))


def _after(pipeline: Sequence[dict | Sequence[dict]], sizes: list[Size]) -> list[Size]:
    for step in pipeline:
        if isinstance(step, (list, tuple)):  # a branch of transforms
            sizes = _after(step, sizes)
        elif isinstance(step, dict) and 'type' in step:
            try:
                sizes = list(dict.fromkeys(new for size in sizes
                                           for new in _sizes_after(step, get_type_name(step), size)))
            except (ArithmeticError, LookupError, TypeError, ValueError):  # it is none of those known here
                continue
    return sizes


def _sizes_after(step: dict, name: str, size: Size) -> Iterator[Size]:
    """The sizes that a transform may make of one."""
    height, width = size
    if name in ('RandomChoice', 'RandomApply') or isinstance(step.get('transforms'), (list, tuple)):
        branches = step['transforms'] if name == 'RandomChoice' else [step['transforms']]
        for branch in (branches[0], branches[-1]):
            yield from _after(branch if isinstance(branch, (list, tuple)) else [branch], [size])
    elif name == 'ResizeShortestEdge':
        yield _resized(size, (step.get('max_size') or LONGEST, min(_pair(step['scale']))), keep_ratio=True)
    elif 'Resize' in name and name != 'FixShapeResize':
        for scale in _scales(step, size):
            yield _resized(size, scale, step.get('keep_ratio', name == 'FixScaleResize'))
    elif name == 'FixShapeResize':
        yield step['height'], step['width']
    elif name in ('RandomCrop', 'RandomCenterCropPad') and step.get('crop_size'):
        yield _cropped(size, step['crop_size'], step.get('crop_type', 'absolute'), pads=name != 'RandomCrop')
    elif name == 'Pad':
        yield _padded(size, step)
    elif name in ('Mosaic', 'CachedMosaic'):
        mosaic_width, mosaic_height = _pair(step.get('img_scale', (640, 640)))
        yield 2 * mosaic_height, 2 * mosaic_width
    elif name == 'RandomAffine':
        border = step.get('border', (0, 0))
        yield height + 2 * border[1], width + 2 * border[0]
    else:
        yield size


def _scales(step: dict, size: Size) -> list[Sequence[float]]:
    """The widths and heights that a transform resizes to, of several the first and the last."""
    scales = step.get('scales') or step.get('scale')
    if step.get('scale_factor') and not scales:
        factors = step['scale_factor']
        across, down = (factors if isinstance(factors, (list, tuple)) else (factors, factors))
        return [(size[1] * across, size[0] * down)]
    if scales is None:
        return [size[::-1]]
    several = isinstance(scales, (list, tuple)) and (isinstance(scales[0], (list, tuple)) or bool(step.get('scales')))
    chosen = [_pair(scale) for scale in ((scales[0], scales[-1]) if several else (scales, ))]
    low, high = step.get('ratio_range') or (1.0, 1.0)
    factors = (1.0, ) if low <= 1.0 <= high else (low, high)
    return [tuple(side * factor for side in scale) for scale in chosen for factor in factors]


def _resized(size: Size, scale: Sequence[float], keep_ratio: bool) -> Size:
    width, height = (round(side) for side in scale)
    if keep_ratio:
        width, height = rescale_size(size[::-1], (width, height))
    return height, width


def _cropped(size: Size, crop: Sequence[float], kind: str, pads: bool) -> Size:
    crop = _pair(crop)
    if kind.startswith('relative'):
        return int(size[0] * crop[0] + 0.5), int(size[1] * crop[1] + 0.5)
    if kind == 'absolute_range':  # from the smaller to the larger of the two numbers, on both sides
        crop = (max(crop), ) * 2
    height, width = crop if pads else map(min, zip(size, crop))
    return int(height), int(width)


def _padded(size: Size, step: dict) -> Size:
    height, width = size
    if step.get('pad_to_square'):
        height = width = max(size)
    if step.get('size'):
        least_width, least_height = step['size']
        height, width = max(height, least_height), max(width, least_width)
    divisor = step.get('size_divisor') or 1
    return height + -height % divisor, width + -width % divisor


def _pair(value: float | Sequence[float]) -> Sequence[float]:
    return value if isinstance(value, (list, tuple)) else (value, value)


def random_distiller(config: Config, device: str | torch.device = 'cpu') -> DetectionDistiller:
    """The distiller of a config, with random weights, which take as long, and every term at its full weight."""
    teachers = config.model.get('teacher', ())
    for teacher in [teachers] if isinstance(teachers, dict) else teachers:
        draw_at_random(teacher)
    config.model.student = remove_pretrained(config.model.student)
    distiller: DetectionDistiller = build_detector(config.model).to(device).train()
    distiller.student.init_weights()  # some parts are whatever the memory held before
    distiller.schedules = {name: Schedule(weight.full) for name, weight in distiller.schedules.items()}
    distiller.progress = Progress(iteration=1)  # no gradients are compared in this step,
    for learner in distiller.learners:
        for balance in learner.monitor.balances.values():
            balance.start = 1  # but the first time that it is made
    return distiller


def draw_at_random(guide: dict) -> None:
    """Lets a guide, and those that it is made of, need no weights."""
    if 'type' not in guide:
        guide.update(checkpoint=None, random_teacher=True, cache=None)
    elif 'checkpoint' in guide:
        guide.update(checkpoint=None, random_teacher=True)
    for each in list_members(guide):
        draw_at_random(each)
