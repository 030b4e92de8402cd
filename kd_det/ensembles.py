"""From one teacher to several of its kind: makes the config that distils an ensemble."""
from __future__ import annotations

import copy
from typing import Sequence, Union

from mmengine.config import Config, ConfigDict

from kd_det.configuration import ConfigurationError, is_distillation, type_name
from kd_det.distillers.balance import DEFAULT_RATIO


def ensemble(config: Config, checkpoints: Sequence[str]) -> Config:
    """Makes a distillation from one teacher into one from several, which differ in their weights alone.

    Each term is repeated for every teacher: ``fgd`` becomes ``fgd_1``, ``fgd_2``, …, each with adapters of its own,
    for features of detectors that were trained apart lie in different bases. Each has the n-th part of the weight, or
    of the ratio of a :class:`~kd_det.distillers.Balance`, so that n equal teachers pull as hard as one. Where a term is
    a forward KL divergence, the mean over the teachers has the gradient of the divergence from their mean prediction,
    which is how an ensemble is distilled (Hinton et al., arXiv 1503.02531); where it is a squared difference, that of
    the difference from their mean. (With Balance weights differ a little: every teacher pulls as hard as each other.)

    The first teacher is the one that is inherited from, and that pseudo-labels come from.

    Args:
        config: Config of a distillation with one teacher.
        checkpoints: Weights of each teacher: files or addresses.

    Returns:
        A config of its own; that of the student is unchanged.

    Raises:
        ConfigurationError: There are less than two checkpoints, or the config has no teacher, or several already.
    """
    if len(checkpoints) < 2:
        raise ConfigurationError(f'An ensemble has two teachers at least, not {len(checkpoints)}.')
    if not is_distillation(config) or not isinstance(config.model.teacher, dict):
        raise ConfigurationError(f"An ensemble is made of a distillation with one teacher, which '{config.filename}' "
                                 'is not.')
    config = copy.deepcopy(config)
    teacher, terms, number = config.model.teacher, config.model.distill, len(checkpoints)
    config.model.teacher = [dict(copy.deepcopy(teacher), checkpoint=checkpoint) for checkpoint in checkpoints]
    config.model.distill = ConfigDict()
    for name, term in terms.items():
        for index in range(number):
            repeated = config.model.distill[f'{name}_{index + 1}'] = copy.deepcopy(term)
            repeated.update(teacher=index, weight=_share(term.get('weight', 1.0), number))
    return config


def _share(weight: Union[float, dict], number: int) -> Union[float, dict]:
    """The n-th part of a weight; schedules around it stay. So does what is no weight, for the distiller to refuse."""
    if isinstance(weight, (float, int)):
        return weight / number
    if type_name(weight) == 'Balance':
        return dict(weight, ratio=_share(weight.get('ratio', DEFAULT_RATIO), number))
    if isinstance(weight, dict) and 'value' in weight:
        return dict(weight, value=_share(weight['value'], number))
    return weight
