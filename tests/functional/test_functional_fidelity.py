"""Numbers of fidelity against loops, other formulas for the same, and cases done by hand."""
import math

import pytest
import torch

from kd_det.functional.fidelity import bernoulli_kl, expected_calibration_error, linear_cka, moments, softmax_kl


@pytest.fixture
def features():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=random) + 3
    return x, x @ torch.randn(6, 4, generator=random) + torch.randn(200, 4, generator=random)


def kernel_alignment(x, y):
    """HSIC of the centered kernels, cell by cell: (n, n) matrices."""
    n = len(x)
    center = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (center @ (each.double() @ each.double().T) @ center for each in (x, y))
    return (k * l).sum() / ((k * k).sum() * (l * l).sum()).sqrt()


def test_linear_cka_is_the_alignment_of_centered_kernels(features):
    torch.testing.assert_close(linear_cka(moments(*features)), kernel_alignment(*features))


def test_linear_cka_from_parts_is_that_of_the_whole(features):
    x, y = features
    parts = moments(x[:30], y[:30]) + moments(x[30:], y[30:])
    torch.testing.assert_close(linear_cka(parts), linear_cka(moments(x, y)))


def test_linear_cka_sees_neither_rotation_nor_scale_nor_shift(features):
    x, _ = features
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(moments(x, 5 * x @ rotation - 2)) == pytest.approx(1, abs=1e-6)


def test_linear_cka_of_independent_features_is_small_and_of_a_constant_unknown(features):
    x, _ = features
    assert linear_cka(moments(x, torch.randn(200, 4, generator=torch.Generator().manual_seed(2)))) < 0.1
    assert linear_cka(moments(x, torch.full((200, 4), 0.1))).isnan()  # though sums of 0.1 are not exact
    assert linear_cka(moments(torch.zeros(200, 4), x)).isnan()


def test_calibration_error_by_hand():
    """Bins of a half: 0.2 and 0.4, one correct of two, |0.3 - 0.5|; 0.9 correct: |0.9 - 1|; weighted 2 : 1."""
    error = expected_calibration_error(torch.tensor([0.2, 0.4, 0.9]), torch.tensor([True, False, True]), bins=2)
    assert error == pytest.approx((2 * 0.2 + 1 * 0.1) / 3)


def test_calibration_error_is_that_of_a_loop():
    random = torch.Generator().manual_seed(0)
    scores, bins = torch.rand(500, generator=random), 15
    correct = torch.rand(500, generator=random) < scores**2
    expected = 0.0
    for index in range(bins):
        within = [place for place, score in enumerate(scores.tolist()) if min(int(score * bins), bins - 1) == index]
        if within:
            gap = sum(scores[within].tolist()) / len(within) - sum(correct[within].tolist()) / len(within)
            expected += len(within) / 500 * abs(gap)
    assert expected_calibration_error(scores, correct, bins) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_scores_that_are_right_is_zero():
    assert expected_calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
    assert expected_calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1


def test_softmax_kl_is_the_sum_of_its_definition():
    teacher, student = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    p, q = teacher.softmax(1), student.softmax(1)
    torch.testing.assert_close(softmax_kl(teacher, student), (p * (p / q).log()).sum(1))
    assert softmax_kl(teacher, teacher).abs().max() < 1e-6


def test_bernoulli_kl_by_hand():
    """p = 0.5 and q = 0.25: 0.5 log 2 + 0.5 log(2/3); a class on which both agree adds nothing."""
    teacher, student = torch.tensor([[0.5, 0.1]]), torch.tensor([[0.25, 0.1]])
    assert bernoulli_kl(teacher, student).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert bernoulli_kl(teacher, teacher).item() == pytest.approx(0, abs=1e-9)


def test_bernoulli_kl_of_certainty_is_finite():
    assert bernoulli_kl(torch.tensor([[1.0]]), torch.tensor([[0.0]])).item() == pytest.approx(math.log(1e6), rel=1e-3)
