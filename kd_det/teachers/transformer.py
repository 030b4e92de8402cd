"""The transformer of a DETR, between neck and head, as far as a teacher or a probe runs it."""
from __future__ import annotations

from typing import List, Sequence, Tuple

from mmdet.structures import DetDataSample
from torch import Tensor, nn

from kd_det.taps import Levels


def shape_samples(batch_shape: Sequence[int], image_shapes: Sequence[Tuple[int, int]]) -> List[DetDataSample]:
    """Data samples that tell what is padding, and nothing else.

    Args:
        batch_shape: Height and width of the padded batch.
        image_shapes: Height and width of each image within it.
    """
    return [DetDataSample(metainfo=dict(img_shape=tuple(shape), batch_input_shape=tuple(batch_shape)))
            for shape in image_shapes]


def run_encoder(model: nn.Module, features: Levels, samples: Sequence[DetDataSample]) -> Tensor:
    """Runs the encoder of a DETR, without its decoder.

    Args:
        model: The detector.
        features: What its neck puts out.
        samples: See :func:`shape_samples`.

    Returns:
        (N, tokens, C).
    """
    inputs, _ = model.pre_transformer(features, samples)
    return model.forward_encoder(**inputs)['memory']
