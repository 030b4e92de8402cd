"""What the terms of a distillation said during a run: their parts, and how hard they pulled."""
from __future__ import annotations

from typing import Dict, List, Mapping, Optional

from mmengine.config import Config

from kd_det.configuration import is_distillation, type_name
from kd_det.distillers import build_weight
from kd_det.visualization.curves import Curve

Scalars = Mapping[str, Curve]


def term_curves(config: Config, scalars: List[Scalars]) -> Dict[str, dict]:
    """What was logged of each term, in the order of the config.

    Args:
        config: Of the runs.
        scalars: What each of them logged, see :func:`kd_det.visualization.read_scalars`.

    Returns:
        Term -> ``loss``: the weighted loss of each run; ``parts``: name -> the weighted part of each run; ``pull``: of
        each run that logged it the gradient of the weighted term, as a multiple of the task's; ``unweighted_pull``: the
        same without the weight, where a Balance's weight tells it, else None.
    """
    curves = {}
    for name, term in (config.model.get('distill') or {} if is_distillation(config) else {}).items():
        loss, prefix = f'loss_{name}', f'distill/{name}_'
        logged = [each for each in scalars if loss in each]
        if not logged:
            continue
        others = tuple(f'distill/{other}_' for other in config.model.distill if other.startswith(f'{name}_'))
        no_parts = (f'{prefix}weight', f'{prefix}gradient')
        parts = [key for key in logged[0]
                 if key.startswith(prefix) and key not in no_parts and not key.startswith(others)]
        curves[name] = dict(
            loss=[each[loss] for each in logged],
            parts={key[len(prefix):]: [each[key] for each in logged if key in each] for key in parts},
            pull=[each[f'{prefix}gradient'] for each in logged if f'{prefix}gradient' in each],
            unweighted_pull=_unweighted_pull(term.get('weight', 1.0), [each.get(f'{prefix}weight') for each in logged]))
    return curves


def _unweighted_pull(weight, logged: List[Optional[Curve]]) -> Optional[List[Curve]]:
    """Balance sets a weight of ratio · task / term, so that term / task is ratio / weight."""
    balanced = weight if isinstance(weight, dict) else {}
    if type_name(balanced) != 'Balance' or isinstance(balanced.get('ratio'), dict) or None in logged:
        return None
    ratio = build_weight(balanced).full
    return [{epoch: ratio / value for epoch, value in curve.items() if value > 0} for curve in logged]


def task_curves(scalars: List[Scalars], terms: List[str]) -> Dict[str, List[Curve]]:
    """The student's own losses, by name, of each run."""
    names = [key for key in (scalars[0] if scalars else ())
             if key.startswith('loss_') and key not in {f'loss_{term}' for term in terms}]
    return {name: [each[name] for each in scalars if name in each] for name in names}


def without_terms(scalars: Scalars, terms: List[str]) -> Curve:
    """The loss of a run without what its terms added to it: what the losses of all variants have in common."""
    return {epoch: value - sum(scalars.get(f'loss_{term}', {}).get(epoch, 0.0) for term in terms)
            for epoch, value in scalars['loss'].items()}
