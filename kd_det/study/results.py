"""What a benchmark found: one entry a run, what several seeds say about a difference, and tables of both.

What ``results.json`` holds is declared in :mod:`kd_det.study.records`.
"""
from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import nct
from scipy.stats import t as student_t

from kd_det.compat.console import TextTable
from kd_det.study.scheduling import Failure, Outcome
from kd_det.study.variants import DISTILLATION_KEYS, PLAIN, Variant, find_twin, without_length

RESULTS_FILE, TABLE_FILE = 'results.json', 'results.md'
CONFIDENCE = 0.95
POWER = 0.8  # with which a difference is to be shown
ROUNDING = 0.1 / sqrt(6)  # standard deviation of the difference of two numbers that are rounded to 0.1 points
MOST_SEEDS = 10**6  # where it stops to count how many are needed
METRICS = {'bbox_mAP': 'mAP', 'bbox_mAP_50': 'AP50', 'bbox_mAP_75': 'AP75', 'bbox_mAP_s': 'APs', 'bbox_mAP_m': 'APm',
           'bbox_mAP_l': 'APl'}
COSTS = ('parameters', 'FLOPs', 's/iteration', 'memory')
FIDELITY = ('found', 'teacher_errors', 'copied_errors', 'agreement', 'teacher_iou', 'class_kl', 'student_ece',
            'teacher_ece', 'cka')
NONE = '–'
TIMES = 'Times (s/iteration) compare only where the machine did nothing else.'


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


def paired_difference(baseline: Mapping[int, float], other: Mapping[int, float],
                      rounding: float = 0.0) -> Difference | None:
    """Compares two variants seed by seed.

    The same seed gives both the same initial weights and the same data order; so the spread of the differences is less
    than that of the values, and the interval is narrower than one from unpaired values. It assumes that the differences
    are normally distributed, which three seeds can not show.

    Args:
        baseline: Seed -> value.
        other: Seed -> value.
        rounding: The least spread that counts: equal differences of rounded values may be so by rounding alone. Of
            points of mAP :data:`ROUNDING`.

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
        half = float(quantile * max(differences.std(ddof=1), rounding) / np.sqrt(len(seeds)))
        interval = (mean - half, mean + half)
    return Difference(dict(zip(seeds, differences.tolist())), mean, interval)


def make_run_entry(variant: Variant, seed: int, folder: Path, outcome: Outcome, root: Path) -> dict:
    """Makes an element of ``runs``: the variant, its settings and its twin, and the run or why there is none."""
    distillation = dict(balance=variant.balance, inherit=variant.inherit, teachers=variant.teachers,
                        **({'policy': variant.policy} if variant.policy else {}),
                        **({} if variant.pseudo_labels is None else {'pseudo_labels': variant.pseudo_labels}))
    settings = dict({} if variant.is_plain else distillation, augment=variant.augment, **variant.labels,
                    **{key: value for key, value in variant.settings.items()
                       if not (variant.is_plain and key.startswith(DISTILLATION_KEYS))})
    entry = dict(variant=variant.name, method=variant.method, seed=seed, settings=settings,
                 twin=find_twin(variant.name), folder=os.path.relpath(folder, root))
    if isinstance(outcome, Failure):
        log = dict(log=os.path.relpath(outcome.log, root)) if outcome.log else {}
        return dict(entry, status=outcome.status, error=outcome.error, **log)
    return dict(entry, status='finished', **outcome.to_dict(root))


def mark_twins(entries: list[dict]) -> None:
    """Notes of each run whether it began as its twin of the same seed, and saw the images in the same order."""
    finished = {(entry['variant'], entry['seed']): entry for entry in entries if entry['status'] == 'finished'}
    for entry in entries:
        if entry['status'] == 'finished':
            twin = finished.get((find_twin(entry['variant']), entry['seed']))
            for key in ('start', 'order'):
                entry[f'same_{key}'] = None if twin is None else entry[key] == twin[key]


def has_metric(entry: dict, metric: str = 'bbox_mAP') -> bool:
    """Whether a run has a number of a metric: it finished, objects count for the metric, and it is finite."""
    return entry['status'] == 'finished' and 0 <= entry['metrics'].get(metric, -1) < inf


def collect_points(entries: Sequence[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """Collects the numbers of the runs that have them: variant -> metric -> seed -> points."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for entry in entries:
        by_metric = values.setdefault(entry['variant'], {})
        for metric in METRICS:
            if has_metric(entry, metric):
                by_metric.setdefault(metric, {})[entry['seed']] = 100 * entry['metrics'][metric]
    return values


