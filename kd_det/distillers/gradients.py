"""How strongly a loss pulls at features, the norm of its gradient there; and whether it reaches any parameter."""
from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from mmdet.utils import reduce_mean
from torch import Tensor

# Of the losses, as in mixed-precision training: in float16 a gradient below 6e-8 is 0. A power of 2 rounds nothing.
SCALE = 2.0**12


class GradientNorms(NamedTuple):
    """Norms of two gradients with respect to the same features; scalars, the same on all ranks."""
    term: Tensor
    task: Tensor


def gradient_norms(task: Tensor, terms: dict[str, Tensor],
                   features: dict[str, Sequence[Tensor]]) -> dict[str, GradientNorms]:
    """Compares the gradient of each term with that of the task.

    Both are taken over the features that both depend on. No parameter gets a gradient, no hook of data-parallel
    training fires, and the graph remains for the step's own backward pass. Every rank must call this.

    Args:
        task: The task's loss, a scalar.
        terms: Values of the terms by name, scalars.
        features: For each term the features to look at.

    Returns:
        The norms by the terms' names, each as that of one process with the whole batch but for a common factor; 0 where
        the two losses share no feature.
    """
    if not terms:
        return {}
    read = list({id(feature): feature for name in terms for feature in features[name]}.values())
    task_gradients = dict(zip(map(id, read), _compute_gradients(task, read)))
    squares = []
    for name, value in terms.items():
        pairs = zip(_compute_gradients(value, features[name]), (task_gradients[id(each)] for each in features[name]))
        shared = [(own, tasks) for own, tasks in pairs if own is not None and tasks is not None]
        squares.append(torch.stack([_compute_square_norm([own for own, _ in shared], task.device),
                                    _compute_square_norm([tasks for _, tasks in shared], task.device)]))
    norms = reduce_mean(torch.stack(squares)).sqrt() / SCALE
    return {name: GradientNorms(*each) for name, each in zip(terms, norms)}


def reaches_parameters(loss: Tensor, apart: Collection[Tensor] = ()) -> bool:
    """Whether the gradient of a loss reaches any parameter, be it 0 in this step.

    The graph is walked and no backward pass is made. So no hook of a model fires, be it compiled, sharded or for
    data-parallel training, and checkpointing that allows a single backward pass is none the wiser: what such a
    checkpoint hides is reached if its inputs are.

    Args:
        loss: A scalar.
        apart: Parameters that do not count.
    """
    ignored, seen, nodes = {id(each) for each in apart}, set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, 'variable', None) if type(node).__name__ == 'AccumulateGrad' else None
        if leaf is not None and id(leaf) not in ignored:
            return True
        nodes.extend(before for before, _ in node.next_functions)
    return False


def _compute_gradients(loss: Tensor, features: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of a loss with respect to each feature, or None where there is none."""
    learning = [feature for feature in features if feature.requires_grad]
    if not learning or not loss.requires_grad:
        return [None] * len(features)
    with torch.autocast(loss.device.type, enabled=False):  # as in the step's backward pass
        gradients = iter(torch.autograd.grad(loss * SCALE, learning, retain_graph=True, allow_unused=True))
    return [next(gradients) if feature.requires_grad else None for feature in features]


def _compute_square_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ‖g‖² in float32, a scalar."""
    squares = (torch.linalg.vector_norm(each, dtype=torch.float32).square() for each in gradients)
    return sum(squares, torch.zeros((), device=device))
