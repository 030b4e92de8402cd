"""Learns the widths within a teacher's heads before the teacher exists."""
from __future__ import annotations

from typing import Dict, Iterable

from mmdet.registry import MODELS

from kd_det.configuration import type_name
from kd_det.detectors import head_classes
from kd_det.heads import TOWERS_OF, HeadError, check_head
from kd_det.heads.towers import TowerWidths, tower_widths
from kd_det.randomness import preserved_randomness
from kd_det.scopes import within_scope
from kd_det.teachers.loading import ModelConfig, read_model_config


def probe_towers(config: ModelConfig, names: Iterable[str]) -> Dict[str, TowerWidths]:
    """Builds those heads of a teacher whose towers are asked for, and lets them go again.

    Args:
        config: See :func:`~kd_det.teachers.loading.read_model_config`.
        names: Of heads, see :func:`~kd_det.heads.find_head`.

    Returns:
        Name -> widths, for the names that end with ``'.towers'``.

    Raises:
        HeadError: A head is absent, or has no towers.
    """
    names = [name for name in names if name.endswith(TOWERS_OF)]
    if not names:
        return {}
    model, widths = read_model_config(config), {}
    for name in names:
        try:
            check_head(type_name(model), head_classes(model), name)
        except HeadError as error:
            raise HeadError(f"A term learns from the teacher's {name}. {error}") from error
        with preserved_randomness(), within_scope(model.get('_scope_')):
            widths[name] = tower_widths(MODELS.build(model[name[:-len(TOWERS_OF)]]))
    return widths
