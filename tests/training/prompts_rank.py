"""One rank of test_prompts.py: learns the prompts of a config as a training would, on the CPU; saves each rank's.

Usage: torchrun prompts_rank.py CONFIG OUTPUT
"""
import sys

import torch
import torch.distributed as dist
from cpu_rank import build_runner

from kd_det.compat.process import end_rank
from kd_det.training.prompts import learn_prompts

runner = build_runner(sys.argv[1])
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
