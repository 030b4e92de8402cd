"""The student ranks the candidates of each box as the teacher does."""
from __future__ import annotations

import torch
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from torchvision.ops import box_iou

from kd_det.context import DistillContext
from kd_det.functional.logits import rank_mimicking
from kd_det.losses.base import Parts
from kd_det.losses.outputs import DenseTerm


@MODELS.register_module()
class RankMimicking(DenseTerm):
    """KL(t ‖ s) of the softmax over the scores of one box's candidates (RM, Li et al., arXiv 2112.04840).

    The candidates of a box are the priors that the student's assigner counts as positive and whose box, as the teacher
    predicts it, overlaps this ground-truth box most. Their scores are the logits of the box's class. The value is the
    mean over the boxes.

    Args:
        temperature: Of the softmax over the candidates.
        head: See :class:`~kd_det.losses.outputs.DenseTerm`.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Example:
        >>> dict(type='RankMimicking', head='bbox_head')
    """

    def __init__(self, temperature: float = 1.0, head: str = 'bbox_head', teacher: int = 0) -> None:
        super().__init__(head=head, teacher=teacher)
        self.temperature = temperature

    def forward(self, context: DistillContext) -> Parts:
        levels = self.levels(context)
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
        count = reduce_mean(divergences.new_tensor(float(offset)))
        return dict(rank=divergences.sum() / count.clamp(min=1))
