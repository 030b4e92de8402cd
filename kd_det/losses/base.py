"""What a distillation term is, and what terms that compare features level by level share."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import MinLen, Predicate
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from torch import Tensor, nn

from kd_det.config.arguments import Count, EitherSide, Index, declared, is_distinct, split_sides
from kd_det.context import ComparedLevel, DistillContext, LevelError, LevelPair, LevelSpec, pair_levels
from kd_det.functional.moments import block_moments, normalize_channels, pool_moments
from kd_det.heads.capture import HeadForm
from kd_det.losses.adapters import ChannelAdapter, build_adapter
from kd_det.masks.base import Mask

Levels = Count | Annotated[Sequence[int], MinLen(1), Predicate(is_distinct), 'a list of different indices']
Parts = dict[str, Tensor]  # of a term's value, by name; scalars
InputSpecs = dict[str, tuple[LevelSpec, ...] | HeadForm]


class DistillTerm(nn.Module):
    """One comparison of student and teacher.

    A term declares what it reads (:attr:`student_taps`, :attr:`student_heads`, and the teacher's), makes its adapters
    once the form of the taps is known (:meth:`connect`), and turns each step's
    :class:`~kd_det.context.DistillContext` into named parts. It does not know its weight: the distiller multiplies, and
    runs the terms in float32. What its arguments do not allow, it refuses when it is built.

    Args:
        teacher: Which teacher to learn from, where there are several; counted from 0.

    Attributes:
        least_levels: How many levels a tap must have for the term to say anything.
        learner_index: Who learns by it, where there are several: ``learner`` beside the arguments in a config.
        independent_of_batch_size: Whether a batch that has each of its images twice has the same value, so that a
            weight fits batches of any size; as far as what the value is divided by, such as the number of boxes, is 1
            or more, where it counts no less. A term that does not claim it says why.

        only_at_boxes: Whether it compares at ground-truth boxes alone. Images without any then add 0, and a process of
            data-parallel training that has only such images a gradient of 0 for every parameter, as it must.
        learns_beforehand: Whether it has prompts, which are learnt before training by the own loss of its teacher, a
            frozen detector; see :class:`~kd_det.losses.FreeKD`, which shows what such a term has.
        prompted_by: The fingerprint of the teacher on which it has learnt them; '' where that is not known.

    Raises:
        ValueError: An argument that does not fit; the message names it, its value, and what would.

    Example:
        A term of one's own, which draws the mean of the student's neck to the teacher's:

        >>> from kd_det.context import DistillContext
        >>> class MeanImitation(DistillTerm):
        ...     student_taps = teacher_taps = ('neck', )
        ...
        ...     def forward(self, context):
        ...         student, teacher = context.student['neck'], context.teachers[self.teacher_index]['neck']
        ...         return dict(mean=sum((s.mean() - t.mean()).abs() for s, t in zip(student, teacher)))
        >>> MeanImitation()(DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)))
        {'mean': tensor(1.)}
    """

    least_levels = 1
    learner_index: int = 0
    independent_of_batch_size: bool = True
    only_at_boxes: bool = False
    learns_beforehand: bool = False
    prompted_by: str = ''

    @declared
    def __init__(self, teacher: Index = 0) -> None:
        super().__init__()
        self.teacher_index = teacher

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Module paths that the term reads in the student."""
        return ()

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Module paths that the term reads in its teacher."""
        return ()

    @property
    def student_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the term reads in the student, see :class:`~kd_det.heads.HeadRequest`."""
        return ()

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        """Heads whose outputs the term reads in its teacher. They run for the steps in which the term has a weight."""
        return ()

    @property
    def teacher_levels_read(self) -> dict[str, tuple[int, ...]]:
        """Indices of the levels that a connected term reads of a path of :attr:`teacher_taps`, where these are not all.

        The others need not be computed.
        """
        return {}

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        """Makes what depends on the form of what the term reads. Called once, before the optimizer is made.

        Args:
            student: Levels of each of :attr:`student_taps`; the forms of those :attr:`student_heads` that are towers or
                dense heads, see :func:`~kd_det.heads.capture.measure_heads`.
            teacher: The same of the teacher.
        """

    def forward(self, context: DistillContext) -> Tensor | Parts:
        """Returns the term's value, or its parts by name; scalars."""
        raise NotImplementedError


