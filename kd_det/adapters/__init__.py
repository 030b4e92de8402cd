"""Student shape -> teacher shape; levels paired by stride."""
from kd_det.adapters.channels import build_adapter
from kd_det.adapters.generation import GenerationBlock
from kd_det.adapters.global_context import GlobalContext
from kd_det.adapters.levels import LevelError, LevelPair, pair_levels
from kd_det.adapters.non_local import NonLocal

__all__ = ['GenerationBlock', 'GlobalContext', 'LevelError', 'LevelPair', 'NonLocal', 'build_adapter', 'pair_levels']
