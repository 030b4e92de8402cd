"""The losses of a step: weighted, and under the names that mmengine adds up or only logs."""
from __future__ import annotations

from typing import Dict, List, Union

import torch
from torch import Tensor

from kd_det.losses import DistillTerm

Losses = Dict[str, Union[Tensor, List[Tensor]]]
Value = Union[Tensor, Dict[str, Tensor]]  # of a term: a scalar, or its parts by name


def total(value: Value) -> Tensor:
    """The value of a term: the sum of its parts."""
    return sum(value.values()) if isinstance(value, dict) else value


def scaled(losses: Losses, weight: float) -> Losses:
    """The student's own losses times a weight; what is only for the log stays as it is."""

    def scale(value: Union[Tensor, List[Tensor]]) -> Union[Tensor, List[Tensor]]:
        return [weight * each for each in value] if isinstance(value, list) else weight * value

    if weight == 1:
        return losses
    return {name: scale(value) if 'loss' in name else value for name, value in losses.items()}


def weighted(name: str, value: Value, weight: Union[float, Tensor]) -> Dict[str, Tensor]:
    """The loss to add, and the parts to look at (without 'loss' in their names, or mmengine would add them too)."""
    parts = value if isinstance(value, dict) else {}
    return {f'loss_{name}': weight * total(value),
            **{f'distill/{name}_{part}': weight * each.detach() for part, each in parts.items()}}


def untouched(name: str, term: DistillTerm, device: torch.device) -> Dict[str, Tensor]:
    """0 with a gradient of 0 for every weight of the term: data-parallel training waits for each in every step."""
    zeros = (parameter.sum() * 0 for parameter in term.parameters())
    return {f'loss_{name}': sum(zeros, torch.zeros((), device=device))}


def logged(**numbers: Dict[str, Union[float, Tensor]]) -> Dict[str, Tensor]:
    """Numbers of the terms, by kind and by the term's name, under the names of the log."""
    return {f'distill/{name}_{kind}': torch.as_tensor(value) for kind, each in numbers.items()
            for name, value in each.items()}
