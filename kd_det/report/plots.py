"""The plots of a report: matplotlib's figures as SVG that follows the page's colours and its switch for the method."""
from __future__ import annotations

import io
import re
from contextlib import contextmanager
from typing import Dict, Iterator, Mapping, Optional, Sequence

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from markupsafe import escape

from kd_det.visualization import draw_curves
from kd_det.visualization.curves import Curve

PLAIN_COLOUR, TEACHER_COLOUR = '#8a8f98', '#d9a514'
COLOURS = ('#2f6fed', '#e0567a', '#1a9e77', '#9a5be0', '#e07b28', '#17a2c4', '#b8416b', '#6a9f1f', '#5a63c9', '#c2542d',
           '#2a9d8f', '#c05fc7', '#7a8a1c', '#3d8bd4', '#d1495b', '#4c956c', '#8367c7', '#b07d2b')
FAR_APART = 30  # values whose ratio is larger are shown logarithmically
LONGEST_NAME = 26  # beside an axis
# Colours that no plot has of its own: the page's own stand for them.
PAGE_COLOURS = {'#010203': 'currentColor', '#040506': 'var(--line)', '#070809': 'var(--soft)'}
TEXT, LINE, SOFT = PAGE_COLOURS
STYLE = {'svg.fonttype': 'none', 'text.color': TEXT, 'axes.labelcolor': TEXT, 'xtick.color': SOFT, 'ytick.color': SOFT,
         'xtick.labelcolor': TEXT, 'ytick.labelcolor': TEXT, 'axes.edgecolor': LINE, 'grid.color': LINE,
         'axes.spines.top': False, 'axes.spines.right': False, 'font.size': 9.5, 'axes.titlesize': 10.5,
         'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'lines.linewidth': 1.8}


def variant_colours(variants: Sequence[str], plain: Optional[str]) -> Dict[str, str]:
    """A colour for each variant; grey for the plain student, gold for the teacher."""
    others = [variant for variant in variants if variant not in (plain, 'teacher')]
    return {plain: PLAIN_COLOUR, 'teacher': TEACHER_COLOUR,
            **{variant: COLOURS[index % len(COLOURS)] for index, variant in enumerate(others)}}


def curves_svg(title: str, curves: Mapping[str, Sequence[Curve]], colours: Mapping[str, str], legend: bool = False,
               log: bool = False) -> str:
    """Learning curves: the mean of the seeds of each kind, and a band from lowest to highest.

    Args:
        title: Of the plot.
        curves: Kind -> one curve a seed.
        colours: Of the kinds; others get one in turn.
        legend: Whether the plot names its kinds itself.
        log: Whether the values may be shown logarithmically: where they are positive and far apart.
    """
    palette = [colours.get(kind, COLOURS[index % len(COLOURS)]) for index, kind in enumerate(curves)]
    with _style(title, palette):
        figure = draw_curves({title: curves})
        figure.set_size_inches(4.6, 2.9 if not legend else 3.2)
        axes, = figure.axes
        axes.get_legend().remove()
        values = [value for each in curves.values() for curve in each for value in curve.values()]
        if log and max(values) > FAR_APART * min(values) > 0:
            axes.set_yscale('log')
        if legend:
            figure.legend(*axes.get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False,
                          fontsize=8.5)
        return _svg(figure, title)


def precision_svg(iou: str, curves: Mapping[str, Sequence[float]], colours: Mapping[str, str]) -> str:
    """Precision at recalls 0, 0.01 … 1, one line for each variant."""
    title = f'precision over recall, IoU 0.{iou}'
    with _style(title):
        figure = Figure(figsize=(4.6, 2.9), layout='constrained')
        axes = figure.subplots()
        for kind, precision in curves.items():
            if len(precision):
                axes.plot(np.linspace(0, 1, len(precision)), precision, color=colours[kind], gid=kind)
        axes.set(xlabel='recall', title=title, xlim=(0, 1.01), ylim=(0, 1.03))
        axes.grid(alpha=0.6)
        return _svg(figure, title)


def differences_svg(statements: Sequence[dict], colours: Mapping[str, str]) -> str:
    """The differences to the plain student with their intervals, and a dot for each seed, the largest gain on top."""
    title = 'mAP against the plain student, in points'
    with _style(title):
        figure = Figure(figsize=(5.2, 0.8 + 0.27 * len(statements)), layout='constrained')
        axes = figure.subplots()
        for row, each in enumerate(statements):
            colour = colours[each['name']]
            if each['interval'] is not None:
                axes.plot(each['interval'], (row, row), color=colour, linewidth=5, alpha=0.35, solid_capstyle='round',
                          gid=each['name'])
            seeds = list(each['by_seed'].values())
            axes.plot(seeds, [row] * len(seeds), 'o', markersize=3.5, color=colour, markerfacecolor='none',
                      gid=each['name'])
            axes.plot([each['difference']], [row], 'D' if each['interval'] is not None else 'o', markersize=5.5,
                      color=colour, gid=each['name'])
        axes.axvline(0, color=TEXT, linewidth=1)
        axes.set(title=title, yticks=range(len(statements)), ylim=(len(statements) - 0.4, -0.6))
        axes.set_yticklabels([_shortened(each['name']) for each in statements])
        axes.tick_params(axis='y', length=0)
        axes.grid(axis='x', alpha=0.6)
        return _svg(figure, title)


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f'{name[:LONGEST_NAME - 1]}…'


@contextmanager
def _style(title: str, palette: Sequence[str] = COLOURS) -> Iterator[None]:
    settings = {**STYLE, 'svg.hashsalt': title, 'axes.prop_cycle': cycler(color=list(palette))}
    with matplotlib.rc_context(settings):
        yield


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of the page: groups of a kind carry it as ``data-series``, and no other names remain."""
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    text = buffer.getvalue()
    text = text[text.index('<svg'):]
    text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->', '', text, flags=re.S)
    text = re.sub(r'(<g) id="([^"]*)"', _named, text)
    opening = f'<svg class="plot" role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink" '
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda match: f'{opening}{match[1]}>', text, count=1)
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    return re.sub(r'\n\s*', '\n', text)


def _named(match) -> str:
    generated = re.fullmatch(r'(figure|axes|patch|matplotlib\.axis|xtick|ytick|line2d|text|legend|PolyCollection|'
                             r'FillBetweenPolyCollection|LineCollection|PathCollection)_\d+', match[2])
    return match[1] if generated else f'{match[1]} data-series="{match[2]}"'
