"""Who teaches, and when: a policy gives each guide, or each group of terms, a weight for a step or for its images.

:class:`Policy` is the face that the distiller knows, :class:`PolicyStep` what a policy may look at, :class:`Lesson`
what follows for the terms. The policies themselves are in :mod:`kd_det.distillers.turns`, and those that learn from the
student's evaluation in :mod:`kd_det.distillers.rewards`.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from mmdet.registry import TASK_UTILS
from mmengine.dist import all_reduce
from torch import Tensor

from kd_det.config.arguments import ArgumentError, at, declared, refuse
from kd_det.config.files import build_own
from kd_det.context import DistillContext, Progress
from kd_det.distillers.class_sets import ClassSets
from kd_det.distillers.supervision import Supervision
from kd_det.losses import DistillTerm
from kd_det.teachers.guide import Guide, LearnerStep
from kd_det.teachers.judging import BoxJudgement, judge_boxes, measure_losses

SCATTER = 2_654_435_761  # odd: another seed for each key, and not that of the step itself
TINY = 1e-12
Arms = Literal['guides', 'terms'] | dict[str, Any]  # or groups: name -> names of terms


@dataclass
class PolicyStep:
    """One step as a policy sees it: after the student's forward, before any guide has run for a term.

    What costs a forward of the guides is computed when it is asked for, once.

    Attributes:
        progress: Where the training stands.
        images: (N, C, H, W), preprocessed for the student.
        supervision: What is known of the batch.
        guides: At work, in the config's order.
        class_sets: Tells which classes they share with the student.
        student: What the student has put out.
    """
    progress: Progress
    images: Tensor
    supervision: Supervision
    guides: Sequence[Guide]
    class_sets: ClassSets
    student: LearnerStep

    def measure_losses(self, index: int) -> Tensor:
        """(N,): a frozen detector's own loss on the ground truth of each image; without gradient."""
        labels = self.class_sets.find_own_labels(self.supervision.labels, index)
        return measure_losses(self.guides[index], self.images, self.supervision.samples, labels)

    def judge_boxes(self, index: int) -> BoxJudgement:
        """How a guide's boxes lie on the ground truth of each image."""
        guide = self.guides[index]
        found = self.class_sets.translate(guide.detect(self.images, self.supervision.samples), index, guide)
        return judge_boxes(found, self.supervision.boxes, self.supervision.labels)

    @cached_property
    def labelled(self) -> Tensor:
        """(N,) of 0 and 1: whether it is known what an image shows."""
        return self.images.new_tensor(self.supervision.labelled, dtype=torch.float32)

    @cached_property
    def pooled(self) -> Tensor:
        """(N, C): the student's features before its heads, the mean over the cells of each level, then over levels."""
        levels = [level.detach().float().mean((2, 3)) for level in self.student.neck if level.dim() == 4]
        return torch.stack([level for level in levels if level.shape[1] == levels[0].shape[1]]).mean(0)


