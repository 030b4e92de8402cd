"""How strongly a loss pulls at features, the norm of its gradient there; and whether it reaches any parameter."""
from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from mmdet.utils import reduce_mean
from torch import Tensor
from torch.autograd.function import once_differentiable

# Of the losses, as in mixed-precision training: in float16 a gradient below 6e-8 is 0. A power of 2 rounds nothing.
SCALE = 2.0**12

Edge = tuple[Any, int]  # of a graph: a node, and which of its outputs


class GradientNorms(NamedTuple):
    """Norms of two gradients with respect to the same features; scalars, the same on all ranks."""
    term: Tensor
    task: Tensor


def gradient_norms(task: Tensor, terms: dict[str, Tensor], features: dict[str, Sequence[Tensor]],
                   shared: SharedPass | None = None) -> dict[str, GradientNorms]:
    """Compares the gradient of each term with that of the task.

    Both are taken over the features that both depend on. No parameter gets a gradient, no hook of data-parallel
    training fires, and the graph remains for the step's own backward pass. Every rank must call this.

    Args:
        task: The task's loss, a scalar.
        terms: Values of the terms by name, scalars.
        features: For each term the features to look at.
        shared: Keeps the task's backward pass for the step, where that is possible.

    Returns:
        The norms by the terms' names, each as that of one process with the whole batch but for a common factor; 0 where
        the two losses share no feature.
    """
    if not terms:
        return {}
    read = list_features(features[name] for name in terms)
    gradients = _compute_gradients(task, read) if shared is None else shared.differentiate(task, read)
    task_gradients = dict(zip(map(id, read), gradients))
    squares = []
    for name, value in terms.items():
        pairs = zip(_compute_gradients(value, features[name]), (task_gradients[id(each)] for each in features[name]))
        shares = [(own, tasks) for own, tasks in pairs if own is not None and tasks is not None]
        squares.append(torch.stack([_compute_square_norm([own for own, _ in shares], task.device),
                                    _compute_square_norm([tasks for _, tasks in shares], task.device)]))
    norms = reduce_mean(torch.stack(squares)).sqrt() / SCALE
    return {name: GradientNorms(*each) for name, each in zip(terms, norms)}


def list_features(groups: Iterable[Sequence[Tensor]]) -> list[Tensor]:
    """Lists the tensors of all groups, each once."""
    return list({id(feature): feature for group in groups for feature in group}.values())


