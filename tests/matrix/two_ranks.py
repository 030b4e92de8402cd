"""One rank of test_matrix.py: which terms of some detectors teach on its images; then two data-parallel steps of each.

Usage: torchrun two_ranks.py INPUT OUTPUT
"""
import sys

import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.model import MMDistributedDataParallel

import kd_det  # noqa: F401
from kd_det.compat.process import end_rank
from kd_det.losses.base import sum_parts


def teach(config, states, batch) -> dict:
    """Whether each term has a gradient other than 0 on this rank, and whether all of its parameters have one."""
    model = MODELS.build(config)
    for module, state in zip((model.student, model.terms, model.build_teachers()[0].model), states):
        module.load_state_dict(state)
    model.train().set_progress(iteration=1000, epoch=1.0)  # behind any warm-up
    observation, student, found = model.observe(*batch, model.terms), list(model.student.parameters()), {}
    for name, value in observation.values.items():
        parameters = [*student, *model.terms[name].parameters()]
        gradients = torch.autograd.grad(sum_parts(value), parameters, retain_graph=True, allow_unused=True)
        found[name] = (any(each is not None and bool(each.any()) for each in gradients),
                       all(each is not None for each in gradients[len(student):]))
    wrapped = MMDistributedDataParallel(model)
    for _ in range(2):  # the second forward fails if the first left a parameter without gradient
        model.zero_grad()
        model.parse_losses(wrapped(*batch, mode='loss'))[0].backward()
    assert all(each.grad.isfinite().all() for each in model.parameters() if each.requires_grad)
    return found


if __name__ == '__main__':
    source, target = sys.argv[1:]
    dist.init_process_group('gloo')
    register_all_modules(init_default_scope=True)
    lessons, found = torch.load(source, weights_only=False), [None, None]
    dist.all_gather_object(found, {kind: teach(config, states, batches[dist.get_rank()])
                                   for kind, (config, states, batches) in lessons.items()})
    if dist.get_rank() == 0:
        torch.save(found, target)
    end_rank(0)
