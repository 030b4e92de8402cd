"""What the terms that compare outputs of heads share: of dense heads prior by prior, of RoI heads region by region."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple, cast

import torch
from annotated_types import Ge, Le
from mmdet.utils import reduce_mean
from torch import Tensor

from kd_det.config.arguments import EitherSide, Index, declared, split_sides
from kd_det.context import DistillContext
from kd_det.functional.dense import sum_bounded_regression
from kd_det.functional.logits import (
    confidence_weights,
    largest_probability,
    permute_others,
    quality_bce,
    standardized_logits,
)
from kd_det.heads import ROI_HEAD, DenseOutputs, HeadError, HeadRequest, RoIOutputs
from kd_det.heads.dense import Stride
from kd_det.heads.readers import DenseForm
from kd_det.heads.request import HEAD_PARTS, KINDS
from kd_det.heads.roi import Stage, at_stage
from kd_det.losses.base import DistillTerm, InputSpecs, Parts, add_parts

DenseNormalizer = Literal['positives', 'confidence', 'richness', 'none']
Treatment = Literal['none', 'cwtm', 'dkpp']  # of what the teacher says of classes
Margin = Annotated[float, Ge(0)]  # between squared errors
NO_TARGETS = ("form='bounded' compares the errors of anchors' deltas, as RetinaNet, ATSS, SSD and RPN heads predict "
              'them; what the positive priors of this head regress to is not known.')
PRIOR_BY_PRIOR = 'dense outputs are compared prior by prior. Use heads with the same anchors.'
NEAR = 0.01  # pixels by which equal priors differ by rounding
# Of the gap in a divergence. Between 0 and 1 the gradient is infinite where student and teacher agree.
GapExponent = Annotated[float, Ge(0), Le(0)] | Annotated[float, Ge(1)]


class ComparedOutputs(NamedTuple):
    """One level of two dense heads with the same priors.

    Attributes:
        student: All levels of the student's outputs.
        teacher: All levels of the teacher's, without gradient.
        student_level: The index of this level among the student's.
        teacher_level: The same for the teacher's.
        valid: (N, H·W·A), 1 for priors on cells that hold a part of the image, 0 for those on padding alone.
        context: The step.
    """
    student: DenseOutputs
    teacher: DenseOutputs
    student_level: int
    teacher_level: int
    valid: Tensor
    context: DistillContext

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's tensor of that name on this level."""
        return getattr(self.student, name)[self.student_level], getattr(self.teacher, name)[self.teacher_level]

    def confidence(self) -> Tensor:
        """(N, H·W·A): the teacher's scores."""
        return self.teacher.scores(self.teacher_level) * self.valid

    def richness(self) -> Tensor:
        """(N, H·W·A): the teacher's largest class probability of any prior of the same cell (FRS, arXiv 2111.00674)."""
        height, width = self.teacher.shapes[self.teacher_level]
        largest = self.teacher.largest_probabilities(self.teacher_level)
        by_cell = largest.view(len(largest), height * width, -1)
        return by_cell.amax(2, keepdim=True).expand_as(by_cell).flatten(1) * self.valid

    def bounded_error(self, margin: float) -> Tensor:
        """The sum of the student's squared errors on its positive priors where it is not better than the teacher.

        That is by the margin, see :func:`~kd_det.functional.boxes.bounded_regression`.

        Raises:
            HeadError: The student's targets are not known.
        """
        if self.student.targets is None:
            raise HeadError(NO_TARGETS)
        targets = self.student.targets[self.student_level]
        weight = self.valid * self.student.positives(self.student_level)
        return sum_bounded_regression(*self.both('regressions'), targets, weight, margin)


