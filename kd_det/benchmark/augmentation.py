"""Mosaic and MixUp for a student whose config has neither."""
from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Iterator, List, Sequence, Tuple, Union

from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from kd_det.configuration import (ConfigurationError, leaf_datasets, student_model, training_pipelines,
                                  type_name)
from kd_det.scopes import HOME, find_class, scope_of, within_scope

AUGMENTATIONS = ('mosaic', 'mixup')
WRAPPER = f'{HOME}.MultiImageMixDataset'
PAD_VALUE = 114.0  # YOLOX's


def mix_images(config: Config, augmentations: Sequence[str]) -> None:
    """Has the training images of a student's config mixed, by MMDetection's own transforms.

    The images are mixed as they are loaded, at the size that the pipeline scales them to (of several the largest;
    without any the data's largest width and height). All other transforms of the pipeline then see the mixed image.
    Mosaic shows a random window of that size, so objects stay as large as they were, as in RTMDet (arXiv 2212.07784).
    MixUp overlays another image, half and half, with the boxes of both. What remains uncovered has the mean colour that
    the student's preprocessor subtracts, as its own padding has.

    Args:
        config: The student's; changed.
        augmentations: Of :data:`AUGMENTATIONS`; for both, Mosaic comes first.

    Raises:
        ConfigurationError: The pipeline mixes images already, or is exchanged during training; or the images have
            masks, which MMDetection does not mix; or the data sets within a wrapper have different pipelines.
    """
    if not augmentations:
        return
    dataset = config.train_dataloader.dataset
    leaves = leaf_datasets(dataset)
    pipeline = list(leaves[0].get('pipeline') or ())
    loading = list(takewhile(lambda transform: type_name(transform).startswith('Load'), pipeline))
    _check(config, pipeline, loading)
    size = _size(pipeline, leaves)
    mean = (student_model(config).get('data_preprocessor') or {}).get('mean')
    pad_value = float(round(sum(mean) / len(mean))) if mean else PAD_VALUE
    for leaf in leaves:
        leaf.pipeline = loading
    config.train_dataloader.dataset = dict(
        type=WRAPPER, dataset=dataset, pipeline=[*_mixing(augmentations, size, pad_value), *pipeline[len(loading):]])


def _mixing(augmentations: Sequence[str], size: Tuple[int, int], pad_value: float) -> Iterator[dict]:
    """Yields the transforms; the image is then of that size, or within it where nothing but MixUp is done."""
    if 'mosaic' in augmentations:
        yield dict(type=f'{HOME}.Mosaic', img_scale=size, pad_val=pad_value)
        yield dict(type=f'{HOME}.RandomCrop', crop_size=size, allow_negative_crop=True)
    else:
        yield dict(type=f'{HOME}.Resize', scale=size, keep_ratio=True)
    if 'mixup' in augmentations:
        yield dict(type=f'{HOME}.MixUp', img_scale=size, pad_val=pad_value)
    # keep_empty=False: an image without boxes stays
    yield dict(type=f'{HOME}.FilterAnnotations', min_gt_bbox_wh=(1, 1), keep_empty=False)


def _check(config: Config, pipeline: List[dict], loading: List[dict]) -> None:
    dataset = config.train_dataloader.dataset
    with within_scope(scope_of(config)):
        mixing = [type_name(each) for each in _all_transforms(training_pipelines(config))
                  # hasattr fails: mmcv's decorator wants an instance
                  if type_name(each) and 'get_indexes' in dir(find_class(TRANSFORMS, each, HOME))]
    if mixing:
        raise ConfigurationError("@augment: the student's training pipeline mixes images already "
                                 f"({', '.join(mixing)}). Give a config without, and without the hooks that end it.")
    for hook in config.get('custom_hooks') or ():
        if type_name(hook) == 'PipelineSwitchHook':
            raise ConfigurationError("@augment: the student's PipelineSwitchHook would exchange the pipeline that "
                                     'mixes. Take it out of custom_hooks.')
    if any(list(leaf.get('pipeline') or ()) != pipeline for leaf in leaf_datasets(dataset)):
        raise ConfigurationError('@augment: the data sets within train_dataloader.dataset have different pipelines, so '
                                 'it is not clear which a mixed image goes through. Give all the same.')
    if not any(type_name(transform) == 'LoadAnnotations' for transform in loading):
        raise ConfigurationError('@augment: expected a training pipeline that begins with LoadImageFromFile and '
                                 f"LoadAnnotations, got {', '.join(map(type_name, pipeline)) or 'none'}.")
    if any(transform.get(key) for transform in loading for key in ('with_mask', 'with_seg')):
        raise ConfigurationError('@augment: Mosaic and MixUp mix boxes, no masks, and the training pipeline loads '
                                 'masks.')


def _size(pipeline: List[dict], leaves: List[dict]) -> Tuple[int, int]:
    """Width and height that images are scaled to."""
    scales = list(_scales(pipeline))
    if scales:
        return max(scales, key=lambda scale: scale[0] * scale[1])
    shapes: List[Tuple[int, int]] = []
    for leaf in leaves:
        content = json.loads(Path(leaf.get('data_root') or '', leaf['ann_file']).read_text(encoding='utf-8'))
        shapes += [(image['width'], image['height']) for image in content['images']]
    widths, heights = zip(*shapes)
    return max(widths), max(heights)


def _scales(pipeline: List[dict]) -> Iterator[Tuple[int, int]]:
    """The sizes that the resizing transforms of a pipeline name; upright ones lie down where the ratio is kept."""
    for transform in _all_transforms(pipeline):
        named = (transform.get('scales') or transform.get('scale') or ()) if 'Resize' in type_name(transform) else ()
        named = (named, named) if isinstance(named, int) else named
        for scale in [named] if named and isinstance(named[0], int) else named:
            yield tuple(sorted(scale, reverse=True)) if transform.get('keep_ratio') else tuple(scale)


def _all_transforms(node: Union[dict, Sequence]) -> Iterator[dict]:
    """The transforms of a pipeline, and those within them."""
    for each in [node] if isinstance(node, dict) else node:
        if isinstance(each, dict):
            yield each
        yield from _all_transforms(each.get('transforms', ()) if isinstance(each, dict) else each)
