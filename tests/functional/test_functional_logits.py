"""Class outputs: the formulas, extreme logits, no samples."""
import pytest
import torch
import torch.nn.functional as F

from kd_det.functional import logits


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


LABELS = torch.tensor([0, 1, 2, 3, 3, 0])
GROUPS = torch.tensor([0, 2, 0, 2, 2, -1])


def coupled(student, teacher):
    return logits.combine_decoupled(*logits.decoupled_kl(student, teacher, LABELS[:len(student)], 2.0), form='coupled')


# Every loss of two sets of logits, per sample or per group; those marked True are 0 for equals.
LOSSES = dict(
    soft=(lambda s, t: logits.soft_target_kl(s, t, 2.0, reduction='none'), True),
    decoupled=(lambda s, t: logits.combine_decoupled(*logits.decoupled_kl(s, t, LABELS[:len(s)], 2.0)), True),
    coupled=(coupled, True),
    quality=(logits.quality_bce, True),
    quality_squared=(lambda s, t: logits.quality_bce(s, t, beta=2.0), True),
    weighted=(logits.weighted_cross_entropy, False),
    standardized=(lambda s, t: logits.soft_target_kl(logits.standardized_logits(s), logits.standardized_logits(t), 2.0,
                                                     reduction='none'), True),
    ranks=(lambda s, t: logits.rank_mimicking(s[:, 0], t[:, 0], GROUPS[:len(s)], 4), True),
)
every_loss = pytest.mark.parametrize('loss, zero_for_equals', LOSSES.values(), ids=LOSSES.keys())


@every_loss
def test_loss_teaches_the_student_alone(loss, zero_for_equals, pair):
    student, teacher = pair
    value = loss(student, teacher)
    assert value.min() >= 0 and value.sum() > 0
    value.sum().backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


@every_loss
def test_gradient_is_that_of_the_formula(loss, zero_for_equals, pair):
    student, teacher = pair
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)


@every_loss
def test_equal_logits_are_a_minimum(loss, zero_for_equals, pair):
    student, _ = pair
    value = loss(student, student.detach().clone())
    gradient, = torch.autograd.grad(value.sum(), student)
    if zero_for_equals:
        assert value.abs().max() == 0
        assert gradient.abs().max() < 1e-12
    else:
        assert (loss(student + 0.1 * torch.randn_like(student), student.detach()) != value).all()


@every_loss
def test_no_samples_and_extreme_logits_are_finite(loss, zero_for_equals):
    none = torch.zeros(0, 4, requires_grad=True)
    assert loss(none, none.detach()).sum() == 0
    extreme = 1e4 * torch.eye(6, 4)
    for student, teacher in [(extreme, -extreme), (-extreme, extreme), (torch.zeros(6, 4), extreme)]:
        student = student.clone().requires_grad_()
        value = loss(student, teacher)
        gradient, = torch.autograd.grad(value.sum(), student)
        assert value.isfinite().all() and gradient.isfinite().all()


def loop_kl(student, teacher):
    return sum(t * (t / s).log() for s, t in zip(student, teacher))


def test_soft_target_kl_equals_the_loop(pair):
    student, teacher = ((side / 3).softmax(1) for side in pair)
    expected = torch.stack([9 * loop_kl(s, t) for s, t in zip(student, teacher)])
    torch.testing.assert_close(logits.soft_target_kl(*pair, 3.0, reduction='none'), expected)
    torch.testing.assert_close(logits.soft_target_kl(*pair, 3.0), expected.mean())
    torch.testing.assert_close(logits.soft_target_kl(*pair, 3.0, 'sum'), expected.mean())
    torch.testing.assert_close(logits.soft_target_kl(*pair, 3.0, 'mean'), expected.mean() / 4)
    assert logits.soft_target_kl(torch.zeros(0, 4), torch.zeros(0, 4), 3.0) == 0
    with pytest.raises(ValueError, match="class_reduction='max'"):
        logits.soft_target_kl(*pair, 3.0, 'max')


