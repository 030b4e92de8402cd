"""CrossKD: the teacher's head finishes what the student's head begins, and must predict what it predicts by itself."""
from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from mmdet.registry import MODELS
from torch import nn

from kd_det.config.arguments import Index, Positive, Weight, declared
from kd_det.context import DistillContext
from kd_det.heads import DenseOutputs, HeadError, HeadRequest
from kd_det.heads.towers import TeacherTowers, TowerFeatures, TowerWidths
from kd_det.losses.adapters import ChannelAdapter, build_adapter
from kd_det.losses.base import InputSpecs, Parts
from kd_det.losses.dense import DenseClassification, DenseRegression
from kd_det.losses.outputs import DenseTerm, GapExponent


@MODELS.register_module()
class CrossKD(DenseTerm):
    """Cross-head distillation of dense heads (CrossKD, Wang et al., CVPR 2024, arXiv 2306.11369).

    ::

        x = P_t(C_t(f_s))
        L = Σ BCE(x, σ(t))·|σ(t) − σ(x)|^β / N_pos + w·Σ max_c σ(t)·d(box_x, box_t) / Σ max_c σ(t)

    with f_s the features within the student's head, ``remaining`` convolutions before its end, C_t and P_t the last
    convolutions of the teacher's head and its layers that predict, which are frozen but let the gradient through, and
    t (N, H·W·A, K) the teacher's own class logits; d 1 − GIoU, or KL(t ‖ x) of the distributions over distances, summed
    over the sides. The last layers of the student's head learn from the ground truth alone, so that the two do not
    contradict each other there.

    For heads with towers, as those of RetinaNet, ATSS, GFL, FCOS and RTMDet. Classes are compared by
    :class:`~kd_det.losses.DenseClassification`, over the student's positives; boxes by
    :class:`~kd_det.losses.DenseRegression`, weighted by the teacher's score: the divergence of the distributions over
    distances where the teacher predicts them, else the GIoU. Centerness (ATSS, FCOS) is not compared: the teacher has
    learnt it on positive priors alone. It counts as a factor of the score.

    In a config: ``dict(type='CrossKD', head='bbox_head', remaining=1)``.

    Args:
        remaining: How many convolutions of the teacher's towers the features pass, before the layers that predict
            (1; FCOS 2). With 1, of four convolutions three are the student's. With 0 only what predicts is the
            teacher's.
        adapter: Student channels -> teacher channels there, see :func:`~kd_det.losses.adapters.build_adapter`; one for
            each tower, which train with the student.
        beta: β, see :class:`~kd_det.losses.DenseClassification`.
        temperature: T of the distributions over distances.
        box_weight: w, weight of the boxes beside the classes, compared by GIoU.
        distribution_weight: The same where they are compared by their distributions.
        **kwargs: ``head`` and ``teacher``, see :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.heads import read_dense
        >>> head = MODELS.build(dict(
        ...     type='RetinaHead', num_classes=3, in_channels=4, feat_channels=4, stacked_convs=1,
        ...     anchor_generator=dict(type='AnchorGenerator', strides=[8], ratios=[1.0], scales=[4])))
        >>> levels = (torch.rand(1, 4, 2, 2), )
        >>> outputs, towers = read_dense(head, head(levels)), TowerFeatures((levels, levels), (levels, levels))
        >>> student = replace(outputs, assigned=(torch.ones(1, 4, dtype=torch.bool), ))
        >>> context = DistillContext.of_features(
        ...     *levels, *levels, student_outputs={'bbox_head': student, 'bbox_head.towers': towers},
        ...     teacher_outputs=[{'bbox_head': outputs, 'bbox_head.towers': TeacherTowers(head)}])
        >>> term, widths = CrossKD(remaining=1), {'bbox_head.towers': TowerWidths((4, 4), (4, 4))}
        >>> term.connect(widths, widths)
        >>> term(context)['classes'].item()  # from the teacher's own features its head predicts what it predicts
        0.0
    """

    @declared
    def __init__(self, remaining: Index = 1, adapter: ChannelAdapter = 'auto', beta: GapExponent = 1.0,
                 temperature: Positive = 1.0, box_weight: Weight = 1.0, distribution_weight: Weight = 4.0,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        widths = (cast(TowerWidths, towers).before(self.remaining)
                  for towers in (student[self.student_towers], teacher[self.teacher_towers]))
        self.adapters = nn.ModuleList(build_adapter(self.adapter, *each) for each in zip(*widths))

    def forward(self, context: DistillContext) -> Parts:
        crossed = replace(context, student_outputs={self.student_head: self.cross_outputs(context)})
        parts = self.classes(crossed)
        if cast(DenseOutputs, context.teacher_outputs[self.teacher_index][self.teacher_head]).distributions is None:
            weight, boxes = self.box_weight, self.boxes(crossed)
        else:
            weight, boxes = self.distribution_weight, self.distributions(crossed)
        return dict(parts, **{name: weight * value for name, value in boxes.items()})

    def cross_outputs(self, context: DistillContext) -> DenseOutputs:
        """What the teacher's head predicts from the student's features; the priors' assignment is the student's.

        Raises:
            HeadError: The two heads have other levels, priors or classes.
        """
        # The student's own outputs must be comparable, too: its positives are counted.
        student, teacher = self.pair_levels(context)[0][:2]
        strides = teacher.strides
        if set(strides) != set(student.strides):
            raise HeadError(f"The student's head has levels of the strides {list(student.strides)}, the teacher's "
                            f'{list(strides)}: CrossKD needs the same.')
        order = [student.level_of(stride) for stride in strides]
        features = cast(TowerFeatures, context.student_outputs[self.student_towers]).before(self.remaining)
        classes, boxes = (tuple(adapter(levels[index].float()) for index in order)
                          for adapter, levels in zip(self.adapters, features))
        towers = cast(TeacherTowers, context.teacher_outputs[self.teacher_index][self.teacher_towers])
        outputs = towers.resume(classes, boxes, self.remaining)
        if student.assigned is not None:
            outputs.assigned = tuple(student.assigned[index] for index in order)
        return outputs
