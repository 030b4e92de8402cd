"""Masks of one level against plain loops over boxes, cells and anchors."""
import pytest
import torch

from kd_det.functional import masks

BATCH = (96, 160)


def test_assign_levels():
    sides = torch.tensor([1., 56., 110., 111.1, 223.1, 447.1, 895.1, 5000.])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)
    levels, none, wide = masks.assign_levels([boxes, torch.zeros(0, 4), torch.tensor([[0., 0., 224 * 224 - 1, 0.]])], 5)
    assert levels.tolist() == [0, 0, 0, 1, 2, 3, 4, 4]
    assert none.shape == (0, ) and none.dtype == torch.long
    assert wide.tolist() == [2]


def test_level_foreground_equals_the_loop(random_boxes):
    tiny = torch.tensor([[8., 8., 9., 30.], [159., 95., 160., 96.]])
    boxes = [random_boxes(12, 5, outside=0.2), torch.zeros(0, 4), tiny]
    levels = [torch.arange(12) % 3, torch.zeros(0, dtype=torch.long), torch.tensor([1, 1])]
    for level, stride in enumerate([4, 8, 16]):
        height, width = BATCH[0] // stride, BATCH[1] // stride
        expected = torch.zeros(3, height, width)
        for image in range(3):
            for box, assigned in zip(boxes[image], levels[image]):
                if assigned == level:
                    x1, y1, x2, y2 = (int(value) for value in box / stride)
                    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
                    if x1 >= x2 or y1 >= y2:
                        expected[image, min(y1, height - 1), min(x1, width - 1)] = 1
                    else:
                        expected[image, y1:y2, x1:x2] = 1
        assert 0 < expected.sum() < expected.numel()
        assert torch.equal(masks.level_foreground(boxes, levels, stride, (height, width)), expected)
        # The same by what the boxes are, rather than by the stride.
        belongs = [assigned == level for assigned in levels]
        assert torch.equal(masks.level_foreground(boxes, belongs, stride, (height, width)), expected)
        shifted = [assigned + 7 for assigned in levels]
        assert torch.equal(masks.level_foreground(boxes, shifted, stride, (height, width), level=level + 7), expected)


def shifted(shapes: torch.Tensor, feature_shape, stride: float) -> torch.Tensor:
    """Anchors of each cell, row by row."""
    y, x = torch.meshgrid(*(stride * torch.arange(size) for size in feature_shape), indexing='ij')
    return (shapes + torch.stack([x, y, x, y], -1).view(-1, 1, 4)).view(-1, 4)


def loop_near_anchors(boxes, belongs, priors, feature_shape, phi, loop_iou):
    expected = torch.zeros(len(boxes), feature_shape[0] * feature_shape[1])
    for image, (image_boxes, on_level) in enumerate(zip(boxes, belongs)):
        for box in image_boxes[on_level].double():
            overlaps = torch.tensor([loop_iou(box.tolist(), prior) for prior in priors.tolist()])
            near = (overlaps > phi * overlaps.max()).view(expected.shape[1], -1).any(1)
            expected[image] = torch.maximum(expected[image], near.float())
    return expected.view(-1, *feature_shape)


@pytest.mark.parametrize('feature_shape, stride',
                         [((1, 1), 64), ((1, 9), 16), ((6, 1), 16), ((6, 10), 16), ((12, 20), 8)])
@pytest.mark.parametrize('phi', [0.0, 0.5, 0.9])
def test_near_anchor_foreground_equals_the_loop(feature_shape, stride, phi, random_boxes, loop_iou):
    shapes = stride * torch.tensor([[-1.5, -1., 1.5, 1.], [-0.6, -1.3, 0.6, 1.3], [0., 0., 1., 1.],
                                    [-4., -2., 4., 2.1]])
    priors = shifted(shapes, feature_shape, stride)
    special = torch.tensor([
        [1000., 1000., 1010., 1010.],  # overlaps no anchor
        [40., 40., 40., 60.],  # a line
        [40., 40., 40., 40.],  # a point
        [60., 40., 50., 30.],  # inside out
        [-900., -900., 900., 900.],  # more than the image
        [-30., 20., 4., 50.],  # over the edge
    ])
    random = random_boxes(6, 7, outside=0.3)
    boxes = [special, random_boxes(9, 8), torch.zeros(0, 4), random, *(each[None] for each in special[:4])]
    belongs = [torch.arange(len(each)) % 3 != 1 for each in boxes[:4]] + 4 * [torch.tensor([True])]
    levels = [each.long() for each in belongs]
    actual = masks.near_anchor_foreground(boxes, levels, 1, priors, feature_shape, phi)
    assert torch.equal(actual, loop_near_anchors(boxes, belongs, priors, feature_shape, phi, loop_iou))
    assert torch.equal(actual, masks.near_anchor_foreground(boxes, belongs, 7, priors, feature_shape, phi))
    assert actual[4:].max() == 0 and actual[1].max() == 1


@pytest.mark.parametrize('spoil', [
    lambda priors: priors.roll(1, 0),  # cells begin within a cell
    lambda priors: priors.flip(0),  # columns from right to left
    lambda priors: priors * torch.linspace(1, 2, len(priors))[:, None],  # sizes that grow
    lambda priors: priors + torch.arange(len(priors))[:, None].remainder(14) // 7,  # shapes that part
])
def test_near_anchors_are_a_grid(spoil, random_boxes):
    priors, boxes = shifted(torch.tensor([[-8., -8., 8., 8.], [-4., -8., 4., 8.]]), (5, 7), 8), [random_boxes(3, 0)]
    levels = masks.assign_levels(boxes, 1)
    assert masks.near_anchor_foreground(boxes, levels, 0, priors, (5, 7)).any()
    with pytest.raises(RuntimeError, match='expected the same boxes at each cell, shifted with columns and rows'):
        masks.near_anchor_foreground(boxes, levels, 0, spoil(priors), (5, 7))
