"""What to compare in class outputs: losses between the logits of student and teacher.

Logits are (N, classes): RoIs, queries, or the cells of dense heads. The teacher is taken as a constant. All results are
finite for N = 0, and exactly 0 when the student equals the teacher, but for cross-entropies, which are then the
teacher's entropy.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_det.functional.blocks import map_rows


def soft_target_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, class_reduction: str = 'sum',
                   reduction: str = 'mean') -> Tensor:
    """Soft targets: T² · KL(softmax(t / T) ‖ softmax(s / T)) (Hinton et al., arXiv 1503.02531).

    Args:
        student: s, (N, classes) logits.
        teacher: t, (N, classes) logits.
        temperature: T, > 0; larger compares more of what the teacher thinks of the wrong classes.
        class_reduction: ``'sum'`` over the classes, which is the divergence, or ``'mean'``, as mmdet's
            ``KnowledgeDistillationKLDivLoss``.
        reduction: ``'mean'`` over the samples, or ``'none'``.

    Returns:
        Scalar, or (N,) without reduction.

    Raises:
        ValueError: An unknown reduction.

    Example:
        >>> teacher = torch.tensor([[0.0, 2.0]])
        >>> soft_target_kl(teacher, teacher, temperature=2.0)
        tensor(0.)
        >>> round(soft_target_kl(-teacher, teacher, temperature=2.0).item(), 4)
        1.8485
    """
    if class_reduction not in ('sum', 'mean') or reduction not in ('mean', 'none'):
        raise ValueError(f"class_reduction={class_reduction!r}, reduction={reduction!r}: expected 'sum' or 'mean', and "
                         "'mean' or 'none'.")
    divergence = temperature**2 * _kl((student / temperature).log_softmax(-1),
                                      (teacher.detach() / temperature).log_softmax(-1))
    if class_reduction == 'mean':
        divergence = divergence / student.shape[-1]
    return divergence if reduction == 'none' else divergence.sum() / max(divergence.numel(), 1)


def decoupled_kl(student: Tensor, teacher: Tensor, labels: Tensor,
                 temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The two parts of which soft targets consist (DKD, arXiv 2203.08679), each times T².

    The target part compares the probability of the labelled class against all others together; the non-target part the
    distribution among those others. :func:`combine_decoupled` weighs them.

    Args:
        student: s, (N, classes) logits, two classes or more.
        teacher: t, (N, classes) logits.
        labels: (N,) long, the ground-truth class of each sample.
        temperature: T, > 0.

    Returns:
        Target divergence, non-target divergence, and the teacher's probability of the target at this temperature: (N,)
        each.

    Raises:
        ValueError: Fewer than two classes.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 1.0, 1.0]])
        >>> parts = decoupled_kl(student, teacher, labels=torch.tensor([0]))
        >>> plain = combine_decoupled(*parts, alpha=1, beta=1, form='coupled')
        >>> torch.allclose(plain, soft_target_kl(student, teacher, reduction='none'))
        True
    """
    if student.shape[-1] < 2:
        raise ValueError(f'decoupled_kl needs two classes or more, got logits {tuple(student.shape)}: a sigmoid head '
                         'takes quality_bce.')
    is_target = F.one_hot(labels, student.shape[-1]).bool()
    student_target, student_others = _split_target(student / temperature, is_target)
    teacher_target, teacher_others = _split_target(teacher.detach() / temperature, is_target)
    target = temperature**2 * _kl(student_target, teacher_target)
    non_target = temperature**2 * _kl(student_others, teacher_others)
    return target, non_target, teacher_target[:, 0].exp()


