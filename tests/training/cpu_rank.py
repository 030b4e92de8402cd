"""One rank of test_runs_on_two_ranks.py: trains a config on the CPU, where MMEngine's own launcher insists on a GPU.

Usage: torchrun cpu_rank.py CONFIG
"""
import sys

import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner

from kd_det.compat.process import end_rank


@MODEL_WRAPPERS.register_module()
class CPUDataParallel(MMDistributedDataParallel):

    def __init__(self, module, device_ids):
        super().__init__(module)


def build_runner(file: str) -> Runner:
    """The runner of a config on this rank."""
    dist.init_process_group('gloo')
    config = Config.fromfile(file)
    config.update(launcher='pytorch', model_wrapper_cfg=dict(type='CPUDataParallel'))
    return Runner.from_cfg(config)


if __name__ == '__main__':
    build_runner(sys.argv[1]).train()
    end_rank(0)
