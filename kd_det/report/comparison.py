"""What a benchmark found out, as the page tells it: the verdict, the table, the fidelity, and how it was made."""
from __future__ import annotations

from typing import Any, Dict, List, Optional, Sequence

from kd_det.benchmark.results import METRICS
from kd_det.benchmark.tables import COSTS, FIDELITY, NONE, fidelity_rows, rows
from kd_det.benchmark.variants import PLAIN
from kd_det.report.detectors import TEACHER
from kd_det.report.studies import Study
from kd_det.report.verdict import METRIC, baseline, beyond_inheritance, sentence, statements, table_cell

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


def _sorted(table: List[dict], names: Sequence[str]) -> List[dict]:
    """The rows of a table in the order of the differences, below the teacher and the plain student."""
    places = {TEACHER: -2, PLAIN: -1, **{name: place for place, name in enumerate(names)}}
    return sorted(table, key=lambda row: places.get(row['method'], len(names)))


def _similarity(variants: Dict[str, Dict[str, dict]]) -> Optional[dict]:
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


def _teacher_numbers(variants: Dict[str, Dict[str, dict]]) -> Dict[str, float]:
    """What FidelityMetric tells of the teacher alone; nothing where no box counted for it."""
    numbers = next(iter(variants.values()), {})
    return {name: numbers[name]['mean'] for name in OF_TEACHER if name in numbers}