class FeatureTerm(DistillTerm):
    """A term that compares features level by level; a subclass implements :meth:`compare`.

    It reads the heads that its masks read.

    Args:
        tap: What to read: ``'neck'``, ``'backbone'`` or any module path within them; or a dict with the keys
            ``student`` and ``teacher`` where the paths differ.
        levels: Indices of the student's levels to compare, negative ones from the last on; or a number, 1 or more: the
            first so many, all where it has fewer; all by default. Each is paired with the teacher level of the same
            stride.
        adapter: Student channels -> teacher channels, see :func:`~kd_det.losses.adapters.build_adapter`.
        resize: Interpolate the teacher's level where it differs in stride or size.
        teacher: See :class:`DistillTerm`.
        normalize: Before they are compared, give the channels of both sides the mean 0 and the deviation 1, over the
            cells of the images in the whole batch of all ranks. That is batch normalisation without weights or running
            statistics, on the student's side after an adapter that then has no bias. Scale and offset of a channel do
            not matter then, as they mean nothing in features that a normalisation still follows (MMYOLO's RTMDet).
            Masks that look at features see them so.

    Raises:
        ValueError: An argument that does not fit.

    Example:
        A term of one's own, with the adapters and levels of all others:

        >>> from kd_det.context import DistillContext
        >>> class LargestDifference(FeatureTerm):
        ...     def compare(self, level, position):
        ...         return dict(largest=((level.student - level.teacher).abs() * level.valid[:, None]).amax())
        >>> context = DistillContext.of_features(torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        >>> term = LargestDifference(tap='neck')
        >>> term.connect(context.student_levels, context.teacher_levels[0])
        >>> term(context)
        {'largest': tensor(1.)}
    """

    @declared
    def __init__(self, tap: EitherSide = 'neck', levels: Levels | None = None, adapter: ChannelAdapter = 'auto',
                 resize: bool = False, teacher: Index = 0, normalize: bool = False) -> None:
        super().__init__(teacher)
        self.student_path, self.teacher_path = split_sides(tap)
        self.levels, self.adapter, self.resize, self.normalize = levels, adapter, resize, normalize

    @property
    def student_taps(self) -> tuple[str, ...]:
        return (self.student_path, )

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        return (self.teacher_path, )

    @property
    def student_heads(self) -> tuple[str, ...]:
        return tuple(head for module in self.modules() if isinstance(module, Mask) for head in module.student_heads)

    @property
    def teacher_heads(self) -> tuple[str, ...]:
        return tuple(head for module in self.modules() if isinstance(module, Mask) for head in module.teacher_heads)

    @property
    def teacher_levels_read(self) -> dict[str, tuple[int, ...]]:
        return {self.teacher_path: tuple(pair.teacher_level for pair in self.pairs)}

    def connect(self, student: InputSpecs, teacher: InputSpecs) -> None:
        """Pairs the levels, and makes an adapter for each.

        Raises:
            LevelError: A level has no partner.
            ValueError: The adapter does not fit the channels.
        """
        specs = (cast(tuple[LevelSpec, ...], student[self.student_path]),
                 cast(tuple[LevelSpec, ...], teacher[self.teacher_path]))
        self.pairs = pair_levels(*specs, self.levels, self.resize)
        self.adapters = nn.ModuleList(self.make_adapter(pair) for pair in self.pairs)

    def make_adapter(self, pair: LevelPair) -> nn.Module:
        """Makes what the student's feature passes before it is compared; a subclass may need another, or none."""
        return build_adapter(self.adapter, pair.student_spec.channels, pair.teacher_spec.channels,
                             bias=not self.normalize)

    def forward(self, context: DistillContext) -> Parts:
        return add_parts(self.compare(self.read_level(context, position), position)
                         for position in range(len(self.pairs)))

    def compare(self, level: ComparedLevel, position: int) -> Parts:
        """Compares one level.

        Args:
            level: Student (after its adapter) and teacher.
            position: Of the level among the compared ones, which is the index of the term's own modules for it.

        Returns:
            The parts by name, scalars; they are summed over the levels.
        """
        raise NotImplementedError

    def read_level(self, context: DistillContext, position: int) -> ComparedLevel:
        """The features of one level in this step, the student's after its adapter.

        Raises:
            LevelError: The two have other numbers of cells, and ``resize`` is not set.
        """
        pair = self.pairs[position]
        raw_student = context.student[self.student_path][pair.student_level].float()
        student = self.adapters[position](raw_student)
        teacher = context.teachers[self.teacher_index][self.teacher_path][pair.teacher_level].float()
        if student.shape[-2:] != teacher.shape[-2:]:
            if not self.resize:
                raise LevelError(f"Level {pair.student_level} of '{self.student_path}': the student's "
                                 f"{tuple(student.shape)} and the teacher's {tuple(teacher.shape)} cover the same "
                                 'image with other cells. Where they differ by one, as detectors that round up and '
                                 "down do, set data_preprocessor.pad_size_divisor of the student's config to the "
                                 'largest stride; else allow resize=True of the term.')
            teacher = F.interpolate(teacher, student.shape[-2:], mode='bilinear', align_corners=False)
        student, teacher = self.normalized(context, student, teacher)
        strides = tuple(spec.stride for spec in context.student_levels[self.student_path])
        return ComparedLevel(student, teacher, raw_student, pair.student_level, strides, context, self.teacher_index)

    def normalized(self, context: DistillContext, *features: Tensor) -> tuple[Tensor, ...]:
        """Features of one level's cells, (N, C, H, W), as they are compared: normalised, if the term does that."""
        if not self.normalize:
            return features
        valid = context.valid(features[0].shape[-2:])
        moments = pool_moments([block_moments(feature, valid) for feature in features],
                               [valid.sum((1, 2))] * len(features), sum_over_ranks)
        return tuple(map(normalize_channels, features, moments))


