"""Pictures: figures of curves, detections, maps and channels, and images as data URIs; text of users as it is."""
from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from mmengine.logging import MMLogger
from PIL import Image

from kd_det.compat.writing import refuse_to_replace
from kd_det.config import ConfigurationError

# Fonts that show boxes for everything, and those of formulas, whose signs stand at places of others.
NO_TEXT = ('Last', '.Last', 'cm', 'STIXNon', 'STIXSize')

LONGEST_SIDE = 480  # of an image, in pixels
MAX_CELLS = 64  # of a map, along its longer side
MAP_COLOURS = 16  # of a map: its PNG takes half a byte for each cell
JPEG_QUALITY = 80
WIDE = 34  # letters of a legend's entry, of which two do not stand side by side

Curve = dict[int, float]  # epoch -> value


def read_scalars(files: str | Path | Sequence[str | Path],
                 log: Callable[[str], None] | None = None) -> dict[str, Curve]:
    """Reads ``vis_data/scalars.json``, one JSON object a line.

    The last line of a run that was killed may be cut: then it does not count.

    Args:
        files: One file; or those of a run and of the runs that resumed it, oldest first.
        log: Given a line on each file of which something can not be read, which is then left out.

    Returns:
        Name -> epoch -> value of every number that was logged: in training the mean over the epoch's lines, in
        validation the value after so many epochs. Where a step was logged twice, as after a resume, the later value
        holds.

    Raises:
        ConfigurationError: A line is not what mmengine writes, and there is no ``log``; the message tells which.
    """
    logged: dict[str, dict[tuple, float]] = defaultdict(dict)  # name -> (epoch, step) -> value
    for file in [files] if isinstance(files, (str, Path)) else files:
        lines, damaged = Path(file).read_bytes().split(b'\n'), []
        for number, line in enumerate(lines, start=1):
            record = _read_record(line)
            if record is None:
                if number < len(lines):  # that it ends in a line break tells that it is whole
                    damaged.append(f'line {number}: expected a JSON object with a \'step\', found '
                                   f"{line.decode(errors='replace')!r:.80}")
                continue
            step = record['step']
            epoch = record.get('epoch', step)  # a line of validation holds no epoch: its step is one
            for name, value in record.items():
                is_number = isinstance(value, float) or isinstance(value, int) and abs(value) < 2**63
                if name not in ('step', 'iter', 'epoch') and is_number:
                    logged[name][epoch, step] = value
        if damaged:
            others = f', and {len(damaged) - 1} more' if damaged[1:] else ''
            if log is None:
                raise ConfigurationError(f"'{file}', {damaged[0]}{others}.")
            log(f"'{file}', {damaged[0]}{others}; left out.")
    return {name: _mean_by_epoch(values) for name, values in logged.items()}


