"""CrossKD: the teacher's head finishes what the student's head begins, and must predict what it predicts by itself."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

from mmdet.registry import MODELS
from torch import nn

from kd_det.config.arguments import Index, Positive, Weight, declared
from kd_det.context import DistillContext
from kd_det.functional.moments import align_channels, block_moments, pool_moments
from kd_det.heads import DenseOutputs, HeadError, HeadRequest
from kd_det.heads.dense import Stride
from kd_det.heads.readers import DenseForm
from kd_det.heads.towers import TeacherTowers, TowerFeatures, TowerWidths
from kd_det.losses.adapters import ChannelAdapter, build_adapter
from kd_det.losses.base import InputSpecs, Parts, sum_over_ranks
from kd_det.losses.dense import DenseClassification, DenseRegression
from kd_det.losses.outputs import ComparedOutputs, DenseNormalizer, DenseTerm, GapExponent, sigmoid_divergence
from kd_det.taps import Features


class _Centerness(DenseTerm):
    """BCE of the centerness to the teacher's, on the student's positive priors; less the teacher's entropy."""

    def compare(self, level: ComparedOutputs) -> Parts:
        student, teacher = (each.unsqueeze(-1) for each in level.both('centerness'))
        positives = level.student.positives(level.student_level)
        return dict(centerness=(level.valid * positives * sigmoid_divergence(student, teacher, 0)).sum())


