"""Masks of predictions and of priors against plain loops, written from the formulas."""
import pytest
import torch

from kd_det.functional import blocks, masks
from kd_det.functional.boxes import find_nearest
from kd_det.functional.logits import class_probabilities


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
def test_prediction_quality_equals_the_loop(budget, monkeypatch, random_boxes, loop_iou):
    monkeypatch.setattr('kd_det.functional.boxes._TABLE_BUDGET', budget)
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


def test_quality_of_a_cell_is_that_of_its_best_prediction(random_boxes, loop_iou):
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
def test_valuable_region_equals_the_loop(budget, monkeypatch, loop_iou):
    """DIoU by its definition, prior by prior, weighted by the IoU; the second image has no boxes."""
    monkeypatch.setattr('kd_det.functional.boxes._TABLE_BUDGET', budget)
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


@pytest.mark.parametrize('anchors, top_k', [(1, 9), (1, 4), (3, 9), (2, 4)])
def test_valuable_region_of_grids_is_that_of_the_table(anchors, top_k, random_boxes):
    """Of four levels, the last one row; boxes at the rim and outside, smaller than a pixel, without area, and none."""
    shapes, priors = ((12, 20), (6, 10), (3, 5), (1, 3)), []
    sides = torch.tensor([[4., 4.], [3.3, 5.1], [7.7, 5.3]])[:anchors]
    for stride, shape in zip((8, 16, 32, 64), shapes):
        rows, columns = torch.meshgrid(*(stride * torch.arange(side) + stride / 2 for side in shape), indexing='ij')
        centres = torch.stack([columns, rows], -1).view(-1, 1, 2)
        priors.append(torch.cat([centres - stride / 2 * sides, centres + stride / 2 * sides], 2).view(-1, 4))
    odd = torch.tensor([[30.3, 40.2, 30.9, 40.4], [50., 50., 50., 70.], [400., 400., 450., 470.], [-80., -9., -3., 60]])
    boxes = [torch.cat([random_boxes(60, 3, outside=0.2), odd]), torch.zeros(0, 4), random_boxes(7, 5)]
    for gamma in (0.25, 0.0):
        actual = masks.valuable_region_of_grids(priors, shapes, boxes, gamma, top_k)
        assert torch.equal(actual, masks.valuable_region(priors, boxes, gamma, top_k))
        assert (actual[0] > 0).sum() > 50 and not actual[1].any() and actual[2].any()
    assert not masks.valuable_region_of_grids(priors, shapes, [odd[:0]] * 2).any()
    with pytest.raises(RuntimeError, match='expected the same boxes at each cell'):
        masks.valuable_region_of_grids([each.flip(0) for each in priors], shapes, boxes)


@pytest.mark.parametrize('block', [2**16, 9])
def test_the_nearest_box_equals_the_loop(block, monkeypatch, random_boxes, loop_iou):
    monkeypatch.setattr(blocks, 'ROW_BLOCK', block)
    truth = [random_boxes(3, 1), torch.zeros(0, 4), random_boxes(5, 2)]
    predictions = torch.stack([random_boxes(40, seed) for seed in (3, 4, 5)])
    predictions[2, 7] = float('nan')
    candidates = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    candidates[2, 7] = True
    actual = find_nearest(predictions, truth, candidates)
    for image, start in enumerate((0, 3, 3)):
        for index, predicted in enumerate(predictions[image].tolist()):
            overlaps = [loop_iou(predicted, box) for box in truth[image].tolist()]
            best = max(overlaps, default=0)
            found = best > 0 and candidates[image, index] and predicted[0] == predicted[0]
            assert actual[image, index] == (start + overlaps.index(best) if found else -1)
    assert (find_nearest(predictions, [torch.zeros(0, 4)] * 3, candidates) == -1).all()


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax', 'objectness'])
@pytest.mark.parametrize('block', [2**16, 60])
def test_quality_of_grids_is_that_of_the_table(activation, block, random_boxes, monkeypatch):
    """Two levels with other numbers of priors; boxes at the rim, without cells, and of a class that there is not."""
    monkeypatch.setattr(blocks, 'ROW_BLOCK', block)
    generator, shapes, anchors = torch.Generator().manual_seed(0), ((12, 20), (6, 10)), (2, 3)
    grids = [torch.stack(torch.meshgrid(*(stride * torch.arange(side) + stride / 2.0 for side in shape),
                                        indexing='ij'), -1).flip(-1) for shape, stride in zip(shapes, (8, 16))]
    counts = [height * width * each for (height, width), each in zip(shapes, anchors)]
    logits = [torch.randn(2, count, 3 + (activation == 'softmax'), generator=generator) for count in counts]
    objectness = None
    if activation == 'objectness':
        activation, objectness = 'sigmoid', [torch.randn(2, count, generator=generator) for count in counts]
    predictions = [torch.stack([random_boxes(count, 9 + image) for image in range(2)]) for count in counts]
    boxes = [torch.cat([random_boxes(4, 11), torch.tensor([[-9., -9., 40., 30.], [5., 5., 7., 7.]])]),
             torch.tensor([[8., 8., 90., 90.], [20., 10., 99., 80.]])]
    labels = [torch.tensor([0, 1, 2, -1, 1, 0]), torch.tensor([3, 2])]
    actual = masks.prediction_quality_of_grids(logits, predictions, grids, boxes, labels, activation, objectness,
                                               top_k=7)
    probabilities = torch.cat([class_probabilities(each, activation, objectness and objectness[level])
                               for level, each in enumerate(logits)], 1)
    cells = torch.cat([each.repeat_interleave(count) for each, count in
                       zip(torch.arange(300).split([240, 60]), anchors)])
    expected = masks.prediction_quality(probabilities, torch.cat(predictions, 1), torch.cat([
        each.flatten(0, 1) for each in grids]), boxes, labels, top_k=7, cells=cells)
    torch.testing.assert_close(actual, expected)
    assert (actual[0] > 0).sum() > 14 and (actual[1] > 0).sum() == 7
    none = masks.prediction_quality_of_grids(logits, predictions, grids, [torch.zeros(0, 4)] * 2,
                                             [torch.zeros(0, dtype=torch.long)] * 2, activation, objectness)
    assert none.shape == actual.shape and not none.any()
