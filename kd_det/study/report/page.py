"""The second stage of a report: the page, with its plots, of what was collected of the studies."""
from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape as escape_html
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger

from kd_det import __version__
from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace, write_whole
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Index, declared
from kd_det.config.files import set_data_root
from kd_det.config.options import merge_options
from kd_det.study.report.evaluation import TEACHER
from kd_det.study.report.studies import read_studies
from kd_det.study.report.summary import collect, name_baseline
from kd_det.training.pictures import Curve, draw_curves, draw_gains

if TYPE_CHECKING:
    from kd_det.study.compression import Compression
    from kd_det.study.suite import SuiteResult

POLICY = {'weights': 'who taught: mean weight in the epoch',
          'score': "the student's score on the probe"}
PULLS = {'pull': 'pull, as weighted (task: 1)', 'unweighted_pull': 'pull before weighting (task: 1)'}

MARGIN = 0.04  # of the axis, on either side
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


@dataclass(frozen=True)
class Report:
    """A page on what runs left behind.

    Attributes:
        file: The page; it needs nothing else.
        studies: What it shows, one for each benchmark and one for all single trainings, see
            :func:`~kd_det.study.report.summary.collect`.
        compressions: The ways to the device that it shows.
        suites: The suites of benchmarks that it shows, each of whose data sets is a study, too.
    """
    file: Path
    studies: list[dict[str, Any]]
    compressions: tuple[Compression, ...] = ()
    suites: tuple[SuiteResult, ...] = ()

    @property
    def verdicts(self) -> dict[str, str]:
        """Study -> the verdict on its methods in a sentence."""
        return {study['name']: study['verdict'] for study in self.studies}

    @property
    def notes(self) -> dict[str, list[str]]:
        """Study -> what could not be had, in sentences."""
        return {study['name']: study['notes'] for study in self.studies}

    def to_dict(self) -> dict[str, Any]:
        """Returns the file and what it shows, as JSON can hold it."""
        return dict(file=str(self.file), studies=replace_nan(self.studies),
                    compressions=[each.to_dict() for each in self.compressions],
                    suites=[each.to_dict() for each in self.suites])

    def _repr_html_(self) -> str:
        """The verdicts, and the page in a frame of its own."""
        verdicts = ''.join(f'<p><b>{escape_html(name)}</b>: {escape_html(verdict)}</p>'
                           for name, verdict in self.verdicts.items())
        page = escape_html(self.file.read_text(encoding='utf-8')) if self.file.is_file() else ''
        return f'{verdicts}<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'


@declared
def report(work_dirs: str | Path | Sequence[str | Path], *, out: str | Path | None = None, images: Index = 8,
           show: Sequence[str] = (), teacher_checkpoint: str | None = None, data_root: str | None = None,
           options: dict[str, Any] | None = None, force: bool = False,
           log: Callable[[str], None] = print) -> Report:
    """Makes one page of what runs left behind: does distilling help, by how much, and where.

    Args:
        work_dirs: Of benchmarks, suites of them, sweeps and compressions, finished or not; or of single trainings.
        out: The page; ``report.html`` in the first work dir by default.
        images: How many validation images to show, evenly spaced over the data.
        show: Validation images to show in place of these, by the names of their files.
        teacher_checkpoint: The teacher's weights, where they are no longer where the runs had them.
        data_root: Folder of the data, where it is no longer where the runs had it.
        options: Settings that override the configs of the runs, by dotted key.
        force: Replace a file of that name that is no report.
        log: Given a line on what is being done, and each note on what is missing.

    Raises:
        FileNotFoundError: There is no such work dir.
        WritingError: There is a file of the page's name that is no report.
        ConfigurationError: A folder is no work dir, or no validation image has a name of ``show``, or several have.
    """
    from kd_det.study.compression import is_compression, read_compression  # which itself writes such a page
    from kd_det.study.suite import is_suite, read_suite
    folders = [Path(each) for each in ([work_dirs] if isinstance(work_dirs, (str, Path)) else work_dirs)]
    file = Path(out) if out else folders[0] / 'report.html'
    refuse_to_replace(file, lambda content: b'<title>kd_det report: ' in content, 'a report', force)
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel('WARNING')
    warnings.filterwarnings('ignore', category=UserWarning)  # of PyTorch about mmdet's meshgrid, for each detector
    compressions = tuple(read_compression(each) for each in folders if is_compression(each))
    suites = tuple(read_suite(each) for each in folders if is_suite(each))
    read = read_studies([each for each in folders if not is_compression(each) and not is_suite(each)])
    missing: list[str] = []  # of the data sets of suites
    for found in chain.from_iterable(suite.benchmarks.values() for suite in suites):
        try:
            read += read_studies([found.work_dir])
        except ConfigurationError as error:
            missing.append(str(error))
            log(f'Note: {error}')
    studies = []
    for study in read:
        for run in study.runs:
            if data_root:
                set_data_root(run.config, data_root)
            merge_options(run.config, options or {})
        teacher = study.teacher
        if teacher and teacher_checkpoint:
            teacher['checkpoint'] = teacher_checkpoint
        studies.append(collect(study, images, teacher, log, show))
        for note in studies[-1]['notes']:
            log(f'Note: {note}')
    write_whole(file, render(studies, [each.prepare_page() for each in compressions],
                             [_prepare_suite(each, missing) for each in suites]))
    return Report(file, studies, compressions, suites)


