"""Training with MMEngine's Runner: the start of a run, the hook of a distillation, augmentation that recurs."""
from kd_det.training.hooks import DistillHook
from kd_det.training.probe import HeldOut
from kd_det.training.replay import ReplayedRandomness
from kd_det.training.saving import WholeCheckpointHook

__all__ = ['DistillHook', 'HeldOut', 'ReplayedRandomness', 'WholeCheckpointHook']
