"""How COCO sets lie in their folders, and configs that are put on one: its paths, its classes, heads that tell them."""
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.config.files import get_type_name, list_leaf_datasets, set_data_root, student_model
from kd_det.registry import HOME

HEADS = ('bbox_head', 'roi_head')  # which tell classes apart; an RPN has its own number


class Layout(NamedTuple):
    """Where a set has its files, relative to its folder.

    Attributes:
        train: Annotations of the training images.
        train_images: Their folder.
        val: Annotations of the validation images.
        val_images: Their folder.
    """
    train: str
    train_images: str
    val: str
    val_images: str


LAYOUTS = (
    Layout('annotations/train.json', 'train/', 'annotations/val.json', 'val/'),
    Layout('train/_annotations.coco.json', 'train/', 'valid/_annotations.coco.json', 'valid/'),  # RF100-VL, Roboflow
    Layout('annotations/instances_train2017.json', 'train2017/', 'annotations/instances_val2017.json', 'val2017/'))


def find_layout(root: str | Path) -> Layout | None:
    """The layout of a folder; None where it is none of those that are known."""
    return next((layout for layout in LAYOUTS if Path(root, layout.train).is_file()
                 and Path(root, layout.val).is_file()), None)


def list_sets(folder: str | Path) -> list[Path]:
    """The folders within a folder that hold a set in a layout that is known, by name.

    Raises:
        ConfigurationError: There are none, or there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ConfigurationError(f"there is no folder '{folder}'.")
    found = sorted(each for each in Path(folder).iterdir() if each.is_dir() and find_layout(each))
    if not found:
        raise ConfigurationError(f"'{folder}' holds no folder with a COCO set: expected {describe_layouts()} in each.")
    return found


def describe_layouts() -> str:
    """The layouts in words."""
    return ', or '.join(f'{layout.train} and {layout.val}' for layout in LAYOUTS)


def read_classes(file: str | Path) -> tuple[str, ...]:
    """Reads the names of the classes from a COCO file, in the order in which MMDetection numbers them.

    A category without a box whose ``supercategory`` is ``'none'`` is no class, but the root of Roboflow's exports.

    Raises:
        ConfigurationError: It is no COCO file.
    """
    try:
        content = json.loads(Path(file).read_text(encoding='utf-8'))
        used = {annotation['category_id'] for annotation in content['annotations']}
        names = tuple(str(category['name']) for category in content['categories']
                      if category['id'] in used or category.get('supercategory') != 'none')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"'{file}' can not be read as a COCO file: {type(error).__name__}: {error}.") from None
    if not names:
        raise ConfigurationError(f"'{file}' names no category.")
    return names


def put_on(config: Config, root: str | Path) -> Config:
    """Returns a copy of a detector's config on the data of a folder, in a layout that is known.

    Training images are its training images, validation and test images its validation images; its classes are those of
    the training annotations, and as many are set in every head. All else, such as pipelines and sizes, stays. A folder
    in no known layout takes the place of the config's ``data_root``, see
    :func:`~kd_det.config.files.set_data_root`.

    Args:
        config: Of a detector, with one data set for training.
        root: The folder.

    Raises:
        ConfigurationError: There is no such folder, its annotations can not be read, or the config joins several data
            sets, or has no ``data_root``, where that is needed.
    """
    config, root = copy.deepcopy(config), Path(root)
    if not root.is_dir():
        raise ConfigurationError(f"there is no folder '{root}'.")
    layout = find_layout(root)
    if layout is None:
        try:
            set_data_root(config, str(root))
        except ConfigurationError:
            raise ConfigurationError(f"'{root}' holds no COCO set: expected {describe_layouts()}.") from None
        return config
    if config.get('data_root'):
        config.data_root = f'{root}/'
    classes = read_classes(root / layout.train)
    for split, file, images in (('train', layout.train, layout.train_images),
                                *((split, layout.val, layout.val_images) for split in ('val', 'test'))):
        loader = config.get(f'{split}_dataloader')
        leaves = list_leaf_datasets(loader.dataset) if loader else []
        if len(leaves) > 1:
            raise ConfigurationError(f"the config '{config.filename}' joins {len(leaves)} data sets in its "
                                     f'{split}_dataloader: expected one, which the suite exchanges.')
        for leaf in leaves:
            leaf['type'] = f'{HOME}.CocoDataset'
            leaf['data_root'], leaf['ann_file'], leaf['data_prefix'] = f'{root}/', file, dict(img=images)
            leaf['metainfo'] = dict(classes=classes)
        evaluators = config.get(f'{split}_evaluator') or []
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            if get_type_name(evaluator) == 'CocoMetric':
                evaluator['ann_file'] = str(root / file)
    model = student_model(config)
    for head in HEADS:
        _count_classes(model.get(head), len(classes))
    return config


def _count_classes(node: Any, count: int) -> None:
    """Sets the number of classes wherever a head, or one within it, has one."""
    if isinstance(node, dict):
        if isinstance(node.get('num_classes'), int):
            node['num_classes'] = count
        node = list(node.values())
    for each in node if isinstance(node, (list, tuple)) else ():
        _count_classes(each, count)