def test_standardized_logits_equal_the_loop_and_know_no_scale(pair):
    student, _ = pair
    expected = []
    for sample in student.tolist():
        mean = sum(sample) / len(sample)
        deviation = (sum((each - mean)**2 for each in sample) / (len(sample) - 1))**0.5
        expected.append([(each - mean) / deviation for each in sample])
    torch.testing.assert_close(logits.standardized_logits(student), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(logits.standardized_logits(7 * student - 3), torch.tensor(expected, dtype=torch.float64))


def test_equal_logits_have_no_standard_but_rounding():
    equal = torch.full((3, 80), -4.6).requires_grad_()  # whose mean is not -4.6 in float32
    standardized = logits.standardized_logits(equal)
    assert not standardized.any()
    gradient, = torch.autograd.grad(standardized.square().sum() + standardized[:, 0].sum(), equal)
    assert not gradient.any()


def test_decoupled_kl_equals_the_loop(pair):
    target, non_target, probability = logits.decoupled_kl(*pair, LABELS, 3.0)
    assert not probability.requires_grad
    student, teacher = ((side / 3).softmax(1) for side in pair)
    for n, label in enumerate(LABELS.tolist()):
        others = [c for c in range(4) if c != label]
        binary = [torch.stack([side[n, label], 1 - side[n, label]]) for side in (student, teacher)]
        rest = [side[n, others] / side[n, others].sum() for side in (student, teacher)]
        torch.testing.assert_close(target[n], 9 * loop_kl(*binary))
        torch.testing.assert_close(non_target[n], 9 * loop_kl(*rest))
        torch.testing.assert_close(probability[n], teacher[n, label])


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_coupled_form_equals_soft_targets_for_each_sample(pair, temperature):
    parts = logits.decoupled_kl(*pair, LABELS, temperature)
    actual = logits.combine_decoupled(*parts, alpha=1, beta=1, form='coupled')
    torch.testing.assert_close(actual, logits.soft_target_kl(*pair, temperature, reduction='none'))
    decoupled = logits.combine_decoupled(*parts, alpha=2, beta=3)
    torch.testing.assert_close(decoupled, 2 * parts[0] + 3 * parts[1])


def test_decoupled_kl_rejects_what_it_cannot_decouple(pair):
    with pytest.raises(ValueError, match='two classes or more'):
        logits.decoupled_kl(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="form='plain': expected 'decoupled' or 'coupled'"):
        logits.combine_decoupled(*logits.decoupled_kl(*pair, LABELS), form='plain')


@pytest.mark.parametrize('beta', [0, 1, 2.5])
def test_quality_bce_equals_the_loop(pair, beta):
    student, teacher = (side.detach().sigmoid() for side in pair)
    bce = -(teacher * student.log() + (1 - teacher) * (1 - student).log())
    torch.testing.assert_close(logits.quality_bce(*pair, beta), (bce * (teacher - student).abs()**beta).sum(1))


@pytest.mark.parametrize('beta', [-1, 0.5])
def test_quality_bce_rejects_exponents_of_infinite_gradient(pair, beta):
    with pytest.raises(ValueError, match='expected 0, or 1 or more'):
        logits.quality_bce(*pair, beta)


def test_weighted_cross_entropy_equals_the_loop(pair):
    student, teacher = (side.detach().softmax(1) for side in pair)
    weights = torch.tensor([1, 1, 1, 1.5], dtype=torch.float64)
    torch.testing.assert_close(logits.weighted_cross_entropy(*pair), -(weights * teacher * student.log()).sum(1))
    torch.testing.assert_close(logits.weighted_cross_entropy(*pair, background_weight=1),
                               F.cross_entropy(pair[0], teacher, reduction='none'))
    first = logits.weighted_cross_entropy(*(side.flip(1) for side in pair), background=0)
    torch.testing.assert_close(first, logits.weighted_cross_entropy(*pair))


def test_rank_mimicking_equals_the_loop(pair):
    student, teacher = (side[:, 0].detach() for side in pair)
    actual = logits.rank_mimicking(student, teacher, GROUPS, 4)
    for group in range(4):
        members = GROUPS == group
        expected = loop_kl(student[members].softmax(0), teacher[members].softmax(0)) if members.any() else 0.
        assert actual[group].item() == pytest.approx(float(expected))
    assert (actual > 0).tolist() == [True, False, True, False]
    torch.testing.assert_close(logits.rank_mimicking(student + 5, teacher, GROUPS, 4), actual)


def test_joint_logits_equal_the_product_and_stay_exact_where_it_rounds(pair):
    classes, objectness = pair[0], pair[1][:, 0]
    joint = logits.joint_logits(classes, objectness)
    torch.testing.assert_close(joint.sigmoid(), classes.sigmoid() * objectness.sigmoid().unsqueeze(1))
    extreme = torch.tensor([-500., -20., 20., 500.]).requires_grad_()
    joint = logits.joint_logits(extreme.unsqueeze(1), torch.full((4, ), 1000.))
    torch.testing.assert_close(joint[:, 0], extreme)  # where an object is certain
    gradient, = torch.autograd.grad(logits.joint_logits(extreme.unsqueeze(1), extreme.flip(0)).sum(), extreme)
    assert gradient.isfinite().all()


def test_restricted_classes_keep_their_probability(pair):
    student, _ = pair
    probabilities = student.softmax(-1)
    restricted = logits.restricted_logits(student, (2, 0), background=True).softmax(-1)
    torch.testing.assert_close(restricted[:, :2], probabilities[:, [2, 0]])
    torch.testing.assert_close(restricted[:, 2], probabilities[:, [1, 3]].sum(1))  # of none of these
    assert torch.equal(logits.restricted_logits(student, (2, 0), background=False), student[:, [2, 0]])
    assert logits.restricted_logits(student, (0, 1, 2), background=True) is student
    assert logits.restricted_logits(student, range(4), background=False) is student


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_confidence_weights_equal_the_loop(pair, activation):
    teacher, weight = pair[1], torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    probabilities = teacher.sigmoid() if activation == 'sigmoid' else teacher.softmax(1)
    surest = [max(sample) for sample in probabilities.tolist()]
    mean = sum(w * m for w, m in zip(weight.tolist(), surest)) / weight.sum().item()
    confidence = logits.largest_probability(teacher, activation)
    torch.testing.assert_close(confidence, torch.tensor(surest, dtype=torch.float64))
    found = logits.confidence_weights(confidence, weight)
    torch.testing.assert_close(found, torch.tensor([m / mean for m in surest], dtype=torch.float64))
    torch.testing.assert_close((weight * found).sum(), weight.sum())
    assert not found.requires_grad
    # Of two processes each knows the mean of both.
    halves = [torch.stack([weight[part].sum(), (weight * confidence)[part].sum()]) for part in (slice(3), slice(3, 6))]
    shared = [logits.confidence_weights(confidence[part], weight[part], lambda own: sum(halves) / 2)
              for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(shared), found)


def test_confidence_weights_are_finite_where_nothing_counts_or_the_teacher_is_sure_of_nothing():
    none, ones = torch.zeros(3), torch.ones(3)
    for confidence, weight in ((ones, none), (none, ones), (none[:0], none[:0])):
        assert logits.confidence_weights(confidence, weight).isfinite().all()


def test_permuted_predictions_equal_the_loop(pair):
    """Given the same random order: all change places, then the largest goes home by an exchange."""
    teacher = pair[1].detach().view(2, 3, 4)
    torch.manual_seed(3)
    found = logits.permute_others(teacher)
    torch.manual_seed(3)
    keys = torch.rand(teacher.shape)
    for image, prior in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]:
        sample, key = teacher[image, prior].tolist(), keys[image, prior].tolist()
        expected = [sample[place] for place in sorted(range(4), key=key.__getitem__)]
        home, now = sample.index(max(sample)), expected.index(max(sample))
        expected[home], expected[now] = expected[now], expected[home]
        assert found[image, prior].tolist() == expected
    assert not torch.equal(found, teacher) and torch.equal(found.argmax(-1), teacher.argmax(-1))
    assert torch.equal(found.sort().values, teacher.sort().values)


def test_each_order_of_the_other_predictions_is_as_likely():
    torch.manual_seed(0)
    drawn = logits.permute_others(torch.tensor([0.0, 3.0, 1.0, 2.0]).expand(6000, 4))
    orders, counts = drawn.unique(dim=0, return_counts=True)
    assert len(orders) == 6 and (orders[:, 1] == 3).all()
    assert (counts - 1000).abs().max() < 130  # 4.5 standard deviations of sqrt(6000 · 1/6 · 5/6)
