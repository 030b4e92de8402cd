"""The first stage of a report: everything that the page shows of a study, as JSON could hold it."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kd_det.study.report.detections import CURVES, choose_evenly, find_images, load_validation
from kd_det.study.report.evaluation import TEACHER, evaluate_study
from kd_det.study.report.studies import (
    Study,
    collect_policy_curves,
    collect_task_curves,
    collect_term_curves,
    subtract_terms,
)
from kd_det.study.results import (
    COSTS,
    FIDELITY,
    METRICS,
    NONE,
    ROUNDING,
    fidelity_rows,
    format_mean,
    paired_difference,
    summarize_gains,
    variant_rows,
)
from kd_det.study.variants import PLAIN, find_twin
from kd_det.training.pictures import read_scalars

METRIC = 'bbox_mAP'
INHERIT = 'inherit'  # the student that starts from the teacher's weights and learns from nothing else
THE_PLAIN, ITS_PLAIN = 'the plain student', 'its plain student'
MAX_NAMES = 5  # in one clause; the others are counted
OF_TEACHER = ('teacher_errors', 'teacher_ece')  # of FidelityMetric's numbers; they are the same beside every student
CKA = 'cka_'  # begins the names of those that belong to a level; its stride follows
PROVENANCE = ('command', 'commit', 'versions', 'machine', 'pair', 'data')
TASK_LOSS = 'training loss without the terms'
SHOWN_METRICS = {'coco/bbox_mAP': 'validation mAP', 'coco/bbox_mAP_50': 'validation AP50', 'loss': TASK_LOSS}


def collect(study: Study, images: int = 8, teacher: dict | None = None,
            log: Callable[[str], None] = lambda text: None, show: Sequence[str] = ()) -> dict:
    """Reads the runs of a study, and runs their checkpoints on the validation images.

    Args:
        study: The study.
        images: How many validation images to show.
        teacher: ``config`` and ``checkpoint``, in place of those that the runs' configs name.
        log: Given a line on what is being done.
        show: Files of validation images to show in place of ``images``, with their folders and suffixes or without.

    Returns:
        See the comments; what could not be had is told in ``notes`` instead.

    Raises:
        ConfigurationError: No validation image has a name of ``show``, or several have.
    """
    notes = list(study.notes)
    made = dict(name=study.name, plain=study.plain, variants=list(study.variants), notes=notes)
    made.update(compare_variants(study))  # verdict, beyond, statements, table, fidelity, provenance
    if study.results is not None and not made['fidelity']:
        notes.append('How closely the students follow the teacher was not measured: kd-det benchmark --fidelity does.')
    made.update(_collect_curves(study, notes))  # curves, terms
    made.update(per_class=None, precision=None, images=[], maps={})
    log(f'{study.name}: reading the validation data')
    try:
        validation = load_validation(study.runs[0].config)
    except Exception as error:  # data that has gone, or a config without any
        notes.append(f'Boxes, precision and maps are missing, for the validation data can not be read: {error}')
        return made
    teacher = teacher or study.teacher
    shown = find_images(validation.images, show) if show else choose_evenly(len(validation.images), images)
    evaluation = evaluate_study(study, validation, shown, teacher, log)
    notes += evaluation.notes
    made.update(
        per_class=_compare_classes(study, validation.classes, evaluation.accuracies), maps=evaluation.maps,
        images=evaluation.images,
        precision={variant: {iou: np.mean([each['precision'][iou] for each in by_seed.values()], 0).tolist()
                             for iou in CURVES} for variant, by_seed in evaluation.accuracies.items()},
        classes=validation.classes, palette=validation.palette, validation_images=len(validation.images),
        by_name=bool(show))
    return made


def compare_variants(study: Study) -> dict:
    """Makes the verdict, the table and the fidelity of a benchmark; of single trainings the sentence that none is."""
    if study.results is None:
        count = f'{len(study.runs)} training{"s" * (len(study.runs) > 1)}'
        return dict(verdict=f'{count}, no benchmark: this page shows what happened, not whether distilling helped.',
                    beyond='', statements=[], lengths={}, table=None, fidelity={}, provenance={})
    results = study.results
    made, beyond = state_differences(results['summary']), compare_with_inheriting(results['runs'])
    table = variant_rows(results)
    added = {each['name']: each['text'] for each in beyond}
    made = [dict(each, beyond=added.get(each['name'])) for each in made]
    table = _sort_rows([dict(row, **{'Δ mAP': format_cell(results['summary'].get(row['method'], {}).get(METRIC, {}))})
                        for row in table], [each['name'] for each in made])
    metrics = [name for name in METRICS.values() if any(row[name] != NONE for row in table)]
    accuracy = [metrics[0], 'Δ mAP', *metrics[1:]] if metrics else []
    of_students = [name for name in FIDELITY if name not in OF_TEACHER]
    fidelity = {split: dict(columns=['method', *of_students], rows=fidelity_rows(variants),
                            levels=_tabulate_similarity(variants), teacher=_read_teacher_numbers(variants))
                for split, variants in results['fidelity'].items()}
    return dict(verdict=write_verdict(made, name_baseline(made)),
                beyond=write_verdict(beyond, 'inherit alone') if beyond else '',
                statements=made,
                lengths=summarize_gains(results),
                table=dict(columns=['method', *accuracy, 'seeds', *COSTS], rows=table),
                fidelity=fidelity,
                provenance={key: _put_in_words(results[key]) for key in PROVENANCE if results.get(key)})


def state_differences(summary: Mapping[str, Mapping[str, dict]]) -> list[dict[str, object]]:
    """States the difference that each method makes, the largest gain first.

    Each has the method's name and that of its twin, the verdict, difference and interval in points of mAP, and a text.
    """
    shown = {variant: metrics[METRIC] for variant, metrics in summary.items() if 'verdict' in metrics.get(METRIC, {})}
    made = [dict(name=variant, twin=find_twin(variant), verdict=each['verdict'], difference=each['difference'],
                 interval=each['interval'], by_seed=each['by_seed'], text=format_statement(each))
            for variant, each in shown.items()]
    return sorted(made, key=lambda each: -each['difference'])


def compare_with_inheriting(runs: Sequence[dict]) -> list[dict[str, object]]:
    """States what methods gain over the student that only inherits, of each that began with its weights.

    Args:
        runs: Those of ``results.json``.

    Returns:
        As :func:`state_differences`; nothing where no student only inherits.
    """
    by_variant: dict[str, dict[int, dict]] = {}
    for run in runs:
        if run['status'] == 'finished' and run['metrics'].get(METRIC, -1) >= 0:
            by_variant.setdefault(run['variant'], {})[run['seed']] = run
    inherited, summary = by_variant.pop(INHERIT, {}), {}
    for variant, by_seed in by_variant.items():
        twins = {seed: run for seed, run in by_seed.items() if seed in inherited and _began_alike(run, inherited[seed])}
        found = paired_difference(*({seed: 100 * run['metrics'][METRIC] for seed, run in each.items()}
                                    for each in (inherited, twins)), rounding=ROUNDING)
        if found is not None:
            summary[variant] = {METRIC: dict(difference=found.mean, interval=found.interval, by_seed=found.by_seed,
                                             verdict=found.verdict)}
    return state_differences(summary)


def write_verdict(made: list[dict], against: str = THE_PLAIN) -> str:
    """Writes the verdict on all methods in a sentence.

    Args:
        made: See :func:`state_differences`.
        against: What they are compared with.
    """
    groups = {verdict: [each for each in made if each['verdict'] == verdict]
              for verdict in ('gain', 'loss', 'no difference shown')}
    single = [each for each in made if each['interval'] is None]
    clauses = []
    if groups['gain']:
        whom = _names(groups['gain'], numbers=True)
        than = _name_baselines(against, groups['gain'])
        clauses.append(f"{whom} {_verb(groups['gain'], 'detect')} better than {than}")
    if groups['loss']:
        whom = _names(groups['loss'], numbers=True)
        than = '' if clauses else f" than {_name_baselines(against, groups['loss'])}"
        clauses.append(f"{whom} {_verb(groups['loss'], 'detect')} worse{than}")
    if groups['no difference shown']:
        clauses.append(f"for {_names(groups['no difference shown'])} no difference is shown")
    if single:
        clauses.append(f'one seed allows no statement on {_names(single)}')
    text = '; '.join(clauses) or f'There is no method beside {against}, so nothing to compare'
    return f'{text[0].upper() if text.startswith(("for", "one")) else text[0]}{text[1:]}.'


def name_baseline(made: Sequence[dict]) -> str:
    """Names what methods are compared with, in words: the plain student, or each with its own where settings differ."""
    return THE_PLAIN if all(each['twin'] == PLAIN for each in made) else ITS_PLAIN


def format_statement(summary: dict) -> str:
    """Writes a difference and what it says; of one seed nothing is said, and of an interval that holds 0 no gain."""
    difference, interval = f"{summary['difference']:+.1f}", summary['interval']
    if interval is None:
        return f'one seed: no statement ({difference})'
    text = f'{difference} mAP ({interval[0]:+.1f} to {interval[1]:+.1f})'
    return text if summary['verdict'] in ('gain', 'loss') else f'no difference shown: {text}'


def format_cell(summary: Mapping[str, object]) -> str:
    """Writes a difference ± half of its interval; in a second line what it does not say."""
    if 'verdict' not in summary:
        return ''
    difference, interval = f"{summary['difference']:+.1f}", summary['interval']
    if interval is None:
        return f'{difference}\none seed'
    text = f"{difference} ± {interval[1] - summary['difference']:.1f}"
    return text if summary['verdict'] in ('gain', 'loss') else f'{text}\nno difference shown'


def _began_alike(run: dict, other: dict) -> bool:
    """Whether two runs began with the same weights, in the same setting of the student."""
    return run['start'] == other['start'] and find_twin(run['variant']) == find_twin(other['variant'])


def _verb(group: list[dict], verb: str) -> str:
    return verb if len(group) > 1 else f'{verb}s'


def _name_baselines(against: str, group: list[dict]) -> str:
    return 'their plain students' if against == ITS_PLAIN and len(group) > 1 else against


def _names(group: list[dict], numbers: bool = False) -> str:
    names = [f"{each['name']} ({each['difference']:+.1f} mAP, {each['interval'][0]:+.1f} to {each['interval'][1]:+.1f})"
             if numbers else each['name'] for each in group]
    rest = len(names) - MAX_NAMES
    if rest > 1:
        names[MAX_NAMES:] = [f'{rest} others']
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _sort_rows(table: list[dict], names: Sequence[str]) -> list[dict]:
    """Sorts the rows of a table in the order of the differences, below the teacher and the plain student."""
    places = {TEACHER: -2, PLAIN: -1, **{name: place for place, name in enumerate(names)}}
    return sorted(table, key=lambda row: places.get(row['method'], len(names)))


def _tabulate_similarity(variants: dict[str, dict[str, dict]]) -> dict | None:
    """Makes a table of the likeness of the features (CKA), level by level; None where it was not measured."""
    names = {name for numbers in variants.values() for name in numbers if name.startswith(CKA)}
    strides = sorted((name[len(CKA):] for name in names), key=float)
    made = [dict(method=variant, **{f'stride {stride}': format_mean(**numbers[f'{CKA}{stride}'], digits=3)
                                    for stride in strides if f'{CKA}{stride}' in numbers})
            for variant, numbers in variants.items()]
    return dict(columns=['method', *(f'stride {stride}' for stride in strides)], rows=made) if strides else None


def _put_in_words(value: Any) -> Any:
    """Writes a value of ``results.json`` as the page shows it."""
    if isinstance(value, dict):
        return {key: _put_in_words(each) for key, each in value.items()}
    if isinstance(value, list):
        return ', '.join(map(str, value)) or 'none'
    return NONE if value is None else value


def _read_teacher_numbers(variants: dict[str, dict[str, dict]]) -> dict[str, float]:
    """Reads what FidelityMetric tells of the teacher alone; nothing where no box counted for it."""
    numbers = next(iter(variants.values()), {})
    return {name: numbers[name]['mean'] for name in OF_TEACHER if name in numbers}


def _collect_curves(study: Study, notes: list[str]) -> dict:
    """Curves: quantity -> variant -> one curve a seed. Terms: variant -> its terms, and the student's own losses."""
    logged: dict[str, list] = {}
    for variant, runs in study.variants.items():
        logged[variant] = [read_scalars(run.scalars, notes.append) for run in runs
                           if run.scalars and run.scalars[-1].is_file()]
        if len(logged[variant]) < len(runs):
            notes.append(f'{variant}: the log (scalars.json) of {len(runs) - len(logged[variant])} run(s) is missing.')
        diverged = [each['loss'] for each in logged[variant] if not np.isfinite([*each.get('loss', {}).values()]).all()]
        if diverged:
            first = min(epoch for curve in diverged for epoch, loss in curve.items() if not np.isfinite(loss))
            notes.append(f'{variant} diverged: the loss of {len(diverged)} of {len(runs)} runs is not finite, first in '
                         f'epoch {first}.')
    terms = {}
    for variant, scalars in logged.items():
        by_term = collect_term_curves(study.variants[variant][0].config, scalars)
        if by_term:
            terms[variant] = dict(terms=by_term, task=collect_task_curves(scalars, list(by_term)),
                                  policy=collect_policy_curves(scalars))
            logged[variant] = [dict(each, loss=subtract_terms(each, list(by_term)))
                               for each in scalars if 'loss' in each]
    curves = {title: {variant: [each[key] for each in scalars if key in each] for variant, scalars in logged.items()}
              for key, title in SHOWN_METRICS.items()}
    curves = {title: {variant: each for variant, each in by_variant.items() if each}
              for title, by_variant in curves.items()}
    return dict(curves={title: each for title, each in curves.items() if each}, terms=terms)


def _compare_classes(study: Study, classes: Sequence[str],
                     accuracies: dict[str, dict[int, dict]]) -> dict[str, list[dict]]:
    """Variant -> class, AP and its change against the variant's twin in points, the largest gain first."""
    changes = {}
    for variant, by_seed in accuracies.items():
        if variant in (study.plain, TEACHER):
            continue
        changes[variant], twin = [], accuracies.get(find_twin(variant), {})
        for index, name in enumerate(classes):
            of_twin, of_variant = ({seed: 100 * each['per_class'][index] for seed, each in seeds.items()
                                     if each['per_class'][index] is not None} for seeds in (twin, by_seed))
            change = paired_difference(of_twin, of_variant, ROUNDING) if study.results is not None else None
            if of_variant:
                changes[variant].append(dict(
                    name=name, ap=float(np.mean(list(of_variant.values()))),
                    difference=change and change.mean, interval=change and change.interval,
                    verdict=change and change.verdict))
        changes[variant].sort(key=lambda each: (-(each['difference'] or 0), -each['ap']))
    return changes
