import pytest
import torch
from mmdet.registry import MODELS

PARAMETERS = {'adapters.0': 'align', 'generation.0.0': 'generation.conv1', 'generation.0.2': 'generation.conv2'}


def test_reproduces_the_authors_values(golden, make_context, term_of, check_gradient, monkeypatch):
    data = golden('mgd')
    student = data.student.requires_grad_()
    context = make_context(student, data.teacher, [torch.zeros(0, 4)] * 2)
    term = term_of(context, type='MGD', ratio=data.meta['mask_ratio'])
    term.load_state_dict({f'{ours}.{kind}': data.params[f'{theirs}.{kind}'] for ours, theirs in PARAMETERS.items()
                          for kind in ('weight', 'bias')})
    monkeypatch.setattr(term, 'draw_kept_cells', lambda feature: data.keep)
    loss = data.meta['alpha'] * term(context)['generation']
    check_gradient(loss, [student], data.loss, [data.grad_student])


def test_drops_the_given_share_of_the_cells_anew_each_time(padded, term_of):
    term = term_of(padded, type='MGD', ratio=0.65)
    torch.manual_seed(0)
    first, second = (term.draw_kept_cells(torch.zeros(4, 3, 100, 100)) for _ in range(2))
    assert first.shape == (4, 1, 100, 100) and set(first.unique().tolist()) == {0, 1}
    assert first.mean().item() == pytest.approx(0.35, abs=0.01) and not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(term.draw_kept_cells(torch.zeros(4, 3, 100, 100)), first)


def test_size_normalised_form(padded, term_of):
    term = term_of(padded, type='MGD', ratio=0)
    value = term(padded)['generation']
    term.normalizer = 'mean'
    torch.testing.assert_close(term(padded)['generation'], value / (6 * 8 * 12))


def test_padding_does_not_count(padded, term_of, check_padding):
    check_padding(term_of(padded, type='MGD'))


def test_a_share_beyond_all_is_an_error():
    with pytest.raises(ValueError, match='^ratio: expected a number of at least 0 and below 1, got 1'):
        MODELS.build(dict(type='MGD', ratio=1))
