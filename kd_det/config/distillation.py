"""Composes what ``kd-det distill`` trains: a student's config, teachers, a method, other learners, and a policy."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.config.choices import PAPER
from kd_det.config.composition import NO_METHOD, distillation_config, make_ensemble
from kd_det.config.files import get_type_name
from kd_det.config.learners import add_learners
from kd_det.config.methods import name_sum
from kd_det.config.policies import add_methods, add_policy, names_all_methods


def compose_distillation(student: str | Config, teachers: Sequence[str], checkpoints: Sequence[str], method: str,
                         inherit: str | Sequence[str] = 'auto', family: str = '', balance: float | str | None = None,
                         peers: int | Sequence[str] = 0, share: Sequence[str] = (), guide: str = 'peers',
                         policy: str | dict[str, Any] | None = None,
                         quantize: int | dict[str, Any] | None = None,
                         inherit_by: str = 'shape') -> tuple[Config, str]:
    """Composes a distillation.

    Args:
        student: See :func:`~kd_det.config.composition.distillation_config`, as for all that is not told here.
        teachers: Their configs; one for all checkpoints, or one for each; none beside peers.
        checkpoints: Their weights.
        method: Of which terms each learns; ``'auto'`` or ``'auto:fgd+pkd'`` for a choice between methods, see
            :func:`~kd_det.config.policies.add_methods`.
        inherit: What the student starts from, of the first teacher.
        family: Whose published weights to use.
        balance: The ratio of the method's gradient to the task's. By default learners learn of each other by the
            published weights, and only of a frozen teacher by a ratio.
        peers: See :func:`~kd_det.config.learners.add_learners`.
        share: See there.
        guide: See there.
        policy: See :func:`~kd_det.config.policies.add_policy`. Without one, several teachers share the weight.
        quantize: How many bits, or ``model.quantize``.
        inherit_by: How the student starts from what it inherits.

    Returns:
        The config, and a name for it.

    Raises:
        ConfigurationError: Teachers or their checkpoints lack, or do not match in number; or see the functions above.
    """
    if not teachers and not peers:
        raise ConfigurationError('There is nothing to learn from: give a teacher, or peers.')
    if bool(teachers) != bool(checkpoints):
        raise ConfigurationError('There is no checkpoint of the teacher: give a file or an address, or several.'
                                 if teachers else 'There is a checkpoint, but no teacher of which it is.')
    if len(teachers) > 1 and len(teachers) != len(checkpoints):
        raise ConfigurationError(f'There are {len(teachers)} teachers, but {len(checkpoints)} checkpoints: give one '
                                 'for each, in the same order.')
    chooses = names_all_methods(method)
    if chooses and (len(checkpoints) != 1 or peers):
        raise ConfigurationError(f'--method {method}: a policy chooses between the methods of one teacher, or between '
                                 'teachers, not both. Give one checkpoint and no peers, or one method.')
    compose = partial(distillation_config, student, teachers[0] if teachers else None,
                      checkpoints[0] if checkpoints else None, NO_METHOD if chooses else method, inherit, family,
                      inherit_by=inherit_by)
    config = compose(balance=balance)
    source = (student.filename or 'student') if isinstance(student, Config) else student
    name = f"{Path(source).stem}_{name_sum(method).replace(':', '_')}"
    if len(checkpoints) > 1:
        config = make_ensemble(config, checkpoints, teachers if len(teachers) > 1 else (), share=policy is None)
        name = f'{name}_{len(checkpoints)}_teachers'
    if peers:
        mutual = compose(balance=PAPER) if balance is None else config
        config = add_learners(config, peers, share, guide, mutual.model.distill)
        name = f"{name}_{guide}_of_{1 + (peers if isinstance(peers, int) else len(peers))}"
    if chooses:
        config = add_methods(config, method, policy or 'bandit', family, balance)
    elif policy is not None:
        config = add_policy(config, policy)
    if chooses or policy is not None:
        name = f'{name}_{get_type_name(config.model.policy).lower()}'
    if quantize is not None:
        config.model.quantize = dict(bits=quantize) if isinstance(quantize, int) else quantize
        name = f"{name}_{config.model.quantize.get('bits', 8)}_bits"
    return config, name