class DenseTerm(DistillTerm):
    """A term that compares two dense heads prior by prior; a subclass implements :meth:`compare`.

    Levels are paired by stride. Both heads must have as many priors per cell, where these are several of the same sizes
    in the same order, and the same classes and activation. Regressions say the same where both heads encode boxes
    alike, of the same priors; a coder's normalisation by means and deviations is taken away. Where one head alone
    predicts objectness, as YOLOX beside RTMDet, its class logits are those of class and object at once
    (:func:`~kd_det.functional.logits.joint_logits`), which is what the other's say. Outputs are (N, H·W·A, …) per
    level, see :class:`~kd_det.heads.DenseOutputs`.

    Args:
        head: ``'bbox_head'`` of one-stage detectors or ``'rpn_head'``; or a dict with the keys ``student`` and
            ``teacher``.
        normalizer: What the sum over all priors is divided by, as mean over ranks. ``'positives'``: the number of
            priors that the student's assigner gave to boxes, as in the task's own loss; ``'confidence'``: the sum of
            the teacher's scores, a soft count of positives that needs no ground truth, and stands for the positives of
            unlabelled images; both at least 1.
            ``'richness'``: each level by the sum over its cells of the teacher's largest probability (FRS).
            ``'none'``: nothing.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Attributes:
        kinds: What it reads of the teacher's outputs, see :class:`~kd_det.heads.HeadRequest`.
        compares_regressions: Whether it compares regressions as heads put them out, and no boxes that are decoded.
        reads_targets: Whether it compares them with the ground truth's.

    Raises:
        ValueError: An argument that does not fit.
    """

    kinds: Iterable[str] = tuple(KINDS)
    compares_regressions: bool = False
    reads_targets: bool = False

    @declared
    def __init__(self, head: EitherSide = 'bbox_head', normalizer: DenseNormalizer = 'positives',
                 teacher: Index = 0) -> None:
        super().__init__(teacher)
        self.student_head, self.teacher_head = map(HeadRequest, split_sides(head))
        self.normalizer = normalizer

    @property
    def student_heads(self) -> tuple[str, ...]:
        positives = (HeadRequest(self.student_head, 'positives'), ) if self.normalizer == 'positives' else ()
        return (self.student_head, *positives)

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return (HeadRequest(self.teacher_head, kinds=self.kinds), )

    @property
    def independent_of_batch_size(self) -> bool:  # type: ignore[override]
        return self.normalizer != 'none'  # a sum grows with the batch

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        """Checks, as far as it is known before the heads run, that they can be compared.

        Raises:
            HeadError: Their priors are others, or what is compared of them says something else.
        """
        own, taught = student.get(self.student_head), teacher.get(self.teacher_head)
        if not isinstance(own, DenseForm) or not isinstance(taught, DenseForm):
            return  # of a guide that does not tell
        for part in (request.part for request in map(HeadRequest.parse, self.teacher_heads)):
            if part not in ('', 'towers', *taught.parts):
                raise HeadError(f"A term learns from the teacher's {self.teacher_head}.{part}. A {taught.head} "
                                f'{HEAD_PARTS[part]}.')
        _require_same_priors(own, taught)
        if self.reads_targets and not own.tells_targets:
            raise HeadError(NO_TARGETS)
        if self.compares_regressions:
            _require_same_encoding(own, taught)

    def forward(self, context: DistillContext) -> Parts:
        levels = self.pair_levels(context)
        return add_parts({name: value / divisor for name, value in parts.items()}
                         for parts, divisor in zip(self.compare_levels(levels), self._divisors(levels)))

    def compare_levels(self, levels: Sequence[ComparedOutputs]) -> Iterable[Parts]:
        """Compares each level by itself; what depends on all of them at once is a subclass's to find before."""
        return map(self.compare, levels)

    def compare(self, level: ComparedOutputs) -> Parts:
        """Compares one level; returns the parts by name, each a sum over the level's priors."""
        raise NotImplementedError

    def _divisors(self, levels: Sequence[ComparedOutputs]) -> Tensor:
        """One for each level."""
        if self.normalizer == 'none':
            return levels[0].valid.new_ones(len(levels))
        counts: Tensor = reduce_mean(torch.stack([self._count(level) for level in levels]))
        if self.normalizer == 'richness':
            return counts.clamp(min=torch.finfo(counts.dtype).tiny)
        return counts.sum().clamp(min=1).expand(len(levels))

    def _count(self, level: ComparedOutputs) -> Tensor:
        if self.normalizer == 'richness':
            height, width = level.teacher.shapes[level.teacher_level]
            return level.richness().sum() * height * width / level.valid.shape[1]  # each cell once, not once per prior
        if self.normalizer == 'confidence':
            return level.confidence().sum()
        positives = level.student.positives(level.student_level).sum().float()
        if level.context.fully_labelled:
            return positives
        return positives + (level.confidence() - level.context.where_labelled(level.confidence())).sum()

    def pair_levels(self, context: DistillContext) -> list[ComparedOutputs]:
        """Pairs the levels of the two heads by stride.

        Raises:
            HeadError: The two can not be compared prior by prior and class by class.
        """
        student = cast(DenseOutputs, context.student_outputs[self.student_head])
        teacher = cast(DenseOutputs, context.teacher_outputs[self.teacher_index][self.teacher_head])
        _require_same_classes(student, teacher)
        if (student.objectness is None) is not (teacher.objectness is None):
            student, teacher = (context.once(('class and object', *key), outputs.join_objectness) for key, outputs in
                                ((('student', self.student_head), student),
                                 ((self.teacher_index, self.teacher_head), teacher)))
        levels = []
        for index, (stride, shape) in enumerate(zip(student.strides, student.shapes)):
            other = teacher.level_of(stride)
            if student.logits[index].shape != teacher.logits[other].shape or shape != teacher.shapes[other]:
                raise HeadError(
                    f'On the level of stride {stride} the student has {_describe(student, index)}, the teacher '
                    f'{_describe(teacher, other)}: {PRIOR_BY_PRIOR}')
            valid = context.valid(shape).flatten(1)
            priors = student.logits[index].shape[1] // valid.shape[1]
            valid = valid.repeat_interleave(priors, 1).float()
            levels.append(ComparedOutputs(student, teacher, index, other, valid, context))
        return levels


