"""FGD's few passes against its formula: values, gradients, and what they keep in memory."""
import pytest
import torch

from kd_det.functional import blocks, focal_global, masks
from kd_det.study.step_costs import measure_peak_memory

BATCH = (64, 96)
WEIGHTS = dict(alpha=2, beta=3, gamma=5, lambda_=7)
BOXES = [torch.tensor([[8., 8., 40., 30.], [50., 10., 90., 60.]]), torch.zeros(0, 4)]


class Inputs:
    """Features, attention weights of both context blocks, and what the blocks add, as a linear map of the context."""

    def __init__(self, shape=(2, 6, 8, 12), padding=False, dtype=torch.float64, layout=lambda feature: feature):
        generator = torch.Generator().manual_seed(0)

        def draw(*size):
            return torch.randn(size, generator=generator, dtype=dtype)

        batch, channels, *size = shape
        self.student, self.teacher = layout(draw(*shape)).requires_grad_(), layout(draw(*shape))
        self.attend = [draw(channels).requires_grad_() for _ in range(2)]
        self.add = [draw(channels, channels).requires_grad_() for _ in range(2)]
        self.valid = masks.valid_cells([BATCH, (40, 56)], BATCH, size) if padding else None
        foreground = masks.box_foreground(BOXES[:batch], BATCH, size, 'inverse_area').to(dtype)
        self.masks = foreground, masks.normalized_background(foreground, self.valid)

    @property
    def learning(self):
        return [self.student, *self.attend, *self.add]

    def plain(self):
        relations = []
        for feature, attend, add in zip((self.student, self.teacher), self.attend, self.add):
            logits = torch.einsum('nchw,c->nhw', feature, attend)[:, None]
            pooled = focal_global.context_pool(feature, logits, self.valid)
            relations.append(feature + torch.einsum('dc,ncij->ndij', add, pooled))
        return focal_global.fgd_loss(self.student, self.teacher, *self.masks, 0.8, *relations, **WEIGHTS,
                                     valid=self.valid)

    def fused(self):
        sums = focal_global.fgd_sums(self.student, self.teacher, *self.attend, 0.8, self.valid)
        added = [torch.einsum('dc,ncij->ndij', add, context)
                 for add, context in zip(self.add, (sums.student_pooled, sums.teacher_pooled))]
        return focal_global.fgd_loss_of_sums(sums, added[0] - added[1], *self.masks, **WEIGHTS, valid=self.valid)


CASES = dict(
    plain=dict(),
    padding=dict(padding=True),
    one_cell=dict(shape=(2, 6, 1, 1)),
    one_image=dict(shape=(1, 5, 8, 12)),
    channels_last=dict(layout=lambda feature: feature.to(memory_format=torch.channels_last), padding=True),
    strided=dict(layout=lambda feature: feature.repeat_interleave(2, 3)[..., ::2]),
    expanded=dict(layout=lambda feature: feature[:, :, :1].expand_as(feature)),
)


@pytest.mark.parametrize('block', [2**18, 200, 1])
@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_values_and_gradients_are_those_of_the_formula(case, block, monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', block)
    inputs = Inputs(**case)
    expected, actual = inputs.plain(), inputs.fused()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
        ours, theirs = (torch.autograd.grad(each, inputs.learning, retain_graph=True, materialize_grads=True)
                        for each in (actual[name], value))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('block', [2**18, 40])
def test_gradient_is_that_of_the_formula(block, monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', block)
    inputs = Inputs(shape=(2, 3, 4, 6), padding=True)

    def parts(*learning):
        inputs.student, *rest = learning
        inputs.attend, inputs.add = rest[:2], rest[2:]
        return tuple(inputs.fused().values())

    assert torch.autograd.gradcheck(parts, inputs.learning)


def test_the_teacher_gets_no_gradient():
    inputs = Inputs()
    inputs.teacher.requires_grad_()
    sum(inputs.fused().values()).backward()
    assert inputs.teacher.grad is None and all(each.grad.abs().sum() > 0 for each in inputs.learning)


def test_all_parts_are_exactly_zero_where_the_student_equals_the_teacher():
    inputs = Inputs(padding=True)
    inputs.teacher = inputs.student.detach().clone()
    inputs.attend[1], inputs.add[1] = inputs.attend[0], inputs.add[0]
    assert all(value == 0 for value in inputs.fused().values())


def test_a_second_derivative_is_an_error():
    inputs = Inputs()
    gradient, = torch.autograd.grad(sum(inputs.fused().values()), inputs.student, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()


def test_shapes_that_differ_are_an_error():
    inputs = Inputs()
    inputs.teacher = inputs.teacher[:, :, :4]
    with pytest.raises(ValueError, match=r'student \(2, 6, 8, 12\) and teacher \(2, 6, 4, 12\) must have one shape'):
        inputs.fused()


def test_nothing_of_the_features_size_is_made_but_the_gradient(monkeypatch):
    """Memory, by count: the formula makes several maps, the fused form one and what fits into the cache."""
    monkeypatch.setattr(blocks, 'BLOCK', 2**12)
    inputs = Inputs(shape=(2, 128, 32, 48), dtype=torch.float32)
    size = 4 * inputs.student.numel()
    peaks = [measure_peak_memory(lambda: torch.autograd.grad(sum(form().values()), inputs.learning))
             for form in (inputs.fused, inputs.plain)]
    assert size < peaks[0] < 1.25 * size and peaks[1] > 4 * size