def render(studies: list[dict], compressions: Iterable[dict] = (), suites: Iterable[dict] = ()) -> str:
    """Makes the page.

    Args:
        studies: See :func:`~kd_det.study.report.summary.collect`.
        compressions: See :func:`prepare_compression`.
        suites: ``name``, ``missing`` and ``tables`` of each, with ``title``, ``columns``, ``rows`` and ``caption``.

    Returns:
        HTML that refers to nothing outside itself.
    """
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies['json.dumps_kwargs'] = dict(separators=(',', ':'), allow_nan=False)
    pages = [dict(study, **_prepare_study(study)) for study in studies]
    return environment.get_template('template.html').render(
        studies=pages, compressions=list(compressions), suites=list(suites), version=__version__)


def _prepare_suite(suite: SuiteResult, missing: Sequence[str]) -> dict[str, Any]:
    tables = [dict(title=table.title, columns=table.columns, caption=table.caption.splitlines(),
                   rows=[dict(zip(table.columns, row)) for row in table.rows]) for table in suite.tabulate()]
    return dict(name=suite.work_dir.resolve().name, tables=tables, missing=missing)


def prepare_compression(name: str, table: TextTable, plot: str) -> dict[str, Any]:
    """Prepares what :func:`render` shows of a way to the device, see :func:`kd_det.study.compression.compress`.

    Args:
        name: Of its folder.
        table: Its stages.
        plot: An SVG element, see :func:`render_svg`; '' for none.
    """
    rows = [dict(zip(table.columns, row), method=row[0]) for row in table.rows]
    return dict(name=name, columns=table.columns, rows=rows, caption=table.caption, plot=Markup(plot))


