"""What to compare in the outputs of dense heads: the losses of logits and boxes, weighted and summed over all priors.

A head with anchors has hundreds of thousands of priors, with a logit for each class. These functions make of them what
the formulas of :mod:`~kd_det.functional.logits` and :mod:`~kd_det.functional.boxes` make, times a weight for each
prior, in sum; but block by block, with a gradient by hand, and keep nothing of the size of the logits but their
gradient: see :func:`~kd_det.functional.blocks.sum_rows`. The teacher and the weights are taken as constants.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from kd_det.functional.blocks import RowLoss, sum_rows
from kd_det.functional.boxes import bounded_regression
from kd_det.functional.logits import check_exponent

Transform = Callable[[Tensor], Tensor]


def sum_quality_bce(student: Tensor, teacher: Tensor, weight: Tensor, beta: float = 1.0, temperature: float = 1.0,
                    transform: Transform | None = None) -> Tensor:
    """Σ w·T²·Σ_classes BCE(s/T, σ(t/T))·|σ(t/T) - σ(s/T)|^β, see :func:`~kd_det.functional.logits.quality_bce`.

    With β = 0 the BCE counts from the teacher's entropy, so that it is 0 where the two agree.

    Args:
        student: s, (..., classes) logits.
        teacher: t, (..., classes) logits.
        weight: w, (...).
        beta: β, exponent of the gap, 1 or more, or 0.
        temperature: T, > 0.
        transform: Of the logits of both sides, row by row, before T.

    Returns:
        Scalar.

    Raises:
        ValueError: ``beta`` between 0 and 1, or negative.

    Example:
        >>> round(sum_quality_bce(torch.zeros(2, 3), torch.full((2, 3), 9.0), torch.tensor([1.0, 0.0])).item(), 2)
        1.04
    """
    check_exponent(beta)
    loss = RowLoss(partial(_sigmoid_value, beta), partial(_sigmoid_gradient, beta))
    return _sum_divergence(loss, student, teacher, weight, temperature, transform)


def sum_soft_target_kl(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 1.0,
                       transform: Transform | None = None) -> Tensor:
    """Σ w·T²·KL(softmax(t / T) ‖ softmax(s / T)), see :func:`~kd_det.functional.logits.soft_target_kl`.

    Args:
        student: s, (..., classes) logits.
        teacher: t, (..., classes) logits.
        weight: w, (...).
        temperature: T, > 0.
        transform: Of the logits of both sides, row by row, before T.

    Returns:
        Scalar.

    Example:
        >>> logits = torch.zeros(2, 3)
        >>> sum_soft_target_kl(logits, logits, torch.ones(2))
        tensor(0.)
    """
    return _sum_divergence(RowLoss(_softmax_value, _softmax_gradient), student, teacher, weight, temperature, transform)


def sum_distribution_kl(student: Tensor, teacher: Tensor, weight: Tensor, temperature: float = 10.0,
                        reduction: str = 'sum') -> Tensor:
    """Σ w·:func:`~kd_det.functional.boxes.distribution_kl`.

    Args:
        student: s, (..., 4, bins) logits.
        teacher: t, (..., 4, bins) logits.
        weight: w, (...).
        temperature: T, > 0.
        reduction: ``'sum'`` over sides and bins, or ``'mean'``.

    Returns:
        Scalar.

    Raises:
        ValueError: An unknown reduction.

    Example:
        >>> logits = torch.zeros(2, 4, 17)
        >>> sum_distribution_kl(logits, logits, torch.ones(2))
        tensor(0.)
    """
    if reduction not in ('sum', 'mean'):
        raise ValueError(f"reduction={reduction!r}: expected 'sum' or 'mean'.")
    weight = weight.unsqueeze(-1).expand(student.shape[:-1])
    total = sum_soft_target_kl(student, teacher, weight, temperature)
    return total / (student.shape[-2] * student.shape[-1]) if reduction == 'mean' else total


def sum_giou_imitation(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Σ w·(1 - GIoU), see :func:`~kd_det.functional.boxes.giou_imitation`.

    A box of the teacher that is not finite or has no area teaches nothing.

    Args:
        student: (..., 4) decoded boxes x1, y1, x2, y2.
        teacher: (..., 4) decoded boxes in the same units.
        weight: w, (...).

    Returns:
        Scalar.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
        >>> sum_giou_imitation(boxes, boxes + torch.tensor([2.0, 0, 2, 0]), torch.tensor([3.0]))
        tensor(3.)
    """
    loss = RowLoss(_giou_value, _giou_gradient)
    return sum_rows(loss, weight.flatten(), student.flatten(0, -2), teacher.flatten(0, -2))


