"""Policies that learn who teaches well from what the student then scores on images that it does not train on.

A run has tens of such decisions, not thousands. So a bandit chooses between few arms, and keeps each for a while; an
agent, which decides image by image, learns from one number an episode, and needs many.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from mmdet.registry import TASK_UTILS
from mmengine.dist import all_reduce, get_rank, get_world_size
from torch import Tensor

from kd_det.config.arguments import Count, Positive, declared
from kd_det.context import Progress
from kd_det.distillers.policies import ArmPolicy, Arms, Policy, PolicyStep, one_hot
from kd_det.distillers.turns import require_judges
from kd_det.losses import DistillTerm
from kd_det.teachers.guide import Guide

MOST = 3.0  # spreads that a gain counts at most
MEMORY = 0.9  # share of its mean that a gain keeps


class Gains:
    """What scores have gained since the one before, in units of their own spread.

    A student gains much at first and little at last, whoever teaches: what an arm is worth is how far the gain lies
    from the running mean of gains, in units of their running spread, at most :data:`MOST`. The first two say nothing.
    """

    def __init__(self) -> None:
        self.state: dict[str, Any] = dict(last=None, mean=0.0, square=0.0, count=0)

    def take(self, score: float) -> float | None:
        """Takes in a score, and returns what its gain is worth; None for the first, and for one that is not finite."""
        last, state = self.state['last'], self.state
        if not math.isfinite(score):
            return None
        state['last'] = score
        if last is None:
            return None
        gain, spread = score - last, math.sqrt(state['square'])
        distance = gain - state['mean'] if state['count'] else 0.0
        worth = max(-MOST, min(MOST, distance / spread)) if spread > 0 else 0.0
        state['count'] += 1
        kept = min(MEMORY, 1 - 1 / state['count'])
        state['mean'] = kept * state['mean'] + (1 - kept) * gain
        state['square'] = kept * state['square'] + (1 - kept) * distance**2
        return worth


@TASK_UTILS.register_module()
class Bandit(ArmPolicy):
    """Lets one arm teach for a while, and learns from the student's evaluation which arm to take.

    Every ``interval`` steps the student is evaluated on the probe. The reward of the arm is what it has gained since,
    see :class:`Gains`, as a number of [0, 1], 0.5 for a gain like those before.

    - ``'exp3'`` (Auer et al., SIAM J. Comput. 32, 2002) draws arm a with p_a = (1 − γ)·w_a/Σw + γ/K, and multiplies w_a
      by exp(γ·r/(p_a·K)). It assumes nothing of the rewards, which change as the student learns.
    - ``'ucb'`` (UCB1: Auer et al., Machine Learning 47, 2002) takes the largest mean + √(2·ln n/n_a), each arm first
      once. It takes an arm's rewards to be alike throughout.
    - ``'halving'`` (sequential halving: Karnin et al., ICML 2013) takes all in turn, ``rounds`` times, keeps the better
      half, and so on; the last one teaches to the end, without further evaluations. Not the regret on the way counts
      here but what is found: the others go on changing arms as long as the student trains, which disturbs it.

    Args:
        algorithm: ``'exp3'``, ``'ucb'`` or ``'halving'``.
        interval: Steps of a decision.
        gamma: The share of decisions that explore, of EXP3.
        rounds: Decisions for each arm before half of them go, of halving.
        arms: See :class:`~kd_det.distillers.policies.ArmPolicy`.
    """
    needs_probe = True
    state_names = 'logits', 'sums', 'counts', 'arm', 'probability', 'gains_state', 'left', 'stage'

    @declared
    def __init__(self, algorithm: Literal['exp3', 'ucb', 'halving'] = 'exp3', interval: Count = 50,
                 gamma: Annotated[float, Gt(0), Le(1)] = 0.2, arms: Arms = 'guides', rounds: Count = 2) -> None:
        super().__init__(arms)
        self.algorithm, self.interval, self.gamma, self.rounds = algorithm, interval, gamma, rounds
        self.gains, self.arm, self.probability = Gains(), -1, 1.0

    def connect(self, guides: Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        super().connect(guides, terms)
        self.start(len(self.arms))

    def start(self, arms: int) -> None:
        """Knows nothing of so many arms."""
        self.logits, self.sums, self.counts = (torch.zeros(arms, dtype=torch.float64) for _ in range(3))
        self.left, self.stage = [*range(arms)], 1  # of halving: who is left, and how often it has begun anew

    @property
    def gains_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the gains."""
        return dict(self.gains.state)

    @gains_state.setter
    def gains_state(self, state: dict[str, Any]) -> None:
        self.gains.state = dict(state)

    def probabilities(self) -> Tensor:
        """(arms,): how likely EXP3 draws each."""
        return (1 - self.gamma) * self.logits.softmax(0) + self.gamma / len(self.logits)

    def choose(self, key: int) -> int:
        """Takes an arm; what is drawn follows from the key."""
        if self.algorithm == 'halving':
            self.arm = min(self.left, key=lambda arm: self.counts[arm].item())
            return self.arm
        if self.algorithm == 'ucb':
            untried = (self.counts == 0).nonzero()
            bounds = self.sums / self.counts + (2 * math.log(max(self.counts.sum().item(), 1)) / self.counts).sqrt()
            self.arm = int(untried[0]) if len(untried) else int(bounds.argmax())
            return self.arm
        likely = self.probabilities()
        self.arm = min(int((likely.cumsum(0) <= self.draw(key).item()).sum()), len(likely) - 1)
        self.probability = likely[self.arm].item()
        return self.arm

    def learn(self, reward: float) -> None:
        """Takes in what the arm brought, a number of [0, 1]."""
        self.sums[self.arm] += reward
        self.counts[self.arm] += 1
        self.logits[self.arm] += self.gamma * reward / (self.probability * len(self.logits))
        if self.algorithm == 'halving' and min(self.counts[self.left]) >= self.rounds * self.stage:
            best = (self.sums / self.counts)[self.left].argsort(descending=True, stable=True)
            self.left = sorted(self.left[place] for place in best[:-(-len(self.left) // 2)].tolist())
            self.stage += 1

    def is_due(self, progress: Progress) -> bool:
        has_decided = self.algorithm == 'halving' and len(self.left) == 1
        return not has_decided and progress.iteration % self.interval == 0

    def evaluate(self, score: float, progress: Progress) -> None:
        worth = self.gains.take(score)
        if worth is not None and self.arm >= 0:
            self.learn(0.5 + 0.5 * worth / MOST)
        self.choose(progress.iteration)

    def weigh(self, step: PolicyStep) -> Sequence[float]:
        if self.arm < 0:  # nothing evaluates: a step by itself
            self.choose(step.progress.iteration)
        return one_hot(self.arm, len(self.arms))

    def report(self) -> str:
        means = (self.sums / self.counts.clamp(min=1)).tolist()
        found = ', '.join(f'{name} {mean:.3f} ({int(count)} decisions)'
                          for name, mean, count in zip(self.arms, means, self.counts.tolist()))
        if self.algorithm == 'halving':
            liked = 'Left: ' + ', '.join(list(self.arms)[arm] for arm in self.left)
        else:
            likely = self.probabilities() if self.algorithm == 'exp3' else torch.tensor(means)
            liked = f'Preferred: {list(self.arms)[int(likely.argmax())]}'
        return (f'{super().report()} Mean reward: {found}. {liked}; {int(self.counts.sum())} evaluations on the probe.')


@TASK_UTILS.register_module()
class Agent(Policy):
    """Decides for each image which guides teach, and learns that by policy gradient (Yuan et al., AAAI 2021).

    For guide t and an image of state s, π(a_t = 1) = σ(A_t·s + b_t). The state holds the student's pooled features,
    divided by their norm; of each guide how its boxes lie on the ground truth, log(1 + loss) less the mean of all
    guides, and how sure they are (:func:`~kd_det.teachers.judging.judge_boxes`). The chosen guides share the weight of
    one; where none is chosen the image teaches by its ground truth alone. (In the paper the chosen are summed, and pull
    the harder the more they are.) A guide that no image of a step has chosen does not run for its terms.

    An episode is ``interval`` steps. Its reward is what the student has gained on the probe, see :class:`Gains`, whose
    running mean is the baseline. REINFORCE: the step is rate · reward · Σ (a − π)·[s, 1] / √(number of images), plain
    gradient ascent of the policy's own parameters, which neither the student's optimizer nor its buckets know.

    It costs the detections of all guides in each step, waits for the device once a step, and has few rewards for many
    decisions: what it finds in a run of some thousand steps is little. :class:`Bandit` decides more coarsely,
    and sooner.

    Args:
        interval: Steps of an episode.
        rate: Of learning.
        explore: Least probability of either action.
    """
    needs_probe = True
    state_names = 'slopes', 'traces', 'images', 'gains_state'

    @declared
    def __init__(self, interval: Count = 25, rate: Positive = 0.3,
                 explore: Annotated[float, Ge(0), Lt(0.5)] = 0.05) -> None:
        self.interval, self.rate, self.explore = interval, rate, explore
        self.gains, self.images = Gains(), 0
        self.slopes: Tensor | None = None  # (guides, state + 1); the last is b
        self.traces: Tensor | None = None  # of the same shape: Σ of this episode

    gains_state = Bandit.gains_state

    def connect(self, guides: Sequence[Guide], terms: Mapping[str, DistillTerm]) -> None:
        super().connect(guides, terms)
        require_judges(guides, self.guide_indices, 'boxes')

    def observe(self, step: PolicyStep) -> Tensor:
        """(N, state): of each image, on the host."""
        judged = [step.judge_boxes(index) for index in self.guide_indices]
        losses = torch.stack([each.losses for each in judged], 1).log1p() * step.labelled[:, None]
        pooled = torch.nn.functional.normalize(step.pooled, dim=1)
        scores = torch.stack([each.scores for each in judged], 1)
        return torch.cat([pooled, losses - losses.mean(1, keepdim=True), scores], 1).cpu()

    def likelihoods(self, states: Tensor) -> Tensor:
        """(N, guides): how likely each guide is chosen for each of the states, (N, state)."""
        if self.slopes is None:
            self.slopes = states.new_zeros(len(self.arms), states.shape[1] + 1)
        return (_with_one(states) @ self.slopes.T).sigmoid().clamp(self.explore, 1 - self.explore)

    def decide(self, states: Tensor, key: int) -> Tensor:
        """Draws an action for each image of this rank, and notes the gradient of its likelihood.

        Args:
            states: (N, state).
            key: What is drawn follows from it.

        Returns:
            (N, guides) of 0 and 1.
        """
        likely, images = self.likelihoods(states), len(states)
        drawn = self.draw(key, images * get_world_size(), likely.shape[1])
        actions = (drawn[get_rank() * images:(get_rank() + 1) * images] < likely).to(likely)
        trace = self.trace(states, actions)
        all_reduce(trace)
        self.traces = trace if self.traces is None else self.traces + trace
        self.images += images * get_world_size()
        return actions

    def trace(self, states: Tensor, actions: Tensor) -> Tensor:
        """(guides, state + 1): the gradient of the actions' log-likelihood, Σ (a − π)·[s, 1].

        Where π is held at its bounds it has none.
        """
        likely = self.likelihoods(states)
        free = (likely > self.explore) & (likely < 1 - self.explore)
        return ((actions - likely) * free).T @ _with_one(states)

    def is_due(self, progress: Progress) -> bool:
        return progress.iteration % self.interval == 0

    def evaluate(self, score: float, progress: Progress) -> None:
        worth = self.gains.take(score)
        if worth is not None and self.traces is not None:
            self.slopes = self.slopes + self.rate * worth * self.traces / math.sqrt(self.images)
        self.traces, self.images = None, 0

    def weigh(self, step: PolicyStep) -> Tensor:
        actions = self.decide(self.observe(step), step.progress.iteration)
        return (actions / actions.sum(1, keepdim=True).clamp(min=1)).T


def _with_one(states: Tensor) -> Tensor:
    return torch.cat([states, states.new_ones(len(states), 1)], 1)