class RoITerm(DistillTerm):
    """A term that compares two RoI heads on the regions that the student sampled.

    Args:
        stage: Of a cascade teacher: ``'mean'`` to learn from the mean of the stages' logits and regressions, the index
            of one stage, or ``'same'``: each stage of a cascade student learns from the teacher's stage of its index,
            or the last.
        normalizer: What the sums over foreground and over background regions are divided by: ``'regions'``, the number
            of all regions, as in the task's own loss; or ``'own'``, the number of each kind, as in DeFeat. As mean over
            ranks, at least 1.
        teacher: See :class:`~kd_det.losses.base.DistillTerm`.

    Raises:
        ValueError: An argument that does not fit.
    """

    student_heads = teacher_heads = (ROI_HEAD, )

    @declared
    def __init__(self, stage: Stage = 'mean', normalizer: Literal['regions', 'own'] = 'regions',
                 teacher: Index = 0) -> None:
        super().__init__(teacher)
        self.stage, self.normalizer = stage, normalizer

    def read_outputs(self, context: DistillContext) -> tuple[RoIOutputs, RoIOutputs]:
        """The student's outputs, and the teacher's on the same regions.

        Raises:
            HeadError: The two tell other classes apart, or the teacher has no such stage.
        """
        student = cast(RoIOutputs, context.student_outputs[ROI_HEAD])
        stages = cast(tuple[RoIOutputs, ...], context.teacher_outputs[self.teacher_index][ROI_HEAD])
        _require_same_classes(student, stages[0])
        return student, at_stage(stages, self.stage)

    def normalize(self, values: Tensor, chosen: Sequence[Tensor]) -> list[Tensor]:
        """Sums of one value per region over subsets of the regions, normalised.

        Args:
            values: (R,).
            chosen: Subsets that share no region, (R,) of bool each.

        Returns:
            One scalar for each subset.
        """
        masks = torch.stack([each.float() for each in chosen])
        counts = masks.sum(1) if self.normalizer == 'own' else values.new_full((len(chosen), ), float(len(values)))
        return list((masks * values).sum(1) / reduce_mean(counts).clamp(min=1))


def sigmoid_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """See :func:`~kd_det.functional.logits.quality_bce`.

    With ``beta=0`` it is less the teacher's own entropy, which leaves the gradient, and makes it 0 where the two agree,
    as it is for any other ``beta``.
    """
    divergence = quality_bce(student, teacher, beta)
    return divergence - quality_bce(teacher, teacher, beta) if beta == 0 else divergence


def treat_teacher(treatment: Treatment, logits: Tensor) -> Tensor:
    """What the teacher says of classes, as a treatment leaves it: with DKPP its other logits have changed places.

    Args:
        treatment: See :class:`~kd_det.losses.DenseClassification`.
        logits: (..., classes).

    Raises:
        HeadError: There are too few classes for anything to change places.
    """
    if treatment != 'dkpp':
        return logits
    if logits.shape[-1] < 3:
        raise HeadError(f"treatment='dkpp' lets the classes beside the teacher's first change places, of which "
                        f'{logits.shape[-1]} have too few: three are needed, with the background of a softmax.')
    return permute_others(logits)


def choose_transform(standardize: bool, classes: int) -> Callable[[Tensor], Tensor] | None:
    """What is done to the logits of both sides, (..., classes), before T; None for nothing.

    Args:
        standardize: See :class:`~kd_det.losses.DenseClassification`.
        classes: How many there are.

    Raises:
        HeadError: There are too few classes to say anything then.
    """
    if not standardize:
        return None
    if classes < 3:
        raise HeadError(f'standardize=True leaves nothing to learn of {classes} classes, whose logits are then always '
                        'the same but for their order: three are needed, with the background of a softmax.')
    return standardized_logits


