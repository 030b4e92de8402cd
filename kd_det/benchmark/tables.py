"""The table of a benchmark, for the console and in Markdown."""
from __future__ import annotations

from typing import List, Optional

import numpy as np
from rich.table import Table

from kd_det.benchmark.results import METRICS

COLUMNS = ('method', 'seeds', *METRICS.values(), 'Δ mAP, 95 %', 'parameters', 'FLOPs', 's / iteration', 'memory')


def rows(results: dict) -> List[List[str]]:
    """One row of text for the teacher and for each variant, as :data:`COLUMNS` has them."""
    made = []
    if results['teacher'] is not None:
        teacher = results['teacher']
        points = {metric: 100 * teacher['metrics'].get(metric, -1) for metric in METRICS}
        made.append(['teacher', '1', *(_spread(value, None) if value >= 0 else '–' for value in points.values()), '',
                     *_costs([teacher])])
    for variant, summary in results['summary'].items():
        runs = [run for run in results['runs'] if run['variant'] == variant]
        finished = [run for run in runs if run['status'] == 'finished']
        count = f'{len(finished)}' if len(finished) == len(runs) else f'{len(finished)} of {len(runs)}'
        metrics = [_spread(summary[metric]['mean'], summary[metric]['std']) if metric in summary else '–' for metric in METRICS]
        made.append([variant, count, *metrics, difference_text(summary.get('bbox_mAP', {})), *_costs(finished)])
    return made


def difference_text(summary: dict) -> str:
    """A difference with its interval, and what it says: never a gain where the interval holds 0."""
    if 'verdict' not in summary:
        return ''
    if summary['interval'] is None:
        return f"{summary['difference']:+.1f} ({summary['verdict']})"
    half = summary['interval'][1] - summary['difference']
    text = f"{summary['difference']:+.1f} ± {half:.1f}"
    return text if summary['verdict'] in ('gain', 'loss') else f"{summary['verdict']} ({text})"


def _spread(mean: float, std: Optional[float]) -> str:
    return f'{mean:.1f}' + ('' if std is None else f' ± {std:.1f}')


def _costs(runs: List[dict]) -> List[str]:
    if not runs:
        return ['–'] * 4
    flops = '–' if runs[0]['flops'] is None else f"{runs[0]['flops'] / 1e9:.2f} G"
    memory = [run['peak_device_memory'] or run['peak_memory'] or 0 for run in runs]
    return [f"{runs[0]['parameters'] / 1e6:.2f} M", flops,
            f"{np.median([run['seconds_per_iteration'] for run in runs]):.3f}", f'{max(memory) / 2**30:.2f} GiB']


def rich_table(results: dict) -> Table:
    """The table for the console."""
    table = Table(title='COCO metric on the validation images, in points; ± standard deviation over seeds')
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify='right' if index else 'left')
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown_table(results: dict) -> str:
    """The same in Markdown, with the runs that failed below it."""
    lines = ['| ' + ' | '.join(COLUMNS) + ' |', '| --- |' + ' ---: |' * (len(COLUMNS) - 1)]
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows(results)]
    lines += ['', 'mAP and the others in points, ± standard deviation over seeds. Δ: paired mean over seeds against the plain '
              'student (none), ± half of its 95 % interval (Student\'s t).']
    failed = [run for run in results['runs'] if run['status'] == 'failed']
    lines += [f"- {run['variant']}, seed {run['seed']} failed: {run['error']}" for run in failed]
    return '\n'.join(lines) + '\n'