class SharedPass:
    """The task's backward pass from its loss to some features, made once for the comparison and for the step.

    A step that compares would go that way twice, through heads that cost as much as the rest. Instead the comparison
    finds the gradients of the weights on the way, too, and hands all of them on: the losses' own gradient is replaced
    by what was found (:meth:`replace`), and the step's backward pass begins at the features. It comes to the same
    gradients, up to the order in which parts are added up.

    Args:
        features: Where the way ends.
        weights: Those that it passes.

    Example:
        >>> feature, weight = torch.ones(2, requires_grad=True) * 3, torch.ones(2, requires_grad=True)
        >>> losses = dict(loss=(feature * weight).square().sum())
        >>> shared = SharedPass.find(losses['loss'], [feature], [feature.sum()])
        >>> shared.differentiate(losses['loss'], [feature])[0] / SCALE
        tensor([6., 6.])
        >>> torch.autograd.grad(shared.replace(losses)['loss'], [feature, weight])
        (tensor([6., 6.]), tensor([18., 18.]))
    """

    def __init__(self, features: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.features, self.weights = list(features), list(weights)
        self._found: list[tuple[Tensor, Tensor]] = []  # tensors, and their gradients

    @classmethod
    def find(cls, task: Tensor, features: Sequence[Tensor], terms: Iterable[Tensor]) -> SharedPass | None:
        """Finds the weights on the way; None where a step would save nothing, or lose digits of float16.

        Args:
            task: The task's loss.
            features: Where the way ends.
            terms: Values of all terms in this step. One that goes through the heads itself has the step's backward pass
                go there in any case, and that does not take longer with the task's gradient.
        """
        learning = [each for each in features if each.grad_fn is not None]
        if not learning or any(each.dtype == torch.float16 for each in learning) or _casts_to_float16(task.device):
            return None
        ends = {(each.grad_fn, each.output_nr) for each in learning}
        weights = {id(each): each for each in _iterate_leaves([task], ends)}
        others = (*_iterate_leaves(learning), *_iterate_leaves(terms, ends))
        return None if not weights or any(id(each) in weights for each in others) else cls(learning, weights.values())

    def differentiate(self, task: Tensor, features: Sequence[Tensor]) -> list[Tensor | None]:
        """The task's gradient, times :data:`SCALE`, with respect to features among those at which the way ends."""
        direct: dict[int, Tensor] = {}

        def catch(index: int, gradient: Tensor) -> Tensor:
            direct[index] = gradient
            return torch.zeros_like(gradient)  # what goes on from here does so in the step's backward pass

        handles = [each.register_hook(partial(catch, index)) for index, each in enumerate(self.features)]
        try:
            of_weights = _compute_gradients(task, [*self.features, *self.weights])[len(self.features):]
        finally:
            for handle in handles:
                handle.remove()
        ends = [self.features[index] for index in direct]
        # Each weight has a gradient, be it 0, for which data-parallel training waits.
        own = [torch.zeros_like(each) if gradient is None else gradient
               for each, gradient in zip(self.weights, of_weights)]
        self._found = list(zip((*ends, *self.weights), (*direct.values(), *own)))
        if not ends:
            return [None] * len(features)
        # A level of a pyramid may be made of another.
        whole = torch.autograd.grad(ends, self.features, list(direct.values()), retain_graph=True, allow_unused=True)
        by_feature = dict(zip(map(id, self.features), whole))
        return [by_feature.get(id(each)) for each in features]

    def replace(self, losses: dict[str, Any]) -> dict[str, Any]:
        """The task's losses with what was found in place of their own gradient; as they are if nothing was."""
        if not self._found:
            return losses
        tensors, gradients = zip(*self._found)
        carried = _Carried.apply(gradients, *tensors)
        replaced = dict(losses)
        for name, value in losses.items():
            if 'loss' in name:
                constants = [each.detach() for each in (value if isinstance(value, list) else [value])]
                if constants and carried is not None:  # one holds the gradient of their sum
                    constants[0], carried = constants[0] + carried, None
                replaced[name] = constants if isinstance(value, list) else constants[0]
        return replaced


class _Carried(torch.autograd.Function):
    """0, with given gradients times :data:`SCALE` with respect to some tensors."""

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(gradient * (weight / SCALE) for gradient in ctx.gradients))


def reaches_parameters(loss: Tensor, apart: Collection[Tensor] = ()) -> bool:
    """Whether the gradient of a loss reaches any parameter, be it 0 in this step.

    The graph is walked and no backward pass is made. So no hook of a model fires, be it compiled, sharded or for
    data-parallel training, and checkpointing that allows a single backward pass is none the wiser: what such a
    checkpoint hides is reached if its inputs are.

    Args:
        loss: A scalar.
        apart: Parameters that do not count.
    """
    ignored = {id(each) for each in apart}
    return any(id(leaf) not in ignored for leaf in _iterate_leaves([loss]))


def _iterate_leaves(tensors: Iterable[Tensor], ends: Collection[Edge] = ()) -> Iterator[Tensor]:
    """The leaves of the graph that the gradient of some tensors reaches, without those that lie behind its ends."""
    seen = set[Any]()
    nodes: list[Any] = [each.grad_fn for each in tensors]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == 'AccumulateGrad':
            yield node.variable
        nodes.extend(before for before, output in node.next_functions if (before, output) not in ends)


def _casts_to_float16(device: torch.device) -> bool:
    """Whether a step under autocast computes in float16."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16


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
