import pytest
import torch
from mmdet.registry import MODELS

from kd_det.context import DistillContext, LevelSpec


@pytest.fixture
def stages():
    """A backbone of three stages, of one image that fills the batch and one that does not."""
    torch.manual_seed(0)
    channels, strides = (3, 4, 5), (4, 8, 16)
    levels = tuple(map(LevelSpec, channels, strides))
    student, teacher = ([torch.rand(2, width, 64 // stride, 96 // stride, requires_grad=True)
                         for width, stride in levels] for _ in range(2))
    return DistillContext(
        student=dict(backbone=tuple(student)), teachers=[dict(backbone=tuple(teacher))],
        student_levels=dict(backbone=levels), teacher_levels=[dict(backbone=levels)], boxes=[torch.zeros(0, 4)] * 2,
        labels=[torch.zeros(0)] * 2, batch_shape=(64, 96), image_shapes=[(64, 96), (32, 48)])


def test_equals_the_formula(stages, term_of):
    expected = mean = 0
    for first in range(2):
        flows = []
        for network in (stages.student, stages.teachers[0]):
            fine, coarse = network['backbone'][first:first + 2]
            pooled = torch.nn.functional.max_pool2d(fine, 2)
            flows.append(torch.einsum('naij,nbij->nab', pooled, coarse) / coarse[0, 0].numel())
        square = (flows[0] - flows[1]).square().sum() / 2
        expected, mean = expected + square, mean + square / flows[0][0].numel()
    torch.testing.assert_close(term_of(stages, type='FSP', pad_aware=False)(stages)['flow'], expected)
    torch.testing.assert_close(term_of(stages, type='FSP', pad_aware=False, normalizer='mean')(stages)['flow'], mean)


def test_padding_is_no_part_of_a_flow(stages, term_of):
    term = term_of(stages, type='FSP')
    students = stages.student['backbone']
    gradients = torch.autograd.grad(term(stages)['flow'], students)
    for student, gradient in zip(students, gradients):
        outside = ~stages.valid(student.shape[2:])[:, None].expand_as(student)
        assert gradient[outside].abs().max() == 0 and gradient[~outside].abs().max() > 0


def test_unlike_widths_are_adapted(stages, term_of):
    stages.teachers[0]['backbone'] = tuple(feature.repeat(1, 2, 1, 1) for feature in stages.teachers[0]['backbone'])
    stages.teacher_levels[0]['backbone'] = tuple(LevelSpec(2 * channels, stride)
                                                 for channels, stride in stages.student_levels['backbone'])
    term = term_of(stages, type='FSP')
    term(stages)['flow'].backward()
    assert all(adapter.weight.grad.abs().max() > 0 for adapter in term.adapters)


def test_a_single_level_has_no_flow(stages, term_of):
    with pytest.raises(ValueError, match="at least two levels, but 'backbone' gives 1"):
        term_of(stages, type='FSP', levels=(1, ))
    with pytest.raises(ValueError, match="^normalizer: expected one of batch, mean, got 'cells'"):
        MODELS.build(dict(type='FSP', normalizer='cells'))
