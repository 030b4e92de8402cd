import itertools

import pytest
import torch
from torchvision.ops import box_iou

from kd_det.evaluation.matching import match_detections, true_positives

SQUARE = [0.0, 0.0, 10.0, 10.0]


def random_boxes(count, seed):
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners, corners + 12], 1)


@pytest.mark.parametrize('seed', range(5))
def test_pairs_have_the_largest_sum_of_overlaps(seed):
    """Against all assignments of 4 boxes to 5."""
    boxes, others = random_boxes(4, seed), random_boxes(5, seed + 100)
    overlap = box_iou(boxes, others).double()
    overlap[overlap < 0.3] = 0
    best = max(sum(overlap[row, column] for row, column in enumerate(columns))
               for columns in itertools.permutations(range(5), 4))
    rows, columns, ious = match_detections(boxes, torch.zeros(4), others, torch.zeros(5), min_iou=0.3)
    assert ious.sum() == pytest.approx(best.item(), abs=1e-5) and (ious >= 0.3).all()
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == len(rows)


def test_labels_decide_between_boxes_at_one_place_alone():
    boxes = torch.tensor([SQUARE, SQUARE])
    rows, columns, _ = match_detections(boxes, torch.tensor([0, 1]), boxes, torch.tensor([1, 0]))
    assert dict(zip(rows.tolist(), columns.tolist())) == {0: 1, 1: 0}
    shifted = torch.tensor([[1.0, 0.0, 11.0, 10.0], SQUARE])
    _, columns, _ = match_detections(boxes[:1], torch.tensor([0]), shifted, torch.tensor([0, 1]))
    assert columns.tolist() == [1]  # overlap counts for more than the class


def test_nothing_matches_nothing():
    rows, columns, ious = match_detections(torch.zeros(0, 4), torch.zeros(0), torch.tensor([SQUARE]), torch.zeros(1))
    assert len(rows) == len(columns) == len(ious) == 0


def test_an_object_is_found_once_by_the_surest_box_of_its_class():
    boxes = torch.tensor([[1.0, 0.0, 11.0, 10.0], SQUARE, SQUARE, [50.0, 50.0, 60.0, 60.0]])
    scores, labels = torch.tensor([0.9, 0.8, 0.95, 0.7]), torch.tensor([0, 0, 1, 0])
    correct = true_positives(boxes, scores, labels, torch.tensor([SQUARE]), torch.tensor([0]))
    assert correct.tolist() == [True, False, False, False]


def test_without_objects_nothing_is_correct():
    correct = true_positives(torch.tensor([SQUARE]), torch.ones(1), torch.zeros(1), torch.zeros(0, 4), torch.zeros(0))
    assert correct.tolist() == [False]
