"""RM: the student ranks the candidates of each box as the teacher does."""
from __future__ import annotations

import torch
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean

from kd_det.config.arguments import EitherSide, Index, Positive, declared
from kd_det.context import DistillContext
from kd_det.functional.boxes import find_nearest
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

    only_at_boxes, kinds = True, ('classes', 'boxes')

    @declared
    def __init__(self, temperature: Positive = 1.0, head: EitherSide = 'bbox_head', teacher: Index = 0) -> None:
        super().__init__(head=head, teacher=teacher)
        self.temperature = temperature

    def forward(self, context: DistillContext) -> Parts:
        levels = self.pair_levels(context)
        boxes = torch.cat([level.both('boxes')[1] for level in levels], 1)
        positives = torch.cat([level.student.positives(level.student_level) for level in levels], 1)
        groups = find_nearest(boxes, context.boxes, positives)
        labels, count = torch.cat(context.labels), sum(map(len, context.boxes))
        # A box of a class that the teacher lacks has no candidates.
        labels = torch.cat([labels, labels.new_full((1, ), -1)])[groups]
        groups, labels = torch.where(labels < 0, -1, groups), labels.clamp(min=0).unsqueeze(-1)
        if levels[0].student.num_classes == 1:  # an RPN's, of objects of any class
            labels = torch.zeros_like(labels)
        chosen = zip(levels, labels.split([level.valid.shape[1] for level in levels], 1))
        scores = zip(*([logits.gather(-1, each).squeeze(-1) for logits in level.both('logits')]
                       for level, each in chosen))
        student, teacher = (torch.cat(each, 1).flatten() / self.temperature for each in scores)
        divergences = rank_mimicking(student, teacher, groups.flatten(), count)
        average = reduce_mean(divergences.new_full((), float(count)))
        return dict(rank=divergences.sum() / average.clamp(min=1))