@dataclass
class Lesson:
    """What a policy has decided for a step, as the terms have it.

    Attributes:
        weights: By the terms' names, what their weights are multiplied by: the mean over the images where the policy
            weighs these. A term that is not named is none of the policy's.
        images: For terms whose images differ, (N,): each one's share, 1 on average over the batch of all ranks.
        log: Arm -> weight.
    """
    weights: dict[str, float | Tensor] = field(default_factory=dict)
    images: dict[str, Tensor] = field(default_factory=dict)
    log: dict[str, float | Tensor] = field(default_factory=dict)

    def choose(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of the terms that teach in this step."""
        return tuple(name for name in names if isinstance(weight := self.weights.get(name, 1.0), Tensor) or weight != 0)

    def show(self, name: str, context: DistillContext) -> DistillContext:
        """The step as a term is to see it."""
        return context.weigh_images(self.images[name]) if name in self.images else context


class Policy:
    """Says in each step who teaches.

    It weighs *arms*: the guides that terms learn from, each with all its terms; of some policies groups of terms. An
    arm's weight multiplies that of its terms, so that schedules and balances stay as they are: a term's ratio of a
    :class:`~kd_det.distillers.Balance` is then that of an arm that teaches alone. An arm of weight 0 does not run, nor
    a guide that no other needs. Where single images are weighed, a term's gradient at what it reads of the student is
    scaled image by image; its value is what it was, and its weight is multiplied by the mean over the images.

    What is drawn at random follows from the run's seed and the iteration alone, and is the same on all ranks; no other
    generator moves. What a policy has learnt lies under ``distill`` of each checkpoint.

    Attributes:
        arms: Name -> the names of its terms; set when the distiller is built.
        seed: The run's.
        taught: (arms,): how many steps each has taught in.
    """
    needs_probe: bool = False  # whether it learns from the student's evaluation
    state_names: tuple[str, ...] = ()  # attributes that a checkpoint keeps: numbers, lists, tensors, None

    seed: int = 0
    taught: Tensor
    arms: dict[str, tuple[str, ...]]

    def connect(self, guides: Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        """Tells the policy between whom it chooses.

        Raises:
            ArgumentError: There are less than two arms, or its arguments do not fit them.
        """
        self.guide_indices = sorted({term.teacher_index for term in terms.values()})
        self.terms = terms
        self.arms = self.find_arms()
        if len(self.arms) < 2:
            raise ArgumentError('', f'there is nothing to choose: {type(self).__name__} weighs {self.arm_kind}, and '
                                    f"model.distill has {len(self.arms) or 'none'} of them. Give model.teacher several "
                                    'guides, and each its terms.')
        self.taught = torch.zeros(len(self.arms), dtype=torch.long)

    arm_kind = 'guides that terms learn from'

    def find_arms(self) -> dict[str, tuple[str, ...]]:
        """The arms by name; the guides."""
        return {f'guide{index}': tuple(name for name, term in self.terms.items() if term.teacher_index == index)
                for index in self.guide_indices}

    def weigh(self, step: PolicyStep) -> Sequence[float] | Tensor:
        """The weights of a step.

        Returns:
            One number for each arm; or (arms, N), one for each image, on the step's device, or on the host where the
            policy knows them there.
        """
        raise NotImplementedError

    def notice(self, progress: Progress, values: Mapping[str, Tensor]) -> None:
        """Told after the forward of a step what the terms that taught have found: scalars without weight."""

    def is_due(self, progress: Progress) -> bool:
        """Whether the student is to be evaluated before this step."""
        return False

    def evaluate(self, score: float, progress: Progress) -> None:
        """Told before a step what the student scores on the held-out probe; the higher the better."""

    def teach(self, step: PolicyStep) -> Lesson:
        """Decides a step."""
        weights = self.weigh(step)
        images = isinstance(weights, Tensor)
        if images:
            means = mean_over_ranks(weights.mean(1).to(step.images.device))
            known = weights.device.type == 'cpu'
            arms: Sequence[float | Tensor] = means.tolist() if known else list(means.unbind())
            shares = (weights.to(means) / means.clamp(min=TINY).unsqueeze(1)).unbind()
        else:
            arms = [float(weight) for weight in weights]
        self.taught += torch.tensor([1 if isinstance(weight, Tensor) or weight else 0 for weight in arms])
        lesson = Lesson(log=dict(zip(self.arms, arms)))
        for place, names in enumerate(self.arms.values()):
            lesson.weights.update(dict.fromkeys(names, arms[place]))
            if images:
                lesson.images.update(dict.fromkeys(names, shares[place]))
        return lesson

    def draw(self, key: int, *shape: int) -> Tensor:
        """Random numbers of [0, 1) of a shape, which follow from the seed and the key, such as the iteration, alone."""
        number = (self.seed * 1_000_003 + key) * SCATTER % 2**32  # of which PyTorch's generator takes 32 bits
        return torch.rand(shape, generator=torch.Generator().manual_seed(number))

    def report(self) -> str:
        """What has taught for how long, for the log at the end of the training."""
        steps = ', '.join(f'{name} {count}' for name, count in zip(self.arms, self.taught.tolist()))
        return f'{type(self).__name__}: steps in which each taught: {steps}.'

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: value.detach().cpu().clone() if isinstance(value, Tensor) else value
                for name in ('taught', *self.state_names) for value in [getattr(self, name)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of what all ranks have, without gradient; a tensor of its own."""
    values = values.detach().clone()
    all_reduce(values, 'mean')
    return values


def build_policy(config: dict[str, Any] | None, guides: Sequence[Guide],
                 terms: Mapping[str, DistillTerm]) -> Policy | None:
    """Builds ``model.policy``; None for none, and where no term has a weight, so that there is nothing to decide.

    Raises:
        ArgumentError: There is no such policy, or it does not fit guides and terms.
    """
    if config is None:
        return None
    with at('model.policy'):
        policy = build_own(TASK_UTILS, config)
        if not isinstance(policy, Policy):
            refuse('type', config['type'], 'a policy: Fixed, Uniform, Random, Confidence, Sequence, Route, Bandit or '
                                           'Agent')
        if not terms:
            return None
        policy.connect(guides, terms)
    return policy


class ArmPolicy(Policy):
    """A policy that may weigh terms, or groups of them, in place of guides.

    Args:
        arms: ``'guides'``; ``'terms'``, each by itself; or groups: name -> names of terms. Terms in no group are not
            the policy's.

    Raises:
        ArgumentError: An argument does not fit.
    """

    @declared
    def __init__(self, arms: Arms = 'guides') -> None:
        self.wanted = arms

    arm_kind = 'arms'

    def find_arms(self) -> dict[str, tuple[str, ...]]:
        if self.wanted == 'guides':
            return super().find_arms()
        if self.wanted == 'terms':
            return {name: (name, ) for name in self.terms}
        known, seen = ', '.join(self.terms) or 'none', set()
        for group, names in self.wanted.items():
            if 'loss' in group:
                refuse('arms', group, "names of groups without 'loss', which mmengine takes for a loss to add")
            if not isinstance(names, (list, tuple)) or not names:
                refuse(f'arms.{group}', names, 'a list of names of terms')
            for name in names:
                if name not in self.terms or name in seen:
                    refuse(f'arms.{group}', name, f'names of terms of model.distill, each once: {known}')
                seen.add(name)
        return {group: tuple(names) for group, names in self.wanted.items()}


def one_hot(index: int, number: int) -> list[float]:
    """The weights of so many arms of which one teaches alone."""
    return [float(place == index) for place in range(number)]