def place_differences(statements: Sequence[dict]) -> dict:
    """Places differences on an axis that holds them all, and 0.

    Args:
        statements: See :func:`~kd_det.study.report.summary.state_differences`.

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


class Ink(NamedTuple):
    """What a variant is drawn with: its colour, and the line that tells it from others of that colour."""
    colour: str
    line: str = 'solid'


def choose_inks(variants: Sequence[str], plain: str | None) -> dict[str, Ink]:
    """Chooses an ink for each variant; grey for the plain student, gold for the teacher."""
    others = [variant for variant in variants if variant not in (plain, 'teacher')]
    own = {} if plain is None else {plain: Ink(PLAIN_COLOUR)}
    return {**own, 'teacher': Ink(TEACHER_COLOUR),
            **{variant: _nth_ink(index) for index, variant in enumerate(others)}}


def plot_curves(title: str, curves: Mapping[str, Sequence[Curve]], inks: Mapping[str, Ink], legend: bool = False,
                log: bool = False) -> str:
    """Plots learning curves: of each kind the mean over seeds, and a band from lowest to highest, while all are finite.

    Args:
        title: Of the plot.
        curves: Kind -> one curve a seed.
        inks: Of the kinds; others get one in turn.
        legend: Whether the plot names its kinds itself.
        log: Whether the values may be shown logarithmically: where they are positive and far apart.
    """
    curves = {kind: [{epoch: value for epoch, value in curve.items() if math.isfinite(value)} for curve in each]
              for kind, each in curves.items()}
    with apply_style(title, [inks.get(kind, _nth_ink(index)) for index, kind in enumerate(curves)]):
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
        return render_svg(figure, title)


def plot_gains(gains: Mapping[str, Mapping[int, Mapping[str, Any]]], inks: Mapping[str, Ink]) -> str:
    """Plots what remains of gains when all train longer, see :func:`~kd_det.study.results.summarize_lengths`."""
    title = 'gain over the plain student trained as long'
    with apply_style(title, [inks.get(name, _nth_ink(index)) for index, name in enumerate(gains)]):
        return render_svg(draw_gains(gains), title)


def plot_precision(iou: str, curves: Mapping[str, Sequence[float]], inks: Mapping[str, Ink]) -> str:
    """Plots precision at recalls 0, 0.01 … 1, one line for each variant."""
    title = f'precision over recall, IoU 0.{iou}'
    with apply_style(title, list(inks.values())):
        figure = Figure(figsize=(4.6, 2.9), layout='constrained')
        axes = figure.subplots()
        for kind, precision in curves.items():
            if len(precision):
                axes.plot(np.linspace(0, 1, len(precision)), precision, color=inks[kind].colour,
                          linestyle=inks[kind].line, gid=kind)
        axes.set(xlabel='recall', title=title, xlim=(0, 1.01), ylim=(0, 1.03))
        axes.grid(alpha=0.6)
        return render_svg(figure, title)


def _prepare_study(study: dict) -> dict:
    inks = choose_inks(study['variants'], study['plain'])
    shown = [variant for variant in study['variants'] if variant != study['plain']] or study['variants']
    curves = {title: {variant: each for variant, each in by_variant.items() if max(map(len, each)) > 1}
              for title, by_variant in study['curves'].items()}
    plots = [plot_curves(title, each, inks) for title, each in curves.items() if each]
    precision = [plot_precision(iou, {variant: each[iou] for variant, each in study['precision'].items()}, inks)
                 for iou in ('50', '75')] if study['precision'] else []
    # The thumbnails hold the pictures: their sources need not be there twice.
    images = [{key: value for key, value in image.items() if key != 'source'} for image in study['images']]
    data = replace_nan(dict(plain=study['plain'], images=images, maps=study['maps'],
                            classes=study.get('classes', ()), palette=study.get('palette', ())))
    best = study['statements'][0]['name'] if study['statements'] else shown[0]
    return dict(inks=inks, switch=shown, first=best, teacher=TEACHER, data=data, by_name=study.get('by_name', False),
                axis=place_differences(study['statements']), baseline=name_baseline(study['statements']),
                gain_plot=Markup(plot_gains(study['lengths'], inks)) if study['lengths'] else '',
                curve_plots=[Markup(plot) for plot in plots], precision_plots=[Markup(plot) for plot in precision],
                term_plots={variant: _plot_terms(each) for variant, each in study['terms'].items()},
                validated_once=len(plots) < len(curves), span=_find_span(study['per_class'] or {}))


def _plot_terms(logged: dict) -> list[Markup]:
    """Plots the losses side by side, of each term its parts, whom a policy chose, how hard the terms pulled."""
    losses = {**logged['task'], **{f'loss_{name}': term['loss'] for name, term in logged['terms'].items()}}
    plots = [plot_curves('losses, as they are added up', losses, {}, legend=True, log=True)]
    for name, term in logged['terms'].items():
        if term['parts']:
            plots.append(plot_curves(f'{name}: its parts', term['parts'], {}, legend=True, log=True))
    for key, title in POLICY.items():
        if logged['policy'][key]:
            plots.append(plot_curves(title, logged['policy'][key], {}, legend=True))
    for key, title in PULLS.items():
        pulls = {name: term[key] for name, term in logged['terms'].items() if term[key]}
        if pulls:
            plots.append(plot_curves(title, pulls, {}, legend=True, log=True))
    return [Markup(plot) for plot in plots]


def replace_nan(value: Any) -> Any:
    """Returns what JSON can hold: None in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {key: replace_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _find_span(per_class: dict[str, list[dict]]) -> float:
    """Finds the largest change of a class: the length of the longest bar."""
    return max((abs(each['difference']) for changes in per_class.values() for each in changes
                if each['difference'] is not None), default=0.0) or 1.0


def _nth_ink(index: int) -> Ink:
    return Ink(COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)])


@contextmanager
def apply_style(title: str, inks: Sequence[Ink]) -> Iterator[None]:
    """Within, figures have the page's colours, and these inks in turn."""
    cycle = cycler(color=[ink.colour for ink in inks], linestyle=[ink.line for ink in inks])
    settings = {**STYLE, 'svg.hashsalt': title, 'axes.prop_cycle': cycle}
    with matplotlib.rc_context(settings):
        yield


def render_svg(figure: Figure, title: str) -> str:
    """Renders a figure as an element of the page: groups of a kind carry it as ``data-series``, others have no id."""
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
    text = buffer.getvalue()
    text = text[text.index('<svg'):]
    text = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->', '', text, flags=re.S)
    text = re.sub(r'(<g) id="([^"]*)"', _name_group, text)
    opening = f'<svg class="plot" role="img" aria-label="{escape(title)}" xmlns:xlink="http://www.w3.org/1999/xlink" '
    text = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda match: f'{opening}{match[1]}>', text, count=1)
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    return re.sub(r'\n\s*', '\n', text)


def _name_group(match) -> str:
    generated = re.fullmatch(r'(figure|axes|patch|matplotlib\.axis|xtick|ytick|line2d|text|legend|PolyCollection|'
                             r'FillBetweenPolyCollection|LineCollection|PathCollection)_\d+', match[2])
    return match[1] if generated else f'{match[1]} data-series="{match[2]}"'
