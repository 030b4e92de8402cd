"""Learning curves from the log that mmengine writes beside its checkpoints."""
from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Dict, Mapping, Sequence, Union

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd_det.visualization.text import literal

Curve = Dict[int, float]  # epoch -> value


def read_scalars(files: Union[str, Path, Sequence[Union[str, Path]]]) -> Dict[str, Curve]:
    """Reads ``vis_data/scalars.json``, one JSON object a line.

    Args:
        files: One file; or those of a run and of the runs that resumed it, oldest first.

    Returns:
        Name -> epoch -> value of every number that was logged: in training the mean over the epoch's lines, in
        validation the value after so many epochs. Where a step was logged twice, as after a resume, the later value
        holds.

    Raises:
        ValueError: A line is not what mmengine writes; the message tells which.
    """
    logged: Dict[str, Dict[tuple, float]] = defaultdict(dict)  # name -> (epoch, step) -> value
    for file in [files] if isinstance(files, (str, Path)) else files:
        for number, line in enumerate(Path(file).read_text(encoding='utf-8').splitlines(), start=1):
            try:
                record = json.loads(line)
                step = record['step']
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}: expected a JSON object with a 'step', "
                                 f'found {line!r:.80}') from error
            epoch = record.get('epoch', step)  # a line of validation holds no epoch: its step is one
            for name, value in record.items():
                if name not in ('step', 'iter', 'epoch') and isinstance(value, (int, float)):
                    logged[name][epoch, step] = value
    return {name: _mean_by_epoch(values) for name, values in logged.items()}


def _mean_by_epoch(values: Dict[tuple, float]) -> Curve:
    by_epoch = defaultdict(list)
    for (epoch, _), value in values.items():
        by_epoch[epoch].append(value)
    return {epoch: float(np.mean(each)) for epoch, each in sorted(by_epoch.items())}


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Figure:
    """Draws one panel for each quantity, one line for each kind of run: its mean, and a band from lowest to highest.

    Args:
        panels: Quantity -> kind of run -> one curve of each run of that kind.

    Returns:
        The figure, one row of panels.

    Raises:
        ValueError: If there is no panel.
    """
    if not panels:
        raise ValueError('There is no panel to draw: expected at least one quantity with its curves.')
    figure = Figure(figsize=(5 * len(panels), 3.6), layout='constrained')
    for axes, (quantity, kinds) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for kind, curves in kinds.items():
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = np.array([[curve[epoch] for epoch in epochs] for curve in curves])
            line, = axes.plot(epochs, values.mean(0), label=literal(kind), gid=kind, marker='o', markersize=3)
            if len(curves) > 1:
                axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0,
                                  gid=kind)
        axes.set(xlabel='epoch', title=literal(quantity))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend(handles=axes.get_lines(), frameon=False)  # told, or a name that begins with _ had none
    return figure
