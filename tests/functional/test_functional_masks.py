"""Masks against plain loops over boxes and cells, written from the formulas."""
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.functional import masks

BATCH = (96, 160)


def random_boxes(count: int, seed: int, shape=BATCH, outside: float = 0.0) -> torch.Tensor:
    """Boxes from thin to large; ``outside`` is how far, in image sizes, they may leave the image."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([shape[1], shape[0]], dtype=torch.float)
    first, second = ((torch.rand(count, 2, generator=generator) * (1 + 2 * outside) - outside) * size for _ in range(2))
    extent = torch.rand(count, 1, generator=generator)**2
    second = first + (second - first) * extent
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], 1)


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
def test_box_foreground_equals_the_loop(weighting, feature_shape):
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


def test_box_foreground_of_many_boxes_makes_no_table_of_cells_times_boxes():
    boxes, feature_shape = [random_boxes(500, 3), random_boxes(500, 4)], (48, 80)
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


def loop_attention(feature, temperature):
    """Both attentions of one image (C, H, W)."""
    channels, height, width = feature.shape
    cells = torch.stack([feature[:, i, j].abs().sum() / channels for i in range(height) for j in range(width)])
    means = torch.stack([feature[c].abs().sum() / (height * width) for c in range(channels)])
    cells, means = (cells / temperature).exp(), (means / temperature).exp()
    return (height * width * cells / cells.sum()).view(height, width), channels * means / means.sum()


def test_attentions_equal_the_loop():
    feature = torch.randn(2, 5, 3, 4)
    for image in range(2):
        spatial, channel = loop_attention(feature[image], 0.5)
        torch.testing.assert_close(masks.spatial_attention(feature, 0.5)[image], spatial)
        torch.testing.assert_close(masks.channel_attention(feature, 0.5)[image], channel)


@pytest.mark.parametrize('attention', [masks.spatial_attention, masks.channel_attention])
def test_attentions_of_valid_cells_are_those_of_the_cropped_feature(attention):
    feature = torch.randn(2, 5, 6, 8, dtype=torch.float64, requires_grad=True)
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    valid[:, :4, :5] = True
    actual, cropped = attention(feature, 0.5, valid), attention(feature[:, :, :4, :5], 0.5)
    if attention is masks.spatial_attention:
        assert actual[~valid].abs().max() == 0
        actual = actual[:, :4, :5]
    torch.testing.assert_close(actual, cropped)
    gradient, = torch.autograd.grad(actual.square().sum(), feature)
    assert gradient[:, :, 4:].abs().max() == 0 and gradient[:, :, :4, :5].abs().max() > 0


@pytest.mark.parametrize('attention', [masks.spatial_attention, masks.channel_attention])
def test_attentions_of_padding_alone_are_zero_with_finite_gradient(attention):
    feature = torch.randn(1, 3, 2, 2, requires_grad=True)
    actual = attention(feature, 0.5, torch.zeros(1, 2, 2, dtype=torch.bool))
    assert actual.abs().max() == 0
    gradient, = torch.autograd.grad(actual.sum(), feature)
    assert gradient.abs().max() == 0


def test_attention_of_one_cell_is_one():
    assert torch.equal(masks.spatial_attention(torch.randn(2, 3, 1, 1), 0.5), torch.ones(2, 1, 1))


def test_assign_levels():
    sides = torch.tensor([1., 56., 110., 111.1, 223.1, 447.1, 895.1, 5000.])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], 1)
    levels, none, wide = masks.assign_levels([boxes, torch.zeros(0, 4), torch.tensor([[0., 0., 224 * 224 - 1, 0.]])], 5)
    assert levels.tolist() == [0, 0, 0, 1, 2, 3, 4, 4]
    assert none.shape == (0, ) and none.dtype == torch.long
    assert wide.tolist() == [2]


def test_level_foreground_equals_the_loop():
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


def loop_iou(a, b):
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def shifted(shapes: torch.Tensor, feature_shape, stride: float) -> torch.Tensor:
    """Anchors of each cell, row by row."""
    y, x = torch.meshgrid(*(stride * torch.arange(size) for size in feature_shape), indexing='ij')
    return (shapes + torch.stack([x, y, x, y], -1).view(-1, 1, 4)).view(-1, 4)


def loop_near_anchors(boxes, belongs, priors, feature_shape, phi):
    expected = torch.zeros(len(boxes), feature_shape[0] * feature_shape[1])
    for image, (image_boxes, on_level) in enumerate(zip(boxes, belongs)):
        for box in image_boxes[on_level].double():
            overlaps = torch.tensor([loop_iou(box.tolist(), prior) for prior in priors.tolist()])
            near = (overlaps > phi * overlaps.max()).view(expected.shape[1], -1).any(1)
            expected[image] = torch.maximum(expected[image], near.float())
    return expected.view(-1, *feature_shape)


@pytest.mark.parametrize('feature_shape, stride', [((1, 1), 64), ((1, 9), 16), ((6, 1), 16), ((6, 10), 16), ((12, 20), 8)])
@pytest.mark.parametrize('phi', [0.0, 0.5, 0.9])
def test_near_anchor_foreground_equals_the_loop(feature_shape, stride, phi):
    shapes = stride * torch.tensor([[-1.5, -1., 1.5, 1.], [-0.6, -1.3, 0.6, 1.3], [0., 0., 1., 1.], [-4., -2., 4., 2.1]])
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
    assert torch.equal(actual, loop_near_anchors(boxes, belongs, priors, feature_shape, phi))
    assert torch.equal(actual, masks.near_anchor_foreground(boxes, belongs, 7, priors, feature_shape, phi))
    assert actual[4:].max() == 0 and actual[1].max() == 1


@pytest.mark.parametrize('spoil', [
    lambda priors: priors.roll(1, 0),  # cells begin within a cell
    lambda priors: priors.flip(0),  # columns from right to left
    lambda priors: priors * torch.linspace(1, 2, len(priors))[:, None],  # sizes that grow
    lambda priors: priors + torch.arange(len(priors))[:, None].remainder(14) // 7,  # rows that are skewed
])
def test_near_anchors_are_a_grid(spoil):
    priors, boxes = shifted(torch.tensor([[-8., -8., 8., 8.], [-4., -8., 4., 8.]]), (5, 7), 8), [random_boxes(3, 0)]
    levels = masks.assign_levels(boxes, 1)
    assert masks.near_anchor_foreground(boxes, levels, 0, priors, (5, 7)).any()
    with pytest.raises(RuntimeError, match='expected the same boxes at each cell, shifted with columns and rows'):
        masks.near_anchor_foreground(boxes, levels, 0, spoil(priors), (5, 7))


def test_prediction_difference_and_teacher_confidence():
    student, teacher = (torch.rand(2, 3, 4, 5, requires_grad=True) for _ in range(2))
    difference, confidence = masks.prediction_difference(student, teacher), masks.teacher_confidence(teacher)
    for i in range(4):
        for j in range(5):
            gaps = [(teacher[1, c, i, j] - student[1, c, i, j]).item()**2 for c in range(3)]
            assert difference[1, i, j].item() == pytest.approx(sum(gaps) / 3)
            assert confidence[1, i, j] == max(teacher[1, c, i, j] for c in range(3))
    assert not difference.requires_grad and not confidence.requires_grad


@pytest.mark.parametrize('budget', [2**24, 100])
def test_prediction_quality_equals_the_loop(budget, monkeypatch):
    monkeypatch.setattr(masks, '_OVERLAP_BUDGET', budget)
    xi, top_k = 0.8, 5
    points = torch.stack(torch.meshgrid(torch.arange(4., 96, 8), torch.arange(4., 160, 8), indexing='ij'), -1).flip(-1)
    points = points.reshape(-1, 2)
    count = len(points)
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(2, count, 3, generator=generator)
    predictions = torch.stack([random_boxes(count, 9), random_boxes(count, 10)])
    boxes = [torch.cat([random_boxes(3, 11), torch.tensor([[20., 20., 90., 60.], [200., 200., 210., 210.]])]),
             torch.zeros(0, 4)]
    labels = [torch.tensor([0, 1, 2, 1, 0]), torch.zeros(0, dtype=torch.long)]
    actual = masks.prediction_quality(probabilities, predictions, points, boxes, labels, xi, top_k)

    expected = torch.zeros(2, count, dtype=torch.float64)
    for box, label in zip(boxes[0].tolist(), labels[0].tolist()):
        quality = torch.zeros(count)
        for index, (x, y) in enumerate(points.tolist()):
            if box[0] <= x <= box[2] and box[1] <= y <= box[3]:
                overlap = loop_iou(box, predictions[0, index].tolist())
                quality[index] = probabilities[0, index, label].item()**(1 - xi) * overlap**xi
        best = [index for index in quality.argsort(descending=True)[:top_k].tolist() if quality[index] > 0]
        if not best:
            continue
        chosen = points[best].double()
        offset = chosen - chosen.mean(0)
        inverse = torch.linalg.pinv(offset.T @ offset / len(best), rtol=1e-6)
        height = (-0.5 * (offset @ inverse * offset).sum(1)).exp()
        for index, value in zip(best, height):
            expected[0, index] = max(expected[0, index], value)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    assert (actual[0] > 0).sum() >= top_k


def test_quality_of_a_cell_is_that_of_its_best_prediction():
    """Two predictions on the first half of the cells, three on the others."""
    points = torch.stack(torch.meshgrid(torch.arange(4., 96, 8), torch.arange(4., 160, 8), indexing='ij'), -1).flip(-1)
    points, boxes, labels = points.reshape(-1, 2), [torch.tensor([[10., 10., 90., 80.]])], [torch.tensor([1])]
    half = len(points) // 2
    cells = torch.arange(len(points)).repeat_interleave(torch.tensor([2, 3]).repeat_interleave(half))
    probabilities, predictions = torch.rand(1, len(cells), 3), random_boxes(len(cells), 9)[None]
    actual = masks.prediction_quality(probabilities, predictions, points, boxes, labels, 0.6, 5, cells)
    overlap = torch.tensor([loop_iou(boxes[0][0].tolist(), each.tolist()) for each in predictions[0]])
    quality = probabilities[0, :, 1]**0.4 * overlap**0.6
    best = torch.stack([(quality - 2.0 * (cells != cell)).argmax() for cell in range(len(points))])
    expected = masks.prediction_quality(probabilities[:, best], predictions[:, best], points, boxes, labels, 0.6, 5)
    assert torch.equal(actual, expected) and (actual > 0).sum() == 5


@pytest.mark.parametrize('budget', [2**24, 100])
def test_valuable_region_equals_the_loop(budget, monkeypatch):
    """DIoU by its definition, prior by prior, weighted by the IoU; the second image has no boxes."""
    monkeypatch.setattr(masks, '_OVERLAP_BUDGET', budget)
    gamma, top_k = 0.3, 4
    centers = [torch.cartesian_prod(*[torch.arange(stride / 2, 96, stride)] * 2) for stride in (16, 32)]
    priors = [torch.cat([each - 2 * stride, each + 2 * stride], 1) for each, stride in zip(centers, (8, 16))]
    boxes = [torch.tensor([[10., 20., 50., 48.], [30., 30., 93., 90.], [80., 2., 90., 9.]]), torch.zeros(0, 4)]
    actual = masks.valuable_region(priors, boxes, gamma, top_k)

    expected = torch.zeros(2, 45)
    for box in boxes[0].tolist():
        overlaps, proximities, candidates = [], [], []
        for level in priors:
            distances, here = [], []
            for prior in level.tolist():
                distance = sum((box[side] + box[side + 2] - prior[side] - prior[side + 2])**2 / 4 for side in (0, 1))
                hull = sum((max(box[side + 2], prior[side + 2]) - min(box[side], prior[side]))**2 for side in (0, 1))
                distances.append(distance)
                here.append(loop_iou(box, prior))
                proximities.append(here[-1] - distance / hull)
            overlaps += here
            nearest = sorted(range(len(here)), key=distances.__getitem__)[:top_k]
            candidates += [here[index] for index in nearest]
        threshold = torch.tensor(candidates).mean() + torch.tensor(candidates).std()
        proximities, overlaps = torch.tensor(proximities), torch.tensor(overlaps)
        valuable = (gamma * threshold <= proximities) & (proximities < threshold)
        expected[0] = torch.maximum(expected[0], overlaps * valuable)
    torch.testing.assert_close(actual, expected)
    assert 5 < (expected > 0).sum() < 40


@pytest.mark.parametrize('feature_shape', [(1, 1), (3, 5), (12, 20), (17, 33)])
def test_regions_equal_the_loop(feature_shape):
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


def test_masks_of_boxes_carry_no_gradient():
    boxes = [random_boxes(3, 12).requires_grad_()]
    levels = masks.assign_levels(boxes, 2)
    foreground = masks.box_foreground(boxes, BATCH, (12, 20), 'inverse_area')
    assert not foreground.requires_grad
    assert not masks.normalized_background(foreground).requires_grad
    assert not masks.level_foreground(boxes, levels, 4, (24, 40)).requires_grad
