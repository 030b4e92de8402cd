import pytest
import torch

from kd_det.context import DistillContext, LevelSpec


@pytest.fixture
def pyramid():
    """Makes a context of several levels, of strides 8, 16, ..., without boxes."""

    def make(students, teachers) -> DistillContext:
        levels = tuple(LevelSpec(student.shape[1], 8 * 2**index) for index, student in enumerate(students))
        height, width = (8 * side for side in students[0].shape[2:])
        batch = len(students[0])
        return DistillContext(
            student=dict(neck=tuple(students)), teachers=[dict(neck=tuple(teachers))], student_levels=dict(neck=levels),
            teacher_levels=[dict(neck=levels)], boxes=[torch.zeros(0, 4)] * batch, labels=[torch.zeros(0)] * batch,
            batch_shape=(height, width), image_shapes=[(height, width)] * batch)

    return make


def test_reproduces_the_authors_values(golden, pyramid, term_of, check_gradient):
    data = golden('pkd')
    students = [data.student0.requires_grad_(), data.student1.requires_grad_()]
    context = pyramid(students, [data.teacher0, data.teacher1])
    loss = data.meta['loss_weight'] * term_of(context, type='PKD')(context)['pearson']
    check_gradient(loss, students, data.loss, [data.grad_student0, data.grad_student1])


def test_a_single_cell_in_a_batch_of_one_counts_as_0(pyramid, term_of):
    """Its deviation is 0: standardised by it, the smallest difference would become a gradient of 1e6."""
    student = torch.randn(1, 4, 1, 1, requires_grad=True)
    context = pyramid([student], [torch.randn(1, 4, 1, 1)])
    value = term_of(context, type='PKD')(context)['pearson']
    gradient, = torch.autograd.grad(value, student)
    assert value == 0 and gradient.abs().max() == 0


def test_scale_and_offset_of_either_side_do_not_matter(pyramid, term_of):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12)
    contexts = pyramid([student], [teacher]), pyramid([30 * student - 5], [0.2 * teacher + 7])
    expected, actual = (term_of(context, type='PKD')(context)['pearson'] for context in contexts)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_batch_size_and_resolution_do_not_matter(pyramid, term_of):
    torch.manual_seed(0)
    pair = torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12)
    twice = tuple(feature.repeat(2, 1, 1, 1) for feature in pair)
    finer = tuple(feature.repeat_interleave(2, 2).repeat_interleave(2, 3) for feature in pair)
    contexts = [pyramid([student], [teacher]) for student, teacher in (pair, twice, finer)]
    values = [term_of(context, type='PKD')(context)['pearson'] for context in contexts]
    for value in values[1:]:  # up to the freedom that the unbiased deviation takes off
        torch.testing.assert_close(value, values[0], rtol=1e-2, atol=0)


def test_padding_does_not_count(padded, term_of, check_padding):
    aware, paper = (term_of(padded, type='PKD', pad_aware=aware)(padded)['pearson'] for aware in (True, False))
    assert aware != paper
    check_padding(term_of(padded, type='PKD'))
