"""Losses of dense outputs by blocks of priors, against their formulas: values, gradients, what they keep in memory."""
import pytest
import torch

from kd_det.functional import blocks, boxes, dense, logits
from kd_det.study.step_costs import measure_peak_memory


def quality(student, teacher, weight, beta, temperature=1.0):
    student, teacher = student / temperature, teacher / temperature
    divergence = logits.quality_bce(student, teacher, beta)
    divergence = divergence - logits.quality_bce(teacher, teacher, beta) if beta == 0 else divergence
    return temperature**2 * (weight * divergence).sum()


def giou(student, teacher, weight):
    usable = teacher.isfinite().all(-1) & (teacher[..., 2:] > teacher[..., :2]).all(-1)
    student, teacher, weight = (each.flatten(0, 1) for each in
                                (student, torch.where(usable[..., None], teacher, student.detach()), weight * usable))
    return (weight * boxes.giou_imitation(student, teacher)).sum()


# Each as it is, and as its formula; of (N, P, K) logits, or (N, P, 4) boxes.
DIVERGENCES = dict(
    quality=(dense.sum_quality_bce, lambda s, t, w: quality(s, t, w, 1.0)),
    quality_squared=(lambda *each: dense.sum_quality_bce(*each, beta=2.0, temperature=2.0),
                     lambda s, t, w: quality(s, t, w, 2.0, 2.0)),
    sigmoid=(lambda *each: dense.sum_quality_bce(*each, beta=0, temperature=3.0),
             lambda s, t, w: quality(s, t, w, 0, 3.0)),
    softmax=(lambda *each: dense.sum_soft_target_kl(*each, temperature=2.0),
             lambda s, t, w: (w * logits.soft_target_kl(s, t, 2.0, reduction='none')).sum()),
    transformed=(lambda *each: dense.sum_soft_target_kl(*each, temperature=2.0, transform=torch.tanh),
                 lambda s, t, w: (w * logits.soft_target_kl(s.tanh(), t.tanh(), 2.0, reduction='none')).sum()),
)
BOX_LOSSES = dict(
    giou=(dense.sum_giou_imitation, giou),
    differences=(dense.sum_differences, lambda s, t, w: (w * (s - t).abs().sum(-1)).sum()),
    bounded=(lambda s, t, w: dense.sum_bounded_regression(s, t, t.flip(1), w, 0.5),
             lambda s, t, w: (w.flatten() * boxes.bounded_regression(
                 *(each.flatten(0, 1) for each in (s, t, t.flip(1))), 0.5)).sum()),
)
CASES = {**{name: (*forms, 4) for name, forms in DIVERGENCES.items()},
         **{f'{name}_of_one': (*forms, 1) for name, forms in DIVERGENCES.items()},
         **{name: (*forms, 0) for name, forms in BOX_LOSSES.items()}}
every_case = pytest.mark.parametrize('ours, formula, classes', CASES.values(), ids=CASES.keys())


