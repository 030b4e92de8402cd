"""Cells that boxes and regions cover, against plain loops over boxes and cells."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.functional import masks
from kd_det.functional.masks import foreground

BATCH = (96, 160)


@pytest.fixture(params=['table', 'tree'])
def painting(request, monkeypatch):
    """Rectangles are painted by a table of cells × rectangles, or, as where that were large, without."""
    if request.param == 'tree':
        monkeypatch.setattr(foreground, 'TABLE', 0)


def loop_foreground(boxes, shape, feature_shape, weighting):
    height, width = feature_shape
    mask = torch.zeros(len(boxes), height, width)
    for image, image_boxes in enumerate(boxes):
        for x1, y1, x2, y2 in image_boxes:
            left, right = math.floor(x1 * width / shape[1]), math.ceil(x2 * width / shape[1])
            top, bottom = math.floor(y1 * height / shape[0]), math.ceil(y2 * height / shape[0])
            weight = torch.tensor(1.)
            if weighting == 'inverse_area':
                weight = torch.tensor(1.) / max(bottom + 1 - top, 1) / max(right + 1 - left, 1)
            for row in range(max(top, 0), min(bottom, height - 1) + 1):
                for column in range(max(left, 0), min(right, width - 1) + 1):
                    mask[image, row, column] = torch.maximum(mask[image, row, column], weight)
    return mask


@pytest.mark.parametrize('weighting', ['binary', 'inverse_area'])
@pytest.mark.parametrize('feature_shape', [(1, 1), (1, 7), (3, 5), (12, 20), (17, 33)])
def test_box_foreground_equals_the_loop(weighting, feature_shape, random_boxes, painting):
    special = torch.tensor([
        [0, 0, 160, 96],  # the whole batch
        [8, 8, 8, 8],  # a point on a cell's corner
        [9, 9, 9, 60],  # a line
        [150, 90, 170, 100],  # over the corner
        [-30, -30, -20, -20],  # outside, before
        [170, 100, 180, 110],  # outside, after
        [60, 40, 50, 30],  # inside out
    ], dtype=torch.float)
    boxes = [special, random_boxes(9, 0), torch.zeros(0, 4), random_boxes(9, 1, outside=0.5)]
    actual = masks.box_foreground(boxes, BATCH, feature_shape, weighting)
    assert torch.equal(actual, loop_foreground(boxes, BATCH, feature_shape, weighting))
    one_by_one = [masks.box_foreground([image_boxes], BATCH, feature_shape, weighting) for image_boxes in boxes]
    assert torch.equal(actual, torch.cat(one_by_one))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_box_foreground_of_many_boxes_makes_no_table_of_cells_times_boxes(random_boxes):
    boxes, feature_shape = [random_boxes(500, 3), random_boxes(500, 4)], (48, 80)
    assert 1000 * 48 * 80 > foreground.TABLE
    with LargestTensor() as largest:
        actual = masks.box_foreground(boxes, BATCH, feature_shape, 'inverse_area')
    cells, count = actual.numel(), 1000
    logarithms = 4 * math.ceil(math.log2(48)) * math.ceil(math.log2(80))
    assert largest.numel <= max(8 * cells, 2 * count * logarithms)
    assert largest.numel < cells * 500 / 10
    assert torch.equal(actual, loop_foreground(boxes, BATCH, feature_shape, 'inverse_area'))


def test_image_shapes_stretch_the_boxes_of_smaller_images():
    boxes = [torch.tensor([[0., 0., 40., 24.]])] * 2
    actual = masks.box_foreground(boxes, BATCH, (12, 20), image_shapes=[BATCH, (48, 80, 3)])
    assert torch.equal(actual[0], masks.box_foreground(boxes, BATCH, (12, 20))[0])
    assert torch.equal(actual[1], masks.box_foreground(boxes, (48, 80), (12, 20))[1])
    assert actual[1].sum() > actual[0].sum()


def test_box_foreground_rejects_an_unknown_weighting():
    with pytest.raises(ValueError, match="weighting='area': expected 'binary' or 'inverse_area'"):
        masks.box_foreground([torch.zeros(0, 4)], BATCH, (12, 20), 'area')


def test_valid_cells_hold_an_image_pixel():
    image_shapes = [(96, 160, 3), (50, 81), (8, 8), (0, 0)]
    for feature_shape in [(12, 20), (7, 3), (1, 1)]:
        actual = masks.valid_cells(image_shapes, BATCH, feature_shape, 'cpu')
        for image, (image_height, image_width, *_) in enumerate(image_shapes):
            for row in range(feature_shape[0]):
                for column in range(feature_shape[1]):
                    first_pixel = row * BATCH[0] / feature_shape[0], column * BATCH[1] / feature_shape[1]
                    expected = first_pixel[0] < image_height and first_pixel[1] < image_width
                    assert actual[image, row, column] == expected


def test_normalized_background():
    foreground = torch.tensor([[[0.5, 0.], [0., 0.]], [[1., 1.], [1., 1.]], [[0., 0.], [0., 0.]]])
    actual = masks.normalized_background(foreground)
    third, quarter = 1 / 3, 1 / 4
    assert torch.equal(actual, torch.tensor([[[0, third], [third, third]], [[0, 0], [0, 0]], [[quarter] * 2] * 2]))
    valid = torch.tensor([[[True, True], [False, False]]] * 2 + [[[False] * 2] * 2])
    actual = masks.normalized_background(foreground, valid)
    assert torch.equal(actual, torch.tensor([[[0., 1.], [0., 0.]], [[0., 0.], [0., 0.]], [[0., 0.], [0., 0.]]]))


@pytest.mark.parametrize('feature_shape', [(1, 1), (3, 5), (12, 20), (17, 33)])
def test_regions_equal_the_loop(feature_shape, random_boxes, painting):
    """At each cell the largest value of the regions that overlap it; an image may have none."""
    special = torch.tensor([[0., 0, 160, 96], [8, 8, 8, 8], [16, 8, 24, 16], [150, 90, 170, 100], [170, 100, 180, 110]])
    boxes, image = torch.cat([special, random_boxes(20, 3)]), torch.tensor([0] * 8 + [2] * 17)
    values = torch.rand(25, generator=torch.Generator().manual_seed(0))
    values[0] = 0.01  # below the others: it counts where it is alone
    rois = torch.cat([image[:, None].float(), boxes], 1)
    actual = masks.region_foreground(rois, values, 3, BATCH, feature_shape)
    height, width = feature_shape
    expected = torch.zeros(3, height, width)
    for (x1, y1, x2, y2), index, value in zip(boxes.tolist(), image.tolist(), values):
        left, right, top, bottom = (edge * cells / pixels for edge, cells, pixels in (
            (x1, width, BATCH[1]), (x2, width, BATCH[1]), (y1, height, BATCH[0]), (y2, height, BATCH[0])))
        for row, column in ((row, column) for row in range(height) for column in range(width)):
            overlaps = left < column + 1 and top < row + 1 and right > column and bottom > row
            corner = math.floor(left) == column and math.floor(top) == row
            if overlaps or corner:
                expected[index, row, column] = torch.maximum(expected[index, row, column], value)
    torch.testing.assert_close(actual, expected)
    assert actual[1].max() == 0 and (actual[0] > 0).all()


def test_masks_of_boxes_carry_no_gradient(random_boxes):
    boxes = [random_boxes(3, 12).requires_grad_()]
    levels = masks.assign_levels(boxes, 2)
    foreground = masks.box_foreground(boxes, BATCH, (12, 20), 'inverse_area')
    assert not foreground.requires_grad
    assert not masks.normalized_background(foreground).requires_grad
    assert not masks.level_foreground(boxes, levels, 4, (24, 40)).requires_grad
