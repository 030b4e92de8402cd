"""The decoders of two DETRs answer the same queries, made of ground-truth boxes: nothing has to be matched."""
from __future__ import annotations

from typing import cast

import torch
from mmdet.registry import MODELS
from mmdet.utils import reduce_mean
from torch import Tensor

from kd_det.config.arguments import Count, EitherSide, Index, Share, Weight, declared
from kd_det.context import DistillContext
from kd_det.functional.boxes import constant
from kd_det.functional.logits import soft_target_kl
from kd_det.functional.queries import hide_other_groups, noisy_targets
from kd_det.heads import QueryDecoder
from kd_det.heads.decoders import BoxQueries
from kd_det.losses.base import Parts
from kd_det.losses.outputs import GapExponent, sigmoid_divergence
from kd_det.losses.queries import DecoderTerm, box_distances, require_same_classes

PADDING = (0.25, 0.25, 0.75, 0.75)  # where queries stand that are there for images with fewer boxes


@MODELS.register_module()
class TargetQueries(DecoderTerm):
    """Both decoders answer the same queries, ground-truth boxes with noise (CLoCKDistill, arXiv 2502.10683).

    ::

        L = Σ (w_c·d(s, t) + w_l1·‖box_s − box_t‖₁ + w_giou·(1 − GIoU(box_s, box_t))) / (G·N_boxes)
        d = Σ_classes (BCE(s, σ(t)) − BCE(t, σ(t)))·|σ(t) − σ(s)|^β           sigmoid classes, at β = 0; else no BCE(t)
        d = KL(softmax(t) ‖ softmax(s))                                         softmax classes

    over D decoder layers, N images, and for each ground-truth box G queries, of which s and t are what the student and
    the teacher say, each by its own decoder from the memory of its own encoder. The decoder layers are paired from the
    last on. The student's own queries and losses stay as they are; its decoder, its encoder and all before it learn.

    Queries of one group of noise attend to each other, and to none of another group. A box of a class that the teacher
    does not know is left out.

    In a config: ``dict(type='TargetQueries', groups=3, box_noise=0.4)``.

    Args:
        head: ``'bbox_head'`` of DAB-DETR, Deformable DETR or DINO; or a dict with the keys ``student`` and ``teacher``.
        layers: Number of decoder layers; as many as both have by default.
        groups: G, how many queries a box has.
        box_noise: By how much a side of a box moves, see :func:`~kd_det.functional.queries.noisy_targets`.
        label_noise: Share of the queries whose class is drawn. Only DINO's queries tell a class.
        beta: β, exponent of the gap; 0 for the cross-entropy, less the teacher's own entropy, see
            :func:`~kd_det.losses.outputs.sigmoid_divergence`.
        class_weight: w_c.
        l1_weight: w_l1 of the L1 distance of centre, width and height, as shares of the image.
        giou_weight: w_giou.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        A decoder that says of every query that it is right, with as much certainty as there is memory:

        >>> from kd_det.heads import QueryOutputs
        >>> class Sure(QueryDecoder):
        ...     def decode(self, queries):
        ...         logits = self.memory.mean((1, 2)).view(1, -1, 1, 1).expand(1, *queries.labels.shape, 2)
        ...         return QueryOutputs(logits, queries.boxes[None], 'sigmoid')
        >>> student, teacher = (Sure(torch.full((1, 6, 4), each), None, {}, 2, 'sigmoid') for each in (0.0, 3.0))
        >>> context = DistillContext.of_features(
        ...     torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), boxes=[torch.tensor([[2.0, 2.0, 9.0, 9.0]])],
        ...     student_outputs={'bbox_head.decoder': student}, teacher_outputs=[{'bbox_head.decoder': teacher}])
        >>> term = TargetQueries(groups=3)
        >>> {name: round(value.item(), 2) for name, value in term(context).items()}
        {'classes': 1.0, 'l1': 0.0, 'giou': 0.0}
    """

    only_at_boxes = True

    @declared
    def __init__(self, head: EitherSide = 'bbox_head', layers: Count | None = None, groups: Count = 3,
                 box_noise: Share = 0.4, label_noise: Share = 0.25, beta: GapExponent = 0.0,
                 class_weight: Weight = 1.0, l1_weight: Weight = 5.0, giou_weight: Weight = 2.0,
                 teacher: Index = 0) -> None:
        super().__init__(head, 'decoder', layers, teacher)
        self.groups, self.beta = groups, beta
        self.box_noise, self.label_noise = box_noise, label_noise
        self.class_weight, self.l1_weight, self.giou_weight = class_weight, l1_weight, giou_weight

    def forward(self, context: DistillContext) -> Parts:
        decoders = [cast(QueryDecoder, outputs[head]) for outputs, head in (
            (context.student_outputs, self.student_head),
            (context.teacher_outputs[self.teacher_index], self.teacher_head))]
        require_same_classes(*decoders)
        queries, known = self.make_queries(context, decoders[0].num_classes)
        student, teacher = self.pair_layers(*(decoder.run(queries) for decoder in decoders))
        if student.activation == 'sigmoid':
            divergence = sigmoid_divergence(student.logits, teacher.logits, self.beta)
        else:
            divergence = soft_target_kl(student.logits, teacher.logits, reduction='none')
        l1, giou = box_distances(student, teacher)
        weight = known.repeat(1, self.groups).float()
        divisor = self.groups * reduce_mean(known.sum().float()).clamp(min=1)
        return dict(classes=self.class_weight * (divergence * weight).sum() / divisor,
                    l1=self.l1_weight * (l1 * weight).sum() / divisor,
                    giou=self.giou_weight * (giou * weight).sum() / divisor)

    def make_queries(self, context: DistillContext, classes: int) -> tuple[BoxQueries, Tensor]:
        """The queries of this step, at least one for each group of an image; and which boxes they are made of.

        Returns:
            Queries (N, G·n, …), group by group; and (N, n) of bool, False where an image has fewer boxes than n, or the
            teacher does not know the class.
        """
        most = max(1, *map(len, context.boxes))
        shares, labels = [], []
        for boxes, own, (height, width) in zip(context.boxes, context.labels, context.image_shapes):
            missing = most - len(boxes)
            whole = constant([max(side, 1) for side in (width, height, width, height)], boxes)
            shares.append(torch.cat([boxes / whole, constant(PADDING, boxes).expand(missing, 4)]))
            labels.append(torch.cat([own, own.new_full((missing, ), -1)]))
        known = torch.stack(labels) >= 0
        boxes, noisy = noisy_targets(torch.stack(shares), torch.stack(labels).clamp(min=0), self.groups, self.box_noise,
                                     self.label_noise, classes, context.progress.iteration)
        return BoxQueries(boxes.flatten(1, 2), noisy.flatten(1, 2), hide_other_groups(known, self.groups)), known
