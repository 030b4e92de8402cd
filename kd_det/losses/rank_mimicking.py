"""RM: the student ranks the candidates of each box as the teacher does."""
from __future__ import annotations

import torch
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from torchvision.ops import box_iou

from kd_det.config.arguments import EitherSide, Index, Positive, declared
from kd_det.context import DistillContext
from kd_det.functional.logits import rank_mimicking
from kd_det.losses.base import Parts
from kd_det.losses.outputs import DenseTerm


@MODELS.register_module()
class RankMimicking(DenseTerm):
    """Rank mimicking (Li et al., AAAI 2022, arXiv 2112.04840).

    ::

        L = mean over boxes of KL(softmax(t/T) ‖ softmax(s/T))

    with s, t (candidates of a box) the logits of the box's class. The candidates are the priors that the student's
    assigner counts as positive and whose box, as the teacher predicts it, overlaps this ground-truth box most.

    In a config: ``dict(type='RankMimicking', head='bbox_head')``.

    Args:
        temperature: T of the softmax over the candidates; smaller looks at the best alone.
        head: See :class:`~kd_det.losses.outputs.DenseTerm`.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.heads import DenseOutputs
        >>> boxes, positives = torch.tensor([[[0.0, 0.0, 8.0, 8.0]] * 2]), torch.ones(1, 2, dtype=torch.bool)
        >>> student, teacher = (
        ...     DenseOutputs.of_boxes(torch.tensor([[[first], [second]]]), boxes, (1, 2), positives=positives)
        ...     for first, second in ((1.0, 2.0), (2.0, 1.0)))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 1, 2), torch.zeros(1, 4, 1, 2), boxes=list(boxes[:, 0].unsqueeze(1)),
        ...     student_outputs=dict(bbox_head=student), teacher_outputs=[dict(bbox_head=teacher)])
        >>> term = RankMimicking()
        >>> round(term(context)['rank'].item(), 3)  # both find the box, and rank the two candidates otherwise
        0.462
    """

    only_at_boxes = True

    @declared
    def __init__(self, temperature: Positive = 1.0, head: EitherSide = 'bbox_head', teacher: Index = 0) -> None:
        super().__init__(head=head, teacher=teacher)
        self.temperature = temperature

    def forward(self, context: DistillContext) -> Parts:
        levels = self.pair_levels(context)
        student, teacher = (torch.cat(each, 1) for each in zip(*(level.both('logits') for level in levels)))
        boxes = torch.cat([level.both('boxes')[1] for level in levels], 1)
        positives = torch.cat([level.student.positives(level.student_level) for level in levels], 1)
        groups = positives.new_full(positives.shape, -1, dtype=torch.long)
        classes, offset = torch.zeros_like(groups), 0
        for image, (truth, labels) in enumerate(zip(context.boxes, context.labels)):
            if len(truth):
                overlap, nearest = box_iou(boxes[image], truth).max(1)
                known = labels >= 0  # a box of a class that the teacher lacks has no candidates
                candidates = positives[image] & (overlap > 0) & known[nearest]
                groups[image] = torch.where(candidates, nearest + offset, -1)
                classes[image] = labels.clamp(min=0)[nearest]
                offset += len(truth)
        classes = classes.unsqueeze(-1)
        student, teacher = (each.gather(-1, classes).flatten() / self.temperature for each in (student, teacher))
        divergences = rank_mimicking(student, teacher, groups.flatten(), offset)
        count = reduce_mean(divergences.new_full((), float(offset)))
        return dict(rank=divergences.sum() / count.clamp(min=1))
