"""The losses as one writes them down: operator by operator, FGD's masks box by box. A measure for the package's."""
from __future__ import annotations

from math import ceil, floor

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from kd_det.context import DistillContext
from kd_det.functional import masks
from kd_det.heads import DenseOutputs


def fgd(student: Tensor, teacher: Tensor, boxes: list, batch_shape: tuple, student_block: torch.nn.Module,
        teacher_block: torch.nn.Module, temperature: float = 0.5, alpha: float = 1e-3, beta: float = 5e-4,
        gamma: float = 5e-4, lambda_: float = 5e-6) -> Tensor:
    """FGD (arXiv 2111.11837) on one level without padding.

    Args:
        student: (N, C, H, W).
        teacher: (N, C, H, W).
        boxes: One (n, 4) per image, pixels.
        batch_shape: (h, w) in pixels.
        student_block: Global context block of the student's side.
        teacher_block: Of the teacher's.
        temperature: T.
        alpha: Weight of the foreground.
        beta: Weight of the background.
        gamma: Weight of the attention.
        lambda_: Weight of the relation.
    """
    batch, channels, height, width = student.shape
    foreground, background = torch.zeros_like(student[:, 0]), torch.ones_like(student[:, 0])
    for image, image_boxes in enumerate(boxes):
        for x1, y1, x2, y2 in image_boxes:
            left, right = max(floor(x1 * width / batch_shape[1]), 0), ceil(x2 * width / batch_shape[1])
            top, bottom = max(floor(y1 * height / batch_shape[0]), 0), ceil(y2 * height / batch_shape[0])
            area = (right + 1 - left) * (bottom + 1 - top)
            window = foreground[image, top:bottom + 1, left:right + 1]
            window.copy_(window.clamp(min=1 / area))
            background[image, top:bottom + 1, left:right + 1] = 0
        background[image] /= background[image].sum().clamp(min=1)

    def attentions(feature):
        spatial = (feature.abs().mean(1) / temperature).flatten(1).softmax(1).view(batch, height, width)
        channel = (feature.abs().mean((2, 3)) / temperature).softmax(1)
        return height * width * spatial, channels * channel

    spatial, channel = attentions(teacher)
    student_spatial, student_channel = attentions(student)
    attention = spatial[:, None] * channel[:, :, None, None]
    imitation = [(mask[:, None] * attention * (student - teacher)**2).sum() for mask in (foreground, background)]
    distance = (student_spatial - spatial).abs().sum() + (student_channel - channel).abs().sum()
    relation = ((student_block(student) - teacher_block(teacher))**2).sum()
    return (alpha * imitation[0] + beta * imitation[1] + gamma * distance + lambda_ * relation) / batch


def defeat(student: Tensor, teacher: Tensor, foreground: Tensor) -> Tensor:
    """DeFeat (arXiv 2103.14475): foreground and background apart, each Σ M·(s - t)² / (2·C·ΣM)."""
    value = 0
    for mask in (foreground, 1 - foreground):
        errors = (mask[:, None] * (student - teacher)**2).sum()
        value = value + errors / (2 * student.shape[1] * mask.sum().clamp(min=1))
    return value


def fkd_imitation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """FKD's attended difference (openreview uKhGRvM8QNH): ‖√M·(s - t)‖."""
    return torch.linalg.vector_norm((student - teacher) * mask[:, None].sqrt())


def cwd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """CWD (arXiv 2011.13256): T²·Σ KL(softmax_hw(t / T) ‖ softmax_hw(s / T)) / (N·C)."""
    log_student, log_teacher = ((feature / temperature).flatten(2).log_softmax(2) for feature in (student, teacher))
    return temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum() / (len(student) * student.shape[1])


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """PKD (arXiv 2207.02039): half the mean squared difference of channels standardised over the batch."""
    student, teacher = ((feature - feature.mean((0, 2, 3), keepdim=True))
                        / (feature.std((0, 2, 3), keepdim=True) + 1e-6)
                        for feature in (student, teacher))
    return ((student - teacher)**2).mean() / 2


def mgd(generated: Tensor, teacher: Tensor) -> Tensor:
    """MGD (arXiv 2205.01529), after its generation block: Σ(G(s) - t)² / N."""
    return ((generated - teacher)**2).sum() / len(generated)


# ------------------------------------------------------------------------------------- of the outputs of dense heads


def scores(outputs: DenseOutputs, level: int) -> Tensor:
    """The largest class probability of each prior, (N, P)."""
    return outputs.probabilities(level).amax(-1)


def by_cell(outputs: DenseOutputs, level: int) -> Tensor:
    """Class probabilities of the cells, of the surest prior of each, (N, K, H, W)."""
    return outputs.probabilities(level).unflatten(1, (*outputs.shapes[level], -1)).amax(3).permute(0, 3, 1, 2)


def classes(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext, beta: float = 1.0,
            temperature: float = 1.0, weighting: str = 'all', treatment: str = 'none') -> Tensor:
    """Soft labels of sigmoid heads, less the teacher's entropy where β = 0, or soft targets of softmax heads."""
    torch.manual_seed(0)
    value, mean = 0, torch.cat([scores(teacher, level) for level in range(len(teacher.logits))], 1).mean()
    for level, (s, t) in enumerate(zip(student.logits, teacher.logits)):
        weight = torch.ones_like(t[..., 0])
        if weighting == 'richness':
            cells = by_cell(teacher, level).amax(1).flatten(1)
            weight = cells.repeat_interleave(weight.shape[1] // cells.shape[1], 1)
        if treatment == 'cwtm':
            weight = weight * scores(teacher, level) / mean
        if treatment == 'dkpp':
            t = permute_others(t)
        s, t = s / temperature, t / temperature
        if student.activation == 'softmax':
            divergence = F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction='none', log_target=True).sum(-1)
        else:
            target = t.sigmoid()
            divergence = F.binary_cross_entropy_with_logits(s, target, reduction='none')
            if beta == 0:
                divergence = divergence - F.binary_cross_entropy_with_logits(t, target, reduction='none')
            else:
                divergence = divergence * (target - s.sigmoid()).abs()**beta
            divergence = divergence.sum(-1)
        value = value + temperature**2 * (weight * divergence).sum()
    return value


