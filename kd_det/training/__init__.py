"""Training with MMEngine's Runner: its start, the hook of a distillation, augmentation that recurs, labels spoiled."""
from kd_det.training.hooks import DistillHook
from kd_det.training.labels import NoisyLabels, WithoutClasses
from kd_det.training.probe import HeldOut
from kd_det.training.replay import ReplayedRandomness
from kd_det.training.saving import WholeCheckpointHook

__all__ = ['DistillHook', 'HeldOut', 'NoisyLabels', 'ReplayedRandomness', 'WholeCheckpointHook', 'WithoutClasses']
