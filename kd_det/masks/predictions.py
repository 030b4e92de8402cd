"""Masks from what the heads predict: dense heads, the queries of DETRs, RoI heads.

Only that of prediction quality needs ground truth. A mask reads the outputs of the heads that it declares; those of
student and teacher are detached here, for no gradient flows through a mask.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, cast

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.config.arguments import Count, EitherSide, Positive, Share, declared, split_sides
from kd_det.context import ComparedLevel, DistillContext
from kd_det.functional import blocks
from kd_det.functional.boxes import constant
from kd_det.functional.logits import cell_probabilities
from kd_det.functional.masks import (
    assign_levels,
    prediction_difference,
    prediction_quality,
    prediction_quality_of_grids,
    region_foreground,
    teacher_confidence,
)
from kd_det.functional.queries import corners
from kd_det.heads import ROI_HEAD, DenseOutputs, HeadError, HeadRequest, QueryOutputs, RoIOutputs
from kd_det.heads.roi import Stage, at_stage
from kd_det.masks.base import CellMask


class _PredictionMask(CellMask):
    """A mask from the class probabilities at each cell, of the head's level of the same stride."""

    @declared
    def __init__(self, head: EitherSide = 'bbox_head', anchors: Literal['max', 'mean'] = 'max') -> None:
        super().__init__()
        student, teacher = split_sides(head)
        self.student_head, self.teacher_head = HeadRequest(student), HeadRequest(teacher, kinds=['classes'])
        self.anchors = anchors

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.teacher_head, )

    def teacher_outputs(self, level: ComparedLevel) -> DenseOutputs:
        return cast(DenseOutputs, level.context.teacher_outputs[level.teacher_index][self.teacher_head])

    def look(self, level: ComparedLevel, see: Callable[..., Tensor], *sides: DenseOutputs) -> Tensor:
        """What can be seen of the class probabilities at each cell, a few cells at a time.

        Args:
            level: The level.
            see: Of (cells, classes) of each side: (cells,).
            sides: Outputs of heads.

        Returns:
            (N, H, W).

        Raises:
            HeadError: A head has no such level.
        """
        cells = [each for outputs in sides for each in outputs.cells(_find_head_level(level, outputs))]

        def see_cells(*blocks: Tensor | None) -> Tensor:
            return see(*(cell_probabilities(cast(Tensor, logits), outputs.activation, objectness, self.anchors)
                         for logits, objectness, outputs in zip(blocks[::2], blocks[1::2], sides)))

        return blocks.map_rows(see_cells, cast(Tensor, cells[0]), *cells[1:]).view(-1, *level.shape)


def _find_head_level(level: ComparedLevel, outputs: DenseOutputs) -> int:
    index = outputs.level_of(level.stride)
    if outputs.shapes[index] != level.shape:
        raise HeadError(f'On the level of stride {level.stride} the features have {level.shape} cells but the head '
                        f'{outputs.shapes[index]}: a mask of predictions needs the features that the head sees.')
    return index


def _compare_probabilities(student: Tensor, teacher: Tensor, class_agnostic: bool) -> Tensor:
    """The difference of class probabilities, (R, K), as (R,)."""
    if class_agnostic:
        student, teacher = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
    if student.shape != teacher.shape:
        raise HeadError(f'The student tells {student.shape[1]} classes apart, the teacher {teacher.shape[1]}: give a '
                        'teacher of the same classes, or set class_agnostic=True.')
    return prediction_difference(student, teacher)


@MODELS.register_module()
class PredictionDifference(_PredictionMask):
    """Where the two detectors disagree: mean over classes of (p_t − p_s)² (PFI, Li et al., arXiv 2112.04840).

    It is made anew each step from the predictions of both, and fades as the student approaches the teacher.

    Args:
        class_agnostic: Compare the largest class probability alone: for heads that tell other classes apart, such as an
            RPN and a one-stage head.
        head: ``'bbox_head'`` of one-stage detectors, or ``'rpn_head'``, whose only class is the object; or a dict with
            the keys ``student`` and ``teacher``.
        anchors: What counts of the anchors of a cell: ``'max'`` or ``'mean'``.

    Raises:
        ValueError: An argument that does not fit.
        HeadError: In a step: the heads tell other classes apart, or see other levels than the features are.

    Example:
        >>> from kd_det.masks import build_mask
        >>> mask = build_mask(dict(type='PredictionDifference', head='rpn_head'))
        >>> mask.anchors, mask.needs_boxes
        ('max', False)
    """

    @declared
    def __init__(self, class_agnostic: bool = False, head: EitherSide = 'bbox_head',
                 anchors: Literal['max', 'mean'] = 'max') -> None:
        super().__init__(head, anchors)
        self.class_agnostic = class_agnostic

    @property
    def student_heads(self) -> tuple[str, ...]:
        return (self.student_head, )

    def cells(self, level: ComparedLevel) -> Tensor:
        compare = partial(_compare_probabilities, class_agnostic=self.class_agnostic)
        student = cast(DenseOutputs, level.context.student_outputs[self.student_head])
        return self.look(level, compare, student, self.teacher_outputs(level)) * level.valid