def combine_decoupled(target: Tensor, non_target: Tensor, teacher_target_probability: Tensor, alpha: float = 1.0,
                      beta: float = 8.0, form: str = 'decoupled') -> Tensor:
    """Puts the parts of :func:`decoupled_kl` together (DKD, arXiv 2203.08679).

    Args:
        target: (N,).
        non_target: (N,).
        teacher_target_probability: (N,).
        alpha: Weight of the target part.
        beta: Weight of the non-target part.
        form: ``'decoupled'`` gives α·target + β·non_target; ``'coupled'`` α·target + β·(1 - p_t)·non_target, which with
            α = β = 1 is the plain divergence.

    Returns:
        (N,).

    Raises:
        ValueError: An unknown form.

    Example:
        >>> combine_decoupled(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.75]), alpha=1, beta=4)
        tensor([9.])
    """
    if form not in ('decoupled', 'coupled'):
        raise ValueError(f"form={form!r}: expected 'decoupled' or 'coupled'.")
    if form == 'coupled':
        non_target = (1 - teacher_target_probability) * non_target
    return alpha * target + beta * non_target


def quality_bce(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Soft labels of sigmoid heads: Σ_classes BCE(s, σ(t)) · |σ(t) - σ(s)|^β (BCKD 2308.14286, CrossKD 2306.11369).

    Args:
        student: s, (N, classes) logits.
        teacher: t, (N, classes) logits.
        beta: β, exponent of the modulating gap, 1 or more; 0 is the plain cross-entropy.

    Returns:
        (N,).

    Raises:
        ValueError: ``beta`` between 0 and 1, whose gradient is infinite where student and teacher agree, or negative.

    Example:
        >>> logits = torch.tensor([[0.0, 3.0]])
        >>> quality_bce(logits, logits), quality_bce(logits, -logits) > 0
        (tensor([0.]), tensor([True]))
    """
    check_exponent(beta)
    target = teacher.detach().sigmoid()
    loss = F.binary_cross_entropy_with_logits(student, target, reduction='none')
    return (loss * (target - student.sigmoid()).abs()**beta).sum(-1)


def check_exponent(beta: float) -> None:
    """Checks the β of :func:`quality_bce`.

    Raises:
        ValueError: It is between 0 and 1, or negative.
    """
    if beta != 0 and beta < 1:
        raise ValueError(f'beta={beta}: expected 0, or 1 or more.')


def weighted_cross_entropy(student: Tensor, teacher: Tensor, background_weight: float = 1.5, background: int = -1,
                           temperature: float = 1.0) -> Tensor:
    """Class-weighted soft targets: -Σ_c w_c · p_t · log p_s · T² (Chen et al., NeurIPS 2017).

    Args:
        student: s, (N, classes) logits, background among the classes.
        teacher: t, (N, classes) logits.
        background_weight: w of the background; that of the other classes is 1.
        background: Index of the background, the last in mmdet.
        temperature: T of both softmaxes, > 0.

    Returns:
        (N,).

    Example:
        >>> logits = torch.zeros(1, 2)  # an object or background, as likely: (1 + 1.5) / 2 times log 2
        >>> round(weighted_cross_entropy(logits, logits).item(), 4)
        0.8664
    """
    weight = student.new_ones(student.shape[-1])
    weight[background] = background_weight
    target = (teacher.detach() / temperature).softmax(-1)
    return -temperature**2 * (weight * target * (student / temperature).log_softmax(-1)).sum(-1)


def rank_mimicking(student: Tensor, teacher: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Rank mimicking: KL(t ‖ s) of the softmax over the scores of one box's candidates (RM, arXiv 2112.04840).

    Args:
        student: (M,) scores of the candidates of all boxes.
        teacher: (M,) scores.
        groups: (M,) long, the box to which each candidate belongs; negative for none.
        num_groups: Number of boxes.

    Returns:
        (num_groups,), 0 for boxes with fewer than two candidates.

    Example:
        >>> teacher, boxes = torch.tensor([1.0, 3.0, 2.0, 9.0]), torch.tensor([0, 0, 1, -1])
        >>> rank_mimicking(teacher, teacher, boxes, num_groups=2)
        tensor([0., 0.])
    """
    # Candidates of no box fall into one more group, which is cut off at the end.
    groups = torch.where(groups < 0, num_groups, groups)
    log_student = _grouped_log_softmax(student, groups, num_groups + 1)
    log_teacher = _grouped_log_softmax(teacher.detach(), groups, num_groups + 1)
    divergence = F.kl_div(log_student, log_teacher, reduction='none', log_target=True)
    return divergence.new_zeros(num_groups + 1).index_add(0, groups, divergence)[:-1]


def standardized_logits(logits: Tensor) -> Tensor:
    """Logit standardisation: (z - mean) / std over the classes of a sample (Sun et al., CVPR 2024, arXiv 2403.01427).

    Of student and teacher both, before the temperature: then only the order and the relative distances of the classes
    are compared, not how far apart the logits are. The deviation is the unbiased one, as the authors'.

    Args:
        logits: (..., classes). Fewer than three say nothing: of two, each standardised pair is (±1, ∓1) / √2.

    Returns:
        (..., classes); 0, with gradient 0, where the logits of a sample are all equal.

    Example:
        >>> standardized_logits(torch.tensor([[0.0, 1.0, 2.0], [7.0, 17.0, 27.0], [5.0, 5.0, 5.0]]))
        tensor([[-1.,  0.,  1.],
                [-1.,  0.,  1.],
                [ 0.,  0.,  0.]])
    """
    centred = logits - logits.mean(-1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    # What rounding leaves of equal logits is no difference.
    equal = length <= 4 * torch.finfo(logits.dtype).eps * logits.abs().amax(-1, keepdim=True)
    deviation = torch.where(equal, 1, length / max(logits.shape[-1] - 1, 1)**0.5)
    return torch.where(equal, 0, centred / deviation)


def restricted_logits(logits: Tensor, classes: Sequence[int], background: bool) -> Tensor:
    """The logits of some classes alone.

    Without background each class has a probability of its own, and the others are left out. With it the softmax of the
    result gives the chosen classes the probability that they had, and the background the rest: it then stands for "none
    of these", which two detectors that share no more than the chosen classes mean alike.

    Args:
        logits: (..., all classes), the background's as the last if there is one.
        classes: Indices of the chosen classes; their order becomes that of the result.
        background: Whether the last logit is the background's.

    Returns:
        (..., chosen), or (..., chosen + 1) with background.

    Example:
        >>> restricted_logits(torch.tensor([0.0, 1.0, 2.0]), [2, 0], background=False)
        tensor([2., 0.])
    """
    count = logits.shape[-1]
    if list(classes) == list(range(count - background)):
        return logits
    # Not by a list of indices: its gradient would be written one element after another.
    rest = [index for index in range(count) if index not in classes]
    chosen, others = (logits.index_select(-1, torch.tensor(each, dtype=torch.long).to(logits.device, non_blocking=True))
                      for each in (list(classes), rest if background else []))
    return torch.cat([chosen, others.logsumexp(-1, keepdim=True)], -1) if background else chosen


def class_probabilities(logits: Tensor, activation: str, objectness: Tensor | None = None) -> Tensor:
    """What a head gives to each class, the background left out.

    Args:
        logits: (..., classes), the background's as the last where they are a softmax's.
        activation: ``'sigmoid'`` or ``'softmax'``.
        objectness: (...) logits, where those of classes are conditional on an object.

    Returns:
        (..., classes without background).

    Example:
        >>> class_probabilities(torch.zeros(1, 4), 'softmax')
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    probabilities = logits.sigmoid() if activation == 'sigmoid' else logits.softmax(-1)[..., :-1]
    return probabilities if objectness is None else probabilities * objectness.sigmoid().unsqueeze(-1)


def joint_logits(logits: Tensor, objectness: Tensor) -> Tensor:
    """Logits of the probability of class and object, log(pq / (1 - pq)), with p, q the sigmoids of a and b.

    They are -log(exp(-a) + exp(-b) + exp(-a - b)), which is exact where a sigmoid is rounded to 0 or 1.

    Args:
        logits: a, (..., classes), conditional on an object.
        objectness: b, (...) logits.

    Returns:
        (..., classes).

    Example:
        >>> joint_logits(torch.zeros(1, 1), torch.zeros(1)).sigmoid()
        tensor([[0.2500]])
    """
    a, b = -logits, -objectness.unsqueeze(-1)
    return -torch.logaddexp(torch.logaddexp(a, b), a + b)


def cell_probabilities(logits: Tensor, activation: str, objectness: Tensor | None = None,
                       reduction: str = 'max') -> Tensor:
    """Class probabilities of cells with several priors each.

    Args:
        logits: (..., priors, classes), see :func:`class_probabilities`.
        activation: ``'sigmoid'`` or ``'softmax'``.
        objectness: (..., priors) logits, see :func:`class_probabilities`.
        reduction: ``'max'`` or ``'mean'`` over the priors of a cell.

    Returns:
        (..., classes without background).

    Example:
        >>> cell_probabilities(torch.tensor([[[0.0], [9.0]]]), 'sigmoid', reduction='mean')
        tensor([[0.7499]])
    """
    if reduction == 'max' and activation == 'sigmoid' and objectness is None:  # which grows with the logit
        return logits.amax(-2).sigmoid()
    probabilities = class_probabilities(logits, activation, objectness)
    return probabilities.amax(-2) if reduction == 'max' else probabilities.mean(-2)


def largest_probability(logits: Tensor, activation: str, background: bool = True) -> Tensor:
    """How sure a head is of the class that it finds most likely; nothing of the logits' size is made.

    Args:
        logits: (..., classes), the background's as the last where they are a softmax's.
        activation: ``'sigmoid'`` or ``'softmax'``.
        background: Whether a softmax's background is one of the classes.

    Returns:
        (...,), without gradient.

    Example:
        >>> largest_probability(torch.zeros(1, 4), 'sigmoid'), largest_probability(torch.zeros(1, 4), 'softmax')
        (tensor([0.5000]), tensor([0.2500]))
    """
    if activation == 'sigmoid':  # which grows with the logit
        return logits.detach().amax(-1).sigmoid()
    count = logits.shape[-1] - (not background)
    return map_rows(lambda rows: rows.softmax(-1)[:, :count].amax(-1), logits.flatten(0, -2)).view(logits.shape[:-1])


def largest_gap(student: Tensor, teacher: Tensor, activation: str, student_objectness: Tensor | None = None,
                teacher_objectness: Tensor | None = None) -> Tensor:
    """The largest difference of a class probability between the two (BCKD, arXiv 2308.14286).

    Args:
        student: (..., classes) logits, see :func:`class_probabilities`.
        teacher: (..., classes) logits.
        activation: ``'sigmoid'`` or ``'softmax'``.
        student_objectness: (...) logits, see :func:`class_probabilities`.
        teacher_objectness: (...) logits.

    Returns:
        (...,), without gradient.

    Example:
        >>> largest_gap(torch.zeros(1, 2), torch.tensor([[0.0, 9.0]]), 'sigmoid')
        tensor([0.4999])
    """

    def find_gap(student: Tensor, teacher: Tensor, *objectness: Tensor | None) -> Tensor:
        of_student, of_teacher = (class_probabilities(logits, activation, of_object)
                                  for logits, of_object in zip((student, teacher), objectness))
        return (of_teacher - of_student).abs_().amax(-1)

    logits, objectness = (student, teacher), (student_objectness, teacher_objectness)
    return map_rows(find_gap, *(each.flatten(0, -2) for each in logits),
                    *(each if each is None else each.flatten() for each in objectness)).view(student.shape[:-1])


def confidence_weights(confidence: Tensor, weight: Tensor, average: Callable[[Tensor], Tensor] = torch.clone) -> Tensor:
    """Confidence weighted by the teacher's maximum: CWTM (Born-Again, Furlanello et al., ICML 2018).

    v_n = m_n · Σ w / Σ w·m: samples count by how sure the teacher is of them, and all together as much as before. (The
    paper divides by Σ m, and sums; this is the same where every sample counts, w = 1, and the loss is their mean.)

    Args:
        confidence: m, (N,), see :func:`largest_probability`.
        weight: w ≥ 0, (N,), by which the samples count without.
        average: Takes the mean of a tensor over the processes of data-parallel training, whose batches are one.

    Returns:
        v, (N,), without gradient; its mean, weighted by w, is 1.

    Example:
        >>> confidence_weights(torch.tensor([0.9, 0.3, 0.7]), torch.tensor([1.0, 1.0, 0.0]))
        tensor([1.5000, 0.5000, 1.1667])
    """
    confidence, weight = confidence.detach(), weight.detach()
    total, weighted = average(torch.stack([weight.sum(), (weight * confidence).sum()])).unbind()
    return confidence * total / weighted.clamp(min=torch.finfo(confidence.dtype).tiny)


def permute_others(logits: Tensor) -> Tensor:
    """Dark knowledge with permuted predictions: DKPP (Born-Again, Furlanello et al., ICML 2018).

    The largest logit of each sample stays, the others change places among the other classes, each order as likely, and
    drawn anew for each sample from PyTorch's global generator. So do the probabilities, of sigmoids and of a softmax at
    any temperature: what is left of the teacher is its class and how sure it is, without which others it resembles.

    Args:
        logits: (..., classes). With fewer than three nothing can change places.

    Returns:
        (..., classes).

    Example:
        >>> permuted = permute_others(torch.tensor([[0.0, 9.0, 1.0, 2.0]]))
        >>> permuted[0, 1], permuted.sort().values
        (tensor(9.), tensor([[0., 1., 2., 9.]]))
    """
    return map_rows(_permute_others, logits.flatten(0, -2)).view(logits.shape)


def _permute_others(logits: Tensor) -> Tensor:
    # In float32 whatever the precision: in half precision numbers would be drawn twice.
    order = torch.rand(logits.shape, device=logits.device).argsort(-1)
    permuted, (largest, place) = logits.gather(-1, order), logits.max(-1, keepdim=True)
    # All have changed places. The largest one, wherever it has come, goes home by an exchange with what is there: so
    # each order of the others comes of as many orders of all.
    moved_to = (order == place).int().argmax(-1, keepdim=True)
    return permuted.scatter(-1, moved_to, permuted.gather(-1, place)).scatter(-1, place, largest)


def _kl(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(t ‖ s) of log-probabilities over the last dimension."""
    return F.kl_div(log_student, log_teacher, reduction='none', log_target=True).sum(-1)


def _split_target(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of target against the rest (N, 2), and of the classes among the rest (N, classes)."""
    log_probability = logits.log_softmax(-1)
    # A finite floor: both sides give the target probability 0 among the rest, and 0 · (finite - finite) is 0.
    floor = torch.finfo(logits.dtype).min
    target = log_probability.masked_fill(~is_target, 0).sum(-1)
    rest = log_probability.masked_fill(is_target, floor).logsumexp(-1)
    return torch.stack([target, rest], -1), logits.masked_fill(is_target, floor).log_softmax(-1)


def _grouped_log_softmax(scores: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """log-softmax within each group of (M,) scores."""
    fixed = scores.detach()
    largest = fixed.new_zeros(num_groups).scatter_reduce(0, groups, fixed, 'amax', include_self=False)
    shifted = scores - largest[groups]
    total = shifted.new_zeros(num_groups).index_add(0, groups, shifted.exp())
    return shifted - total[groups].log()