def permute_others(logits: Tensor) -> Tensor:
    """The largest logit stays, the others change places (DKPP)."""
    order = torch.rand(logits.shape, device=logits.device).argsort(-1)
    permuted, (largest, place) = logits.gather(-1, order), logits.max(-1, keepdim=True)
    moved_to = (order == place).int().argmax(-1, keepdim=True)
    return permuted.scatter(-1, moved_to, permuted.gather(-1, place)).scatter(-1, place, largest)


def boxes(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext, weighting: str) -> Tensor:
    """1 - GIoU, weighted by the teacher's score or by the largest difference of a class probability."""
    value = 0
    for level, (s, t) in enumerate(zip(student.boxes, teacher.boxes)):
        weight = scores(teacher, level)
        if weighting == 'gap':
            weight = (teacher.probabilities(level) - student.probabilities(level).detach()).abs().amax(-1)
        usable = (t[..., 2:] > t[..., :2]).all(-1) & t.isfinite().all(-1)
        t = torch.where(usable[..., None], t, s.detach())
        value = value + (weight * usable * giou_distance(s, t)).sum()
    return value


def giou_distance(s: Tensor, t: Tensor) -> Tensor:
    """1 - GIoU of (..., 4) boxes."""
    def area(first: Tensor, last: Tensor) -> Tensor:
        return (last - first).clamp(min=0).prod(-1)

    overlap = area(torch.maximum(s[..., :2], t[..., :2]), torch.minimum(s[..., 2:], t[..., 2:]))
    union = area(s[..., :2], s[..., 2:]) + area(t[..., :2], t[..., 2:]) - overlap
    hull = area(torch.minimum(s[..., :2], t[..., :2]), torch.maximum(s[..., 2:], t[..., 2:]))
    return 1 - overlap / union.clamp(min=1e-7) + (hull - union) / hull.clamp(min=1e-7)


def distributions(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext, weighting: str,
                  temperature: float = 10.0) -> Tensor:
    """LD (arXiv 2102.12252): T²·KL of the distributions, as mean over bins and sides."""
    value, priors = 0, student.priors
    regions = masks.valuable_region(priors, context.boxes).split([len(each) for each in priors], 1)
    for level, (s, t) in enumerate(zip(student.distributions, teacher.distributions)):
        weight = scores(student, level).detach() * student.assigned[level]
        if weighting == 'valuable':
            weight = regions[level] * ~student.assigned[level]
        log_student, log_teacher = ((each / temperature).log_softmax(-1) for each in (s, t))
        divergence = F.kl_div(log_student, log_teacher, reduction='none', log_target=True).mean((2, 3))
        value = value + temperature**2 * (weight * divergence).sum()
    return value


def valuable_region(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext) -> Tensor:
    """LD's valuable region (arXiv 2102.12252), by a table of boxes and priors."""
    return masks.valuable_region(student.priors, context.boxes)


def rank_mimicking(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext) -> Tensor:
    """RM (arXiv 2112.04840), box by box."""
    value, count = 0, sum(map(len, context.boxes))
    s, t = (torch.cat(side.logits, 1) for side in (student, teacher))
    predicted, positive = torch.cat(teacher.boxes, 1), torch.cat(student.assigned, 1)
    for image, (truth, labels) in enumerate(zip(context.boxes, context.labels)):
        overlap, nearest = box_iou(predicted[image], truth).max(1)
        for box, label in enumerate(labels.tolist()):
            chosen = positive[image] & (overlap > 0) & (nearest == box)
            log_student, log_teacher = (side[image, chosen, label].log_softmax(0) for side in (s, t))
            value = value + F.kl_div(log_student, log_teacher, reduction='sum', log_target=True)
    return value / count


def prediction_difference(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext) -> Tensor:
    """PFI's mask (arXiv 2112.04840): mean over classes of (p_t - p_s)² of each cell."""
    with torch.no_grad():
        return torch.cat([masks.prediction_difference(by_cell(student, level), by_cell(teacher, level)).flatten()
                          for level in range(len(student.logits))])


def confidence(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext) -> Tensor:
    """FRS's mask (arXiv 2111.00674): the largest class probability of each cell."""
    return torch.cat([masks.teacher_confidence(by_cell(teacher, level)).flatten()
                      for level in range(len(teacher.logits))])


def prediction_quality(student: DenseOutputs, teacher: DenseOutputs, context: DistillContext) -> Tensor:
    """PGD's mask (arXiv 2203.05469), by a table of boxes and priors."""
    sizes = [height * width for height, width in teacher.shapes]
    anchors = len(teacher.priors[0]) // sizes[0]
    points = torch.cat([each[::anchors].unflatten(1, (2, 2)).mean(1) for each in teacher.priors])
    cells = torch.arange(len(points), device=points.device).repeat_interleave(anchors)
    probabilities = torch.cat([teacher.probabilities(level) for level in range(len(sizes))], 1)
    quality = masks.prediction_quality(probabilities, torch.cat(teacher.boxes, 1), points, context.boxes,
                                       context.labels, cells=cells)
    return torch.cat([each.flatten() for each in quality.split(sizes, 1)])