@MODELS.register_module()
class TeacherConfidence(_PredictionMask):
    """Where the teacher sees an object: max over classes of p_t (feature richness, FRS, arXiv 2111.00674).

    Args:
        head: See :class:`PredictionDifference`; of a dict the teacher's counts.
        anchors: See :class:`PredictionDifference`.

    Raises:
        ValueError: An argument that does not fit.
        HeadError: In a step: the head sees other levels than the features are.

    Example:
        A head of two cells, a class and an anchor:

        >>> import torch
        >>> from kd_det.context import DistillContext
        >>> from kd_det.heads import DenseOutputs
        >>> outputs = DenseOutputs(logits=(torch.tensor([[[-1.], [1.]]]), ), activation='sigmoid', regressions=(),
        ...                        shapes=((1, 2), ), strides=(8, ), decode=tuple, generate_priors=tuple)
        >>> feature = torch.zeros(1, 4, 1, 2)
        >>> context = DistillContext.of_features(feature, feature, 8, teacher_outputs=[dict(bbox_head=outputs)])
        >>> TeacherConfidence().cells(context.read_level())
        tensor([[[0.2689, 0.7311]]])
    """

    def cells(self, level: ComparedLevel) -> Tensor:
        return self.look(level, teacher_confidence, self.teacher_outputs(level)) * level.valid


@MODELS.register_module()
class PredictionQuality(CellMask):
    """From where the teacher detects each box best (PGD, Yang et al., ECCV 2022, arXiv 2203.05469).

    The quality of a cell inside a box is p(class)^(1 − ξ)·IoU(prediction, box)^ξ, of its best prior. The best cells of
    each box, of all levels of the head, get the height of the Gaussian fitted to their positions; all others get 0.

    Args:
        head: ``'bbox_head'``, or ``'rpn_head'``, whose only class is the object; of a dict with the keys ``student``
            and ``teacher`` the teacher's counts. Boxes of a class that the head does not have get no cells.
        xi: ξ, the share of the localisation in the quality.
        top_k: Number of cells for each box.

    Raises:
        ValueError: An argument that does not fit.
        HeadError: In a step: the head sees other levels than the features are.

    Example:
        >>> from kd_det.masks import build_mask
        >>> mask = build_mask(dict(type='PredictionQuality', top_k=9))
        >>> mask.xi, mask.needs_boxes
        (0.8, True)
    """

    @declared
    def __init__(self, head: EitherSide = 'bbox_head', xi: Share = 0.8, top_k: Count = 30) -> None:
        super().__init__()
        _, teacher_head = split_sides(head)
        self.head, self.xi, self.top_k = HeadRequest(teacher_head, kinds=['classes', 'boxes']), xi, top_k

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.head, )

    @property
    def needs_boxes(self) -> bool:
        return True

    def cells(self, level: ComparedLevel) -> Tensor:
        context, teacher_index = level.context, level.teacher_index
        outputs = cast(DenseOutputs, context.teacher_outputs[teacher_index][self.head])
        index = _find_head_level(level, outputs)
        # Boxes compete for the cells of all levels together.
        key = ('quality', teacher_index, self.head, self.xi, self.top_k)
        return context.once(key, lambda: self._spread_quality(context, outputs))[index] * level.valid

    def _spread_quality(self, context: DistillContext, outputs: DenseOutputs) -> list[Tensor]:
        """(N, H, W) of each level of the head."""
        sizes = [height * width for height, width in outputs.shapes]
        anchors = [len(priors) // size for priors, size in zip(outputs.priors, sizes)]
        centers = [priors[::each].unflatten(1, (2, 2)).mean(1) for priors, each in zip(outputs.priors, anchors)]
        boxes = [level.nan_to_num(0, 0, 0) for level in outputs.boxes]  # a box that overflowed overlaps with none
        labels = context.labels
        if outputs.num_classes == 1:  # an object, whatever its class; but -1 is a class that the teacher does not know
            labels = [each.clamp(max=0) for each in labels]
        if blocks.is_on_host(context.boxes[0]):
            grids = [level.view(*shape, 2) for level, shape in zip(centers, outputs.shapes)]
            quality = prediction_quality_of_grids(outputs.logits, boxes, grids, context.boxes, labels,
                                                  outputs.activation, outputs.objectness, self.xi, self.top_k)
        else:
            points = torch.cat(centers)
            cells = torch.cat([cell.repeat_interleave(each) for cell, each in
                               zip(torch.arange(len(points), device=points.device).split(sizes), anchors)])
            probabilities = torch.cat([outputs.probabilities(index) for index in range(len(sizes))], 1)
            quality = prediction_quality(probabilities, torch.cat(boxes, 1), points, context.boxes, labels, self.xi,
                                         self.top_k, cells)
        return [level.view(-1, *shape) for level, shape in zip(quality.split(sizes, 1), outputs.shapes)]


@MODELS.register_module()
class QueryConfidence(CellMask):
    """Where the queries of a teacher see objects: at each cell the largest score, max_c p_t, of those that cover it.

    FRS (arXiv 2111.00674) weighs features by what the teacher's dense head sees; this does it by the last decoder layer
    of a DETR, which says itself how far an object reaches. It needs no ground truth.

    Args:
        head: ``'bbox_head'``; of a dict with the keys ``student`` and ``teacher`` the teacher's counts.
        top_k: Number of queries that count, the surest.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> from kd_det.masks import build_mask
        >>> build_mask(dict(type='QueryConfidence', top_k=0))
        Traceback (most recent call last):
        kd_det.config.arguments.ArgumentError: mask.top_k: expected an integer of at least 1, got 0.
    """

    @declared
    def __init__(self, head: EitherSide = 'bbox_head', top_k: Count = 100) -> None:
        super().__init__()
        _, teacher_head = split_sides(head)
        self.head, self.top_k = HeadRequest(teacher_head, 'queries'), top_k

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.head, )

    def cells(self, level: ComparedLevel) -> Tensor:
        context = level.context
        last = cast(QueryOutputs, context.teacher_outputs[level.teacher_index][self.head]).last(1)
        scores, surest = last.scores()[0].topk(min(self.top_k, last.boxes.shape[2]))
        boxes = corners(last.boxes[0]).gather(1, surest.unsqueeze(-1).expand(-1, -1, 4)) / 1000
        sizes = constant([[width, height] * 2 for height, width in context.image_shapes], boxes)
        images = torch.arange(len(boxes), device=boxes.device).repeat_interleave(scores.shape[1]).unsqueeze(1)
        rois = torch.cat([images, (boxes.clamp(0, 1) * sizes.unsqueeze(1)).flatten(0, 1)], 1)
        return region_foreground(rois, scores.flatten(), len(boxes), context.batch_shape, level.shape) * level.valid


