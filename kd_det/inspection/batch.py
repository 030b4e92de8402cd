"""A batch to look at: the first that a run would train on, or a single image."""
from __future__ import annotations

import copy
from pathlib import Path
from typing import Optional, Tuple, Union

import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from kd_det.classes import Names, label_names
from kd_det.configuration import ConfigurationError, leaf_datasets, type_name
from kd_det.diagnosis.data import check_labels
from kd_det.diagnosis.images import check_images

IMAGES = 500  # of the training data that are read before; a run reads all


def first_training_batch(config: Config) -> Tuple[dict, Optional[Names]]:
    """The first batch of the config's training data, loaded in this process, and what its labels mean.

    Raises:
        DiagnosisError: The data is empty, its labels mean something else than its metainfo says, or an image can not
            be read.
    """
    settings = copy.deepcopy(config.train_dataloader)
    settings.update(num_workers=0, persistent_workers=False)
    settings.pop('prefetch_factor', None)
    loader = Runner.build_dataloader(settings, seed=(config.get('randomness') or {}).get('seed') or 0)
    check_labels(dict(train=loader.dataset))
    check_images(loader.dataset, most=IMAGES)
    return next(iter(loader)), label_names(loader.dataset)


def image_batch(config: Config, file: Union[str, Path]) -> dict:
    """One image, prepared as for validation, without ground truth.

    Args:
        config: Its ``val_dataloader`` says how to prepare an image.
        file: The image.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: It is no image, or the config has no validation data.
    """
    if not config.get('val_dataloader'):
        raise ConfigurationError(f"The config '{config.filename}' has no val_dataloader, whose pipeline would prepare "
                                 'the image. Leave --image out to look at training data.')
    if not Path(file).is_file():
        raise FileNotFoundError(f"There is no image '{file}'.")
    pipeline = leaf_datasets(config.val_dataloader.dataset)[0]['pipeline']
    load, *prepare = (step for step in pipeline if 'Annotations' not in type_name(step))
    try:  # whatever the transform reads is an image
        loaded = Compose([load])(dict(img_path=str(file), img_id=0))
    except Exception as error:
        raise ConfigurationError(f"'{file}' can not be read as an image by {type_name(load)}, the first transform of "
                                 f'the val_dataloader: {type(error).__name__}: {error}') from error
    data = Compose(prepare)(loaded)
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    data['data_samples'].ignored_instances = nothing
    data['data_samples'].gt_instances = nothing.clone()
    data['data_samples'].gt_instances.masks = BitmapMasks([], *data['data_samples'].img_shape[:2])
    return pseudo_collate([data])
