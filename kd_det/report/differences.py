"""Where differences and their intervals lie on a common axis, as the page draws them beside their names."""
from __future__ import annotations

from typing import Dict, List, Sequence

from matplotlib.ticker import MaxNLocator

MARGIN = 0.04  # of the axis, on either side


def differences_axis(statements: Sequence[dict]) -> dict:
    """Places differences on an axis that holds them all, and 0.

    Args:
        statements: See :func:`kd_det.report.verdict.statements`.

    Returns:
        ``ticks``: text -> place; ``rows``: of each statement the places of its ``mean``, its ``seeds`` and the ends of
        its ``interval``, None if it has none. Places are percentages of the axis' length.
    """
    values = [0.0]
    for each in statements:
        values += [each['difference'], *each['by_seed'].values(), *(each['interval'] or ())]
    low, high = min(values), max(values)
    margin = MARGIN * (high - low) or 1.0
    low, high = low - margin, high + margin

    def places(values: Sequence[float]) -> List[float]:
        return [round(100 * (value - low) / (high - low), 2) for value in values]

    ticks = [value for value in MaxNLocator(6).tick_values(low, high) if low <= value <= high]
    rows: List[Dict[str, object]] = [
        dict(mean=places([each['difference']])[0], seeds=places(list(each['by_seed'].values())),
             interval=places(each['interval']) if each['interval'] else None) for each in statements]
    return dict(ticks=dict(zip([f'{value:g}' for value in ticks], places(ticks))), rows=rows)