def inputs(classes, dtype=torch.float64, priors=11):
    """Student, teacher and weights of a batch of two; without classes boxes, of which two can teach nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    student, teacher = (3 * draw(2, priors, classes or 4) for _ in range(2))
    if not classes:
        student, teacher = (torch.cat([each[..., :2], each[..., :2] + each[..., 2:].abs()], 2)
                            for each in (student, teacher))
        teacher[0, 1:3, 2] = teacher[0, 1:3, 0] - 1
        student[0, 3:4] = teacher[0, 3:4]
    weight = draw(2, priors).abs()
    return student.to(dtype).requires_grad_(), teacher.to(dtype), weight.to(dtype)


def both(form, student, *others):
    value = form(student, *others)
    return value.detach(), torch.autograd.grad(3 * value, student, retain_graph=True)[0]


@every_case
@pytest.mark.parametrize('block', [2**16, 9])
@pytest.mark.parametrize('layout', ['all', 'few', 'none', 'strided'])
def test_value_and_gradient_are_those_of_the_formula(ours, formula, classes, block, layout, monkeypatch):
    """With weights of all priors, of few, so that the others are left out, and of none."""
    monkeypatch.setattr(blocks, 'ROW_BLOCK', block)
    student, teacher, weight = inputs(classes)
    if layout == 'strided':
        student, teacher = (each.detach().repeat_interleave(2, 1)[:, ::2] for each in (student, teacher))
        student.requires_grad_()
    elif layout != 'all':
        weight = weight * (torch.arange(11) < (3 if layout == 'few' else 0))
    torch.testing.assert_close(both(ours, student, teacher, weight), both(formula, student, teacher, weight))


@every_case
def test_single_and_half_precision_and_extreme_values(ours, formula, classes):
    expected = both(formula, *inputs(classes))
    torch.testing.assert_close(both(ours, *inputs(classes, torch.float32)), tuple(each.float() for each in expected))
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher, weight = inputs(classes, dtype)
        reference = both(formula, student.detach().double().requires_grad_(), teacher.double(), weight.double())
        value, gradient = both(ours, student, teacher, weight)
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(value, reference[0].float())
        torch.testing.assert_close(gradient.float(), reference[1].float(), rtol=1e-2, atol=1e-2)
    extreme = 1e4 * torch.eye(8)[:, None, :classes or 4]
    for student, teacher in [(extreme, -extreme), (-extreme, extreme), (0 * extreme, extreme)]:
        found = both(ours, student.clone().requires_grad_(), teacher, torch.ones(8, 1))
        assert all(each.isfinite().all() for each in found)


@every_case
def test_no_priors_one_prior_and_equals(ours, formula, classes):
    student, teacher, weight = inputs(classes, priors=0)
    value, gradient = both(ours, student, teacher, weight)
    assert value == 0 and gradient.shape == student.shape
    one = [each[:1, :1].detach() for each in inputs(classes)]
    torch.testing.assert_close(both(ours, one[0].requires_grad_(), *one[1:]), both(formula, *one))
    if formula not in BOX_LOSSES['bounded']:
        value, gradient = both(ours, student := inputs(classes)[0], student.detach().clone(), inputs(classes)[2])
        assert value == 0 and gradient.abs().max() < 1e-12


@every_case
def test_gradient_is_that_of_the_value_and_once_differentiable(ours, formula, classes, monkeypatch):
    monkeypatch.setattr(blocks, 'ROW_BLOCK', 13)
    student, teacher, weight = inputs(classes)
    teacher, weight = teacher.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: ours(s, teacher, weight), student)
    gradient, = torch.autograd.grad(ours(student, teacher, weight).square(), student, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        gradient.sum().backward()
    ours(student, teacher, weight).backward()
    assert teacher.grad is None and weight.grad is None


@pytest.mark.parametrize('name', ['quality', 'sigmoid', 'softmax', 'transformed', 'giou'])
def test_nothing_of_the_logits_size_is_made_but_the_gradient(name, monkeypatch):
    monkeypatch.setattr(blocks, 'ROW_BLOCK', 2**9)
    ours, formula, classes = CASES[name]
    student, teacher, weight = inputs(classes * 4, torch.float32, priors=1500)
    peaks = [measure_peak_memory(lambda: torch.autograd.grad(form(student, teacher, weight), student)) / student.nbytes
             for form in (ours, formula)]
    assert 1 < peaks[0] < 1.8 and peaks[1] > 3


def test_rows_without_weight_are_not_computed_on_the_cpu_and_all_are_elsewhere(monkeypatch):
    seen = []
    loss = blocks.RowLoss(lambda x: (seen.append(len(x)), x.sum(1))[1])
    rows, weight = torch.ones(100, 3, requires_grad=True), torch.arange(100.) % 10
    few = weight * (weight > 8)
    assert blocks.sum_rows(loss, few, rows) == 10 * 9 * 3 and seen == [10]
    assert blocks.sum_rows(loss, weight, rows) == 450 * 3 and seen.pop() == 100  # to leave out few would cost more
    where = torch.arange(100) % 4 == 0
    expected = 3.0 * where
    assert torch.equal(blocks.map_rows(loss.value, rows, where=where), expected) and seen.pop() == 25
    assert blocks.map_rows(loss.value, rows, where=where[1:2].expand(100)).abs().max() == 0
    monkeypatch.setattr(blocks, '_find_weighted', lambda weight: None)  # as for a GPU
    assert torch.equal(blocks.map_rows(loss.value, rows, where=where), expected) and seen.pop() == 100


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
@pytest.mark.parametrize('block', [2**16, 9])
def test_largest_probabilities_and_gaps_equal_the_loop(activation, block, monkeypatch):
    monkeypatch.setattr(blocks, 'ROW_BLOCK', block)
    student, teacher, weight = inputs(4)
    sides = [each.detach().sigmoid() if activation == 'sigmoid' else each.detach().softmax(-1)[..., :-1]
             for each in (student, teacher)]
    largest = logits.largest_probability(teacher, activation, background=False)
    gap = logits.largest_gap(student, teacher, activation)
    assert torch.equal(largest, sides[1].amax(-1)) and not gap.requires_grad
    torch.testing.assert_close(gap, (sides[0] - sides[1]).abs().amax(-1))
    objectness = [weight - 1, 1 - weight]
    expected = [side * each.sigmoid().unsqueeze(-1) for side, each in zip(sides, objectness)]
    torch.testing.assert_close(logits.largest_gap(student, teacher, activation, *objectness),
                               (expected[0] - expected[1]).abs().amax(-1))
    torch.testing.assert_close(logits.largest_gap(student, teacher, activation, None, objectness[1]),
                               (sides[0] - expected[1]).abs().amax(-1))


def test_what_does_not_fit_is_an_error():
    student, teacher, weight = inputs(4)
    with pytest.raises(ValueError, match='beta=0.5: expected 0, or 1 or more'):
        dense.sum_quality_bce(student, teacher, weight, 0.5)
    with pytest.raises(ValueError, match="reduction='none'"):
        dense.sum_distribution_kl(student.view(2, 11, 2, 2), teacher.view(2, 11, 2, 2), weight, reduction='none')


@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_distributions_are_those_of_all_sides(reduction):
    student, teacher, weight = inputs(20)
    student, teacher = (each.detach().view(2, 11, 4, 5) for each in (student, teacher))
    expected = (weight.flatten() * boxes.distribution_kl(student.flatten(0, 1), teacher.flatten(0, 1), 3.0, reduction))
    torch.testing.assert_close(dense.sum_distribution_kl(student, teacher, weight, 3.0, reduction), expected.sum())
