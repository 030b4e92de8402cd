"""What several seeds say about a difference, and what they do not."""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from kd_det.study.runs import Run
from kd_det.study.scheduling import Failure, Outcome
from kd_det.study.variants import PLAIN, Variant, twin_of

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A paired difference between two variants, over seeds.

    Attributes:
        by_seed: Seed -> difference.
        mean: Over the seeds.
        interval: Where the mean of all seeds lies with a confidence of 95 %, by Student's t; None for a single seed.
    """
    by_seed: Mapping[int, float]
    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """``'gain'`` or ``'loss'`` only where the whole interval lies on one side of 0."""
        if self.interval is None:
            return 'one seed, no statement'
        low, high = self.interval
        return 'gain' if low > 0 else 'loss' if high < 0 else 'no difference shown'


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """``mean`` and ``std`` of a sample; of a single value there is no standard deviation."""
    return dict(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired_difference(baseline: Mapping[int, float], other: Mapping[int, float]) -> Difference | None:
    """Compares two variants seed by seed.

    The same seed gives both the same initial weights and the same data order; so the spread of the differences is less
    than that of the values, and the interval is narrower than one from unpaired values. It assumes that the differences
    are normally distributed, which three seeds can not show.

    Args:
        baseline: Seed -> value.
        other: Seed -> value.

    Returns:
        ``other - baseline`` over the seeds that both have; None if they share none.
    """
    seeds = sorted(set(baseline) & set(other))
    if not seeds:
        return None
    differences = np.array([other[seed] - baseline[seed] for seed in seeds])
    mean, interval = float(differences.mean()), None
    if len(seeds) > 1:
        quantile = student_t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)
        half = float(quantile * differences.std(ddof=1) / np.sqrt(len(seeds)))
        interval = (mean - half, mean + half)
    return Difference(dict(zip(seeds, differences.tolist())), mean, interval)


METRICS = {'bbox_mAP': 'mAP', 'bbox_mAP_50': 'AP50', 'bbox_mAP_75': 'AP75', 'bbox_mAP_s': 'APs', 'bbox_mAP_m': 'APm',
           'bbox_mAP_l': 'APl'}


def run_entry(variant: Variant, seed: int, folder: Path, outcome: Outcome, root: Path) -> dict:
    """One element of ``runs``."""
    distillation = dict(balance=variant.balance, inherit=variant.inherit, teachers=variant.teachers)
    settings = dict({} if variant.is_plain else distillation, augment=variant.augment, **variant.settings)
    entry = dict(variant=variant.name, method=variant.method, seed=seed, settings=settings, twin=twin_of(variant.name),
                 folder=os.path.relpath(folder, root))
    if isinstance(outcome, Failure):
        return dict(entry, status='failed', error=outcome.error, log=os.path.relpath(outcome.log, root))
    return dict(entry, status='finished', **relative(outcome, root))


def relative(run: Run, root: Path) -> dict:
    """A run as a dict, with paths relative to a folder."""
    paths = {name: os.path.relpath(getattr(run, name), root) for name in ('checkpoint', 'scalars')}
    return dict(asdict(run), **paths)


def mark_twins(entries: list[dict]) -> None:
    """Notes of each run whether it began as its twin of the same seed, and saw the images in the same order."""
    finished = {(entry['variant'], entry['seed']): entry for entry in entries if entry['status'] == 'finished'}
    for entry in entries:
        if entry['status'] == 'finished':
            twin = finished.get((twin_of(entry['variant']), entry['seed']))
            for key in ('start', 'order'):
                entry[f'same_{key}'] = None if twin is None else entry[key] == twin[key]


def counts(entry: dict, metric: str = 'bbox_mAP') -> bool:
    """Whether a run has a number of a metric: it finished, objects count for the metric, and it is finite."""
    return entry['status'] == 'finished' and 0 <= entry['metrics'].get(metric, -1) < inf


def summarize(entries: list[dict]) -> dict[str, dict[str, dict]]:
    """Mean and spread of every variant, and its paired difference to its twin, by metric."""
    values: dict[str, dict[str, dict[int, float]]] = {}  # variant -> metric -> seed -> points
    for entry in entries:
        by_metric = values.setdefault(entry['variant'], {})
        for metric in METRICS:
            if counts(entry, metric):
                by_metric.setdefault(metric, {})[entry['seed']] = 100 * entry['metrics'][metric]
    return {variant: {metric: _summary(variant, by_seed, values.get(twin_of(variant), {}).get(metric, {}))
                      for metric, by_seed in by_metric.items()} for variant, by_metric in values.items()}


def _summary(variant: str, by_seed: Mapping[int, float], twin: Mapping[int, float]) -> dict:
    summary = dict(seeds=len(by_seed), **mean_and_std(list(by_seed.values())))
    difference = None if variant == PLAIN else paired_difference(twin, by_seed)
    if difference is not None:
        summary.update(pairs=len(difference.by_seed), by_seed=difference.by_seed, difference=difference.mean,
                       interval=difference.interval, verdict=difference.verdict)
    return summary
