import math

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, soft_nms


def random_boxes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 60
    return torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=generator) * 30], dim=1)


def reference_nms(boxes, scores, threshold, offset):
    """Greedy suppression, one pair at a time."""
    keep = []
    for i in scores.argsort(descending=True).tolist():
        if all(reference_iou(boxes[i], boxes[j], offset) <= threshold for j in keep):
            keep.append(i)
    return keep


def reference_iou(a, b, offset):
    w = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    area = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return w * h / (area[0] + area[1] - w * h)


def reference_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """Takes the best remaining box, decays all others, drops the weak ones."""
    remaining = {i: float(score) for i, score in enumerate(scores)}
    chosen = []
    while remaining:
        best = max(remaining, key=remaining.get)
        chosen.append((best, remaining.pop(best)))
        for i in list(remaining):
            iou = float(reference_iou(boxes[best], boxes[i], offset))
            decay = dict(naive=0 if iou >= threshold else 1, linear=1 - iou if iou >= threshold else 1,
                         gaussian=math.exp(-iou**2 / sigma))[method]
            remaining[i] *= decay
            if remaining[i] < min_score:
                del remaining[i]
    return chosen


@pytest.mark.parametrize('offset', [0, 1])
def test_nms_equals_greedy_suppression(offset):
    boxes = random_boxes(60).double()
    scores = torch.rand(60, generator=torch.Generator().manual_seed(1)).double()
    dets, inds = nms(boxes, scores, 0.4, offset=offset)
    assert inds.tolist() == reference_nms(boxes, scores, 0.4, offset)
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[inds])


def test_offset_decides():
    # IoU 0.5 of the continuous boxes; 11 x 6 of 11 x 11 pixels, 0.545, when the last pixel is inside.
    boxes, scores = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 5.]]), torch.tensor([0.9, 0.8])
    assert len(nms(boxes, scores, 0.52, offset=0)[1]) == 2
    assert len(nms(boxes, scores, 0.52, offset=1)[1]) == 1


def test_iou_equal_to_the_threshold_is_kept():
    # IoU 6 / 10: as float32 it exceeds the double 0.6, but not the float32 to which mmcv rounds the threshold.
    boxes, scores = torch.tensor([[0., 0., 10., 1.], [0., 0., 6., 1.]]), torch.tensor([0.9, 0.8])
    assert len(nms(boxes, scores, 0.6)[1]) == 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_nms_in_other_precisions(dtype):
    boxes, scores = random_boxes(40).to(dtype), torch.arange(40, 0, -1).to(dtype)
    dets, inds = nms(boxes, scores, 0.5)
    assert dets.dtype == dtype
    assert inds.tolist() == nms(boxes.float(), scores.float(), 0.5)[1].tolist()


def test_nms_of_numpy_arrays():
    boxes, scores = random_boxes(20).numpy(), np.linspace(1, 0, 20, dtype=np.float32)
    dets, inds = nms(boxes, scores, 0.5)
    assert isinstance(dets, np.ndarray) and np.array_equal(dets[:, :4], boxes[inds])


def test_no_boxes():
    boxes, scores = torch.zeros(0, 4), torch.zeros(0)
    for dets, inds in (nms(boxes, scores, 0.5), soft_nms(boxes, scores, 0.5)):
        assert dets.shape == (0, 5) and inds.shape == (0, ) and inds.dtype == torch.long
    assert batched_nms(random_boxes(3), torch.ones(3), torch.arange(3), dict(type='nms', iou_threshold=0.1))[0].shape \
        == (3, 5), 'boxes of different classes never suppress each other'
    assert nms(boxes, scores, 0.5, offset=1)[1].shape == (0, )


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_equals_its_definition(method, offset):
    boxes, scores = random_boxes(50, seed=2), torch.rand(50, generator=torch.Generator().manual_seed(3))
    dets, inds = soft_nms(boxes, scores, 0.3, sigma=0.4, min_score=0.05, method=method, offset=offset)
    expected = reference_soft_nms(boxes.double(), scores, 0.3, 0.4, 0.05, method, offset)
    assert inds.tolist() == [i for i, _ in expected]
    assert torch.equal(dets[:, :4], boxes[inds])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]), rtol=1e-5, atol=1e-6)


def test_soft_nms_order_of_ties():
    # After box 3 is chosen, 0 stands in its place; when 1 is dropped, the last box fills the gap: mmcv's order.
    boxes = torch.tensor([[0., 0, 1, 1], [50, 0, 60, 10], [20, 0, 21, 1], [50, 0, 60, 10], [30, 0, 31, 1]])
    scores = torch.tensor([0.5, 0.5, 0.5, 0.9, 0.5])
    assert soft_nms(boxes, scores, 0.5, method='naive')[1].tolist() == [3, 4, 2, 0]


def test_soft_nms_leaves_its_input_alone():
    boxes, scores = random_boxes(10), torch.rand(10)
    before = boxes.clone(), scores.clone()
    soft_nms(boxes, scores, 0.1)
    assert torch.equal(boxes, before[0]) and torch.equal(scores, before[1])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
def test_nms_match_equals_its_definition(dtype):
    boxes, scores = random_boxes(50).to(dtype), torch.linspace(0, 1, 50)[torch.randperm(50)].to(dtype)
    groups = nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.3)
    remaining, expected = scores.argsort(descending=True).tolist(), []
    while remaining:
        best = remaining.pop(0)
        overlaps = {i: reference_iou(boxes[best].double(), boxes[i].double(), 0) for i in remaining}
        expected.append([best, *(i for i in remaining if overlaps[i] >= 0.3)])
        remaining = [i for i in remaining if i not in expected[-1]]
    assert [group.tolist() for group in groups] == expected
    assert sorted(torch.cat(groups).tolist()) == list(range(50))


def test_nms_match_takes_an_iou_equal_to_the_threshold():
    # Here a group begins at the threshold, where nms keeps the box.
    dets = torch.tensor([[0., 0., 10., 1., 0.9], [0., 0., 6., 1., 0.8], [0., 0., 5., 1., 0.7]])
    assert [group.tolist() for group in nms_match(dets, 0.6)] == [[0, 1], [2]]


def test_nms_match_of_nothing_and_of_numpy_arrays():
    assert nms_match(torch.zeros(0, 5), 0.5) == []
    dets = np.array([[0, 0, 10, 10, 0.5], [0, 0, 10, 10, 0.9]], dtype=np.float32)
    assert [group.tolist() for group in nms_match(dets, 0.5)] == [[1, 0]]
