"""One rank of test_prompts.py: learns the prompts of a config as a training would, on the CPU; saves each rank's.

Usage: torchrun prompts_rank.py CONFIG OUTPUT
"""
import sys

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner

from kd_det.compat.process import end_rank
from kd_det.training.prompts import learn_prompts


@MODEL_WRAPPERS.register_module()
class CPUDataParallel(MMDistributedDataParallel):

    def __init__(self, module, device_ids):
        super().__init__(module)


dist.init_process_group('gloo')
config = Config.fromfile(sys.argv[1])
config.update(launcher='pytorch', model_wrapper_cfg=dict(type='CPUDataParallel'))
runner = Runner.from_cfg(config)
runner._train_loop = runner.build_train_loop(runner._train_loop)
runner._init_model_weights()
term = runner.model.module.terms['freekd']
for each in term.prompts:
    each.add_(dist.get_rank())  # what the first rank has drawn counts
learn_prompts(runner, runner.model.module)
found = [None, None]
dist.all_gather_object(found, term.prompts)
if dist.get_rank() == 0:
    torch.save(found, sys.argv[2])
end_rank(0)
