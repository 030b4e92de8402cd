"""One rank of test_runs_on_two_ranks.py: trains a config on the CPU, and saves what guides and peers are on each rank.

Usage: torchrun states_rank.py CONFIG OUTPUT
"""
import sys

import torch
import torch.distributed as dist
from cpu_rank import build_runner

from kd_det.compat.process import end_rank

if __name__ == '__main__':
    source, target = sys.argv[1:]
    runner = build_runner(source)
    runner.train()
    distiller = runner.model.module
    models = (getattr(guide, 'model', getattr(guide, 'weights', None)) for guide in distiller.teachers)
    states = dict(guides=[model.state_dict() for model in models if model is not None],
                  peers=[peer.state_dict() for peer in distiller.peers])
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, states)
    if dist.get_rank() == 0:
        torch.save(of_ranks, target)
    end_rank(0)