def summarize(entries: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """Summarizes the runs: of every variant mean, spread and paired difference to its twin, by metric, in points."""
    values = collect_points(entries)
    return {variant: {metric: _summarize_metric(variant, by_seed, values.get(find_twin(variant), {}).get(metric, {}))
                      for metric, by_seed in by_metric.items()} for variant, by_metric in values.items()}


def _summarize_metric(variant: str, by_seed: Mapping[int, float], twin: Mapping[int, float]) -> dict:
    summary = dict(seeds=len(by_seed), **mean_and_std(list(by_seed.values())))
    difference = None if variant == PLAIN else paired_difference(twin, by_seed, ROUNDING)
    if difference is not None:
        summary.update(pairs=len(difference.by_seed), by_seed=difference.by_seed, difference=difference.mean,
                       interval=difference.interval, verdict=difference.verdict)
    return summary


def count_seeds(spread: float, difference: float = 1.0, power: float = POWER) -> int:
    """Counts the seeds with which a difference would be shown, most of the times that it is there.

    That is the least number of pairs with which the 95 % interval of the mean, by Student's t, lies on the difference's
    side of 0 with that probability.

    Args:
        spread: Standard deviation of the differences by seed.
        difference: The true mean, in the same unit.
        power: The probability.

    Example:
        >>> count_seeds(1.0), count_seeds(2.0), count_seeds(2.0, difference=2.0)
        (10, 34, 10)
    """
    return 2 + bisect_left(range(2, MOST_SEEDS), power, key=lambda seeds: _find_power(seeds, spread, difference))


def _find_power(seeds: int, spread: float, difference: float) -> float:
    if spread == 0:
        return 1.0
    bound = student_t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
    shift = abs(difference) * sqrt(seeds) / spread
    return float(nct.sf(bound, seeds - 1, shift))


def tell_power(by_name: Mapping[str, Mapping[Any, float]], of: str = 'Seeds') -> str:
    """Tells how many seeds a difference of a point would need, by the spread of each method's own differences.

    Args:
        by_name: Method -> seed, or data set -> difference; of one alone there is no spread.
        of: What they are over.

    Returns:
        A line; '' where none has a spread.
    """
    needed = [f'{name} {count_seeds(max(float(np.std(list(values.values()), ddof=1)), ROUNDING))}'
              for name, values in by_name.items() if len(values) > 1]
    return (f"{of} by which a difference of 1 point would be shown in {100 * POWER:.0f} of 100 cases: "
            f"{', '.join(needed)}") if needed else ''


def _tell_more(results: dict) -> str:
    """What stands below the tables: how many seeds would be needed, and which are not there."""
    power = tell_power({variant: metrics['bbox_mAP']['by_seed'] for variant, metrics in results['summary'].items()
                        if 'by_seed' in metrics.get('bbox_mAP', {})})
    return '\n'.join(filter(None, [power, tell_left_out(results)]))


def tell_left_out(results: dict) -> str:
    """Tells the seeds that a budget had no room for; '' where there are none."""
    left = results.get('budget', {}).get('not_run')
    return f"Not run, for the budget had no room: seeds {', '.join(map(str, left))}" if left else ''


def summarize_lengths(results: dict) -> dict[str, dict[int, dict]]:
    """Sorts what a benchmark of several lengths found: how much remains of a gain when all train longer.

    Args:
        results: What ``results.json`` holds.

    Returns:
        Variant without its epochs -> epochs -> the summary of its mAP, see :func:`summarize`, with the difference to
        the plain student that trained as long; nothing where all trained equally long.
    """
    epochs = {run['variant']: run.get('epochs') for run in results['runs'] if run['status'] == 'finished'}
    found: dict[str, dict[int, dict]] = {}
    for variant, metrics in results['summary'].items():
        if epochs.get(variant) and 'bbox_mAP' in metrics:
            found.setdefault(without_length(variant), {})[epochs[variant]] = metrics['bbox_mAP']
    lengths = {length for by_length in found.values() for length in by_length}
    return {name: dict(sorted(by_length.items())) for name, by_length in found.items()} if len(lengths) > 1 else {}


def summarize_gains(results: dict) -> dict[str, dict[int, dict]]:
    """As :func:`summarize_lengths`, of what has a difference alone: its plain student of that length has finished."""
    gains = {name: {epochs: each for epochs, each in by_length.items() if 'difference' in each}
             for name, by_length in summarize_lengths(results).items() if name != PLAIN}
    return {name: by_length for name, by_length in gains.items() if by_length}


def summarize_classes(results: dict) -> dict[str, dict[str, dict]]:
    """Tells what became of the classes that some variants never saw labelled.

    Args:
        results: What ``results.json`` holds.

    Returns:
        Variant -> such a class, and ``'others'``, the mean of all that every variant saw -> mean and standard deviation
        over the seeds of the AP, in points; nothing where all classes were labelled.
    """
    runs = [run for run in results['runs'] if run['status'] == 'finished' and run.get('class_ap')]
    missing = dict.fromkeys(name for run in runs for name in run.get('settings', {}).get('without', ()))
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs if missing else ():
        others = [value for name, value in run['class_ap'].items() if name not in missing]
        found = {name: run['class_ap'][name] for name in missing if name in run['class_ap']}
        for name, value in (*found.items(), *([('others', float(np.mean(others)))] if others else ())):
            values.setdefault(run['variant'], {}).setdefault(name, []).append(100 * value)
    return {variant: {name: mean_and_std(each) for name, each in by_name.items()}
            for variant, by_name in values.items()}


def summarize_fidelity(entries: Sequence[dict], splits: Sequence[str]) -> dict[str, dict[str, dict[str, dict]]]:
    """Split -> variant -> number -> mean and standard deviation over the seeds that have it."""
    values: dict[str, dict[str, dict[str, list]]] = {split: {} for split in splits}
    for entry in entries:
        for split, numbers in entry.get('fidelity', {}).items():
            by_name = values[split].setdefault(entry['variant'], {})
            for name, value in numbers.items():
                by_name.setdefault(name, []).append(value)
    return {split: {variant: {name: mean_and_std(each) for name, each in by_name.items()}
                    for variant, by_name in variants.items()} for split, variants in values.items()}


def tabulate(results: dict) -> list[TextTable]:
    """Makes the tables for the console: what the detectors detect, what they cost, and their fidelity."""
    rows = variant_rows(results)
    tables = [
        _make_table('COCO metric on the validation images, in points; mean ± standard deviation over seeds',
                    ('seeds', 'mAP', 'Δ mAP', 'AP50', 'AP75'), rows,
                    'Δ: paired mean over seeds against the plain student in the same setting ± half of its 95 % '
                    f'interval\n{_tell_more(results)}'.rstrip()),
        _make_table('By size of the objects; costs of inference (parameters, multiply-adds) and of training',
                    ('APs', 'APm', 'APl', *COSTS), rows, TIMES)]
    lengths = summarize_lengths(results)
    if lengths:
        tables.insert(1, _tabulate_lengths(lengths))
    if classes := summarize_classes(results):
        tables.insert(1, _tabulate_classes(classes))
    tables += [_make_table(f'Fidelity on {split} images, mean ± standard deviation over seeds; cka: mean over levels',
                           FIDELITY, fidelity_rows(variants)) for split, variants in results['fidelity'].items()]
    return tables


def _tabulate_lengths(lengths: Mapping[str, Mapping[int, dict]]) -> TextTable:
    columns = sorted({length for by_length in lengths.values() for length in by_length})
    rows = [(name, *(NONE if length not in by_length else
                     format_mean(by_length[length]['mean'], by_length[length]['std']) if name == PLAIN else
                     format_difference(by_length[length], by_length[length]['seeds']) for length in columns))
            for name, by_length in lengths.items()]
    headings = 'method', *(f'{length} epochs' for length in columns)
    return TextTable('What remains when all train longer', headings, rows,
                     'mAP of the plain student, ± standard deviation over seeds; of the others what they gain over the '
                     'one that trained as long, ± half of its 95 % interval')


def _tabulate_classes(classes: Mapping[str, Mapping[str, dict]]) -> TextTable:
    columns = tuple(dict.fromkeys(name for by_name in classes.values() for name in by_name))
    rows = [{name: format_mean(**each) for name, each in by_name.items()} | dict(method=variant)
            for variant, by_name in classes.items()]
    return _make_table('Classes that some never saw labelled (@without), beside the mean of the others', columns, rows,
                       'AP in points, mean ± standard deviation over seeds')


def _make_table(title: str, columns: Sequence[str], rows: Sequence[dict[str, str]], caption: str = '') -> TextTable:
    columns = ('method', *columns)
    unbroken = [index for index, column in enumerate(columns) if column in ('method', *METRICS.values())]
    return TextTable(title, columns, [[row.get(column, '') for column in columns] for row in rows], caption,
                     no_wrap=unbroken)


def format_markdown(results: dict) -> str:
    """Writes the same in Markdown, accuracy and costs in one table, with the runs that have no result below it."""
    table = _make_table('', ('seeds', *METRICS.values(), 'Δ mAP', *COSTS), variant_rows(results))
    lines = [table.to_markdown(), '', 'mAP and the others in points, ± standard deviation over seeds. Δ: paired mean '
             'over seeds against the plain student (none; where a setting changes the student, none with that '
             f"setting), ± half of its 95 % interval (Student's t). FLOPs are multiply-adds. {TIMES}"]
    lines += filter(None, [_tell_more(results)])
    lengths = summarize_lengths(results)
    if lengths:
        remaining = _tabulate_lengths(lengths)
        lines += ['', remaining.to_markdown(), '', f'{remaining.title}: {remaining.caption}.']
    if classes := summarize_classes(results):
        unseen = _tabulate_classes(classes)
        lines += ['', unseen.to_markdown(), '', f'{unseen.title}: {unseen.caption}.']
    lines += [f"- {run['variant']}, seed {run['seed']} {run['status']}: {run['error']}" for run in results['runs']
              if run['status'] != 'finished']
    for split, variants in results['fidelity'].items():
        lines += ['', f'Fidelity on {split} images, mean ± standard deviation over seeds (cka: mean over levels too):',
                  '', _make_table('', FIDELITY, fidelity_rows(variants)).to_markdown()]
    return '\n'.join(lines) + '\n'


def variant_rows(results: dict) -> list[dict[str, str]]:
    """Column -> text of one row for the teachers, where they were trained here, and for each variant."""
    rows = []
    teachers = [results['teacher'], *(each['run'] for each in results.get('further_teachers', ()))]
    if teachers[0] is not None:
        points = {name: [100 * teacher['metrics'].get(metric, -1) for teacher in teachers]
                  for metric, name in METRICS.items()}
        metrics = {name: format_mean(**mean_and_std(values)) if min(values) >= 0 else NONE
                   for name, values in points.items()}
        rows.append(dict(method='teacher', seeds=f'{len(teachers)}', **metrics, **_format_costs(teachers)))
    for variant, summary in results['summary'].items():
        runs = [run for run in results['runs'] if run['variant'] == variant]
        finished = [run for run in runs if run['status'] == 'finished']
        metrics = {name: format_mean(summary[metric]['mean'], summary[metric]['std']) if metric in summary else NONE
                   for metric, name in METRICS.items()}
        counted = sum(map(has_metric, runs))
        seeds = f'{len(runs)}' if counted == len(runs) else f'{counted} of {len(runs)}'
        metrics['Δ mAP'] = format_difference(summary.get('bbox_mAP', {}), counted)
        rows.append(dict(method=variant, seeds=seeds, **metrics, **_format_costs(finished)))
    return rows


def fidelity_rows(variants: dict[str, dict[str, dict]]) -> list[dict[str, str]]:
    """Column -> text of one row for each variant: the numbers of FidelityMetric, its mean CKA over the levels."""
    rows = []
    for variant, numbers in variants.items():
        texts = {name: format_mean(**each, digits=3) for name, each in numbers.items() if not name.startswith('cka_')}
        levels = [each['mean'] for name, each in numbers.items() if name.startswith('cka_')]
        rows.append(dict(method=variant, **texts, **(dict(cka=f'{np.mean(levels):.3f}') if levels else {})))
    return rows


def format_mean(mean: float, std: float | None = None, digits: int = 1, sign: str = '') -> str:
    """Writes a mean ± its standard deviation, where there is one; ``sign='+'`` writes that of a gain, too."""
    return f'{mean:{sign}.{digits}f}' + ('' if std is None else f' ± {std:.{digits}f}')


def format_difference(summary: dict, seeds: int) -> str:
    """Writes a difference with its interval, and what it says: never a gain where the interval holds 0.

    Args:
        summary: Of a metric, as :func:`summarize` gives it.
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


def _format_costs(runs: Sequence[dict]) -> dict[str, str]:
    if not runs:
        return dict.fromkeys(COSTS, NONE)
    first = runs[0]
    memory = max(run['peak_device_memory'] or run['peak_memory'] or 0 for run in runs)
    texts = (f"{first['parameters'] / 1e6:.2f} M", NONE if first['flops'] is None else f"{first['flops'] / 1e9:.2f} G",
             f"{np.median([run['seconds_per_iteration'] for run in runs]):.3f}", f'{memory / 2**30:.2f} GiB')
    return dict(zip(COSTS, texts))
