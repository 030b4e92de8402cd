"""The feature terms on a GPU: values and gradients are those of the CPU, and nothing makes the host wait."""
import pytest
import torch
from mmdet.registry import MODELS

BOXES = [torch.tensor([[4., 4., 60., 40.], [50., 8., 90., 60.]]), torch.tensor([[0., 0., 30., 20.]])]
TERMS = dict(
    fgd=dict(type='FGD'),
    pkd=dict(type='PKD'),
    cwd=dict(type='CWD'),
    fkd=dict(type='FKD'),
    defeat=dict(type='DecoupledImitation'),
    imitation=dict(type='FeatureImitation', mask=dict(type='MaskProduct', masks=['BoxForeground', 'ChannelAttention'])),
)


@pytest.fixture
def run(make_context, connected):
    """Runs a term, forward and backward; returns value and gradient on the CPU."""

    def step(config, device, mode='default'):
        torch.manual_seed(0)
        student, teacher = (torch.randn(2, 256, 8, 12).to(device) for _ in range(2))
        context = make_context(student.requires_grad_(), teacher, [each.to(device) for each in BOXES],
                               image_shapes=[(64, 96), (40, 56)])
        term = connected(MODELS.build(config), context).to(device)
        if device == 'cuda':
            torch.cuda.set_sync_debug_mode(mode)
        try:
            value = sum(term(context).values())
            value.backward()
        finally:
            if device == 'cuda':
                torch.cuda.set_sync_debug_mode('default')
        return value.detach().cpu(), student.grad.cpu()

    return step


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('config', TERMS.values(), ids=TERMS.keys())
def test_values_are_those_of_the_cpu_and_the_host_does_not_wait(config, run):
    expected = run(config, 'cpu')
    run(config, 'cuda')  # libraries start, which may wait
    for actual, each in zip(run(config, 'cuda', 'error'), expected):
        assert (actual - each).norm() < 5e-3 * each.norm()  # convolutions round to TF32
