"""Makes of a distillation one of several learners, who learn from each other, from their mean or from their fusion."""
from __future__ import annotations

import copy
from collections.abc import Sequence

from mmengine.config import Config, ConfigDict

from kd_det.config.choices import LEARNT_FROM
from kd_det.config.composition import share_weight
from kd_det.config.detectors import read_model_config
from kd_det.config.files import ConfigurationError, is_distillation


def add_learners(config: Config, peers: int | Sequence[str], share: Sequence[str] = (),
                 guide: str = LEARNT_FROM[0]) -> Config:
    """Adds learners to a distillation, and lets each of them learn by the method's terms.

    Each term is repeated for every learner: of a frozen teacher, where there is one, and of the guide, with adapters of
    its own. ``fgd`` becomes ``fgd_0``, ``fgd_1``, … of the teacher, and ``fgd_0_guide``, … of the guide; of
    ``'peers'`` ``fgd_0_peer1``, …, which share the weight, so that many peers pull as hard as one (Deep Mutual
    Learning, Zhang et al., CVPR 2018).

    Args:
        config: Of a distillation, with a frozen teacher or without.
        peers: How many learners beside the student, of its own kind; or their configs.
        share: Parts that all have in common, see :class:`~kd_det.distillers.DetectionDistiller`.
        guide: One of :data:`~kd_det.config.choices.LEARNT_FROM`.

    Returns:
        A config of its own.

    Raises:
        ConfigurationError: There is no peer, or no term; or the config has several teachers already.
    """
    if not is_distillation(config) or not isinstance(config.model.get('teacher', ()), (dict, tuple)):
        raise ConfigurationError("Peers are added to a distillation with one teacher or none, which "
                                 f"'{config.filename}' is not.")
    config = copy.deepcopy(config)
    models = peers if isinstance(peers, int) else [read_model_config(each) for each in peers]
    number = 1 + (models if isinstance(models, int) else len(models))
    if number < 2:
        raise ConfigurationError('There has to be one peer at least: give their number, or their configs.')
    model, terms = config.model, config.model.distill
    members = [dict(type='Peer', learner=index) for index in range(number)]
    frozen = [model.teacher] if model.get('teacher') else []
    guides = {'peers': members,
              'mean': [dict(type='Ensemble', of=members)],
              'gate': [dict(type='Ensemble', of=members, weights='gate')],
              'fusion': [dict(type='Fusion', of=tuple(range(number))), dict(type='Ensemble', of=members)]}[guide]
    model.peers, model.share, model.teacher = models, tuple(share), [*frozen, *guides]
    model.distill = ConfigDict()
    first = len(frozen)
    for name, term in terms.items():
        def repeat(suffix: str, learner: int, teacher: int, number: int = 1, name: str = name,
                   term: ConfigDict = term) -> None:
            model.distill[f'{name}_{suffix}'] = ConfigDict(
                copy.deepcopy(term), learner=learner, teacher=teacher,
                weight=share_weight(copy.deepcopy(term.get('weight', 1.0)), number))

        for learner in range(number):
            if frozen:
                repeat(f'{learner}', learner, 0)
            others = [index for index in range(number) if index != learner] if guide == 'peers' else []
            for other in others:
                repeat(f'{learner}_peer{other}', learner, first + other, len(others))
            if not others:
                repeat(f'{learner}_guide', learner, first)
        if guide == 'fusion':  # who learns from the mean of the others
            repeat('fusion', number, first + 1)
    return config
