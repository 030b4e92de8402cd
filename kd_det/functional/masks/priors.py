"""Masks over the priors of a dense head."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_det.functional.masks.boxes import concatenate, iou, slices


@torch.no_grad()
def valuable_region(
    priors: Sequence[Tensor],
    boxes: Sequence[Tensor],
    gamma: float = 0.25,
    top_k: int = 9,
) -> Tensor:
    """How valuable the priors around those that an adaptive assigner gives to boxes are (VLR of LD, arXiv 2102.12252).

    A prior is valuable to a box where γ·α ≤ DIoU(prior, box) < α, and as much as the two overlap. α is the box's
    threshold of ATSS (arXiv 1912.02424): mean + standard deviation of the IoU over the candidates, on each level the
    ``top_k`` priors nearest to the box.

    Args:
        priors: One (P, 4) tensor per level, pixels.
        boxes: One (n, 4) tensor of ground truth per image.
        gamma: γ.
        top_k: Candidates of each level.

    Returns:
        (N, ΣP) in [0, 1]: the largest IoU of the prior with a box to which it is valuable, 0 where there is none.
    """
    corners, image = concatenate(boxes)
    sizes = [len(level) for level in priors]
    every = torch.cat(list(priors)).to(corners)
    values = corners.new_zeros(len(boxes), len(every))
    for part in slices(len(corners), 4 * len(every)):
        box = corners[part, None]
        distance = (_centre(box) - _centre(every)).square().sum(-1)
        hull = torch.maximum(box[..., 2:], every[:, 2:]) - torch.minimum(box[..., :2], every[:, :2])
        overlap = iou(box, every)
        candidates = torch.cat([
            here.gather(1, there.topk(min(top_k, size), dim=1, largest=False)[1])
            for here, there, size in zip(overlap.split(sizes, 1), distance.split(sizes, 1), sizes)], 1)
        threshold = (candidates.mean(1) + candidates.std(1))[:, None]
        proximity = overlap - distance / hull.square().sum(-1).clamp(min=1e-6)
        valuable = (proximity >= gamma * threshold) & (proximity < threshold)
        values.scatter_reduce_(0, image[part, None].expand_as(overlap), overlap * valuable, 'amax')
    return values


def _centre(boxes: Tensor) -> Tensor:
    return (boxes[..., :2] + boxes[..., 2:]) / 2
