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


# FreeKD


def test_the_haar_transform_is_that_of_each_four_cells():
    feature = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    low, bands = structure.haar(feature)
    assert low.shape == (2, 3, 3, 4) and bands.shape == (2, 3, 3, 3, 4)
    for n, c, i, j in torch.cartesian_prod(*map(torch.arange, low.shape)).tolist():
        a, b, below, d = (feature[n, c, y, x] if y < 5 else 0.0 for y in (2 * i, 2 * i + 1) for x in (2 * j, 2 * j + 1))
        expected = [(a + b + below + d) / 2, (a + b - below - d) / 2, (a - b + below - d) / 2, (a - b - below + d) / 2]
        torch.testing.assert_close(torch.stack([low[n, c, i, j], *bands[n, c, :, i, j]]), torch.stack(expected))
    torch.testing.assert_close(low.square().sum() + bands.square().sum(), feature.square().sum())


@pytest.mark.parametrize('cells', [(8, 12), (5, 7), (1, 1), (1, 6)])
def test_the_haar_transform_can_be_undone(cells):
    feature = torch.randn(2, 3, *cells)
    torch.testing.assert_close(structure.inverse_haar(*structure.haar(feature), cells), feature)


def frequencies(feature, scales=3):
    """The bands of each scale."""
    found = []
    for _ in range(scales):
        feature, bands = structure.haar(feature)
        found.append(bands)
    return feature, found


def test_masks_and_their_likeness_equal_the_loop():
    feature, prompts = torch.randn(2, 3, 4, 5), torch.randn(4, 3)
    masks = structure.prompt_masks(feature, prompts)
    expected = torch.stack([torch.stack([(feature[n] * prompt[:, None, None]).sum(0).sigmoid() for prompt in prompts])
                            for n in range(2)])
    torch.testing.assert_close(masks, expected)
    likeness = [2 * (a * b).sum() / (a.square().sum() + b.square().sum()) for image in masks
                for i, a in enumerate(image) for j, b in enumerate(image) if i != j]
    torch.testing.assert_close(structure.dice_similarity(masks), torch.stack(likeness).mean())
    assert structure.dice_similarity(masks[:, :1]) == 0  # of one prompt there is no pair


def test_prompted_features_are_made_of_what_the_masks_let_through():
    feature, prompts = torch.randn(2, 3, 7, 10), torch.randn(4, 2, 3)
    left, alike = structure.prompted_feature(feature, prompts)
    low, scales = frequencies(feature)
    likeness = 0
    for part, each in zip((low, *(bands.sum(2) for bands in scales)), prompts):
        likeness += structure.dice_similarity(structure.prompt_masks(part, each))
    torch.testing.assert_close(alike, torch.as_tensor(likeness))
    # In frequencies: each is multiplied by the sum of its masks (the padded rows of zeros stay outside).
    even = feature[:, :, :, :8].repeat(1, 1, 2, 1)[:, :, :8]
    made_low, made = frequencies(structure.prompted_feature(even, prompts)[0])
    own_low, own = frequencies(even)
    torch.testing.assert_close(made_low, own_low * structure.prompt_masks(own_low, prompts[0]).sum(1, keepdim=True))
    for one, bands, each in zip(made, own, prompts[1:]):
        mask = structure.prompt_masks(bands.sum(2), each).sum(1)
        torch.testing.assert_close(one, bands * mask[:, None, None])
    assert left.shape == feature.shape


def test_frequency_imitation_equals_the_loop_over_scales_and_prompts(pair):
    student, teacher = pair
    prompts = torch.randn(4, 5, 3, dtype=torch.float64)
    expected = 0
    for s, t, each in zip(frequencies(student)[1], frequencies(teacher)[1], prompts[1:]):
        masks = structure.prompt_masks(t.sum(2), each)[:, :, None, None]  # (N, T, 1, 1, h, w)
        expected = expected + (masks * s[:, None] - masks * t[:, None]).abs().mean()
    torch.testing.assert_close(structure.frequency_imitation(student, teacher, prompts), expected)


def test_frequencies_of_padding_do_not_count(pair, valid):
    student, teacher = pair
    prompts = torch.randn(4, 5, 3, dtype=torch.float64)
    value = structure.frequency_imitation(student, teacher, prompts, valid)
    gradient, = torch.autograd.grad(value, student)
    outside = ~valid[:, None].expand_as(student)
    assert not gradient[outside].any() and gradient[~outside].any()
    changed = torch.where(outside, 9.0, teacher)
    torch.testing.assert_close(structure.frequency_imitation(student, changed, prompts, valid), value)
    # Of each image by itself, as if no other were there, and the cells of its padding neither.
    alone = [structure.frequency_imitation(student[:1], teacher[:1], prompts),
             structure.frequency_imitation(student[1:, :, :5, :7], teacher[1:, :, :5, :7], prompts)]
    torch.testing.assert_close(value, sum(alone) / 2)


def test_frequency_imitation_in_blocks_is_that_of_the_whole(pair, valid, monkeypatch):
    student, teacher = pair
    prompts = torch.randn(4, 5, 3, dtype=torch.float64)

    def value_and_gradient():
        value = structure.frequency_imitation(student, teacher, prompts, valid)
        return value.detach(), torch.autograd.grad(value, student)[0]

    whole = value_and_gradient()
    monkeypatch.setattr(blocks, 'BLOCK', 2 * 8 * 12)  # one channel at a time
    for actual, expected in zip(value_and_gradient(), whole):
        torch.testing.assert_close(actual, expected)
