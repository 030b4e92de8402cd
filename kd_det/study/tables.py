"""The tables of a benchmark, for the console and in Markdown."""
from __future__ import annotations

import numpy as np
from rich.table import Table

from kd_det.study.results import METRICS, counts, mean_and_std

COSTS = ('parameters', 'FLOPs', 's/iteration', 'memory')
FIDELITY = ('found', 'teacher_errors', 'copied_errors', 'agreement', 'teacher_iou', 'class_kl', 'student_ece',
            'teacher_ece', 'cka')
NONE = '–'
TIMES = 'Times (s/iteration) compare only where the machine did nothing else.'


def rows(results: dict) -> list[dict[str, str]]:
    """Column -> text of one row for the teachers, where they were trained here, and for each variant."""
    made = []
    teachers = [results['teacher'], *(each['run'] for each in results.get('further_teachers', ()))]
    if teachers[0] is not None:
        points = {name: [100 * teacher['metrics'].get(metric, -1) for teacher in teachers]
                  for metric, name in METRICS.items()}
        metrics = {name: _spread(**mean_and_std(values)) if min(values) >= 0 else NONE
                   for name, values in points.items()}
        made.append(dict(method='teacher', seeds=f'{len(teachers)}', **metrics, **_costs(teachers)))
    for variant, summary in results['summary'].items():
        runs = [run for run in results['runs'] if run['variant'] == variant]
        finished = [run for run in runs if run['status'] == 'finished']
        metrics = {name: _spread(summary[metric]['mean'], summary[metric]['std']) if metric in summary else NONE
                   for metric, name in METRICS.items()}
        counted = sum(map(counts, runs))
        seeds = f'{len(runs)}' if counted == len(runs) else f'{counted} of {len(runs)}'
        metrics['Δ mAP'] = difference_text(summary.get('bbox_mAP', {}), counted)
        made.append(dict(method=variant, seeds=seeds, **metrics, **_costs(finished)))
    return made


def difference_text(summary: dict, seeds: int) -> str:
    """A difference with its interval, and what it says: never a gain where the interval holds 0.

    Args:
        summary: Of a metric, as :func:`~kd_det.study.results.summarize` gives it.
        seeds: How many the variant's mean is over; where its twin lacks some, the number of pairs is told.
    """
    if 'verdict' not in summary:
        return ''
    text = f"{summary['difference']:+.1f}"
    if summary['interval'] is not None:
        text += f" ± {summary['interval'][1] - summary['difference']:.1f}"
    if summary['verdict'] not in ('gain', 'loss'):
        text = f"{summary['verdict']} ({text})"
    pairs = len(summary['by_seed'])
    return text if pairs == seeds else f"{text}, {pairs} pair{'s' * (pairs > 1)}"


def _spread(mean: float, std: float | None = None, digits: int = 1) -> str:
    return f'{mean:.{digits}f}' + ('' if std is None else f' ± {std:.{digits}f}')


def _costs(runs: list[dict]) -> dict[str, str]:
    if not runs:
        return dict.fromkeys(COSTS, NONE)
    first = runs[0]
    memory = max(run['peak_device_memory'] or run['peak_memory'] or 0 for run in runs)
    texts = (f"{first['parameters'] / 1e6:.2f} M", NONE if first['flops'] is None else f"{first['flops'] / 1e9:.2f} G",
             f"{np.median([run['seconds_per_iteration'] for run in runs]):.3f}", f'{memory / 2**30:.2f} GiB')
    return dict(zip(COSTS, texts))


def rich_tables(results: dict) -> list[Table]:
    """For the console: what the detectors detect, and what they cost."""
    made = rows(results)
    tables = [_table('COCO metric on the validation images, in points; mean ± standard deviation over seeds',
                     ('seeds', 'mAP', 'Δ mAP', 'AP50', 'AP75'), made),
              _table('By size of the objects; costs of inference (parameters, multiply-adds) and of training',
                     ('APs', 'APm', 'APl', *COSTS), made)]
    tables += [_fidelity_table(split, variants) for split, variants in results['fidelity'].items()]
    tables[0].caption = ('Δ: paired mean over seeds against the plain student in the same setting ± half of its 95 % '
                         'interval')
    tables[1].caption = TIMES
    return tables


def _table(title: str, columns: tuple, made: list[dict[str, str]]) -> Table:
    table = Table(title=title)
    table.add_column('method', no_wrap=True)
    for column in columns:
        table.add_column(column, justify='right', no_wrap=column in METRICS.values())
    for row in made:
        table.add_row(row['method'], *(row.get(column, '') for column in columns))
    return table


def fidelity_rows(variants: dict[str, dict[str, dict]]) -> list[dict[str, str]]:
    """Column -> text of one row for each variant: the numbers of FidelityMetric, its mean CKA over the levels."""
    made = []
    for variant, numbers in variants.items():
        texts = {name: _spread(**each, digits=3) for name, each in numbers.items() if not name.startswith('cka_')}
        levels = [each['mean'] for name, each in numbers.items() if name.startswith('cka_')]
        made.append(dict(method=variant, **texts, **(dict(cka=f'{np.mean(levels):.3f}') if levels else {})))
    return made


def _fidelity_table(split: str, variants: dict[str, dict[str, dict]]) -> Table:
    title = f'Fidelity on {split} images, mean ± standard deviation over seeds; cka: mean over levels'
    return _table(title, FIDELITY, fidelity_rows(variants))


def markdown_table(results: dict) -> str:
    """The same in Markdown, accuracy and costs in one, with the runs that failed below it."""
    lines = _markdown(('method', 'seeds', *METRICS.values(), 'Δ mAP', *COSTS), rows(results))
    lines += ['', 'mAP and the others in points, ± standard deviation over seeds. Δ: paired mean over seeds against '
              'the plain student (none; where a setting changes the student, none with that setting), ± half of its '
              f"95 % interval (Student's t). FLOPs are multiply-adds. {TIMES}"]
    failed = [run for run in results['runs'] if run['status'] == 'failed']
    lines += [f"- {run['variant']}, seed {run['seed']} failed: {run['error']}" for run in failed]
    for split, variants in results['fidelity'].items():
        lines += ['', f'Fidelity on {split} images, mean ± standard deviation over seeds (cka: mean over levels too):',
                  '']
        lines += _markdown(('method', *FIDELITY), fidelity_rows(variants))
    return '\n'.join(lines) + '\n'


def _markdown(columns: tuple, made: list[dict[str, str]]) -> list[str]:
    return ['| ' + ' | '.join(columns) + ' |', '| --- |' + ' ---: |' * (len(columns) - 1),
            *('| ' + ' | '.join(row.get(column, '') for column in columns) + ' |' for row in made)]
