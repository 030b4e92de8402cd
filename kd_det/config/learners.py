"""Makes of a distillation one of several learners, who learn from each other, from their mean or from their fusion."""
from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence

from mmengine.config import Config, ConfigDict

from kd_det.config.choices import LEARNT_FROM
from kd_det.config.composition import share_weight
from kd_det.config.detectors import read_model_config
from kd_det.config.files import ConfigurationError, is_distillation
from kd_det.registry import HOME


def add_learners(config: Config, peers: int | Sequence[str], share: Sequence[str] = (),
                 guide: str = LEARNT_FROM[0], mutual: Mapping[str, dict] | None = None) -> Config:
    """Adds learners to a distillation, and lets each of them learn by the method's terms.

    Each term is repeated for every learner: of a frozen teacher, where there is one, and of the guide, with adapters of
    its own. ``fgd`` becomes ``fgd_0``, ``fgd_1``, … of the teacher, and ``fgd_0_guide``, … of the guide; of
    ``'peers'`` ``fgd_0_peer1``, …, which share the weight, so that many peers pull as hard as one (Deep Mutual
    Learning, Zhang et al., CVPR 2018). A learner knows nothing at first: what is learnt of one grows over the whole
    training to its weight, by a ``SigmoidWarmup``, as ONE and Feature Fusion Learning have it.

    Args:
        config: Of a distillation, with a frozen teacher or without.
        peers: How many learners beside the student, of its own kind; or their configs.
        share: Parts that all have in common, see :class:`~kd_det.distillers.DetectionDistiller`.
        guide: One of :data:`~kd_det.config.choices.LEARNT_FROM`.
        mutual: The terms by which they learn of each other, by the names of the config's own; those by default. Their
            weights should be numbers: a ``Balance`` keeps the pull of two learners that agree as strong as the task's,
            and what it then enlarges may be noise.

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
    lessons, length = list(list_lessons(number, guide, bool(frozen))), _read_length(config)
    for name, term in terms.items():
        for suffix, learner, teacher, share_of in lessons:
            is_mutual = teacher >= len(frozen)
            of = (mutual or terms)[name] if is_mutual else term
            weight = share_weight(copy.deepcopy(of.get('weight', 1.0)), share_of)
            if is_mutual:
                weight = dict(type=f'{HOME}.SigmoidWarmup', value=weight, **length)
            model.distill[f'{name}_{suffix}'] = ConfigDict(copy.deepcopy(term), learner=learner, teacher=teacher,
                                                           weight=weight)
    return config


def _read_length(config: Config) -> dict[str, int]:
    """How long a training lasts, as schedules of weights count it."""
    settings = config.get('train_cfg') or {}
    if settings.get('max_iters'):
        return dict(iterations=settings['max_iters'])
    return dict(epochs=settings.get('max_epochs') or 0)


def list_lessons(learners: int, guide: str, is_taught: bool) -> Iterator[tuple[str, int, int, int]]:
    """Lists who learns from whom.

    Args:
        learners: How many there are, without one of fused features.
        guide: One of :data:`~kd_det.config.choices.LEARNT_FROM`.
        is_taught: Whether a frozen teacher is the first of the guides.

    Yields:
        What to append to a term's name, the index of the learner, that of its guide, and among how many guides a
        term's weight is shared.
    """
    first = int(is_taught)
    for learner in range(learners):
        if is_taught:
            yield f'{learner}', learner, 0, 1
        if guide == 'peers':
            yield from ((f'{learner}_peer{other}', learner, first + other, learners - 1)
                        for other in range(learners) if other != learner)
        else:
            yield f'{learner}_guide', learner, first, 1
    if guide == 'fusion':  # who learns from the mean of the others
        yield 'fusion', learners, first + 1, 1
