"""What a benchmark shows, in one sentence."""
from __future__ import annotations

from typing import Dict, List, Mapping, Sequence

from kd_det.benchmark.statistics import paired_difference
from kd_det.benchmark.variants import PLAIN, twin_of

METRIC = 'bbox_mAP'
INHERIT = 'inherit'  # the student that starts from the teacher's weights and learns from nothing else
THE_PLAIN, ITS_PLAIN = 'the plain student', 'its plain student'
MOST_NAMES = 5  # in one clause; the others are counted


def statements(summary: Mapping[str, Mapping[str, dict]]) -> List[Dict[str, object]]:
    """One statement on each method, the largest gain first.

    Each has the method's name and that of its twin, the verdict, difference and interval in points of mAP, and a text.
    """
    shown = {variant: metrics[METRIC] for variant, metrics in summary.items() if 'verdict' in metrics.get(METRIC, {})}
    made = [dict(name=variant, twin=twin_of(variant), verdict=each['verdict'], difference=each['difference'],
                 interval=each['interval'], by_seed=each['by_seed'], text=statement(each))
            for variant, each in shown.items()]
    return sorted(made, key=lambda each: -each['difference'])


def statement(summary: dict) -> str:
    """A difference and what it says; of one seed nothing is said, and of an interval that holds 0 no gain."""
    difference, interval = f"{summary['difference']:+.1f}", summary['interval']
    if interval is None:
        return f'one seed: no statement ({difference})'
    text = f'{difference} mAP ({interval[0]:+.1f} to {interval[1]:+.1f})'
    return text if summary['verdict'] in ('gain', 'loss') else f'no difference shown: {text}'


def table_cell(summary: Mapping[str, object]) -> str:
    """A difference ± half of its interval; in a second line what it does not say."""
    if 'verdict' not in summary:
        return ''
    difference, interval = f"{summary['difference']:+.1f}", summary['interval']
    if interval is None:
        return f'{difference}\none seed'
    text = f"{difference} ± {interval[1] - summary['difference']:.1f}"
    return text if summary['verdict'] in ('gain', 'loss') else f'{text}\nno difference shown'


def baseline(made: Sequence[dict]) -> str:
    """What methods are compared with, in words: the plain student, or each with its own where settings differ."""
    return THE_PLAIN if all(each['twin'] == PLAIN for each in made) else ITS_PLAIN


def beyond_inheritance(runs: Sequence[dict]) -> List[Dict[str, object]]:
    """What methods gain over the student that only inherits: one statement on each that began with its weights.

    Args:
        runs: Those of ``results.json``.

    Returns:
        As :func:`statements`; nothing where no student only inherits.
    """
    by_variant: Dict[str, Dict[int, dict]] = {}
    for run in runs:
        if run['status'] == 'finished' and run['metrics'].get(METRIC, -1) >= 0:
            by_variant.setdefault(run['variant'], {})[run['seed']] = run
    inherited, summary = by_variant.pop(INHERIT, {}), {}
    for variant, by_seed in by_variant.items():
        twins = {seed: run for seed, run in by_seed.items() if seed in inherited and _alike(run, inherited[seed])}
        found = paired_difference(*({seed: 100 * run['metrics'][METRIC] for seed, run in each.items()}
                                    for each in (inherited, twins)))
        if found is not None:
            summary[variant] = {METRIC: dict(difference=found.mean, interval=found.interval, by_seed=found.by_seed,
                                             verdict=found.verdict)}
    return statements(summary)


def _alike(run: dict, other: dict) -> bool:
    """Whether two runs began with the same weights, in the same setting of the student."""
    return run['start'] == other['start'] and twin_of(run['variant']) == twin_of(other['variant'])


def sentence(made: List[dict], against: str = THE_PLAIN) -> str:
    """The verdict on all methods.

    Args:
        made: See :func:`statements`.
        against: What they are compared with.
    """
    groups = {verdict: [each for each in made if each['verdict'] == verdict]
              for verdict in ('gain', 'loss', 'no difference shown')}
    single = [each for each in made if each['interval'] is None]
    clauses = []
    if groups['gain']:
        whom = _names(groups['gain'], numbers=True)
        clauses.append(f"{whom} {_verb(groups['gain'], 'detect')} better than {_whom(against, groups['gain'])}")
    if groups['loss']:
        whom, than = _names(groups['loss'], numbers=True), '' if clauses else f" than {_whom(against, groups['loss'])}"
        clauses.append(f"{whom} {_verb(groups['loss'], 'detect')} worse{than}")
    if groups['no difference shown']:
        clauses.append(f"for {_names(groups['no difference shown'])} no difference is shown")
    if single:
        clauses.append(f'one seed allows no statement on {_names(single)}')
    text = '; '.join(clauses) or f'There is no method beside {against}, so nothing to compare'
    return f'{text[0].upper() if text.startswith(("for", "one")) else text[0]}{text[1:]}.'


def _verb(group: List[dict], verb: str) -> str:
    return verb if len(group) > 1 else f'{verb}s'


def _whom(against: str, group: List[dict]) -> str:
    return 'their plain students' if against == ITS_PLAIN and len(group) > 1 else against


def _names(group: List[dict], numbers: bool = False) -> str:
    names = [f"{each['name']} ({each['difference']:+.1f} mAP, {each['interval'][0]:+.1f} to {each['interval'][1]:+.1f})"
             if numbers else each['name'] for each in group]
    rest = len(names) - MOST_NAMES
    if rest > 1:
        names[MOST_NAMES:] = [f'{rest} others']
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