def sum_parts(value: Tensor | Parts) -> Tensor:
    """The value of a term as one scalar.

    Example:
        >>> sum_parts(dict(foreground=torch.tensor(1.0), background=torch.tensor(2.0)))
        tensor(3.)
    """
    return cast(Tensor, sum(value.values())) if isinstance(value, dict) else value


def add_parts(several: Iterable[Parts]) -> Parts:
    """Adds parts, such as those of several levels, by their names.

    Example:
        >>> add_parts([dict(flow=torch.tensor(1.0)), dict(flow=torch.tensor(2.0))])
        {'flow': tensor(3.)}
    """
    total: Parts = {}
    for parts in several:
        for name, value in parts.items():
            total[name] = total[name] + value if name in total else value
    return total


def rank_share(mask: Tensor) -> Tensor:
    """ΣM of this rank over its mean across ranks; 1 in a single process.

    Data-parallel training averages the ranks. Losses over their own rank's ΣM, each times its share, average to what
    one process finds over the ΣM of the whole batch, however unevenly the boxes are spread. Every rank must call this.

    Args:
        mask: (N, H, W), or any other shape.

    Returns:
        Scalar, 0 where no rank has any.

    Example:
        >>> rank_share(torch.ones(2, 4, 4))
        tensor(1.)
    """
    total = mask.sum()
    mean: Tensor = reduce_mean(total)
    return total / mean.clamp(min=torch.finfo(total.dtype).tiny)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, with its gradient: a value of any rank teaches all. Every rank must call this.

    Args:
        values: Of any shape, the same on all ranks.

    Example:
        >>> sum_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if get_world_size() == 1:
        return values
    from torch.distributed.nn.functional import all_reduce  # not in every build of PyTorch
    return cast(Tensor, all_reduce(values))


def find_read_levels(terms: Iterable[DistillTerm],
                     specs: dict[str, Sequence[LevelSpec]]) -> dict[str, tuple[bool, ...]]:
    """Which levels of a teacher's taps are read by any of its terms.

    Args:
        terms: Connected ones, all of the same teacher.
        specs: Of the levels of each tap of that teacher.

    Returns:
        Path -> for each level whether it is read, of the paths of which some level is not.
    """
    indices: dict[str, set[int]] = defaultdict(set)
    for term in terms:
        for path in term.teacher_taps:
            indices[path].update(term.teacher_levels_read.get(path, range(len(specs[path]))))
    read = {path: tuple(index in indices[path] for index in range(len(specs[path]))) for path in indices}
    return {path: each for path, each in read.items() if not all(each)}
