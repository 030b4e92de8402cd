"""MMEngine's Runner for a config."""
from __future__ import annotations

from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from kd_det.compat import log_operator_backend


def build_runner(config: Config) -> Runner:
    """Builds the runner that the config asks for."""
    setup_cache_size_limit_of_dynamo()
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    log_operator_backend()  # into the log that the runner has opened
    return runner
