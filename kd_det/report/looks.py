"""Where a detector looks: the attention of its features, and the masks of the terms that taught it, level by level."""
from __future__ import annotations

import re
from typing import Dict, List, Sequence

import numpy as np
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.compat import load_checkpoint
from kd_det.distillers import DetectionDistiller
from kd_det.functional.masks import spatial_attention, valid_cells
from kd_det.hooks.distill_hook import CHECKPOINT_KEY
from kd_det.inspection import compared_levels, mask_looks
from kd_det.report.pictures import map_uri
from kd_det.report.validation import Validation
from kd_det.scopes import build_detector, scope_of, within_scope

TEMPERATURE = 0.5  # FGD's
Maps = Dict[str, List[dict]]  # title -> one map for each level, see _picture


@torch.no_grad()
def attention_maps(detector: nn.Module, validation: Validation, indices: Sequence[int]) -> List[List[dict]]:
    """The spatial attention of the neck's features, of each image and level.

    Args:
        detector: A trained detector.
        validation: The images.
        indices: Of the images to look at.
    """
    made = []
    for index in indices:
        data = detector.data_preprocessor(pseudo_collate([validation.dataset[index]]), False)
        inputs, sample = data['inputs'], data['data_samples'][0]
        levels = []
        for feature in detector.extract_feat(inputs):
            valid = valid_cells([sample.img_shape], inputs.shape[-2:], feature.shape[-2:], feature.device)
            stride = round(inputs.shape[-1] / feature.shape[-1])
            levels.append(_picture(stride, spatial_attention(feature.float(), TEMPERATURE, valid)[0], valid[0]))
        made.append(levels)
    return made


@torch.no_grad()
def mask_maps(config: Config, checkpoint: str, validation: Validation, indices: Sequence[int]) -> List[Maps]:
    """The masks of the terms that compare features, of each image; on images without augmentation.

    Args:
        config: Of a distillation.
        checkpoint: What it has trained.
        validation: The images; their ground truth counts as it does in training.
        indices: Of the images to look at.
    """
    distiller = _trained_distiller(config, checkpoint)
    return [_masks(distiller, _with_ground_truth(validation, index)) for index in indices] if distiller.terms else []


def _masks(distiller: DetectionDistiller, batch: dict) -> Maps:
    data = distiller.data_preprocessor(batch, False)
    _, levels = compared_levels(distiller, data)
    made = {}
    for name, each in levels.items():
        for title, looks in mask_looks(distiller.terms[name], each):
            pictures = [_picture(look.stride, look.cells[0], level.valid[0])
                        for look, level in zip(looks, each) if look.cells is not None]
            if pictures:
                made[f'{name}: {title}'] = pictures
    return made


def mask_title(name: str) -> str:
    """A mask in words: ``fgd, box foreground`` for ``fgd: foreground_BoxForeground``, the mask's place and type."""
    term, _, mask = name.partition(': ')
    *place, kind = mask.split('_')
    kind = ' '.join(word if word == 'RoI' else word.lower() for word in re.split(r'(?<=[a-zI])(?=[A-Z][a-z])', kind))
    place = [word for word in place if word not in ('mask', 'masks', *kind.split())]
    return f'{term}, {kind}' + (f" ({' '.join(place)})" if place else '')


def _picture(stride: int, cells: Tensor, valid: Tensor) -> dict:
    """A map without the padding, which is not shown.

    Returns:
        Its stride; how many cells are not finite, as those of a student that diverged; the smallest and the largest
        value of the others, and a picture of them, or None where there is none.
    """
    shown = cells[:int(valid.any(1).sum()), :int(valid.any(0).sum())].float().cpu().numpy()
    finite = np.isfinite(shown)
    made = dict(stride=stride, not_finite=int((~finite).sum()))
    if not finite.any():
        return dict(made, low=None, high=None, source=None)
    low, high = shown[finite].min(), shown[finite].max()
    clipped = np.nan_to_num(shown, nan=low, posinf=high, neginf=low)
    return dict(made, low=float(f'{low:.3g}'), high=float(f'{high:.3g}'), source=map_uri(clipped))


def _trained_distiller(config: Config, checkpoint: str) -> DetectionDistiller:
    """The distiller as it was at the end of its training."""
    with within_scope(scope_of(config)):
        distiller = build_detector(config.model)
    loaded = load_checkpoint(checkpoint, map_location='cpu')
    distiller.load_state_dict(loaded['state_dict'])
    if CHECKPOINT_KEY in loaded:
        distiller.load_terms(loaded[CHECKPOINT_KEY]['terms'])
    distiller.build_teachers()
    return distiller.to(get_device()).eval()


def _with_ground_truth(validation: Validation, index: int) -> dict:
    """An image as training would see it: prepared for validation, with its boxes in the prepared image's pixels."""
    batch, image = pseudo_collate([validation.dataset[index]]), validation.images[index]
    sample = batch['data_samples'][0]
    scale = np.tile(sample.metainfo.get('scale_factor', (1.0, 1.0)), 2)
    kept = [position for position, ignored in enumerate(image.ignored) if not ignored]
    boxes = torch.tensor(np.array(image.boxes).reshape(-1, 4)[kept] * scale, dtype=torch.float32)
    height, width = sample.img_shape[:2]
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor(image.labels, dtype=torch.long)[kept],
        masks=BitmapMasks(np.zeros((len(kept), height, width), np.uint8), height, width))
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return batch
