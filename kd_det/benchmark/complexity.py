"""How much a detector computes."""
from __future__ import annotations

import copy
from functools import partial
from typing import Optional

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.logging import print_log
from torch import nn
from torch.utils.data import DataLoader


@torch.no_grad()
def multiply_adds(detector: nn.Module, images: DataLoader) -> Optional[int]:
    """The multiply-adds that a detector needs for one image, without the decoding and suppression of its boxes.

    Of a two-stage detector it depends a little on how many regions it proposes.

    Args:
        detector: The detector; a copy of it is run.
        images: A loader of validation images: the first is taken.

    Returns:
        The number, or None where the detector can not be traced; the log then tells why.
    """
    detector = copy.deepcopy(detector).eval()
    batch = images.collate_fn([images.dataset[0]])
    batch = detector.data_preprocessor(batch, False)
    detector.forward = partial(detector.forward, data_samples=batch['data_samples'])
    try:
        found = get_model_complexity_info(detector, inputs=batch['inputs'], show_table=False, show_arch=False)
        return int(found['flops'])
    except Exception as error:  # the tracer's: it must not cost the training that came before
        print_log(f'FLOPs are not known: {type(error).__name__}: {error}', 'current')
        return None
