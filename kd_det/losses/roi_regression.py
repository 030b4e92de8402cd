"""The student's RoI head moves its regions as the teacher's does."""
from __future__ import annotations

from mmdet.registry import MODELS

from kd_det.context import DistillContext
from kd_det.functional.boxes import bounded_regression
from kd_det.losses.base import Parts
from kd_det.losses.outputs import RoITerm

FORMS = ('bounded', 'l1', 'mse')


@MODELS.register_module()
class RoIRegression(RoITerm):
    """Box distillation of two-stage detectors, on the foreground regions that the student sampled.

    Regressions of the region's class (or the only ones of a class-agnostic head; the two detectors may differ in that)
    are compared in the units of the student's coder. Forms:

    - ``'bounded'``: ‖s − y‖² where it is not better than the teacher's ‖t − y‖² by the margin, else 0 (Chen et al.,
      NeurIPS 2017).
    - ``'l1'``, ``'mse'``: |s − t| and (s − t)², summed over the four values.

    Args:
        form: See above.
        margin: Of the bounded form.
        **kwargs: See :class:`~kd_det.losses.outputs.RoITerm`.

    Raises:
        ValueError: An unknown form.

    Example:
        >>> dict(type='RoIRegression', form='bounded', margin=0.0, weight=0.5)
    """

    def __init__(self, form: str = 'bounded', margin: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if form not in FORMS:
            raise ValueError(f"form='{form}': expected one of {', '.join(FORMS)}.")
        self.form, self.margin = form, margin

    def forward(self, context: DistillContext) -> Parts:
        outputs = self.outputs(context)
        regions, classes = outputs[0].regions, outputs[0].num_classes
        student, teacher = (each.labelled_deltas() / regions.stds for each in outputs)
        if self.form == 'bounded':
            errors = bounded_regression(student, teacher, regions.targets / regions.stds, self.margin)
        else:
            errors = ((student - teacher).abs() if self.form == 'l1' else (student - teacher).square()).sum(1)
        (value, ) = self.normalized(errors, (regions.labels < classes, ))
        return dict(regression=value)