def _read_record(line: bytes) -> dict | None:
    """What a line logs, of a step; None where it can not be read."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_record = isinstance(record, dict) and all(type(record.get(key, 0)) is int for key in ('step', 'epoch'))
    return record if is_record and 'step' in record else None


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]], columns: int | None = None) -> Figure:
    """Draws one panel for each quantity, one line for each kind of run: its mean, and a band from lowest to highest.

    Args:
        panels: Quantity -> kind of run -> one curve of each run of that kind.
        columns: How many panels stand side by side; all by default.

    Returns:
        The figure.

    Raises:
        ValueError: If there is no panel.
    """
    if not panels:
        raise ValueError('There is no panel to draw: expected at least one quantity with its curves.')
    width = columns or len(panels)
    height = -(-len(panels) // width)
    figure = Figure(figsize=(5 * width, 3.6 * height), layout='constrained')
    places = figure.subplots(height, width, squeeze=False).flatten()
    for axes in places[len(panels):]:
        axes.remove()
    for axes, (quantity, kinds) in zip(places, panels.items()):
        for kind, curves in kinds.items():
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
            line, = axes.plot(epochs, values.mean(0), label=escape_formula(kind), gid=kind, marker='o', markersize=3)
            if len(curves) > 1:
                axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0,
                                  gid=kind)
        axes.set(xlabel='epoch', title=escape_formula(quantity))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(handles=axes.get_lines(), frameon=False)  # told, or a name that begins with _ had none
    return figure


def draw_gains(gains: Mapping[str, Mapping[float, Mapping[str, Any]]], by: str = 'epochs',
               title: str = 'gain over the plain student trained as long') -> Figure:
    """Draws what each method gains against a setting, by default how long it and its plain student have trained.

    Args:
        gains: Method -> value of the setting -> ``difference`` in points of mAP, and its ``interval``, None where there
            is none.
        by: The name of the setting.
        title: Of the figure.
    """
    columns = 1 if max(map(len, gains), default=0) > WIDE else 2
    figure = Figure(figsize=(6, 3.3 + 0.22 * -(-len(gains) // columns)), layout='constrained')
    axes = figure.subplots()
    lengths = sorted({length for by_length in gains.values() for length in by_length})
    logarithmic, is_shared = lengths[0] > 0, len(lengths) < sum(map(len, gains.values()))
    for place, (name, by_length) in enumerate(gains.items()):
        values = [each['difference'] for each in by_length.values()]
        ends = [each['interval'] or (each['difference'], ) * 2 for each in by_length.values()]
        shift = 0.012 * (place - (len(gains) - 1) / 2) if is_shared else 0.0  # so that bars do not hide each other
        axes.errorbar([length + shift * (length if logarithmic else lengths[-1]) for length in by_length], values, [
            [value - low for value, (low, _) in zip(values, ends)],
            [high - value for value, (_, high) in zip(values, ends)]], label=escape_formula(name), gid=name, marker='o',
            markersize=4, capsize=3)
    axes.axhline(0, linewidth=1, color='grey')
    axes.set(xlabel=by, ylabel='points of mAP', xscale='log' if logarithmic else 'linear', title=title)
    axes.set_xticks(lengths, [f'{length:g}' for length in lengths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=columns, frameon=False)
    return figure


def draw_detections(image: np.ndarray,
                    panels: Mapping[str, Any],
                    classes: Sequence[str],
                    palette: Sequence[tuple[int, int, int]],
                    score_threshold: float = 0.3) -> Figure:
    """Draws one panel for each set of boxes, all on the same image.

    Args:
        image: (H, W, 3) uint8, red first.
        panels: Title -> instances with ``bboxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``labels`` (n,) and, unless they
            are ground truth, ``scores`` (n,): for instance mmdet's ``gt_instances`` and ``pred_instances``.
        classes: Name of each class.
        palette: Colour of each class, 0 to 255.
        score_threshold: Boxes with a lower score are left out.

    Returns:
        The figure, one row of panels.

    Raises:
        ValueError: If there is no panel.
    """
    if not panels:
        raise ValueError('There is no panel to draw: expected at least one title with its instances.')
    height, width = image.shape[:2]
    figure = Figure(figsize=(3.4 * len(panels), 3.4 * height / width + 0.8), layout='constrained')
    colours = [tuple(channel / 255 for channel in colour) for colour in palette]
    shown = set()
    for axes, (title, instances) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axes.imshow(image, interpolation='nearest')
        axes.set(xticks=[], yticks=[], title=escape_formula(title))
        boxes, labels = _to_array(instances.bboxes).reshape(-1, 4), _to_array(instances.labels)
        scores = _to_array(instances.scores) if hasattr(instances, 'scores') else [None] * len(labels)
        for (x1, y1, x2, y2), label, score in zip(boxes, labels, scores):
            if score is not None and score < score_threshold:
                continue
            # Pixel i spans i - 0.5 to i + 0.5 in matplotlib's coordinates, i to i + 1 in a box's.
            axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, linewidth=1.8,
                                     edgecolor=colours[label]))
            if score is not None:
                above = y1 > 0.05 * height  # at the top of the image the score stands within the box
                axes.text(x1, y1, f'{score:.2f}', color='white', fontsize=6, clip_on=True,
                          verticalalignment='bottom' if above else 'top',
                          bbox=dict(facecolor=colours[label], edgecolor='none', pad=0.6))
            shown.add(int(label))
    handles = [Rectangle((0, 0), 1, 1, color=colours[label], label=escape_formula(classes[label]))
               for label in sorted(shown)]
    figure.legend(handles=handles, loc='outside lower center', ncols=max(len(handles), 1), frameon=False, fontsize=8)
    return figure


def draw_maps(image: np.ndarray, maps: Mapping[str, np.ndarray], columns: int = 4) -> Figure:
    """Draws an image, then each map over it.

    Args:
        image: (H, W, 3) uint8, red first.
        maps: Title -> (h, w) map, see :func:`overlay_map`.
        columns: Panels in a row.

    Returns:
        The figure.
    """
    panels = {'image': image, **{title: overlay_map(image, cells) for title, cells in maps.items()}}
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    height, width = image.shape[:2]
    figure = Figure(figsize=(3.0 * columns, (3.0 * height / width + 0.3) * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, panel) in zip(grid, panels.items()):
        axes.imshow(panel, interpolation='nearest')
        axes.set_title(escape_formula(title), fontsize=10)
    for axes in grid:
        axes.set_axis_off()
    return figure


def overlay_map(image: np.ndarray, cells: np.ndarray, opacity: float = 0.65, colours: str = 'inferno') -> np.ndarray:
    """Lays a map of cells over an image: each pixel takes the colour of the cell that covers it.

    Args:
        image: (H, W, 3) uint8.
        cells: (h, w) finite values; they are stretched over the colours from smallest to largest, and a map that is the
            same everywhere takes the lowest colour.
        opacity: Of the map, 0 to 1.
        colours: Name of a matplotlib colour map.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ValueError: If ``cells`` is not a map of finite values.
    """
    if cells.ndim != 2 or not np.isfinite(cells).all():
        raise ValueError(f'expected a map of (h, w) finite values, got {cells.shape} with '
                         f'{np.count_nonzero(~np.isfinite(cells))} that are not finite')
    span = np.ptp(cells)
    values = (cells - cells.min()) / (span if span > 0 else 1)
    rows, columns = (np.arange(pixels) * count // pixels for pixels, count in zip(image.shape[:2], cells.shape))
    colour = colormaps[colours](values)[..., :3][rows[:, None], columns] * 255
    return (image * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def draw_channels(weights: Mapping[str, np.ndarray]) -> Figure:
    """Draws the weights of channels, from the largest to the smallest, one line for each level.

    Args:
        weights: Title -> (C,).

    Returns:
        The figure.

    Raises:
        ValueError: If there is no level.
    """
    if not weights:
        raise ValueError('There is nothing to draw: expected at least one level with the weights of its channels.')
    figure = Figure(figsize=(5, 3.4), layout='constrained')
    axes = figure.subplots()
    for title, each in weights.items():
        axes.plot(np.arange(1, len(each) + 1), np.sort(each)[::-1], label=escape_formula(title))
    axes.set(xlabel='channels, by weight', ylabel='weight', ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def image_uri(image: np.ndarray) -> str:
    """An image as a JPEG, no larger than :data:`LONGEST_SIDE`.

    Args:
        image: (H, W), or (H, W, C) blue first. Of 2 channels the first is shown, of more than 3 the first three; what
            is no uint8 is stretched from its smallest to its largest finite value.
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
    return _encode_image(picture, 'JPEG', quality=JPEG_QUALITY, optimize=True)


