"""What an ensemble of learners was in training, as a detector of its own: several detectors that say one thing."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from annotated_types import MinLen
from mmdet.models.detectors import BaseDetector
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from torch import Tensor, nn

from kd_det.compat import load_checkpoint
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Names, declared
from kd_det.config.detectors import extract_plain_detector
from kd_det.config.files import get_type_name, is_distillation, student_config
from kd_det.distillers.building import list_guide_configs
from kd_det.distillers.learners import build_peers, list_peers, read_peer
from kd_det.registry import build_detector
from kd_det.teachers.ensemble import Ensemble, Gate, Weights

ENSEMBLE = 'ensemble'  # in place of a learner's index


@MODELS.register_module()
class JoinedDetector(BaseDetector):
    """Detectors that predict as the weighted mean of what their heads say, from a trunk that they share.

    ``kd-det export --learner ensemble`` writes one. It predicts; it is trained as the learners of a distillation are.

    Args:
        detectors: Their model dicts; the first has the parts that are shared.
        share: The shared parts: ``('backbone', 'neck')``.
        weights: See :class:`~kd_det.teachers.ensemble.Ensemble`.

    Raises:
        ArgumentError: An argument does not fit, or the detectors can not share or be joined.
    """

    @declared
    def __init__(self, detectors: Annotated[Sequence[dict[str, Any]], MinLen(2)], share: Names = ('backbone', 'neck'),
                 weights: Weights = 'mean') -> None:
        first = build_detector(detectors[0])
        super().__init__()
        self.data_preprocessor = first.data_preprocessor
        self.detectors = nn.ModuleList([first, *build_peers(detectors[1:], share, first, detectors[0])])
        self.ensemble = Ensemble([dict(type='Peer', learner=index) for index in range(len(detectors))], weights)
        self.shares_neck = 'neck' in share
        if weights == 'gate':
            self.gate = self.ensemble.module = Gate(first.neck.out_channels, len(detectors))

    def extract_feat(self, batch_inputs: Tensor) -> Any:
        """The features of the shared trunk."""
        return self.detectors[0].extract_feat(batch_inputs)

    def predict(self, batch_inputs: Tensor, batch_data_samples: list, rescale: bool = True) -> list:
        """What they find together; ``rescale`` puts the boxes into the coordinates of the original images."""
        shared = self.extract_feat(batch_inputs) if self.shares_neck else None
        members = [SimpleNamespace(student=detector, extract_feat=lambda inputs, samples, detector=detector: (
            detector.extract_feat(inputs) if shared is None else shared)) for detector in self.detectors]
        return self.ensemble.make_predictor(members)(batch_inputs, batch_data_samples, rescale=rescale)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list) -> dict:
        """It has none.

        Raises:
            ConfigurationError: Whenever it is called.
        """
        raise ConfigurationError('A JoinedDetector only predicts: it is trained as the learners of a distillation, '
                                 'model.peers.')

    def _apply(self, function: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> JoinedDetector:
        super()._apply(function, *args, **kwargs)
        self.ensemble._apply(function)
        return self

    def _forward(self, batch_inputs: Tensor, batch_data_samples: list | None = None) -> Any:
        return self.detectors[0]._forward(batch_inputs, batch_data_samples)


def extract_learner(config: Config, checkpoint: str | Path, learner: int | str, folder: Path) -> tuple[Config, Path]:
    """Takes a learner beside the student, or an ensemble of learners, out of a checkpoint, as a detector of its own.

    Args:
        config: Of the run.
        checkpoint: A file.
        learner: The learner's index; 1 is the first of ``model.peers``; or :data:`ENSEMBLE`.
        folder: Where its checkpoint is written.

    Returns:
        Its config, with the student's data, and its checkpoint.

    Raises:
        ConfigurationError: There is no such learner or ensemble, or it is no detector; or the checkpoint holds none.
    """
    models = list_learner_models(config)
    loaded = load_checkpoint(str(checkpoint))
    share, stored = tuple(config.model.get('share', ())), loaded.get('distill', {})
    states = [loaded['state_dict'], *stored.get('peers', ())] if 'state_dict' in loaded else []
    plain, file = student_config(config), folder / 'learner.pth'
    if learner == ENSEMBLE:
        index, weights, members = find_ensemble(config, len(models))
        needed = max(members)
        plain.model = ConfigDict(type='JoinedDetector', detectors=[models[each] for each in members], share=share,
                                 weights=weights)
    else:
        needed = int(learner)
        if needed >= len(models):
            raise ConfigurationError(f"--learner {learner}: '{config.filename}' has {len(models) - 1} learners beside "
                                     'the student that are plain detectors.')
        plain.model = models[needed]
    if needed >= len(states):
        raise ConfigurationError(f"--learner {learner}: '{checkpoint}' holds no such learner, only a student.")
    if learner == ENSEMBLE:
        state = {f'detectors.{place}.{key}': value for place, each in enumerate(members)
                 for key, value in states[each].items()}
        guides = stored.get('guides', {}).get(str(index), {})
        gate = stored.get('averaged_guides', {}).get(str(index)) or {
            name.removeprefix('gate.'): value for name, value in guides.items() if name.startswith('gate.')}
        state.update({f'gate.{key}': value for key, value in gate.items()})
    else:
        state = {**{key: value for key, value in states[0].items() if key.split('.')[0] in share}, **states[needed]}
    torch.save(dict(meta=loaded.get('meta', {}), state_dict=state), file)
    return plain, file


def list_learner_models(config: Config) -> list[ConfigDict]:
    """Model dicts of the learners of a run that are plain detectors, the student's first."""
    if not is_distillation(config):
        return [config.model]
    peers = list_peers(config.model.get('peers', 0), config.model.student)
    return [extract_plain_detector(each) for each in (config.model.student, *map(read_peer, peers))]


def find_ensemble(config: Config, learners: int) -> tuple[int, Any, list[int]]:
    """Finds the ensemble of learners with a common trunk among the guides of a run.

    Args:
        config: The run's.
        learners: How many of its learners are plain detectors.

    Returns:
        Its index among the guides, its weights, and the indices of its members.

    Raises:
        ConfigurationError: There is none, or it can not be one detector.
    """
    guides = list_guide_configs(config.model.get('teacher', ())) if is_distillation(config) else []
    for index, guide in enumerate(guides):
        members = guide.get('of', ()) if get_type_name(guide) == 'Ensemble' else ()
        indices = [each.get('learner', 1) for each in members if get_type_name(each) == 'Peer']
        if indices and len(indices) == len(members):
            if not config.model.get('share') or indices[0] != 0 or max(indices) >= learners:
                raise ConfigurationError('--learner ensemble: its members share no trunk, or one is no plain detector '
                                         'of the run, so that they are no detector together. Export each.')
            return index, guide.get('weights', 'mean'), indices
    raise ConfigurationError(f"--learner ensemble: no guide in '{config.filename}' is an Ensemble of learners.")
