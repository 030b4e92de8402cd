"""Costs of pairs against loops over pairs, and matchings against trying them all."""
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from kd_det.functional import boxes, logits, queries


def random_queries(images: int, count: int, classes: int = 5, seed: int = 0):
    """Logits and boxes, as centre, width and height."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(images, count, classes, generator=generator, dtype=torch.float64),
            torch.rand(images, count, 4, generator=generator, dtype=torch.float64) * 0.5 + 0.05)


def pair_cost(student, teacher, first, second, activation) -> torch.Tensor:
    """One image, one query each."""
    if activation == 'sigmoid':
        targets = teacher.sigmoid()
        classes = F.binary_cross_entropy(student.sigmoid(), targets, reduction='sum') \
            - F.binary_cross_entropy(targets, targets, reduction='sum')
    else:
        classes = logits.soft_target_kl(student[None], teacher[None])
    giou = boxes.giou_imitation(queries.corners(first)[None], queries.corners(second)[None])[0]
    return 2 * classes + 5 * (first - second).abs().sum() + 2 * giou


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_cost_is_that_of_each_pair(activation, close):
    (student, first), (teacher, second) = random_queries(2, 4), random_queries(2, 3, seed=1)
    cost = queries.query_cost(student, teacher, first, second, activation)
    expected = torch.stack([pair_cost(student[image, q], teacher[image, m], first[image, q], second[image, m],
                                      activation)
                            for image in range(2) for q in range(4) for m in range(3)]).view(2, 4, 3)
    close(cost, expected)
    assert not queries.query_cost(student.requires_grad_(), teacher, first, second, activation).requires_grad


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_cost_of_equal_queries_is_0_and_no_pair_costs_less(activation):
    student, first = (each.float() for each in random_queries(1, 6))
    first[0, 0, 2:] = 1e-5  # a box of a hundredth of a pixel
    cost = queries.query_cost(student, student, first, first, activation)[0]
    assert cost.diagonal().abs().max() < 1e-4 and cost.min() >= 0
    assert (cost + torch.eye(6)).min() > 0.1


def test_corners():
    torch.testing.assert_close(queries.corners(torch.tensor([0.5, 0.4, 0.2, 0.1])), torch.tensor([400., 350, 600, 450]))


def cheapest(cost: torch.Tensor) -> float:
    """The least sum over all ways to give each row a column of its own, or each column a row."""
    rows, columns = cost.shape
    if rows > columns:
        return cheapest(cost.T)
    return min(sum(cost[row, column].item() for row, column in enumerate(chosen))
               for chosen in permutations(range(columns), rows))


@pytest.mark.parametrize('count, candidates', [(5, 4), (4, 5), (5, 5)])
def test_matching_costs_least_of_all(count, candidates):
    """Without boxes; two images that have nothing to do with each other."""
    cost = torch.rand(2, count, candidates, generator=torch.Generator().manual_seed(3))
    which = torch.stack([torch.randperm(7)[:candidates] for _ in range(2)])
    paired = queries.match_queries(cost, which, torch.zeros(2, 7, 0), [0, 0], torch.full((2, count), -1))
    for image in range(2):
        place = {query.item(): index for index, query in enumerate(which[image])}
        columns = [place[query.item()] for query in paired[image] if query >= 0]
        assert len(set(columns)) == len(columns) == min(count, candidates)
        total = sum(cost[image, row, place[query.item()]].item() for row, query in enumerate(paired[image])
                    if query >= 0)
        assert total == pytest.approx(cheapest(cost[image]))


def test_the_query_of_the_same_box_comes_first():
    """The student gave box 0 to its query 2 and box 1 to its query 0; the teacher's queries for them are 1 and 3."""
    box_cost = torch.ones(1, 4, 3)
    box_cost[0, 1, 0] = box_cost[0, 3, 1] = 0
    box_cost[..., 2] = -5  # padding
    assigned = torch.tensor([[1, -1, 0, -1]])
    cost = torch.tensor([[[0., 9, 9, 9], [0, 1, 0, 9], [0, 0, 0, 0], [0, 2, 0, 1]]])
    candidates = torch.tensor([[3, 0, 1, 2]])  # of which 0 and 2 have no box
    paired = queries.match_queries(cost, candidates, box_cost, [2], assigned)
    assert paired.tolist() == [[3, 0, 1, 2]]


def test_a_student_with_more_queries_leaves_some_without():
    assigned = torch.tensor([[0, -1, -1, -1], [-1, 1, -1, 0]])
    paired = queries.match_queries(torch.zeros(2, 4, 2), torch.tensor([[0, 1]] * 2), torch.rand(2, 2, 2), [1, 2],
                                   assigned)
    assert (paired >= 0).sum(1).tolist() == [2, 2]
    assert (paired[1] >= 0).tolist() == [False, True, False, True]  # both of the teacher's have a box
    more_boxes = torch.tensor([[0, 1, 2, -1]])
    paired = queries.match_queries(torch.zeros(1, 4, 2), torch.tensor([[0, 1]]), torch.rand(1, 2, 3), [3], more_boxes)
    assert (paired >= 0).sum() == 2 and paired[0, 3] == -1  # no candidate is left


