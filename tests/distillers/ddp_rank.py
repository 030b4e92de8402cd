"""One rank of test_ddp.py: takes two steps on a share of a batch; saves gradients, and of each rank what its balances
hold and how many of the teacher's weights it does.

Usage: torchrun ddp_rank.py INPUT OUTPUT
"""
import sys

import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.model import MMDistributedDataParallel

import kd_det  # noqa: F401
from kd_det.compat.process import end_rank
from kd_det.teachers.engine import to_local


def distilled_gradients(config, images, samples, wrap=lambda model: model):
    """Gradients of the terms alone, the balances, and the number of the teacher's weights that this rank holds.

    The student's own losses stay in the graph with weight 0.
    """
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    plain = MODELS.build(config)
    plain.init_weights()
    plain.train()
    for block in (block for name, block in plain.terms.named_modules() if name.endswith('expand')):
        torch.nn.init.normal_(block.weight, std=0.1)  # a block that starts as the identity hides most gradients
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a batch's own statistics would differ between the two
            module.eval()
    model, distilled = wrap(plain), {f'loss_{name}' for name in config['distill']}
    for step in range(2):  # the second forward fails if the first left a parameter without gradient
        plain.zero_grad()
        losses = model(images, samples, mode='loss')
        total, _ = plain.parse_losses({
            name: value if name in distilled or name.startswith('guide') else
            [each * 0 for each in value] if isinstance(value, list) else value * 0 for name, value in losses.items()})
        total.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()
                 if parameter.requires_grad}
    weights = sum(to_local(parameter).numel() for parameter in plain.teacher.model.parameters()) if hasattr(
        plain.teacher, 'model') else 0
    return gradients, dict(
        plain.monitor.state_dict(), ranges=plain.quantizer and plain.quantizer.ranges,
        policy=plain.policy and plain.policy.state_dict()), weights


if __name__ == '__main__':
    source, target = sys.argv[1:]
    dist.init_process_group('gloo')
    config, images, samples = torch.load(source, weights_only=False)
    share = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    gradients, *others = distilled_gradients(config, images[share], samples[share], MMDistributedDataParallel)
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, others)
    if dist.get_rank() == 0:
        torch.save((gradients, of_ranks), target)
    end_rank(0)