def standardize_both(standardize: bool, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits, (..., classes), as they are or as :func:`choose_transform` says."""
    transform = choose_transform(standardize, student.shape[-1])
    return (student, teacher) if transform is None else (transform(student), transform(teacher))


def weigh_by_confidence(treatment: Treatment, logits: Tensor, activation: str, weight: Tensor) -> Tensor:
    """By how much each sample counts more or less, as mean over all ranks 1: with CWTM as the teacher is sure.

    Args:
        treatment: See :class:`~kd_det.losses.DenseClassification`.
        logits: The teacher's, (..., classes).
        activation: Its head's.
        weight: (...), by which the samples count without.

    Returns:
        (...,); of another treatment 1.
    """
    if treatment != 'cwtm':
        return torch.ones_like(weight)
    return confidence_weights(largest_probability(logits, activation), weight, reduce_mean)


def _require_same_classes(student: DenseOutputs | RoIOutputs, teacher: DenseOutputs | RoIOutputs) -> None:
    if student.num_classes != teacher.num_classes:
        raise HeadError(f'The student tells {student.num_classes} classes apart, the teacher {teacher.num_classes}: '
                        'outputs are compared class by class, and classes are matched by name where both sides tell '
                        "theirs. Name the teacher's, by label, with teacher.classes=[…], or distil features alone.")


def _require_same_priors(student: DenseForm, teacher: DenseForm) -> None:
    """Of several priors a cell each has its part in the other head; of one, whatever its size, the cell is compared."""
    for stride, priors, others in _list_pairs(student, teacher):
        if len(priors) != len(others) or student.activation != teacher.activation:
            own, taught = (f'{len(each.priors[stride])} priors on each cell with {each.activation} classes'
                           for each in (student, teacher))
            raise HeadError(f'On the level of stride {stride} the student, a {student.head}, has {own}, the teacher, '
                            f'a {teacher.head}, {taught}: {PRIOR_BY_PRIOR}')
        sizes, other_sizes = (each[:, 2:] - each[:, :2] for each in (priors, others))
        if len(sizes) > 1 and not _is_near(sizes, other_sizes):
            raise HeadError(
                f'On the level of stride {stride} the anchors of the student, a {student.head}, are of '
                f'{_list_sizes(sizes)} pixels, those of the teacher, a {teacher.head}, of {_list_sizes(other_sizes)}: '
                "dense outputs are compared anchor by anchor. Give the student's anchor_generator the teacher's "
                'scales, ratios and sizes, or distil features.')


def _require_same_encoding(student: DenseForm, teacher: DenseForm) -> None:
    remedy = ("Compare decoded boxes, by DenseRegression with form='giou'; RPNImitation beside it with "
              'regression_weight=0.')
    if student.encoding != teacher.encoding:
        raise HeadError(f'Regressions of the student, a {student.head}, are {student.encoding}, those of the teacher, '
                        f'a {teacher.head}, {teacher.encoding}. {remedy}')
    for stride, priors, others in _list_pairs(student, teacher):
        if student.is_of_centres:
            priors, others = (each.unflatten(1, (2, 2)).mean(1) for each in (priors, others))
        if not _is_near(priors, others):
            what = 'centre of the first prior' if student.is_of_centres else 'first prior'
            raise HeadError(f"Regressions are of other priors: on the level of stride {stride} the student's {what} is "
                            f"{priors[0].tolist()} in pixels, the teacher's {others[0].tolist()}. Give the student's "
                            f"anchor_generator (offset and center_offset, too) the teacher's settings. Or: {remedy}")


def _list_pairs(student: DenseForm, teacher: DenseForm) -> Iterator[tuple[Stride, Tensor, Tensor]]:
    """The priors of the first cell of each of the student's levels, and of the teacher's of the same stride."""
    for stride, priors in student.priors.items():
        if stride not in teacher.priors:
            raise HeadError(f"The student's head has a level of stride {stride}; the strides of the teacher's are "
                            f'{list(teacher.priors)}. Dense outputs are compared level by level: give both the same, '
                            'or distil features.')
        yield stride, priors, teacher.priors[stride]


def _is_near(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=NEAR)


def _list_sizes(sizes: Tensor) -> str:
    return ', '.join(f'{width:.4g} × {height:.4g}' for width, height in sizes.tolist())


def _describe(outputs: DenseOutputs, level: int) -> str:
    height, width = outputs.shapes[level]
    priors = outputs.logits[level].shape[1] // (height * width)
    return f'{priors} priors on each of {height} × {width} cells with {outputs.activation} classes'
