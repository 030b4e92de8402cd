"""Correlation of features: indifferent to their scale and offset."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.context import ComparedLevel
from kd_det.functional.features import pearson_distance
from kd_det.losses.base import FeatureTerm, Parts


@MODELS.register_module()
class PKD(FeatureTerm):
    """Pearson correlation of the features (Cao et al., NeurIPS 2022, arXiv 2207.02039): 1 − r, averaged over channels.

    Each channel is standardised over the batch and its cells before it is compared, which makes detectors of unlike
    kinds comparable. A level of a single cell in a batch of one has no deviation and counts as 0.

    Args:
        pad_aware: Leave padding cells out. The paper's form counts them.
        **kwargs: See :class:`~kd_det.losses.base.FeatureTerm`.

    Example:
        >>> dict(type='PKD', tap='neck', levels=4, weight=6.0)
    """

    def __init__(self, pad_aware: bool = True, **kwargs) -> None:
        super().__init__(**kwargs)
        self.pad_aware = pad_aware

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        return dict(pearson=pearson_distance(level.student, level.teacher, level.valid if self.pad_aware else None))
