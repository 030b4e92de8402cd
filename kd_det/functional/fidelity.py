"""How closely one detector follows another: pure functions on what both put out."""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
ROUNDING = 1e-10  # of a mean square; a variance that is less is that of rounded sums


class Moments(NamedTuple):
    """Sums over the rows of two feature matrices; those of several batches or ranks add up.

    Attributes:
        count: () number of rows.
        sum_x: (P,) sum of the rows of X.
        sum_y: (Q,) sum of the rows of Y.
        xx: (P, P) XᵀX.
        yy: (Q, Q) YᵀY.
        xy: (P, Q) XᵀY.
    """
    count: Tensor  # type: ignore[assignment]  # not the method of tuples
    sum_x: Tensor
    sum_y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]  # not the concatenation of tuples
        return Moments(*(mine + theirs for mine, theirs in zip(self, other)))


def moments(x: Tensor, y: Tensor) -> Moments:
    """The sums, in float64, from which :func:`linear_cka` is computed.

    Args:
        x: (n, P).
        y: (n, Q), row by row of the same cells.
    """
    x, y = x.double(), y.double()
    return Moments(x.new_tensor(len(x)), x.sum(0), y.sum(0), x.T @ x, y.T @ y, x.T @ y)


def linear_cka(sums: Moments) -> Tensor:
    """Linear centered kernel alignment of two sets of features (arXiv 1905.00414).

    ``‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`` in Frobenius norms, of features whose mean over the rows is subtracted. It does not
    change when features are rotated or scaled. It is the plain estimate: with fewer rows than channels it is too high,
    so there should be many more.

    Args:
        sums: See :func:`moments`.

    Returns:
        (): 1 for the same features, 0 for uncorrelated ones; NaN if one of the two is constant.
    """
    xx = sums.xx - torch.outer(sums.sum_x, sums.sum_x) / sums.count
    yy = sums.yy - torch.outer(sums.sum_y, sums.sum_y) / sums.count
    xy = sums.xy - torch.outer(sums.sum_x, sums.sum_y) / sums.count
    constant = (xx.norm() <= ROUNDING * sums.xx.norm()) | (yy.norm() <= ROUNDING * sums.yy.norm())
    return torch.where(constant, math.nan, xy.square().sum() / (xx.norm() * yy.norm()))


def expected_calibration_error(scores: Tensor, correct: Tensor, bins: int = 15) -> Tensor:
    """Detection ECE: by how much scores differ from the share of detections that are correct (arXiv 2004.13546).

    The detections are put into bins of equal width by their score; of every bin the distance between mean score and
    precision counts with the share of detections in it. (Of the position-dependent error of the paper this is the part
    by score alone.)

    Args:
        scores: (n,) between 0 and 1.
        correct: (n,) of bool: true positives.
        bins: Number of bins.

    Returns:
        (): 0 for perfect calibration, at most 1; NaN without detections.
    """
    scores, correct = scores.double(), correct.double()
    index = (scores * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=scores.device).index_add_(0, index, scores - correct)
    return gaps.abs().sum() / len(scores)


def softmax_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) between categorical distributions, in nats.

    Args:
        teacher: (n, K) logits.
        student: (n, K) logits.

    Returns:
        (n,).
    """
    log_teacher, log_student = teacher.log_softmax(-1), student.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def bernoulli_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher ‖ student) between independent yes-no distributions of every class, summed over classes, in nats.

    Args:
        teacher: (n, K) probabilities; clamped away from 0 and 1 by 1e-6.
        student: (n, K) probabilities.

    Returns:
        (n,).
    """
    teacher, student = (each.double().clamp(EPSILON, 1 - EPSILON) for each in (teacher, student))
    entropy = F.binary_cross_entropy(teacher, teacher, reduction='none')
    return (F.binary_cross_entropy(student, teacher, reduction='none') - entropy).sum(-1)
