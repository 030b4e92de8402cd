import itertools

import pytest
import torch
from mmengine.structures import InstanceData
from torchvision.ops import box_iou

from kd_det.study.fidelity import class_overlaps, match_boxes, true_positives

SQUARE = [0.0, 0.0, 10.0, 10.0]


def labelled(boxes, labels):
    return InstanceData(bboxes=torch.tensor(boxes).reshape(-1, 4), labels=torch.tensor(labels).long())


def random_boxes(count, seed):
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 20
    return torch.cat([corners, corners + 12], 1)


@pytest.mark.parametrize('seed', range(5))
def test_pairs_have_the_largest_sum_of_overlaps(seed):
    """Against all assignments of 4 boxes to 5."""
    overlaps = box_iou(random_boxes(4, seed), random_boxes(5, seed + 100)).double()
    allowed = overlaps * (overlaps >= 0.3)
    best = max(sum(allowed[row, column] for row, column in enumerate(columns))
               for columns in itertools.permutations(range(5), 4))
    rows, columns = match_boxes(overlaps, min_iou=0.3)
    assert overlaps[rows, columns].sum() == pytest.approx(best.item(), abs=1e-5)
    assert (overlaps[rows, columns] >= 0.3).all()
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == len(rows)


def test_overlaps_are_of_one_class():
    half = [0.0, 0.0, 5.0, 10.0]
    overlaps = class_overlaps(labelled([SQUARE, half], [0, 1]), labelled([half, SQUARE, SQUARE], [0, 0, 1]))
    assert overlaps.tolist() == [[0.5, 1, 0], [0, 0, 0.5]]
    assert class_overlaps(labelled([half], [1]), labelled([SQUARE], [1]), 'iof').tolist() == [[1]]


def test_nothing_matches_nothing():
    nothing, square = labelled([], []), labelled([SQUARE], [0])
    for overlaps in (class_overlaps(nothing, square), class_overlaps(square, nothing)):
        rows, columns = match_boxes(overlaps)
        assert len(rows) == len(columns) == 0


def test_an_object_is_found_once_by_the_surest_box_of_its_class():
    boxes = labelled([[1.0, 0.0, 11.0, 10.0], SQUARE, SQUARE, [50.0, 50.0, 60.0, 60.0]], [0, 0, 1, 0])
    correct = true_positives(class_overlaps(boxes, labelled([SQUARE], [0])), torch.tensor([0.9, 0.8, 0.95, 0.7]))
    assert correct.tolist() == [True, False, False, False]


def test_without_objects_nothing_is_correct():
    assert true_positives(torch.zeros(1, 0), torch.ones(1)).tolist() == [False]