def map_uri(cells: np.ndarray) -> str:
    """A map as a PNG of one pixel for each cell, in inferno's colours from its smallest to its largest value.

    Args:
        cells: (h, w); where a side has more cells than :data:`MAX_CELLS`, the mean over neighbours is shown.
    """
    height, width = cells.shape
    if max(height, width) > MAX_CELLS:
        scale = MAX_CELLS / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        cells = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(cells)[None], size)[0].numpy()
    span = np.ptp(cells)
    shares = (cells - cells.min()) / (span if span > 0 else 1)
    image = Image.fromarray((shares * (MAP_COLOURS - 1)).round().astype(np.uint8)).convert('P')
    palette = colormaps['inferno'](np.linspace(0, 1, MAP_COLOURS))[:, :3]
    image.putpalette((palette * 255).round().astype(np.uint8).ravel().tolist())
    return _encode_image(image, 'PNG', optimize=True, bits=4)


def save_figure(figure: Figure, file: str | Path, force: bool = True, **settings) -> None:
    """Saves a figure as pixels, each text in fonts that have its signs; what no installed font has is spelt out.

    Args:
        figure: The figure; changed.
        file: Where to.
        force: Replace a file of that name that matplotlib did not write.
        **settings: As ``Figure.savefig`` takes them.

    Raises:
        WritingError: There is such a file.
    """
    refuse_to_replace(file, is_picture, 'a picture', force)
    for text in figure.findobj(Text):
        missing = _find_missing(text.get_text(), text.get_fontproperties())
        if missing:
            families, unknown = _find_fonts(missing)
            text.set_fontfamily([*text.get_fontfamily(), *families])
            text.set_text(_spell_out(text.get_text(), unknown))
    figure.savefig(file, **settings)