@MODELS.register_module()
class RoIPredictionDifference(CellMask):
    """Where the RoI heads disagree: PFI (Li et al., arXiv 2112.04840) for two-stage detectors, in box space.

    Both RoI heads classify the regions that the student sampled. The difference of a region, the mean over classes of
    (p_t − p_s)², goes to the cells that the region covers, on the level whose features the heads read for it; where
    regions overlap, the largest counts. Cells without a region get 0, and so do levels that no RoI head reads: the
    :class:`PredictionDifference` of the RPN sees those.

    Args:
        stage: Of a cascade teacher: ``'mean'``, ``'same'`` or an index, see :func:`~kd_det.heads.roi.at_stage`.
        class_agnostic: Compare the largest class probability alone: for RoI heads that tell other classes apart.
        num_levels: Number of levels that the RoI heads read, counted from the finest.
        finest_scale: Regions up to twice this size, in pixels, are read from the finest level, as ``finest_scale`` of
            mmdet's ``SingleRoIExtractor``.

    Raises:
        ValueError: An argument that does not fit.
        HeadError: In a step: the heads tell other classes apart, or the teacher has no such stage.

    Example:
        >>> from kd_det.masks import build_mask
        >>> build_mask(dict(type='RoIPredictionDifference', stage='last'))
        Traceback (most recent call last):
        kd_det.config.arguments.ArgumentError: mask.stage: expected mean, same, or an integer of at least 0, got 'last'.
    """

    student_heads = teacher_heads = (ROI_HEAD, )

    @declared
    def __init__(self, stage: Stage = 'mean', class_agnostic: bool = False, num_levels: Count = 4,
                 finest_scale: Positive = 56) -> None:
        super().__init__()
        self.stage, self.class_agnostic = stage, class_agnostic
        self.num_levels, self.finest_scale = num_levels, finest_scale

    def cells(self, level: ComparedLevel) -> Tensor:
        context, teacher_index = level.context, level.teacher_index
        key = ('regions', teacher_index, self.stage, self.class_agnostic)
        difference = context.once(key, lambda: self._compare_regions(context, teacher_index))
        rois = cast(RoIOutputs, context.student_outputs[ROI_HEAD]).regions.rois
        (levels, ) = assign_levels([rois[:, 1:]], self.num_levels, self.finest_scale, pixel=0)
        values = difference * (levels == level.index)
        return region_foreground(rois, values, len(level.teacher), context.batch_shape, level.shape) * level.valid

    def _compare_regions(self, context: DistillContext, teacher_index: int) -> Tensor:
        """(R,) of the regions.

        Raises:
            HeadError: The two tell other classes apart, or the teacher has no such stage.
        """
        stages = cast(Sequence[RoIOutputs], context.teacher_outputs[teacher_index][ROI_HEAD])
        student, teacher = cast(RoIOutputs, context.student_outputs[ROI_HEAD]), at_stage(stages, self.stage)
        return _compare_probabilities(student.probabilities(), teacher.probabilities(), self.class_agnostic)
