import pytest
import torch


@pytest.mark.parametrize('name', ['cwd_tau1', 'cwd_tau4'])
def test_reproduces_the_authors_values(name, golden, make_context, term_of, check_gradient):
    data = golden(name)
    student = data.student.requires_grad_()
    context = make_context(student, data.teacher, [torch.zeros(0, 4)] * 2)
    loss = term_of(context, type='CWD', temperature=data.meta['tau'])(context)['channel_kl']
    check_gradient(loss, [student], data.loss, [data.grad_student])


def test_batch_size_and_resolution_do_not_matter(make_context, term_of):
    torch.manual_seed(0)
    pair = torch.randn(2, 4, 8, 12), torch.randn(2, 4, 8, 12)
    twice = tuple(feature.repeat(2, 1, 1, 1) for feature in pair)
    finer = tuple(feature.repeat_interleave(2, 2).repeat_interleave(2, 3) for feature in pair)
    contexts = [make_context(student, teacher, [torch.zeros(0, 4)] * len(student))
                for student, teacher in (pair, twice, finer)]
    values = [term_of(context, type='CWD')(context)['channel_kl'] for context in contexts]
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_padding_does_not_count(padded, term_of, check_padding):
    aware, paper = (term_of(padded, type='CWD', pad_aware=aware)(padded)['channel_kl'] for aware in (True, False))
    assert aware != paper
    check_padding(term_of(padded, type='CWD'))
