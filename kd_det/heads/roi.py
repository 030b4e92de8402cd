"""What RoI heads say about the regions that the student samples in its own loss."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from torch import Tensor, nn

from kd_det.functional.boxes import constant
from kd_det.functional.gradients import scale_gradient
from kd_det.functional.logits import restricted_logits
from kd_det.heads.readers import remove_normalization
from kd_det.heads.request import HeadError
from kd_det.taps import Call, Features

Stage = Literal['mean', 'same'] | Annotated[int, Ge(0)]  # of a cascade, see :func:`at_stage`


class Regions(NamedTuple):
    """The R regions that the student sampled from its proposals; those of a cascade's stages follow one another.

    Attributes:
        rois: (R, 5) image index and x1, y1, x2, y2 in pixels of the padded batch.
        labels: (R,) class that the student's sampler gave to the region; the number of classes for background.
        targets: (R, 4) regression to the region's ground-truth box, in the units of :class:`RoIOutputs`; 0 for
            background.
        stds: (R, 4) by which the student's coder divides regressions.
        stages: (R,) index of the student's stage that sampled the region.
    """
    rois: Tensor
    labels: Tensor
    targets: Tensor
    stds: Tensor
    stages: Tensor

    def select(self, rows: Tensor) -> Regions:
        """Those of the R regions where ``rows``, (R,) of bool, is true."""
        return Regions(*(each[rows] for each in self))


class RoIOutputs(NamedTuple):
    """The outputs of a RoI head for R regions, in float32.

    Regressions are shifts of the centre in widths and heights of the region, and logarithms of the scale, without the
    normalisation of the head's own coder: so heads of any normalisation, and the stages of a cascade, can be compared.

    Attributes:
        regions: What the student sampled.
        logits: (R, K + 1) class logits, the background's as the last.
        deltas: (R, K, 4) box regressions by class, or (R, 1, 4) of a class-agnostic head.
    """
    regions: Regions
    logits: Tensor
    deltas: Tensor

    @property
    def num_classes(self) -> int:
        return self.logits.shape[1] - 1

    def weigh(self, shares: Tensor) -> RoIOutputs:
        """The same with the gradient of each region times the share, (N,), of its image."""
        of_regions = shares[self.regions.rois[:, 0].long()]
        return self._replace(logits=scale_gradient(self.logits, of_regions),
                             deltas=scale_gradient(self.deltas, of_regions))

    def restrict(self, classes: Sequence[int], regions: Regions, rows: Tensor) -> RoIOutputs:
        """The same of some classes and some regions alone.

        Args:
            classes: The labels to keep; their order becomes that of the result, see
                :func:`~kd_det.functional.logits.restricted_logits`.
            regions: The kept regions, with labels among those classes.
            rows: (R,) of bool: which of the regions are kept.
        """
        deltas = self.deltas if self.deltas.shape[1] == 1 else self.deltas[:, list(classes)]
        return RoIOutputs(regions, restricted_logits(self.logits, classes, background=True)[rows], deltas[rows])

    def labelled_deltas(self) -> Tensor:
        """(R, 4): the regressions for each region's label; for background, which has none, those of some class."""
        chosen = self.regions.labels.clamp(max=self.deltas.shape[1] - 1)
        return self.deltas.gather(1, chosen[:, None, None].expand(-1, 1, 4)).squeeze(1)

    def probabilities(self) -> Tensor:
        """(R, K) class probabilities, without that of the background."""
        return self.logits.softmax(1)[:, :-1]


def find_stages(roi_head: Any) -> list[Any]:
    """Returns the box heads of a RoI head, one per stage.

    Raises:
        HeadError: Their outputs can not be read.
    """
    stages = list(roi_head.bbox_head) if isinstance(roi_head.bbox_head, nn.ModuleList) else [roi_head.bbox_head]
    for head in stages:
        known = (isinstance(roi_head, (StandardRoIHead, CascadeRoIHead)) and isinstance(head, BBoxHead)
                 and type(head).loss_and_target is BBoxHead.loss_and_target
                 and isinstance(head.bbox_coder, DeltaXYWHBBoxCoder)
                 and head.with_cls and head.with_reg and not head.custom_cls_channels)
        if not known:
            raise HeadError(f'The outputs of a {type(roi_head).__name__} with a {type(head).__name__} can not be read: '
                            'only those of StandardRoIHead, CascadeRoIHead and heads derived from them, whose box head '
                            'both classifies and regresses by DeltaXYWHBBoxCoder.')
    return stages


def read_sampled(stages: Sequence[nn.Module], calls: Sequence[Sequence[Call]]) -> RoIOutputs:
    """Reads the student's outputs from its own loss.

    Args:
        stages: The student's box heads.
        calls: The calls of each one's ``loss_and_target``, where logits, regressions, regions and their targets meet.

    Raises:
        HeadError: The RoI head computed no loss.
    """
    outputs = [_read_call(index, head, call) for index, (head, made) in enumerate(zip(stages, calls)) for call in made]
    if not outputs:
        raise HeadError("The student's RoI head computed no loss in this step, so it sampled no regions.")
    regions = Regions(*map(torch.cat, zip(*(each.regions for each in outputs))))
    logits, deltas = torch.cat([each.logits for each in outputs]), torch.cat([each.deltas for each in outputs])
    return RoIOutputs(regions, logits, deltas)


