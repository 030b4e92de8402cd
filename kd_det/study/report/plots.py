"""Images and maps as data URIs, small ones."""
from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from cycler import cycler
from markupsafe import escape
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from kd_det.study.pictures import Curve, draw_curves

LONGEST_SIDE = 480  # of an image, in pixels
MOST_CELLS = 64  # of a map, along its longer side
MAP_COLOURS = 16  # of a map: its PNG takes half a byte for each cell
JPEG_QUALITY = 80


def image_uri(image: np.ndarray) -> str:
    """An image as a JPEG, no larger than :data:`LONGEST_SIDE`.

    Args:
        image: (H, W), or (H, W, C) blue first. Of 2 channels the first is shown, of more than 3 the first three; what is
            no uint8 is stretched from its smallest to its largest finite value.
    """
    image = image.reshape(*image.shape[:2], -1)
    image = image[..., 2::-1] if image.shape[2] > 2 else image[..., [0, 0, 0]]
    if image.dtype != np.uint8:
        finite = image[np.isfinite(image)] if image.dtype.kind == 'f' else image
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        stretched = (np.nan_to_num(image.astype(float), nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1)
        image = (stretched * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return _uri(picture, 'JPEG', quality=JPEG_QUALITY, optimize=True)


def map_uri(cells: np.ndarray) -> str:
    """A map as a PNG of one pixel for each cell, in inferno's colours from its smallest to its largest value.

    Args:
        cells: (h, w); where a side has more cells than :data:`MOST_CELLS`, the mean over neighbours is shown.
    """
    height, width = cells.shape
    if max(height, width) > MOST_CELLS:
        scale = MOST_CELLS / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        cells = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(cells)[None], size)[0].numpy()
    span = np.ptp(cells)
    shares = (cells - cells.min()) / (span if span > 0 else 1)
    image = Image.fromarray((shares * (MAP_COLOURS - 1)).round().astype(np.uint8)).convert('P')
    palette = colormaps['inferno'](np.linspace(0, 1, MAP_COLOURS))[:, :3]
    image.putpalette((palette * 255).round().astype(np.uint8).ravel().tolist())
    return _uri(image, 'PNG', optimize=True, bits=4)


def _uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'


MARGIN = 0.04  # of the axis, on either side


def differences_axis(statements: Sequence[dict]) -> dict:
    """Places differences on an axis that holds them all, and 0.

    Args:
        statements: See :func:`kd_det.study.report.verdict.statements`.

    Returns:
        ``ticks``: text -> place; ``rows``: of each statement the places of its ``mean``, its ``seeds`` and the ends of
        its ``interval``, None if it has none. Places are percentages of the axis' length.
    """
    values = [0.0]
    for each in statements:
        values += [each['difference'], *each['by_seed'].values(), *(each['interval'] or ())]
    low, high = min(values), max(values)
    margin = MARGIN * (high - low) or 1.0
    low, high = low - margin, high + margin

    def places(values: Sequence[float]) -> list[float]:
        return [round(100 * (value - low) / (high - low), 2) for value in values]

    ticks = [value for value in MaxNLocator(6).tick_values(low, high) if low <= value <= high]
    rows: list[dict[str, object]] = [
        dict(mean=places([each['difference']])[0], seeds=places(list(each['by_seed'].values())),
             interval=places(each['interval']) if each['interval'] else None) for each in statements]
    return dict(ticks=dict(zip([f'{value:g}' for value in ticks], places(ticks))), rows=rows)


PLAIN_COLOUR, TEACHER_COLOUR = '#8a8f98', '#d9a514'
COLOURS = ('#2f6fed', '#e0567a', '#1a9e77', '#9a5be0', '#e07b28', '#17a2c4', '#b8416b', '#6a9f1f', '#5a63c9', '#c2542d',
           '#2a9d8f', '#c05fc7', '#7a8a1c', '#3d8bd4', '#d1495b', '#4c956c', '#8367c7', '#b07d2b')
LINES = ('solid', 'dashed', 'dotted')  # matplotlib's and the style sheet's names
FAR_APART = 30  # values whose ratio is larger are shown logarithmically
# Colours that no plot has of its own: the page's own stand for them.
PAGE_COLOURS = {'#010203': 'currentColor', '#040506': 'var(--line)', '#070809': 'var(--soft)'}
TEXT, LINE, SOFT = PAGE_COLOURS
STYLE = {'svg.fonttype': 'none', 'text.color': TEXT, 'axes.labelcolor': TEXT, 'xtick.color': SOFT, 'ytick.color': SOFT,
         'xtick.labelcolor': TEXT, 'ytick.labelcolor': TEXT, 'axes.edgecolor': LINE, 'grid.color': LINE,
         'axes.spines.top': False, 'axes.spines.right': False, 'font.size': 9.5, 'axes.titlesize': 10.5,
         'axes.titleweight': 'bold', 'axes.titlelocation': 'left', 'lines.linewidth': 1.8}


class Ink(NamedTuple):
    """What a variant is drawn with: its colour, and the line that tells it from others of that colour."""
    colour: str
    line: str = 'solid'


def variant_inks(variants: Sequence[str], plain: str | None) -> dict[str, Ink]:
    """An ink for each variant; grey for the plain student, gold for the teacher."""
    others = [variant for variant in variants if variant not in (plain, 'teacher')]
    return {plain: Ink(PLAIN_COLOUR), 'teacher': Ink(TEACHER_COLOUR),
            **{variant: _ink(index) for index, variant in enumerate(others)}}


def _ink(index: int) -> Ink:
    return Ink(COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)])


