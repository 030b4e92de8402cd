"""What a benchmark shows, in one sentence."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd_det.study.report.detectors import TEACHER
from kd_det.study.report.runs import Study
from kd_det.study.results import METRICS, paired_difference
from kd_det.study.tables import COSTS, FIDELITY, NONE, fidelity_rows, rows
from kd_det.study.variants import PLAIN, find_twin

METRIC = 'bbox_mAP'
INHERIT = 'inherit'  # the student that starts from the teacher's weights and learns from nothing else
THE_PLAIN, ITS_PLAIN = 'the plain student', 'its plain student'
MOST_NAMES = 5  # in one clause; the others are counted


def statements(summary: Mapping[str, Mapping[str, dict]]) -> list[dict[str, object]]:
    """One statement on each method, the largest gain first.

    Each has the method's name and that of its twin, the verdict, difference and interval in points of mAP, and a text.
    """
    shown = {variant: metrics[METRIC] for variant, metrics in summary.items() if 'verdict' in metrics.get(METRIC, {})}
    made = [dict(name=variant, twin=find_twin(variant), verdict=each['verdict'], difference=each['difference'],
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


def beyond_inheritance(runs: Sequence[dict]) -> list[dict[str, object]]:
    """What methods gain over the student that only inherits: one statement on each that began with its weights.

    Args:
        runs: Those of ``results.json``.

    Returns:
        As :func:`statements`; nothing where no student only inherits.
    """
    by_variant: dict[str, dict[int, dict]] = {}
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
    return run['start'] == other['start'] and find_twin(run['variant']) == find_twin(other['variant'])


def sentence(made: list[dict], against: str = THE_PLAIN) -> str:
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


def _verb(group: list[dict], verb: str) -> str:
    return verb if len(group) > 1 else f'{verb}s'


def _whom(against: str, group: list[dict]) -> str:
    return 'their plain students' if against == ITS_PLAIN and len(group) > 1 else against


def _names(group: list[dict], numbers: bool = False) -> str:
    names = [f"{each['name']} ({each['difference']:+.1f} mAP, {each['interval'][0]:+.1f} to {each['interval'][1]:+.1f})"
             if numbers else each['name'] for each in group]
    rest = len(names) - MOST_NAMES
    if rest > 1:
        names[MOST_NAMES:] = [f'{rest} others']
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)


OF_TEACHER = ('teacher_errors', 'teacher_ece')  # of FidelityMetric's numbers; they are the same beside every student
CKA = 'cka_'  # begins the names of those that belong to a level; its stride follows
PROVENANCE = ('command', 'commit', 'versions', 'machine', 'pair', 'data')


def comparison(study: Study) -> dict:
    """The verdict, the table and the fidelity of a benchmark; of single trainings a sentence that there are none."""
    if study.results is None:
        count = f'{len(study.runs)} training{"s" * (len(study.runs) > 1)}'
        return dict(verdict=f'{count}, no benchmark: this page shows what happened, not whether distilling helped.',
                    beyond='', statements=[], table=None, fidelity={}, provenance={})
    results = study.results
    made, beyond, table = statements(results['summary']), beyond_inheritance(results['runs']), rows(results)
    added = {each['name']: each['text'] for each in beyond}
    made = [dict(each, beyond=added.get(each['name'])) for each in made]
    table = _sorted([dict(row, **{'Δ mAP': table_cell(results['summary'].get(row['method'], {}).get(METRIC, {}))})
                     for row in table], [each['name'] for each in made])
    metrics = [name for name in METRICS.values() if any(row[name] != NONE for row in table)]
    accuracy = [metrics[0], 'Δ mAP', *metrics[1:]] if metrics else []
    of_students = [name for name in FIDELITY if name not in OF_TEACHER]
    fidelity = {split: dict(columns=['method', *of_students], rows=fidelity_rows(variants),
                            levels=_similarity(variants), teacher=_teacher_numbers(variants))
                for split, variants in results['fidelity'].items()}
    return dict(verdict=sentence(made, baseline(made)), beyond=sentence(beyond, 'inherit alone') if beyond else '',
                statements=made, table=dict(columns=['method', *accuracy, 'seeds', *COSTS], rows=table),
                fidelity=fidelity,
                provenance={key: _in_words(results[key]) for key in PROVENANCE if results.get(key)})


def _sorted(table: list[dict], names: Sequence[str]) -> list[dict]:
    """The rows of a table in the order of the differences, below the teacher and the plain student."""
    places = {TEACHER: -2, PLAIN: -1, **{name: place for place, name in enumerate(names)}}
    return sorted(table, key=lambda row: places.get(row['method'], len(names)))


def _similarity(variants: dict[str, dict[str, dict]]) -> dict | None:
    """The likeness of the features (CKA) as a table, level by level; None where it was not measured."""
    names = {name for numbers in variants.values() for name in numbers if name.startswith(CKA)}
    strides = sorted((name[len(CKA):] for name in names), key=float)
    made = [dict(method=variant, **{f'stride {stride}': _spread(numbers[f'{CKA}{stride}']) for stride in strides
                                    if f'{CKA}{stride}' in numbers}) for variant, numbers in variants.items()]
    return dict(columns=['method', *(f'stride {stride}' for stride in strides)], rows=made) if strides else None


def _spread(number: dict) -> str:
    return f"{number['mean']:.3f}" + ('' if number['std'] is None else f" ± {number['std']:.3f}")


def _in_words(value: Any) -> Any:
    """A value of ``results.json`` as the page shows it."""
    if isinstance(value, dict):
        return {key: _in_words(each) for key, each in value.items()}
    if isinstance(value, list):
        return ', '.join(map(str, value)) or 'none'
    return NONE if value is None else value


def _teacher_numbers(variants: dict[str, dict[str, dict]]) -> dict[str, float]:
    """What FidelityMetric tells of the teacher alone; nothing where no box counted for it."""
    numbers = next(iter(variants.values()), {})
    return {name: numbers[name]['mean'] for name in OF_TEACHER if name in numbers}
