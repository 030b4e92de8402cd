"""The first stage of a report: everything that the page shows of a study, as JSON could hold it."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_det import __version__
from kd_det.study.pictures import read_scalars
from kd_det.study.report.detections import CURVES, chosen, evenly_spaced, read_validation
from kd_det.study.report.detectors import TEACHER, look
from kd_det.study.report.plots import curves_svg, differences_axis, precision_svg, variant_inks
from kd_det.study.report.runs import Study, task_curves, term_curves, without_terms
from kd_det.study.report.verdict import baseline, comparison
from kd_det.study.results import paired_difference
from kd_det.study.variants import twin_of

TASK_LOSS = 'training loss without the terms'
SHOWN_METRICS = {'coco/bbox_mAP': 'validation mAP', 'coco/bbox_mAP_50': 'validation AP50', 'loss': TASK_LOSS}


def collect(study: Study, images: int = 8, teacher: dict | None = None,
            say: Callable[[str], None] = lambda text: None, show: Sequence[str] = ()) -> dict:
    """Reads the runs of a study, and runs their checkpoints on the validation images.

    Args:
        study: The study.
        images: How many validation images to show.
        teacher: ``config`` and ``checkpoint``, in place of those that the runs' configs name.
        say: Told what is being done.
        show: Files of validation images to show in place of ``images``, with their folders and suffixes or without.

    Returns:
        See the comments; what could not be had is told in ``notes`` instead.

    Raises:
        ConfigurationError: No validation image has a name of ``show``, or several have.
    """
    notes = list(study.notes)
    made = dict(name=study.name, plain=study.plain, variants=list(study.variants), notes=notes)
    made.update(comparison(study))  # verdict, beyond, statements, table, fidelity, provenance
    if study.results is not None and not made['fidelity']:
        notes.append('How closely the students follow the teacher was not measured: kd-det benchmark --fidelity does.')
    made.update(_logs(study, notes))  # curves, terms
    made.update(per_class=None, precision=None, images=[], maps={})
    say(f'{study.name}: reading the validation data')
    try:
        validation = read_validation(study.runs[0].config)
    except Exception as error:  # data that has gone, or a config without any
        notes.append(f'Boxes, precision and maps are missing, for the validation data can not be read: {error}')
        return made
    teacher = teacher or study.teacher
    shown = chosen(validation.images, show) if show else evenly_spaced(len(validation.images), images)
    seen = look(study, validation, shown, teacher, say)
    notes += seen.notes
    made.update(
        per_class=_per_class(study, validation.classes, seen.accuracies), maps=seen.maps, images=seen.images,
        precision={variant: {iou: np.mean([each['precision'][iou] for each in by_seed.values()], 0).tolist()
                             for iou in CURVES} for variant, by_seed in seen.accuracies.items()},
        classes=validation.classes, palette=validation.palette, validation_images=len(validation.images),
        by_name=bool(show))
    return made


def _logs(study: Study, notes: list[str]) -> dict:
    """Curves: quantity -> variant -> one curve a seed. Terms: variant -> its terms, and the student's own losses."""
    logged: dict[str, list] = {}
    for variant, runs in study.variants.items():
        logged[variant] = [read_scalars(run.scalars) for run in runs if run.scalars and run.scalars[-1].is_file()]
        if len(logged[variant]) < len(runs):
            notes.append(f'{variant}: the log (scalars.json) of {len(runs) - len(logged[variant])} run(s) is missing.')
        diverged = [each['loss'] for each in logged[variant] if not np.isfinite([*each.get('loss', {}).values()]).all()]
        if diverged:
            first = min(epoch for curve in diverged for epoch, loss in curve.items() if not np.isfinite(loss))
            notes.append(f'{variant} diverged: the loss of {len(diverged)} of {len(runs)} runs is not finite, first in '
                         f'epoch {first}.')
    terms = {}
    for variant, scalars in logged.items():
        by_term = term_curves(study.variants[variant][0].config, scalars)
        if by_term:
            terms[variant] = dict(terms=by_term, task=task_curves(scalars, list(by_term)))
            logged[variant] = [dict(each, loss=without_terms(each, list(by_term)))
                               for each in scalars if 'loss' in each]
    curves = {title: {variant: [each[key] for each in scalars if key in each] for variant, scalars in logged.items()}
              for key, title in SHOWN_METRICS.items()}
    curves = {title: {variant: each for variant, each in by_variant.items() if each}
              for title, by_variant in curves.items()}
    return dict(curves={title: each for title, each in curves.items() if each}, terms=terms)