def _read_call(stage: int, head: Any, call: Call) -> RoIOutputs:
    labels, _, targets, _ = call.returned['bbox_targets']
    rois = call.arguments['rois'].float()
    if head.reg_decoded_bbox:  # the targets are boxes, or 0 for background, which becomes its own target
        boxes = torch.where((labels < head.num_classes).unsqueeze(1), targets.float(), rois[:, 1:])
        targets = head.bbox_coder.encode(rois[:, 1:], boxes)
    stds = constant(head.bbox_coder.stds, rois).expand_as(targets)
    targets = remove_normalization(head.bbox_coder, targets)
    regions = Regions(rois, labels, targets, stds, stages=torch.full_like(labels, stage))
    return _assemble(head, regions, call.arguments['cls_score'], call.arguments['bbox_pred'])


def run_roi_head(roi_head: Any, features: Features, regions: Regions) -> tuple[RoIOutputs, ...]:
    """Runs a teacher's RoI head, its own RoI extractor included, on the student's regions.

    Args:
        roi_head: The teacher's.
        features: What the teacher's neck puts out.
        regions: What the student sampled.

    Returns:
        The outputs of each stage; all stages see the same regions, none the boxes that the stage before it refined.
    """
    outputs, branches = [], _run_image_branches(roi_head, features)
    for stage, head in enumerate(find_stages(roi_head)):
        which = (stage, ) if isinstance(roi_head, CascadeRoIHead) else ()
        results = roi_head._bbox_forward(*which, features, regions.rois, **branches)
        outputs.append(_assemble(head, regions, results['cls_score'], results['bbox_pred']))
    return tuple(outputs)


def _run_image_branches(roi_head: Any, features: Features) -> dict[str, Tensor]:
    """Makes what the box heads of HTC and SCNet are given beside the regions: features of the whole image."""
    names = dict(semantic_feat='semantic_head', glbctx_feat='glbctx_head')
    heads = {argument: getattr(roi_head, name, None) for argument, name in names.items()}
    return {argument: head(features)[1] for argument, head in heads.items() if head is not None}


def join_regions(sampled: Sequence[RoIOutputs]) -> RoIOutputs:
    """The first of what some learners put out, with the regions of all of them, which are what a guide is asked of."""
    if len(sampled) == 1:
        return sampled[0]
    return sampled[0]._replace(regions=Regions(*map(torch.cat, zip(*(each.regions for each in sampled)))))


def split_stages(outputs: Sequence[RoIOutputs], sampled: Sequence[RoIOutputs]) -> list[tuple[RoIOutputs, ...]]:
    """What the stages of a guide's RoI head say of joined regions, for each of the learners that sampled them."""
    counts = [len(each.regions.rois) for each in sampled]
    parts = zip(*(zip(stage.logits.split(counts), stage.deltas.split(counts)) for stage in outputs))
    return [tuple(RoIOutputs(each.regions, *stage) for stage in stages) for each, stages in zip(sampled, parts)]


def at_stage(outputs: Sequence[RoIOutputs], stage: Stage) -> RoIOutputs:
    """One teacher's outputs out of those of its stages.

    Args:
        outputs: Of each stage, for the same regions, see :func:`run_roi_head`.
        stage: The index of one; ``'mean'`` of all, of their logits and regressions; or ``'same'``: for each region
            those of the stage with the index of the student's stage that sampled it, or of the last.

    Raises:
        HeadError: There is no such stage.
    """
    if isinstance(stage, int):
        if not 0 <= stage < len(outputs):
            raise HeadError(f"stage={stage}: the teacher's RoI head has {len(outputs)} stages, counted from 0.")
        return outputs[stage]
    logits, deltas = (torch.stack([getattr(each, name) for each in outputs]) for name in ('logits', 'deltas'))
    if stage == 'mean':
        return outputs[0]._replace(logits=logits.mean(0), deltas=deltas.mean(0))
    everyone = torch.arange(logits.shape[1], device=logits.device)
    same = outputs[0].regions.stages.clamp(max=len(outputs) - 1)
    return outputs[0]._replace(logits=logits[same, everyone], deltas=deltas[same, everyone])


def _assemble(head: Any, regions: Regions, logits: Tensor, deltas: Tensor) -> RoIOutputs:
    """Puts the one form together from a box head's (R, K + 1) logits and (R, K·4) or (R, 4) deltas."""
    by_class = deltas.float().view(len(deltas), deltas.shape[1] // 4, 4)
    return RoIOutputs(regions, logits.float(), remove_normalization(head.bbox_coder, by_class))
