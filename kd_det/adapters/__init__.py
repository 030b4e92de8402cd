"""Student shape -> teacher shape; levels paired by stride."""
from kd_det.adapters.channels import build_adapter
from kd_det.adapters.global_context import GlobalContext
from kd_det.adapters.levels import LevelError, LevelPair, pair_levels

__all__ = ['GlobalContext', 'LevelError', 'LevelPair', 'build_adapter', 'pair_levels']