def is_picture(content: bytes) -> bool:
    """Whether the content of a file is that of one which matplotlib wrote."""
    return b'Matplotlib' in content[:1000]


def names_to_draw(names: Sequence[str]) -> tuple[str, ...]:
    """Names as somebody else's matplotlib code can draw them, which knows one font and no more.

    Where the default font lacks signs, one that has all becomes the default of this process; else they are spelt out.
    """
    every = ''.join(names)
    missing = _find_missing(every, FontProperties(family=['sans-serif']))
    if missing:
        needed = missing | {ord(sign) for sign in every if not sign.isspace()} | set(range(33, 127))
        families, left = _find_fonts(needed)
        if len(families) == 1 and not left:
            matplotlib.rcParams['font.sans-serif'] = [*families, *matplotlib.rcParams['font.sans-serif']]
        else:
            names = [_spell_out(name, missing) for name in names]
    return tuple(map(escape_formula, names))


def escape_formula(text: str) -> str:
    """Escapes a text so that matplotlib takes it for no formula: of two dollars it would make one, or an error."""
    return text.replace('$', r'\$')


def _find_missing(text: str, font: FontProperties) -> frozenset[int]:
    """The code points of a text that a font lacks."""
    signs = {ord(sign) for sign in text if not sign.isspace()}
    return frozenset(signs - _read_signs(font_manager.findfont(font)))


@cache
def _read_signs(file: str) -> set[int]:
    try:
        return set(font_manager.get_font(file).get_charmap())
    except (OSError, RuntimeError):  # not one that matplotlib can read
        return set()


@cache
def _find_fonts(signs: frozenset[int]) -> tuple[list[str], frozenset[int]]:
    """Installed fonts that together have as many of these code points as can be, the fewest; and those left over."""
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    for file in set(font_manager.findSystemFonts()) - listed:  # installed since matplotlib made its list
        try:
            font_manager.fontManager.addfont(file)
        except (OSError, RuntimeError):
            continue
    upright = [entry for entry in font_manager.fontManager.ttflist
               if entry.style == 'normal' and not entry.name.startswith(NO_TEXT)]
    families, left = [], set(signs)
    while left:
        best = max(upright, key=lambda entry: (len(left & _read_signs(entry.fname)), -len(entry.name)), default=None)
        if best is None or not left & _read_signs(best.fname):
            break
        families.append(best.name)
        left -= _read_signs(best.fname)
    if left:  # told once, as the answer is kept
        signs = ''.join(map(chr, sorted(left)))
        MMLogger.get_current_instance().warning(
            f'No installed font has {signs}: pictures show {_spell_out(signs, frozenset(left))} instead. Install one '
            'that has, such as Noto Sans CJK.')
    return families, frozenset(left)


def _spell_out(text: str, signs: frozenset[int]) -> str:
    return ''.join(sign.encode('ascii', 'backslashreplace').decode() if ord(sign) in signs else sign for sign in text)


def _mean_by_epoch(values: dict[tuple, float]) -> Curve:
    by_epoch = defaultdict(list)
    for (epoch, _), value in values.items():
        by_epoch[epoch].append(value)
    return {epoch: float(np.mean(each)) for epoch, each in sorted(by_epoch.items())}


def _to_array(values: Any) -> np.ndarray:
    """A tensor, mmdet's boxes, or an array, as an array."""
    values = getattr(values, 'tensor', values)
    return values.detach().cpu().numpy() if hasattr(values, 'detach') else np.asarray(values)


def _encode_image(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f'data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}'
