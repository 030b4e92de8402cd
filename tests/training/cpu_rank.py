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


dist.init_process_group('gloo')
config = Config.fromfile(sys.argv[1])
config.update(launcher='pytorch', model_wrapper_cfg=dict(type='CPUDataParallel'))
Runner.from_cfg(config).train()
end_rank(0)
