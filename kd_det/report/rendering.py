"""The second stage of a report: one page, with everything in it."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Dict, List

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_det.report.detectors import TEACHER
from kd_det.report.differences import differences_axis
from kd_det.report.plots import curves_svg, precision_svg, variant_inks
from kd_det.report.verdict import baseline
from kd_det import __version__

PULLS = {'pull': 'pull, as weighted (task: 1)', 'unweighted_pull': 'pull before weighting (task: 1)'}


def render(studies: List[dict]) -> str:
    """Makes the page.

    Args:
        studies: See :func:`kd_det.report.collecting.collect`.

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


def _term_plots(logged: dict) -> List[Markup]:
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


def _span(per_class: Dict[str, List[dict]]) -> float:
    """The largest change of a class: the length of the longest bar."""
    return max((abs(each['difference']) for changes in per_class.values() for each in changes
                if each['difference'] is not None), default=0.0) or 1.0
