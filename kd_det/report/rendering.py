"""The second stage of a report: one page, with everything in it."""
from __future__ import annotations

from pathlib import Path
from typing import Dict, List

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_det.report.detectors import TEACHER
from kd_det.report.plots import curves_svg, differences_svg, precision_svg, variant_colours
from kd_det.version import __version__


def render(studies: List[dict]) -> str:
    """Makes the page.

    Args:
        studies: See :func:`kd_det.report.collecting.collect`.

    Returns:
        HTML that refers to nothing outside itself.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies['json.dumps_kwargs'] = dict(separators=(',', ':'))
    pages = [dict(study, **_prepared(study)) for study in studies]
    return environment.get_template('template.html').render(studies=pages, version=__version__)


def _prepared(study: dict) -> dict:
    colours = variant_colours(study['variants'], study['plain'])
    shown = [variant for variant in study['variants'] if variant != study['plain']] or study['variants']
    curves = {title: {variant: each for variant, each in by_variant.items() if max(map(len, each)) > 1}
              for title, by_variant in study['curves'].items()}
    plots = [curves_svg(title, each, colours) for title, each in curves.items() if each]
    precision = [precision_svg(iou, {variant: each[iou] for variant, each in study['precision'].items()}, colours)
                 for iou in ('50', '75')] if study['precision'] else []
    differences = differences_svg(study['statements'], colours) if study['statements'] else ''
    # The thumbnails hold the pictures: their sources need not be there twice.
    images = [{key: value for key, value in image.items() if key != 'source'} for image in study['images']]
    data = dict(plain=study['plain'], images=images, maps=study['maps'], classes=study.get('classes', ()),
                palette=study.get('palette', ()))
    best = study['statements'][0]['name'] if study['statements'] else shown[0]
    return dict(colours=colours, switch=shown, first=best, teacher=TEACHER, data=data, differences=Markup(differences),
                curve_plots=[Markup(plot) for plot in plots], precision_plots=[Markup(plot) for plot in precision],
                term_plots={variant: _term_plots(variant, each, colours) for variant, each in study['terms'].items()},
                validated_once=len(plots) < len(curves), span=_span(study['per_class'] or {}))


def _term_plots(variant: str, logged: dict, colours: Dict[str, str]) -> List[Markup]:
    """The losses side by side, then of each term its parts and the pull of its gradient."""
    losses = {**logged['task'], **{f'loss_{name}': term['loss'] for name, term in logged['terms'].items()}}
    plots = [curves_svg('losses, as they are added up', losses, {}, legend=True, log=True)]
    for name, term in logged['terms'].items():
        if term['parts']:
            plots.append(curves_svg(f'{name}: its parts', term['parts'], {}, legend=True, log=True))
    gradients = {name: term['gradient'] for name, term in logged['terms'].items() if term['gradient']}
    if gradients:
        plots.append(curves_svg("gradient without weight ÷ task's", gradients, {}, legend=True, log=True))
    return [Markup(plot) for plot in plots]


def _span(per_class: Dict[str, List[dict]]) -> float:
    """The largest change of a class: the length of the longest bar."""
    return max((abs(each['difference']) for changes in per_class.values() for each in changes
                if each['difference'] is not None), default=0.0) or 1.0
