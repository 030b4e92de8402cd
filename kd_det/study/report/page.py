"""The first stage of a report: everything that the page shows of a study, as JSON could hold it."""
from __future__ import annotations

from typing import Callable, Dict, List, Optional, Sequence

import numpy as np

from kd_det.benchmark.statistics import paired_difference
from kd_det.benchmark.variants import twin_of
from kd_det.report.accuracy import CURVES
from kd_det.report.comparison import comparison
from kd_det.report.detectors import TEACHER, look
from kd_det.report.studies import Study
from kd_det.report.terms import task_curves, term_curves, without_terms
from kd_det.report.validation import chosen, evenly_spaced, read_validation
from kd_det.visualization import read_scalars

TASK_LOSS = 'training loss without the terms'
SHOWN_METRICS = {'coco/bbox_mAP': 'validation mAP', 'coco/bbox_mAP_50': 'validation AP50', 'loss': TASK_LOSS}


def collect(study: Study, images: int = 8, teacher: Optional[dict] = None,
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


def _logs(study: Study, notes: List[str]) -> dict:
    """Curves: quantity -> variant -> one curve a seed. Terms: variant -> its terms, and the student's own losses."""
    logged: Dict[str, list] = {}
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


def _per_class(study: Study, classes: Sequence[str], accuracies: Dict[str, Dict[int, dict]]) -> Dict[str, List[dict]]:
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
