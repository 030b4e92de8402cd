"""The teacher's head finishes what the student's head begins, and must predict what it predicts by itself."""
from __future__ import annotations

from dataclasses import replace

from mmdet.registry import MODELS
from torch import nn

from kd_det.context import DistillContext
from kd_det.heads import DenseOutputs, HeadError, HeadRequest
from kd_det.losses.adapters import build_adapter
from kd_det.losses.base import InputSpecs, Parts
from kd_det.losses.dense import DenseClassification, DenseRegression
from kd_det.losses.outputs import DenseTerm


@MODELS.register_module()
class CrossKD(DenseTerm):
    """Cross-head distillation of dense heads (CrossKD, Wang et al., arXiv 2306.11369).

    Features from within the student's head pass the last layers of the teacher's, which are frozen but let the gradient
    through. These cross predictions imitate the teacher's own. The last layers of the student's head learn from the
    ground truth alone, so that the two do not contradict each other there.

    For heads with towers, as those of RetinaNet, ATSS, GFL, FCOS and RTMDet. Classes are compared by
    :class:`~kd_det.losses.DenseClassification`, over the student's positives; boxes by
    :class:`~kd_det.losses.DenseRegression`, weighted by the teacher's score: the divergence of the distributions over
    distances where the teacher predicts them, else the GIoU. Centerness (ATSS, FCOS) is not compared: the teacher has
    learnt it on positive priors alone. It counts as a factor of the score.

    Args:
        remaining: How many convolutions of the teacher's towers the features pass, before the layers that predict.
            With 1, of four convolutions three are the student's. With 0 only what predicts is the teacher's.
        adapter: Student channels -> teacher channels there, see :func:`~kd_det.losses.adapters.build_adapter`; one for each
            tower, which train with the student.
        beta: See :class:`~kd_det.losses.DenseClassification`.
        temperature: T of the distributions over distances.
        box_weight: Weight of the boxes beside the classes, compared by GIoU.
        distribution_weight: The same where they are compared by their distributions.
        **kwargs: ``head`` and ``teacher``, see :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: A negative ``remaining``.

    Example:
        >>> dict(type='CrossKD', head='bbox_head', remaining=1)
    """

    def __init__(self, remaining: int = 1, adapter: str = 'auto', beta: float = 1.0, temperature: float = 1.0,
                 box_weight: float = 1.0, distribution_weight: float = 4.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if remaining < 0:
            raise ValueError(f'remaining={remaining}: expected the number of convolutions, 0 or more.')
        self.remaining, self.adapter = remaining, adapter
        self.student_towers, self.teacher_towers = (HeadRequest(head, 'towers')
                                                    for head in (self.student_head, self.teacher_head))
        self.box_weight, self.distribution_weight = box_weight, distribution_weight
        self.classes = DenseClassification(beta=beta, **kwargs)
        boxes = dict(kwargs, weighting='confidence', normalizer='confidence')
        self.boxes = DenseRegression(form='giou', **boxes)
        self.distributions = DenseRegression(form='distribution', temperature=temperature, reduction='sum', **boxes)

    @property
    def student_heads(self) -> tuple[str, ...]:
        return (*self.classes.student_heads, self.student_towers)

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.teacher_head, self.teacher_towers)

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        """Makes an adapter for the features of each tower.

        Raises:
            HeadError: A tower has fewer convolutions.
            ValueError: The adapter does not fit the widths.
        """
        widths = (towers.before(self.remaining)
                  for towers in (student[self.student_towers], teacher[self.teacher_towers]))
        self.adapters = nn.ModuleList(build_adapter(self.adapter, *each) for each in zip(*widths))

    def forward(self, context: DistillContext) -> Parts:
        crossed = replace(context, student_outputs={self.student_head: self.cross_outputs(context)})
        parts = self.classes(crossed)
        if context.teacher_outputs[self.teacher_index][self.teacher_head].distributions is None:
            weight, boxes = self.box_weight, self.boxes(crossed)
        else:
            weight, boxes = self.distribution_weight, self.distributions(crossed)
        return dict(parts, **{name: weight * value for name, value in boxes.items()})

    def cross_outputs(self, context: DistillContext) -> DenseOutputs:
        """What the teacher's head predicts from the student's features; the priors' assignment is the student's.

        Raises:
            HeadError: The two heads have other levels, priors or classes.
        """
        self.levels(context)  # the student's own outputs must be comparable, too: its positives are counted
        student, teacher = context.student_outputs[self.student_head], context.teacher_outputs[self.teacher_index]
        strides, towers = teacher[self.teacher_head].strides, teacher[self.teacher_towers]
        if set(strides) != set(student.strides):
            raise HeadError(f"The student's head has levels of the strides {list(student.strides)}, the teacher's "
                            f'{list(strides)}: CrossKD needs the same.')
        order = [student.level_of(stride) for stride in strides]
        features = context.student_outputs[self.student_towers].before(self.remaining)
        crossing = (tuple(adapter(levels[index].float()) for index in order)
                    for adapter, levels in zip(self.adapters, features))
        outputs = towers.resume(*crossing, self.remaining)
        if student.assigned is not None:
            outputs.assigned = tuple(student.assigned[index] for index in order)
        return outputs
