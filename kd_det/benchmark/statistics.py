"""What several seeds say about a difference, and what they do not."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
from scipy.stats import t as student_t

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
    interval: Optional[Tuple[float, float]]

    @property
    def verdict(self) -> str:
        """``'gain'`` or ``'loss'`` only where the whole interval lies on one side of 0."""
        if self.interval is None:
            return 'one seed, no statement'
        low, high = self.interval
        return 'gain' if low > 0 else 'loss' if high < 0 else 'no difference shown'


def mean_and_std(values: Sequence[float]) -> Dict[str, Optional[float]]:
    """``mean`` and ``std`` of a sample; of a single value there is no standard deviation."""
    return dict(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)) if len(values) > 1 else None)


def paired_difference(baseline: Mapping[int, float], other: Mapping[int, float]) -> Optional[Difference]:
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