def sum_differences(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Σ w·|s - t|, summed over the four regressions.

    Args:
        student: s, (..., 4) box regressions.
        teacher: t, (..., 4) box regressions in the same encoding.
        weight: w, (...).

    Returns:
        Scalar.

    Example:
        >>> sum_differences(torch.zeros(2, 4), torch.ones(2, 4), torch.tensor([1.0, 0.5]))
        tensor(6.)
    """
    loss = RowLoss(lambda s, t: (s - t).abs_().sum(-1), lambda s, t: (s - t).sign_())
    return sum_rows(loss, weight.flatten(), student.flatten(0, -2), teacher.flatten(0, -2))


def sum_bounded_regression(student: Tensor, teacher: Tensor, target: Tensor, weight: Tensor,
                           margin: float = 0.0) -> Tensor:
    """Σ w·:func:`~kd_det.functional.boxes.bounded_regression`.

    Args:
        student: s, (..., 4) box regressions.
        teacher: t, (..., 4) box regressions in the same encoding.
        target: y, (..., 4) ground truth in the same encoding.
        weight: w, (...).
        margin: m, in squared units of the encoding.

    Returns:
        Scalar.

    Example:
        >>> target, teacher, student = torch.zeros(2, 4), torch.ones(2, 4), torch.full((2, 4), 2.0)
        >>> sum_bounded_regression(student, teacher, target, torch.tensor([1.0, 0.0]))
        tensor(16.)
    """
    loss = RowLoss(partial(bounded_regression, margin=margin))
    return sum_rows(loss, weight.flatten(), *(each.flatten(0, -2) for each in (student, teacher, target)))


def _sum_divergence(loss: RowLoss, student: Tensor, teacher: Tensor, weight: Tensor, temperature: float,
                    transform: Transform | None) -> Tensor:
    """Σ w·T²·d(s/T, t/T) of a divergence d of (r, classes) logits."""

    def scale(logits: Tensor) -> Tensor:
        logits = logits if transform is None else transform(logits)
        return logits if temperature == 1 else logits / temperature

    def gradient(student: Tensor, teacher: Tensor) -> Tensor:
        if transform is None:
            return loss.differentiate(scale(student), scale(teacher)).mul_(temperature)
        student = student.detach().requires_grad_()
        with torch.enable_grad():
            scaled = scale(student)
        by_scaled = loss.differentiate(scaled.detach(), scale(teacher)).mul_(temperature**2)
        return torch.autograd.grad(scaled, student, by_scaled)[0]

    def value(student: Tensor, teacher: Tensor) -> Tensor:
        return loss.value(scale(student), scale(teacher)).mul_(temperature**2)

    return sum_rows(RowLoss(value, gradient), weight.flatten(), student.flatten(0, -2), teacher.flatten(0, -2))


def _sigmoid_value(beta: float, student: Tensor, teacher: Tensor) -> Tensor:
    target = teacher.sigmoid()
    if beta == 0:
        divergence = _softplus(student).sub_(_softplus(teacher))
        return divergence.addcmul_(target, student - teacher, value=-1).sum(-1)
    gap = student.sigmoid().sub_(target).abs_()
    entropy = _softplus(student).addcmul_(target, student, value=-1)
    return entropy.mul_(gap if beta == 1 else gap.pow_(beta)).sum(-1)


def _sigmoid_gradient(beta: float, student: Tensor, teacher: Tensor) -> Tensor:
    """With d = σ(s) - σ(t): d·|d|^β + BCE·β·|d|^(β - 1)·sign(d)·σ(s)·(1 - σ(s))."""
    target, probability = teacher.sigmoid(), student.sigmoid()
    difference = probability - target
    if beta == 0:
        return difference
    gradient = _softplus(student).addcmul_(target, student, value=-1)
    gradient.mul_(probability).mul_(probability.neg_().add_(1)).mul_(difference.sign())
    gap = difference.abs()
    if beta != 1:
        gradient.mul_(gap.pow(beta - 1)).mul_(beta)
        gap.pow_(beta)
    return gradient.addcmul_(difference, gap)


def _softmax_value(student: Tensor, teacher: Tensor) -> Tensor:
    log_target = teacher.log_softmax(-1)
    difference = log_target - student.log_softmax(-1)
    return difference.mul_(log_target.exp_()).sum(-1)


def _softmax_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    return student.softmax(-1).sub_(teacher.softmax(-1))


def _softplus(logits: Tensor) -> Tensor:
    """log(1 + exp(x)), several times faster on a CPU than PyTorch's own, or its log1p.

    With z = exp(-|x|) and u = 1 + z as it is rounded: log(1 + z) = log(u) + (z - (u - 1)) / u, up to the square of the
    rounding error.
    """
    small = logits.abs().neg_().exp_()
    rounded = small + 1
    lost = small.sub_(rounded - 1).div_(rounded)
    return rounded.log_().add_(lost).add_(logits.clamp(min=0))


class _Areas(NamedTuple):
    """What the GIoU of (r, 4) boxes of student and teacher is made of, (r,) each.

    Attributes:
        corners: Along x and along y: the student's first, the teacher's, the student's last, the teacher's.
        sides: Along x and along y: of the overlap, the student's box, the hull; negative where corners cross.
        overlap: Area.
        union: Area.
        hull: Area.
        usable: Where the teacher's box is finite and has an area.
    """
    corners: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    sides: list[tuple[Tensor, Tensor, Tensor]]
    overlap: Tensor
    union: Tensor
    hull: Tensor
    usable: Tensor


def _measure_areas(student: Tensor, teacher: Tensor) -> _Areas:
    own, other = ([column.contiguous() for column in boxes.unbind(1)] for boxes in (student, teacher))
    corners = [(own[axis], other[axis], own[axis + 2], other[axis + 2]) for axis in (0, 1)]
    sides = [(torch.minimum(last, last_other).sub_(torch.maximum(first, first_other)), last - first,
              torch.maximum(last, last_other).sub_(torch.minimum(first, first_other)))
             for first, first_other, last, last_other in corners]
    overlap, area, hull = (width.clamp(min=0).mul_(height.clamp(min=0)) for width, height in zip(*sides))
    width, height = other[2] - other[0], other[3] - other[1]
    usable = (width > 0) & (height > 0)
    area_of_teacher = width.mul_(height)
    return _Areas(corners, sides, overlap, area.add_(area_of_teacher).sub_(overlap), hull,
                  usable.logical_and_(area_of_teacher < inf))


def _giou_value(student: Tensor, teacher: Tensor) -> Tensor:
    areas, smallest = _measure_areas(student, teacher), torch.finfo(student.dtype).eps
    distance = (areas.hull - areas.union).div_(areas.hull.clamp_(min=smallest)).add_(1)
    return torch.where(areas.usable, distance.sub_(areas.overlap.div_(areas.union.clamp_(min=smallest))), 0)


def _giou_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    """By the corners, through the areas and their sides."""
    areas, smallest = _measure_areas(student, teacher), torch.finfo(student.dtype).eps
    per_union, per_hull = 1 / areas.union.clamp(min=smallest), 1 / areas.hull.clamp(min=smallest)
    by_union = (areas.overlap * per_union).mul_(per_union).mul_(areas.union > smallest).sub_(per_hull)
    by_hull = (areas.hull - areas.union).mul_(per_hull).mul_(areas.hull > smallest).neg_().add_(1).mul_(per_hull)
    by_areas = per_union.neg_().sub_(by_union), by_union, by_hull
    by_first, by_last = [], []
    for sides, others, (first, first_other, last, last_other) in zip(areas.sides, areas.sides[::-1], areas.corners):
        by_overlap, by_own, by_hull = (other.clamp(min=0).mul_(factor).mul_(side > 0)
                                       for factor, side, other in zip(by_areas, sides, others))
        # A corner of the overlap is the student's where that is the inner one, one of the hull's where it is the outer
        # one; half each where both are in one place.
        both, difference = by_own.add_(by_overlap, alpha=0.5).add_(by_hull, alpha=0.5), by_hull.sub_(by_overlap).div_(2)
        by_first.append((first - first_other).sign_().mul_(difference).sub_(both))
        by_last.append((last - last_other).sign_().mul_(difference).add_(both))
    return torch.where(areas.usable[:, None], torch.stack([*by_first, *by_last], 1), 0)
