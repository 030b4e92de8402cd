"""Learns the form of a detector's features (channels, stride) before any image or weight is loaded."""
from __future__ import annotations

import copy
from typing import Dict, Iterable, Tuple

import torch
from mmdet.registry import MODELS
from torch import nn

from kd_det.context import Level
from kd_det.randomness import preserved_randomness
from kd_det.taps import ENCODER, Levels, TapError, Taps, find_module, is_within_encoder
from kd_det.teachers.transformer import shape_samples

PROBE_SIZE = 256  # pixels; a multiple of every stride in use


class FeatureExtractor(nn.Module):
    """The backbone and neck of a detector, from its model dict.

    Args:
        model: A model dict with ``backbone`` and perhaps ``neck``.
    """

    def __init__(self, model: dict) -> None:
        super().__init__()
        self.backbone = MODELS.build(model['backbone'])
        self.neck = MODELS.build(model['neck']) if model.get('neck') else None

    def extract_feat(self, images):
        features = self.backbone(images)
        return features if self.neck is None else self.neck(features)


def probe_levels(model: nn.Module, taps: Taps) -> Dict[str, Tuple[Level, ...]]:
    """Runs one blank image through backbone and neck. An encoder does not run: it keeps the form of its tokens.

    Args:
        model: A detector, or a :class:`FeatureExtractor`. It is left as it was, BatchNorm statistics included.
        taps: Taps of that model.

    Returns:
        Path -> form of each level.

    Raises:
        TapError: A tapped module is not part of backbone, neck or encoder.
    """
    was_training = {module: module.training for module in model.modules()}
    anchor = next(model.parameters())
    image = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=anchor.device, dtype=anchor.dtype)
    with preserved_randomness(), torch.no_grad(), taps.capture() as features:
        maps = model.eval().extract_feat(image)
        for path in filter(is_within_encoder, taps.paths):
            _pass_tokens(model, path, maps)
    for module, training in was_training.items():
        module.training = training
    return {path: tuple(Level(level.shape[1], round(PROBE_SIZE / level.shape[-1])) for level in levels)
            for path, levels in features.items()}


def probe_config(model: dict, paths: Iterable[str]) -> Dict[str, Tuple[Level, ...]]:
    """Like :func:`probe_levels` for a model dict: backbone and neck are built on the meta device, without memory.

    Raises:
        TapError: A path does not exist in backbone, neck or encoder.
    """
    paths = tuple(paths)
    foreign = [path for path in paths if path.split('.')[0] not in ('backbone', 'neck', ENCODER)]
    if foreign:
        raise TapError(f"Taps read backbone, neck or encoder; '{foreign[0]}' is in none of them.")
    whole = any(map(is_within_encoder, paths))

    def build() -> nn.Module:  # of a DETR with its encoder there is only the whole, which writes into its config
        return MODELS.build(copy.deepcopy(model)) if whole else FeatureExtractor(model)

    with preserved_randomness():
        try:
            with torch.device('meta'):
                extractor = build().to('meta')
            return probe_levels(extractor, Taps(extractor, paths))
        except (NotImplementedError, RuntimeError) as error:
            # Some backbones compute with numbers while they are built (Swin's drop rates), which meta tensors lack.
            if isinstance(error, TapError):
                raise
            extractor = build()
            return probe_levels(extractor, Taps(extractor, paths))


def _pass_tokens(model: nn.Module, path: str, maps: Levels) -> None:
    """Shows a tap in an encoder what the encoder would be given."""
    module, batch_shape = find_module(model, path), (PROBE_SIZE, PROBE_SIZE)
    tokens = model.pre_transformer(maps, shape_samples(batch_shape, [batch_shape]))[0]['feat']
    module.forward = lambda query: query  # on the instance, before the class's
    try:
        module(tokens)
    finally:
        del module.forward
