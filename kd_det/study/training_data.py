"""What a variant of a benchmark changes in the training data of its config: images that are mixed, labels spoiled."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from kd_det.config import ConfigurationError, suggest_names
from kd_det.config.classes import find_dataset_classes
from kd_det.config.files import (
    get_type_name,
    list_exchanging_hooks,
    list_leaf_datasets,
    student_model,
    training_pipelines,
)
from kd_det.registry import HOME, find_class, get_scope, within_scope
from kd_det.training.labels import LABEL_TRANSFORMS

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
    leaves = list_leaf_datasets(dataset)
    pipeline = list(leaves[0].get('pipeline') or ())
    loading = list(takewhile(lambda transform: get_type_name(transform).startswith(('Load', *LABEL_TRANSFORMS)),
                             pipeline))
    _check_mixable(config, pipeline, loading)
    size = _find_size(pipeline, leaves)
    mean = (student_model(config).get('data_preprocessor') or {}).get('mean')
    pad_value = float(round(sum(mean) / len(mean))) if mean else PAD_VALUE
    for leaf in leaves:
        leaf['pipeline'] = loading
    mixing = _mixing_transforms(augmentations, size, pad_value)
    config.train_dataloader.dataset = dict(type=WRAPPER, dataset=dataset, pipeline=[*mixing, *pipeline[len(loading):]])


def _mixing_transforms(augmentations: Sequence[str], size: tuple[int, int], pad_value: float) -> Iterator[dict]:
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


def _check_mixable(config: Config, pipeline: list[dict], loading: list[dict]) -> None:
    dataset = config.train_dataloader.dataset
    with within_scope(get_scope(config)):
        mixing = {get_type_name(each): None for each in _all_transforms(training_pipelines(config))
                  # hasattr fails: mmcv's decorator wants an instance
                  if get_type_name(each) and 'get_indexes' in dir(find_class(TRANSFORMS, each, HOME))}
    if mixing:
        raise ConfigurationError("@augment: the student's training pipeline mixes images already "
                                 f"({', '.join(mixing)}). Give a config without, and without the hooks that end it.")
    for hook in config.get('custom_hooks') or ():
        if get_type_name(hook) == 'PipelineSwitchHook':
            raise ConfigurationError("@augment: the student's PipelineSwitchHook would exchange the pipeline that "
                                     'mixes. Take it out of custom_hooks.')
    if any(list(leaf.get('pipeline') or ()) != pipeline for leaf in list_leaf_datasets(dataset)):
        raise ConfigurationError('@augment: the data sets within train_dataloader.dataset have different pipelines, so '
                                 'it is not clear which a mixed image goes through. Give all the same.')
    if not any(get_type_name(transform) == 'LoadAnnotations' for transform in loading):
        raise ConfigurationError('@augment: expected a training pipeline that begins with LoadImageFromFile and '
                                 f"LoadAnnotations, got {', '.join(map(get_type_name, pipeline)) or 'none'}.")
    if any(transform.get(key) for transform in loading for key in ('with_mask', 'with_seg')):
        raise ConfigurationError('@augment: Mosaic and MixUp mix boxes, no masks, and the training pipeline loads '
                                 'masks.')


def _find_size(pipeline: list[dict], leaves: list[dict]) -> tuple[int, int]:
    """Width and height that images are scaled to."""
    scales = list(_find_scales(pipeline))
    if scales:
        return max(scales, key=lambda scale: scale[0] * scale[1])
    shapes: list[tuple[int, int]] = []
    for leaf in leaves:
        content = json.loads(Path(leaf.get('data_root') or '', leaf['ann_file']).read_text(encoding='utf-8'))
        shapes += [(image['width'], image['height']) for image in content['images']]
    widths, heights = zip(*shapes)
    return max(widths), max(heights)


def _find_scales(pipeline: list[dict]) -> Iterator[tuple[int, int]]:
    """The sizes that the resizing transforms of a pipeline name; upright ones lie down where the ratio is kept."""
    for transform in _all_transforms(pipeline):
        resizes = 'Resize' in get_type_name(transform)
        named = (transform.get('scales') or transform.get('scale') or ()) if resizes else ()
        named = (named, named) if isinstance(named, int) else named
        for scale in [named] if named and isinstance(named[0], int) else named:
            yield tuple(sorted(scale, reverse=True)) if transform.get('keep_ratio') else tuple(scale)


def _all_transforms(node: dict | Sequence) -> Iterator[dict]:
    """The transforms of a pipeline, and those within them."""
    for each in [node] if isinstance(node, dict) else node:
        if isinstance(each, dict):
            yield each
        yield from _all_transforms(each.get('transforms', ()) if isinstance(each, dict) else each)


def spoil_labels(config: Config, noise: float = 0.0, shift: float = 0.0, without: Sequence[str] = (),
                 seed: int = 0) -> None:
    """Spoils the labels of a student's training images, right after they are loaded, and nothing else of its config.

    So does the pipeline that a PipelineSwitchHook exchanges the first one for. Validation images keep theirs, and so do
    the training images on which fidelity is measured. Boxes are left out by the class that the noise gave them, so that
    no label is ever of these.

    Args:
        config: The student's; changed.
        noise: See :class:`~kd_det.training.NoisyLabels`.
        shift: See there.
        without: Names of classes, see :class:`~kd_det.training.WithoutClasses`.
        seed: Of the noise.

    Raises:
        ConfigurationError: There are no labels to spoil, a data set does not name its classes, has none of that name,
            or only such, or has one class alone, of which no label can be wrong; or the data sets name other classes
            than each other, and a hook exchanges the pipelines of all.
    """
    if not noise and not shift and not without:
        return
    leaves = [leaf for leaf in list_leaf_datasets(config.train_dataloader.dataset) if _loads_labels(leaf, 'pipeline')]
    if not leaves:
        raise ConfigurationError('@noise, @shift and @without change the labels that LoadAnnotations loads, and no '
                                 'pipeline of the training data begins with it.')
    named = [list(find_dataset_classes(leaf) or ()) for leaf in leaves]
    for leaf, classes in zip(leaves, named):
        _insert(leaf, 'pipeline', list(_spoiling_transforms(classes, noise, shift, without, seed)))
    for hook in list_exchanging_hooks(config):
        if _loads_labels(hook, 'switch_pipeline'):
            if any(classes != named[0] for classes in named):
                raise ConfigurationError(f'@noise, @shift and @without: {get_type_name(hook)} gives all training data '
                                         'one pipeline, and its data sets name unlike classes. Give all the same.')
            _insert(hook, 'switch_pipeline', list(_spoiling_transforms(named[0], noise, shift, without, seed)))


def _loads_labels(holder: dict, key: str) -> bool:
    return 'LoadAnnotations' in map(get_type_name, holder.get(key) or ())


def _insert(holder: dict, key: str, spoiling: list[dict]) -> None:
    """Puts transforms right behind the one that loads the labels."""
    pipeline = list(holder[key])
    loaded = 1 + list(map(get_type_name, pipeline)).index('LoadAnnotations')
    holder[key] = [*pipeline[:loaded], *spoiling, *pipeline[loaded:]]


def _spoiling_transforms(classes: list[str], noise: float, shift: float, without: Sequence[str],
                         seed: int) -> Iterator[dict]:
    """Yields the transforms for data of these classes."""
    told = f"@without={'+'.join(without)}"
    if (noise or without) and not classes:
        raise ConfigurationError('@noise and @without: give the training data metainfo=dict(classes=(…)).')
    for name in without:
        if name not in classes:
            raise ConfigurationError(f"{told}: the training data has no class '{name}'. "
                                     f'{suggest_names(name, classes)}'.rstrip())
        if without.count(name) > 1:
            raise ConfigurationError(f"{told} names '{name}' {without.count(name)} times.")
    if without and set(classes) <= set(without):
        raise ConfigurationError(f'{told}: the training data has no other class, so nothing would be left.')
    if noise and len(classes) < 2:
        raise ConfigurationError(f'@noise: the training data has one class, {classes[0]}: no label of it can be wrong.')
    if noise or shift:
        yield dict(type=f'{HOME}.NoisyLabels', share=noise, classes=len(classes) if noise else None, shift=shift,
                   seed=seed)
    if without:
        yield dict(type=f'{HOME}.WithoutClasses', labels=sorted(map(classes.index, without)))