def test_costs_that_are_not_finite_come_last():
    cost = torch.tensor([[[float('nan'), 1.], [float('inf'), 0]]])
    box_cost = torch.full((1, 2, 0), float('nan'))
    paired = queries.match_queries(cost, torch.tensor([[0, 1]]), box_cost, [0], torch.tensor([[-1, -1]]))
    assert sorted(paired[0].tolist()) == [0, 1]


def test_a_box_of_infinite_costs_is_nobodys():
    box_cost = torch.tensor([[[float('inf'), 1.], [float('inf'), 0]]])
    paired = queries.match_queries(torch.rand(1, 3, 2), torch.tensor([[0, 1]]), box_cost, [2],
                                   torch.tensor([[0, 1, -1]]))
    assert paired.tolist() == [[-1, 1, 0]]


def test_one_transfer_to_the_host(monkeypatch):
    given, transfer = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda self: given.append(self.shape) or transfer(self))
    queries.match_queries(torch.rand(6, 4, 3), torch.tensor([[0, 1, 2]] * 6), torch.rand(6, 5, 2), [2, 0] * 3,
                          torch.full((6, 4), -1))
    assert len(given) == 1


# ------------------------------------------------------------------------------------------- ground truth with noise


@pytest.fixture
def truth():
    """Boxes as x1, y1, x2, y2 in shares of their image, and labels."""
    generator = torch.Generator().manual_seed(3)
    first = torch.rand(4, 50, 2, generator=generator) * 0.6
    boxes = torch.cat([first, first + 0.02 + 0.3 * torch.rand(4, 50, 2, generator=generator)], -1)
    return boxes, torch.randint(7, (4, 50), generator=generator)


def test_noise_moves_each_side_evenly_and_no_further_than_it_says(truth):
    boxes, labels = truth
    noisy, same = queries.noisy_targets(boxes, labels, groups=20, box_noise=0.4)
    assert noisy.shape == (4, 20, 50, 4) and torch.equal(same, labels[:, None].expand(4, 20, 50))
    center, size = noisy.chunk(2, -1)
    moved = torch.cat([center - size / 2, center + size / 2], -1) - boxes[:, None]
    moves = moved / (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)[:, None]
    assert moves.abs().max() <= 0.2 + 1e-5
    assert moves.mean((0, 1, 2)).abs().max() < 0.01 and (moves.std((0, 1, 2)) - 0.4 / 12**0.5).abs().max() < 0.005
    correlation = torch.corrcoef(moves.flatten(0, 2).T) - torch.eye(4)
    between_groups = torch.corrcoef(moves.transpose(0, 1).flatten(1)) - torch.eye(20)
    assert correlation.abs().max() < 0.07 and between_groups.abs().max() < 0.15  # of 4000 draws, of 800
    exact, _ = queries.noisy_targets(boxes, labels, box_noise=0.0)
    torch.testing.assert_close(queries.corners(exact[:, 0]) / 1000, boxes)


def test_a_share_of_the_labels_is_drawn_from_all_classes(truth):
    boxes, labels = truth
    _, noisy = queries.noisy_targets(boxes, labels, groups=50, label_noise=0.7, classes=7)
    differ = noisy != labels[:, None]
    assert differ.float().mean().item() == pytest.approx(0.7 * 6 / 7, abs=0.02)
    counts = noisy[differ].bincount(minlength=7)
    assert len(counts) == 7 and counts.min() > 0.8 * counts.float().mean()
    assert torch.equal(queries.noisy_targets(boxes, labels, groups=3, label_noise=1.0, classes=1)[1],
                       torch.zeros(4, 3, 50, dtype=torch.long))


def test_noise_follows_the_box_and_the_step_alone(truth):
    boxes, labels = truth
    state = torch.get_rng_state()
    noise = dict(groups=2, label_noise=0.5, classes=7)
    noisy, others = queries.noisy_targets(boxes, labels, step=5, **noise)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    moved, relabelled = queries.noisy_targets(boxes[[2, 0]][:, order], labels[[2, 0]][:, order], step=5, **noise)
    assert torch.equal(moved, noisy[[2, 0]][:, :, order]) and torch.equal(relabelled, others[[2, 0]][:, :, order])
    assert (queries.noisy_targets(boxes, labels, step=6, **noise)[0] != noisy).any(-1).all()
    assert (noisy[:, 0] != noisy[:, 1]).any(-1).all() and torch.equal(torch.get_rng_state(), state)


def test_noisy_boxes_stay_within_the_image():
    edges = torch.tensor([[[0.0, 0.0, 1.0, 1.0], [0.9, 0.9, 1.2, 1.3], [0.5, 0.5, 0.5, 0.5], [-0.0, 0.0, 0.1, 0.0]]])
    noisy, _ = queries.noisy_targets(edges, torch.zeros(1, 4).long(), groups=50, box_noise=1.0)
    assert noisy.min() >= queries.LEAST and noisy.max() <= 1 - queries.LEAST and noisy.logit().isfinite().all()


def test_queries_see_the_known_ones_of_their_group_and_themselves():
    known = torch.tensor([[True, True, False], [False, False, False]])
    hidden = queries.hide_other_groups(known, 2)
    for image in range(2):
        for first in range(6):
            for second in range(6):
                seen = first == second or first // 3 == second // 3 and bool(known[image, second % 3])
                assert hidden[image, first, second] == (not seen)
