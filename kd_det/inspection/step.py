"""One training step, with all that there is to see in it."""
from __future__ import annotations

from contextlib import ExitStack
from typing import Dict, List, NamedTuple, Tuple

from torch import Tensor

from kd_det.context import ComparedLevel
from kd_det.distillers.detection_distiller import DetectionDistiller, Observation
from kd_det.distillers.gradients import GradientNorms, gradient_norms
from kd_det.distillers.weighting import total
from kd_det.heads.recording import recorded_calls
from kd_det.losses import FeatureTerm


class InspectedStep(NamedTuple):
    """What was seen in one step.

    Attributes:
        inputs: (N, 3, H, W), the preprocessed batch.
        observation: What the distiller observed, with the values of all terms, without weights.
        task: The student's own loss.
        norms: By the terms' names, without weights.
        levels: By the names of the terms that compare features level by level: what they compared.
    """
    inputs: Tensor
    observation: Observation
    task: Tensor
    norms: Dict[str, GradientNorms]
    levels: Dict[str, List[ComparedLevel]]


def inspect_step(distiller: DetectionDistiller, batch: dict) -> InspectedStep:
    """Runs one training step without learning from it.

    All terms are run, those too that have no weight at the beginning of the training.

    Args:
        distiller: The distiller, in training mode.
        batch: As a data loader gives it.
    """
    data = distiller.data_preprocessor(batch, True)
    observation, levels = compared_levels(distiller, data)
    task, _ = distiller.parse_losses(observation.losses)
    norms = gradient_norms(task, {name: total(value) for name, value in observation.values.items()},
                           {name: distiller.measured_features(name, observation.context) for name in distiller.terms})
    return InspectedStep(data['inputs'], observation, task, norms, levels)


def compared_levels(distiller: DetectionDistiller, data: dict) -> Tuple[Observation, Dict[str, List[ComparedLevel]]]:
    """Observes a batch with all terms.

    Args:
        distiller: The distiller.
        data: A batch, preprocessed.

    Returns:
        What was observed; and, by the names of the terms that compare features, the levels that they compared.
    """
    with ExitStack() as stack:
        calls = {name: stack.enter_context(recorded_calls(term, 'compare'))
                 for name, term in distiller.terms.items() if isinstance(term, FeatureTerm)}
        observation = distiller.observe(data['inputs'], data['data_samples'], distiller.terms)
    return observation, {name: [call.arguments['level'] for call in made] for name, made in calls.items()}
