"""What a benchmark shows, in one sentence."""
from __future__ import annotations

from typing import Dict, List, Mapping

METRIC = 'bbox_mAP'
MOST_NAMES = 5  # in one clause; the others are counted


def statements(summary: Mapping[str, Mapping[str, dict]]) -> List[Dict[str, object]]:
    """One statement on each method: name, verdict, difference and interval in points of mAP; the largest gain first."""
    made = [dict(name=variant, verdict=metrics[METRIC]['verdict'], difference=metrics[METRIC]['difference'],
                 interval=metrics[METRIC]['interval'], by_seed=metrics[METRIC]['by_seed'],
                 text=statement(metrics[METRIC]))
            for variant, metrics in summary.items() if 'verdict' in metrics.get(METRIC, {})]
    return sorted(made, key=lambda each: -each['difference'])


def statement(summary: dict) -> str:
    """A difference and what it says; of one seed nothing is said, and of an interval that holds 0 no gain."""
    difference, interval = f"{summary['difference']:+.1f}", summary['interval']
    if interval is None:
        return f'one seed: no statement ({difference})'
    text = f'{difference} mAP ({interval[0]:+.1f} to {interval[1]:+.1f})'
    return text if summary['verdict'] in ('gain', 'loss') else f'no difference shown: {text}'


def sentence(made: List[dict]) -> str:
    """The verdict on all methods.

    Args:
        made: See :func:`statements`.
    """
    groups = {verdict: [each for each in made if each['verdict'] == verdict]
              for verdict in ('gain', 'loss', 'no difference shown')}
    single = [each for each in made if each['interval'] is None]
    clauses = []
    if groups['gain']:
        whom = _names(groups['gain'], numbers=True)
        clauses.append(f"{whom} {_verb(groups['gain'], 'detect')} better than the plain student")
    if groups['loss']:
        whom, than = _names(groups['loss'], numbers=True), '' if clauses else ' than the plain student'
        clauses.append(f"{whom} {_verb(groups['loss'], 'detect')} worse{than}")
    if groups['no difference shown']:
        clauses.append(f"for {_names(groups['no difference shown'])} no difference is shown")
    if single:
        clauses.append(f'one seed allows no statement on {_names(single)}')
    text = '; '.join(clauses) or 'There is no method beside a plain student, so nothing to compare'
    return f'{text[0].upper() if text.startswith(("for", "one")) else text[0]}{text[1:]}.'


def _verb(group: List[dict], verb: str) -> str:
    return verb if len(group) > 1 else f'{verb}s'


def _names(group: List[dict], numbers: bool = False) -> str:
    names = [f"{each['name']} ({each['difference']:+.1f} mAP, {each['interval'][0]:+.1f} to {each['interval'][1]:+.1f})"
             if numbers else each['name'] for each in group]
    rest = len(names) - MOST_NAMES
    if rest > 1:
        names[MOST_NAMES:] = [f'{rest} others']
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
