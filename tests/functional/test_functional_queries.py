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
