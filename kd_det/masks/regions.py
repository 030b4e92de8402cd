"""A mask from what the RoI heads predict for the regions that the student samples."""
from __future__ import annotations

from typing import Union

from mmdet.registry import MODELS
from torch import Tensor

from kd_det.context import ComparedLevel, DistillContext
from kd_det.functional.masks import assign_levels, prediction_difference, region_foreground
from kd_det.heads import ROI_HEAD, HeadError
from kd_det.heads.roi import at_stage
from kd_det.masks.base import CellMask


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

    Example:
        >>> dict(type='MaskSum', masks=[dict(type='PredictionDifference', head='rpn_head'), 'RoIPredictionDifference'])
    """

    student_heads = teacher_heads = (ROI_HEAD, )

    def __init__(self, stage: Union[str, int] = 'mean', class_agnostic: bool = False, num_levels: int = 4,
                 finest_scale: float = 56) -> None:
        super().__init__()
        self.stage, self.class_agnostic = stage, class_agnostic
        self.num_levels, self.finest_scale = num_levels, finest_scale

    def cells(self, level: ComparedLevel) -> Tensor:
        context, teacher = level.context, level.teacher_index
        key = ('regions', teacher, self.stage, self.class_agnostic)
        difference = context.once(key, lambda: self.difference(context, teacher))
        rois = context.student_outputs[ROI_HEAD].regions.rois
        (levels, ) = assign_levels([rois[:, 1:]], self.num_levels, self.finest_scale)
        values = difference * (levels == level.index)
        return region_foreground(rois, values, len(level.teacher), context.batch_shape, level.shape) * level.valid

    def difference(self, context: DistillContext, teacher: int) -> Tensor:
        """(R,) of the regions.

        Raises:
            HeadError: The two tell other classes apart, or the teacher has no such stage.
        """
        outputs = context.student_outputs[ROI_HEAD], at_stage(context.teacher_outputs[teacher][ROI_HEAD], self.stage)
        ours, theirs = (each.probabilities() for each in outputs)
        if self.class_agnostic:
            ours, theirs = ours.amax(1, keepdim=True), theirs.amax(1, keepdim=True)
        if ours.shape != theirs.shape:
            raise HeadError(f'The student tells {ours.shape[1]} classes apart, the teacher {theirs.shape[1]}: give a '
                            'teacher of the same classes, or set class_agnostic=True.')
        return prediction_difference(ours, theirs)
