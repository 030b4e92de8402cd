"""The structure of features against loops over windows, and what happens at borders and in padding."""
import math

import pytest
import torch

from kd_det.functional import blocks, structure
from kd_det.functional.masks import valid_cells

CELLS = (8, 12)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, *CELLS, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.fixture
def valid():
    """The second image covers the first 5 rows and 7 columns of cells."""
    return valid_cells([(64, 96), (40, 56)], (64, 96), CELLS)


# SSIM


def distance_in_window(s, t, weights):
    """1 - SSIM of one channel of one window, as SSIM was published: lists of values and of weights with the sum 1."""
    mean_s, mean_t = (sum(w * x for w, x in zip(weights, side)) for side in (s, t))
    var_s, var_t = (sum(w * (x - mean)**2 for w, x in zip(weights, side)) for side, mean in ((s, mean_s), (t, mean_t)))
    covariance = sum(w * (x - mean_s) * (y - mean_t) for w, x, y in zip(weights, s, t))
    luminance = (2 * mean_s * mean_t + 1e-4) / (mean_s**2 + mean_t**2 + 1e-4)
    if luminance < 0:
        return 1 - luminance
    return 1 - luminance * (2 * covariance + 9e-4) / (var_s + var_t + 9e-4)


@pytest.mark.parametrize('window, sigma', [(11, 1.5), (3, 0.8)])
@pytest.mark.parametrize('share', [0.7, 0.0, -0.5])
def test_structural_distance_equals_the_loop_over_windows(window, sigma, share, pair, valid):
    student, teacher = (feature.detach() for feature in pair)
    student = share * teacher + 0.3 * student
    expected = []
    for image in range(2):
        values = []
        cells = valid[image].nonzero().tolist()
        for channel in range(3):
            s, t = ({(i, j): feature[image, channel, i, j].item() for i, j in cells} for feature in (student, teacher))
            least, scale = min(t.values()), max(t.values()) - min(t.values())
            for row, column in cells:
                near = [(i, j) for i, j in s if max(abs(i - row), abs(j - column)) <= window // 2]
                weights = [math.exp(-((i - row)**2 + (j - column)**2) / (2 * sigma**2)) for i, j in near]
                sides = ([(side[place] - least) / scale for place in near] for side in (s, t))
                values.append(distance_in_window(*sides, [weight / sum(weights) for weight in weights]))
        expected.append(sum(values) / len(values))
    actual = structure.structural_distance(student, teacher, valid, window, sigma)
    assert actual.item() == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_structural_distance_in_blocks_is_that_of_the_whole(pair, valid, monkeypatch):
    student, teacher = pair

    def value_and_gradient():
        value = structure.structural_distance(student, teacher, valid)
        return value.detach(), torch.autograd.grad(value, student)[0]

    whole = value_and_gradient()
    monkeypatch.setattr(blocks, 'BLOCK', 2 * 8 * 12)  # one channel at a time
    for actual, expected in zip(value_and_gradient(), whole):
        torch.testing.assert_close(actual, expected)


def test_an_inverted_feature_is_farthest(pair):
    """SSIM's two factors are both negative there, and their product would be 1."""
    _, teacher = pair
    middle = (teacher.amin((2, 3), keepdim=True) + teacher.amax((2, 3), keepdim=True)) / 2
    factors = (1, 0.5, 0.0, -1)
    values = [structure.structural_distance(middle + factor * (teacher - middle), teacher).item() for factor in factors]
    assert values[0] < 1e-12 and values == sorted(values)  # contrast lost, pattern lost, inverted
    assert structure.structural_distance(-teacher, teacher) > 1
    least = teacher.amin((2, 3), keepdim=True)
    assert structure.structural_distance(2 * least - teacher, teacher) > 1.9  # all below what the teacher has


def test_scale_and_offset_of_both_sides_do_not_matter(pair):
    student, teacher = pair
    value = structure.structural_distance(student, teacher)
    torch.testing.assert_close(structure.structural_distance(30 * student - 7, 30 * teacher - 7), value)


def test_padding_is_in_no_window(pair, valid):
    student, teacher = pair
    value = structure.structural_distance(student, teacher, valid)
    gradient, = torch.autograd.grad(value, student)
    outside = ~valid[:, None].expand_as(student)
    assert not gradient[outside].any() and gradient[~outside].all()
    changed = torch.where(outside, 9.0, teacher)
    torch.testing.assert_close(structure.structural_distance(student, changed, valid), value)


def test_an_even_window_is_refused(pair):
    with pytest.raises(ValueError, match='window=10: expected an odd number'):
        structure.structural_distance(*pair, window=10)
