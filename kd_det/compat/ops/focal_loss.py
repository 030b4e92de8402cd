"""Focal loss (arXiv 1708.02002), sigmoid and softmax, with the gradients in closed form.

A target is a class index; for the sigmoid form the index C, or any other outside [0, C), is background.
``weight`` is (C,), one factor a class of the target, or empty.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Writes ``output``, (N, C), from the logits ``input``, (N, C), and the classes ``target``, (N,)."""
    logits, = at_least_float32(input)
    p = logits.sigmoid()
    positive = -alpha * (1 - p)**gamma * F.logsigmoid(logits)
    negative = -(1 - alpha) * p**gamma * F.logsigmoid(-logits)
    output.copy_(torch.where(_is_target(input, target), positive, negative) * _row_weight(weight, target, logits))


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float,
                                alpha: float) -> None:
    """Writes ``grad_input``, (N, C): each element's derivative by its own logit."""
    logits, = at_least_float32(input)
    p = logits.sigmoid()
    positive = -alpha * (1 - p)**gamma * (1 - p - gamma * p * F.logsigmoid(logits))
    negative = -(1 - alpha) * p**gamma * (gamma * (1 - p) * F.logsigmoid(-logits) - p)
    grad_input.copy_(torch.where(_is_target(input, target), positive, negative) * _row_weight(weight, target, logits))


def softmax_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float,
                               alpha: float) -> None:
    """Writes ``output``, (N,), from the probabilities ``input``, (N, C); 0 where ``target`` is negative."""
    probabilities, = at_least_float32(input)
    p, log_p = _target_probability(probabilities, target)
    loss = -alpha * (1 - p)**gamma * log_p * _row_weight(weight, target, probabilities)[:, 0]
    output.copy_(loss.masked_fill(target < 0, 0))


def softmax_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor,
                                gamma: float, alpha: float) -> None:
    """Writes ``grad_input``, (N, C), the derivative by the logits; ``buff``, (N,), holds its common factor."""
    probabilities, = at_least_float32(input)
    p, log_p = _target_probability(probabilities, target)
    # By the chain rule through dp / dlogit_c = p (1[c = target] - p_c).
    factor = -alpha * ((1 - p)**gamma - gamma * (1 - p)**(gamma - 1) * p * log_p)
    factor = (factor * _row_weight(weight, target, probabilities)[:, 0]).masked_fill(target < 0, 0)
    buff.copy_(factor)
    grad_input.copy_(factor[:, None] * (_is_target(probabilities, target).to(factor.dtype) - probabilities))


def _is_target(scores: Tensor, target: Tensor) -> Tensor:
    return target[:, None] == torch.arange(scores.shape[1], device=scores.device)


def _row_weight(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    """(N, 1); background, which has no entry in ``weight``, counts 1."""
    if weight.numel() == 0:
        return like.new_ones(1, 1)
    is_class = (target >= 0) & (target < len(weight))
    index = torch.where(is_class, target, torch.full_like(target, len(weight)))
    return F.pad(weight.to(like.dtype), (0, 1), value=1.0)[index, None]


def _target_probability(probabilities: Tensor, target: Tensor):
    p = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return p, p.clamp(min=torch.finfo(torch.float32).tiny).log()
