"""The boxes of several detectors on one image, side by side."""
from __future__ import annotations

from typing import Any, Mapping, Sequence, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from kd_det.visualization.text import literal


def draw_detections(image: np.ndarray,
                    panels: Mapping[str, Any],
                    classes: Sequence[str],
                    palette: Sequence[Tuple[int, int, int]],
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
        axes.set(xticks=[], yticks=[], title=literal(title))
        boxes, labels = _array(instances.bboxes).reshape(-1, 4), _array(instances.labels)
        scores = _array(instances.scores) if hasattr(instances, 'scores') else [None] * len(labels)
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
    handles = [Rectangle((0, 0), 1, 1, color=colours[label], label=literal(classes[label])) for label in sorted(shown)]
    figure.legend(handles=handles, loc='outside lower center', ncols=max(len(handles), 1), frameon=False, fontsize=8)
    return figure


def _array(values: Any) -> np.ndarray:
    """A tensor, mmdet's boxes, or an array, as an array."""
    values = getattr(values, 'tensor', values)
    return values.detach().cpu().numpy() if hasattr(values, 'detach') else np.asarray(values)