def _per_class(study: Study, classes: Sequence[str], accuracies: dict[str, dict[int, dict]]) -> dict[str, list[dict]]:
    """Variant -> class, AP and its change against the variant's twin in points, the largest gain first."""
    changes = {}
    for variant, by_seed in accuracies.items():
        if variant in (study.plain, TEACHER):
            continue
        changes[variant], twin = [], accuracies.get(twin_of(variant), {})
        for index, name in enumerate(classes):
            of_twin, of_variant = ({seed: 100 * each['per_class'][index] for seed, each in seeds.items()
                                     if each['per_class'][index] is not None} for seeds in (twin, by_seed))
            change = paired_difference(of_twin, of_variant) if study.results is not None else None
            if of_variant:
                changes[variant].append(dict(
                    name=name, ap=float(np.mean(list(of_variant.values()))),
                    difference=change and change.mean, interval=change and change.interval,
                    verdict=change and change.verdict))
        changes[variant].sort(key=lambda each: (-(each['difference'] or 0), -each['ap']))
    return changes


PULLS = {'pull': 'pull, as weighted (task: 1)', 'unweighted_pull': 'pull before weighting (task: 1)'}


def render(studies: list[dict]) -> str:
    """Makes the page.

    Args:
        studies: See :func:`kd_det.study.report.page.collect`.

    Returns:
        HTML that refers to nothing outside itself.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies['json.dumps_kwargs'] = dict(separators=(',', ':'), allow_nan=False)
    pages = [dict(study, **_prepared(study)) for study in studies]
    return environment.get_template('template.html').render(studies=pages, version=__version__)


def _prepared(study: dict) -> dict:
    inks = variant_inks(study['variants'], study['plain'])
    shown = [variant for variant in study['variants'] if variant != study['plain']] or study['variants']
    curves = {title: {variant: each for variant, each in by_variant.items() if max(map(len, each)) > 1}
              for title, by_variant in study['curves'].items()}
    plots = [curves_svg(title, each, inks) for title, each in curves.items() if each]
    precision = [precision_svg(iou, {variant: each[iou] for variant, each in study['precision'].items()}, inks)
                 for iou in ('50', '75')] if study['precision'] else []
    # The thumbnails hold the pictures: their sources need not be there twice.
    images = [{key: value for key, value in image.items() if key != 'source'} for image in study['images']]
    data = without_nan(dict(plain=study['plain'], images=images, maps=study['maps'],
                            classes=study.get('classes', ()), palette=study.get('palette', ())))
    best = study['statements'][0]['name'] if study['statements'] else shown[0]
    return dict(inks=inks, switch=shown, first=best, teacher=TEACHER, data=data, by_name=study.get('by_name', False),
                axis=differences_axis(study['statements']), baseline=baseline(study['statements']),
                curve_plots=[Markup(plot) for plot in plots], precision_plots=[Markup(plot) for plot in precision],
                term_plots={variant: _term_plots(each) for variant, each in study['terms'].items()},
                validated_once=len(plots) < len(curves), span=_span(study['per_class'] or {}))


def _term_plots(logged: dict) -> list[Markup]:
    """The losses side by side, then of each term its parts, then how hard the terms pulled."""
    losses = {**logged['task'], **{f'loss_{name}': term['loss'] for name, term in logged['terms'].items()}}
    plots = [curves_svg('losses, as they are added up', losses, {}, legend=True, log=True)]
    for name, term in logged['terms'].items():
        if term['parts']:
            plots.append(curves_svg(f'{name}: its parts', term['parts'], {}, legend=True, log=True))
    for key, title in PULLS.items():
        pulls = {name: term[key] for name, term in logged['terms'].items() if term[key]}
        if pulls:
            plots.append(curves_svg(title, pulls, {}, legend=True, log=True))
    return [Markup(plot) for plot in plots]


def without_nan(value: Any) -> Any:
    """What JSON can hold: None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _span(per_class: dict[str, list[dict]]) -> float:
    """The largest change of a class: the length of the longest bar."""
    return max((abs(each['difference']) for changes in per_class.values() for each in changes
                if each['difference'] is not None), default=0.0) or 1.0