def curves_svg(title: str, curves: Mapping[str, Sequence[Curve]], inks: Mapping[str, Ink], legend: bool = False,
               log: bool = False) -> str:
    """Learning curves: the mean of the seeds of each kind, and a band from lowest to highest, as far as all are finite.

    Args:
        title: Of the plot.
        curves: Kind -> one curve a seed.
        inks: Of the kinds; others get one in turn.
        legend: Whether the plot names its kinds itself.
        log: Whether the values may be shown logarithmically: where they are positive and far apart.
    """
    curves = {kind: [{epoch: value for epoch, value in curve.items() if math.isfinite(value)} for curve in each]
              for kind, each in curves.items()}
    with _style(title, [inks.get(kind, _ink(index)) for index, kind in enumerate(curves)]):
        figure = draw_curves({title: curves})
        figure.set_size_inches(4.6, 2.9 if not legend else 3.2)
        axes, = figure.axes
        axes.get_legend().remove()
        values = [curve[epoch] for each in curves.values() for epoch in set.intersection(*map(set, each))
                  for curve in each]
        if log and values and max(values) > FAR_APART * min(values) > 0:
            axes.set_yscale('log')
        if legend:
            figure.legend(handles=axes.get_lines(), loc='outside lower center', ncols=3, frameon=False,
                          fontsize=8.5)
        return _svg(figure, title)


def precision_svg(iou: str, curves: Mapping[str, Sequence[float]], inks: Mapping[str, Ink]) -> str:
    """Precision at recalls 0, 0.01 … 1, one line for each variant."""
    title = f'precision over recall, IoU 0.{iou}'
    with _style(title, list(inks.values())):
        figure = Figure(figsize=(4.6, 2.9), layout='constrained')
        axes = figure.subplots()
        for kind, precision in curves.items():
            if len(precision):
                axes.plot(np.linspace(0, 1, len(precision)), precision, color=inks[kind].colour,
                          linestyle=inks[kind].line, gid=kind)
        axes.set(xlabel='recall', title=title, xlim=(0, 1.01), ylim=(0, 1.03))
        axes.grid(alpha=0.6)
        return _svg(figure, title)


@contextmanager
def _style(title: str, inks: Sequence[Ink]) -> Iterator[None]:
    cycle = cycler(color=[ink.colour for ink in inks], linestyle=[ink.line for ink in inks])
    settings = {**STYLE, 'svg.hashsalt': title, 'axes.prop_cycle': cycle}
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