@MODELS.register_module()
class CrossKD(DenseTerm):
    """Cross-head distillation of dense heads (CrossKD, Wang et al., CVPR 2024, arXiv 2306.11369).

    ::

        x = P_t(C_t(act_t(μ_t + σ_t·(f_s − μ_s) / σ_s)))
        L = Σ BCE(x, σ(t))·|σ(t) − σ(x)|^β / N_pos + w·Σ max_c σ(t)·d(box_x, box_t) / D
            + w_c·Σ_positives BCE(x_c, σ(t_c)) / N_pos

    with f_s the features within the student's head before an activation, ``remaining`` convolutions before its end; μ
    and σ the mean and deviation of its channels, and of the teacher's at the same place, over the batch and its cells;
    act_t, C_t and P_t the teacher's activation there, its last convolutions and its layers that predict, which are
    frozen but let the gradient through; t (N, H·W·A, K) the teacher's own class logits; d 1 − GIoU, or KL(t ‖ x) of the
    distributions over distances, summed over the sides; x_c, t_c the centerness of heads that predict it. The last
    layers of the student's head learn from the ground truth alone, so that the two do not contradict each other there.

    For heads with towers, as those of RetinaNet, ATSS, GFL, FCOS, RTMDet and YOLOX. Classes are compared by
    :class:`~kd_det.losses.DenseClassification`, over the student's positives; boxes by
    :class:`~kd_det.losses.DenseRegression`: by the distributions over distances where the teacher predicts them, else
    by the GIoU. Padding is no part of any sum or mean; the centerness counts from the teacher's entropy.

    In a config: ``dict(type='CrossKD', head='bbox_head', remaining=1)``.

    Args:
        remaining: How many convolutions of the teacher's towers the features pass, before the layers that predict
            (1; FCOS 2). With 1, of four convolutions three are the student's. With 0 only what predicts is the
            teacher's. ``'half'``: half of each tower, rounded down.
        align: Give the features the teacher's means and deviations. Without, they pass as they are behind the student's
            own activation, and the teacher's layers see what they were not trained on, unless heads are alike.
        adapter: Student channels -> teacher channels there, see :func:`~kd_det.losses.adapters.build_adapter`; one for
            each tower, which train with the student. Aligned features need no bias.
        beta: β, see :class:`~kd_det.losses.DenseClassification`.
        temperature: T of the distributions over distances.
        box_weight: w, weight of the boxes beside the classes, compared by GIoU.
        distribution_weight: The same where they are compared by their distributions.
        centerness_weight: w_c; 0 leaves the centerness out.
        box_weighting: What weighs the boxes: ``'probability'``, max_c σ(t), or ``'confidence'``, that times the
            teacher's centerness; see :class:`~kd_det.losses.DenseRegression`.
        box_normalizer: D: ``'family'``, what classes are divided by where boxes are compared by GIoU, and where they
            are compared by distributions the sum of their weights, ``'confidence'``; or as ``normalizer``.
        **kwargs: ``head``, ``normalizer`` and ``teacher``, see :class:`~kd_det.losses.outputs.DenseTerm`.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        >>> import torch
        >>> from kd_det.heads import read_dense
        >>> from kd_det.heads.towers import measure_moments, read_towers, record_towers
        >>> head = MODELS.build(dict(
        ...     type='RetinaHead', num_classes=3, in_channels=4, feat_channels=4, stacked_convs=1,
        ...     anchor_generator=dict(type='AnchorGenerator', strides=[8], ratios=[1.0], scales=[4])))
        >>> levels = (torch.rand(1, 4, 2, 2), )
        >>> with record_towers(head, 1) as readings:
        ...     outputs = read_dense(head, head(levels))
        >>> towers, student = read_towers(readings), replace(outputs, assigned=(torch.ones(1, 4, dtype=torch.bool), ))
        >>> context = DistillContext.of_features(
        ...     *levels, *levels, student_outputs={'bbox_head': student, 'bbox_head.towers.1': towers},
        ...     teacher_outputs=[{'bbox_head': outputs,
        ...                       'bbox_head.towers.1': TeacherTowers(head, 1, measure_moments(towers, ()))}])
        >>> term, widths = CrossKD(remaining=1), {'bbox_head.towers.1': TowerWidths((4, 4), (4, 4))}
        >>> term.connect(widths, widths)
        >>> term(context)['classes'].item()  # from the teacher's own features its head predicts what it predicts
        0.0
    """

    @declared
    def __init__(self, remaining: Index | Literal['half'] = 1, align: bool = True, adapter: ChannelAdapter = 'auto',
                 beta: GapExponent = 1.0, temperature: Positive = 1.0, box_weight: Weight = 1.0,
                 distribution_weight: Weight = 4.0, centerness_weight: Weight = 1.0,
                 box_weighting: Literal['probability', 'confidence'] = 'probability',
                 box_normalizer: DenseNormalizer | Literal['family'] = 'family', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.remaining, self.align, self.adapter = remaining, align, adapter
        self.student_towers, self.teacher_towers = (HeadRequest(head, 'towers', remaining)
                                                    for head in (self.student_head, self.teacher_head))
        self.box_weight, self.distribution_weight = box_weight, distribution_weight
        self.centerness_weight = centerness_weight
        of_family = box_normalizer == 'family'
        boxes = dict(kwargs, weighting=box_weighting,
                     normalizer=self.normalizer if of_family else box_normalizer)
        self.classes = DenseClassification(beta=beta, **kwargs)
        self.boxes = DenseRegression(form='giou', **boxes)
        self.distributions = DenseRegression(
            form='distribution', temperature=temperature, reduction='sum',
            **dict(boxes, normalizer='confidence') if of_family else boxes)
        self.centerness = _Centerness(**dict(kwargs, normalizer='positives'))

    @property
    def student_heads(self) -> tuple[str, ...]:
        return (*dict.fromkeys((*self.classes.student_heads, *self.boxes.student_heads)), self.student_towers)

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (self.teacher_head, self.teacher_towers)

    @property
    def independent_of_batch_size(self) -> bool:  # type: ignore[override]
        return all(each.independent_of_batch_size for each in (self.classes, self.boxes, self.distributions))

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        """Makes an adapter for the features of each tower.

        Raises:
            HeadError: A tower has fewer convolutions, or the heads can not be compared.
            ValueError: The adapter does not fit the widths.
        """
        super().connect(student, teacher)
        own, taught = student.get(self.student_head), teacher.get(self.teacher_head)
        if isinstance(own, DenseForm) and isinstance(taught, DenseForm):
            _require_same_strides(list(own.priors), list(taught.priors))
        if (self.centerness_weight and isinstance(own, DenseForm) and isinstance(taught, DenseForm)
                and taught.predicts_centerness and 'positives' not in own.parts):
            raise HeadError(f"The centerness of the teacher's {taught.head} is compared on the priors that the student "
                            f'assigns to boxes, and a {own.head} does not tell which: set centerness_weight=0.')
        widths = (cast(TowerWidths, towers).before(self.remaining)
                  for towers in (student[self.student_towers], teacher[self.teacher_towers]))
        self.adapters = nn.ModuleList(build_adapter(self.adapter, own, taught, bias=not self.align)
                                      for own, taught in zip(*widths))

    def forward(self, context: DistillContext) -> Parts:
        crossed = self.cross_outputs(context)
        teacher = cast(DenseOutputs, context.teacher_outputs[self.teacher_index][self.teacher_head])
        context = replace(context, student_outputs={self.student_head: crossed})
        parts: Parts = self.classes(context)
        weight, boxes = ((self.box_weight, self.boxes) if teacher.distributions is None else
                         (self.distribution_weight, self.distributions))
        parts.update({name: weight * value for name, value in boxes(context).items()})
        if self.centerness_weight and teacher.centerness is not None:
            parts['centerness'] = self.centerness_weight * self.centerness(context)['centerness']
        return parts

    def cross_outputs(self, context: DistillContext) -> DenseOutputs:
        """What the teacher's head predicts from the student's features; the priors' assignment is the student's.

        Raises:
            HeadError: The two heads have other levels, priors or classes.
        """
        # The student's own outputs must be comparable, too: its positives are counted.
        student, teacher = self.pair_levels(context)[0][:2]
        strides = teacher.strides
        _require_same_strides(student.strides, strides)
        order = [student.level_of(stride) for stride in strides]
        features = cast(TowerFeatures, context.student_outputs[self.student_towers])
        towers = cast(TeacherTowers, context.teacher_outputs[self.teacher_index][self.teacher_towers])
        classes, boxes = (tuple(adapter(levels[index].float()) for index in order) for adapter, levels in zip(
            self.adapters, features[:2] if self.align else features.activated()))
        if self.align:
            classes, boxes = towers.activate(*self._align(context, classes, boxes, towers))
        outputs = towers.resume(classes, boxes)
        for name in ('assigned', 'ignored'):
            of_student = getattr(student, name)
            setattr(outputs, name, of_student and tuple(of_student[index] for index in order))
        return outputs

    def _align(self, context: DistillContext, classes: Features, boxes: Features,
               towers: TeacherTowers) -> tuple[Features, Features]:
        """The features of both towers with the means and deviations of the teacher's, over the images of all ranks."""
        levels, taught = (*classes, *boxes), (*towers.moments.classes, *towers.moments.boxes)
        valid = [context.valid(level.shape[-2:]) for level in levels]
        moments = [*map(block_moments, levels, valid), *(each.float().view(len(each), 2, -1) for each in taught)]
        pooled = pool_moments(moments, [each.sum((1, 2)) for each in valid] * 2, sum_over_ranks)
        aligned = tuple(map(align_channels, levels, pooled, pooled[len(levels):]))
        return aligned[:len(classes)], aligned[len(classes):]


def _require_same_strides(student: Sequence[Stride], teacher: Sequence[Stride]) -> None:
    if set(student) != set(teacher):
        raise HeadError(f"The student's head has levels of the strides {list(student)}, the teacher's "
                        f'{list(teacher)}: CrossKD needs the same.')
