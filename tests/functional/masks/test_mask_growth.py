"""Masks of boxes grow with cells + boxes, not cells × boxes: by the elements that they make, not by the clock."""
import pytest
import torch
from mmdet.registry import MODELS
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.functional import masks
from kd_det.functional.masks import foreground

BATCH, CELLS = (800, 1344), (100, 168)
FINER = (400, 672)  # 16 times the cells


class Elements(TorchDispatchMode):
    """Counts the elements of all results."""
    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else [result]
        self.made += sum(each.numel() for each in results if isinstance(each, torch.Tensor))
        return result


def boxes_of(count):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, count, 2, generator=generator) * torch.tensor([1200., 700.])
    return list(torch.cat([corner, corner + 10 + 300 * torch.rand(2, count, 2, generator=generator)], 2))


def level(boxes, cells):
    return masks.level_foreground(boxes, masks.assign_levels(boxes, 4), BATCH[0] // cells[0], cells, 0)


def near_anchors(boxes, cells):
    y, x = torch.meshgrid(*(side // size * torch.arange(size) for side, size in zip(BATCH, cells)), indexing='ij')
    shapes = torch.tensor([[-64., -32., 64., 32.], [-45., -45., 45., 45.], [-32., -64., 32., 64.]])
    priors = (torch.stack([x, y, x, y], -1).view(-1, 1, 4) + shapes).view(-1, 4)
    return masks.near_anchor_foreground(boxes, masks.assign_levels(boxes, 4), 0, priors, cells)


def qualities(boxes, cells):
    """Boxes of as many cells on either grid."""
    stride, count = BATCH[0] // cells[0], cells[0] * cells[1]
    boxes = [torch.cat([each[:, :2], each[:, :2] + 3 * stride], 1) for each in boxes]
    centres = torch.meshgrid(*(stride * torch.arange(side) + stride / 2 for side in cells), indexing='ij')
    grid = torch.stack(centres, -1).flip(-1)
    outputs = [torch.zeros(1, 1, size).expand(2, count, size) for size in (3, 4)]
    labels = [torch.zeros(len(each), dtype=torch.long) for each in boxes]
    return masks.prediction_quality_of_grids(outputs[:1], outputs[1:], [grid], boxes, labels, 'sigmoid', top_k=4)


def valuable(boxes, cells):
    """Boxes and anchors of as many cells on either grid."""
    stride = BATCH[0] // cells[0]
    boxes = [torch.cat([each[:, :2], each[:, :2] + 9 * stride], 1) for each in boxes]
    y, x = torch.meshgrid(*(stride * torch.arange(size) for size in cells), indexing='ij')
    priors = torch.stack([x - 4 * stride, y - 4 * stride, x + 4 * stride, y + 4 * stride], -1).view(-1, 4)
    return masks.valuable_region_of_grids([priors], [cells], boxes)


# What a box adds may grow so many times where the cells do 16 times: by logarithms, or with rows + columns.
MASKS = dict(
    foreground=(2, lambda boxes, cells: masks.box_foreground(boxes, BATCH, cells, 'inverse_area')),
    background=(2, lambda boxes, cells: masks.normalized_background(masks.box_foreground(boxes, BATCH, cells))),
    level=(2, level),
    near_anchors=(4, near_anchors),
    qualities=(1.5, qualities),
    valuable=(1.5, valuable),
)


def made(mask, count, cells):
    with Elements() as elements:
        mask(boxes_of(count), cells)
    return elements.made


@pytest.mark.parametrize('growth, mask', MASKS.values(), ids=MASKS.keys())
def test_what_a_box_adds_does_not_grow_like_the_cells(growth, mask, monkeypatch):
    monkeypatch.setattr(foreground, 'TABLE', 0)
    each, each_of_finer = ((made(mask, 500, cells) - made(mask, 50, cells)) / 900 for cells in (CELLS, FINER))
    assert (made(mask, 5000, CELLS) - made(mask, 500, CELLS)) / 9000 == pytest.approx(each, rel=0.01)
    assert 0 < each_of_finer < growth * each and each_of_finer < FINER[0] * FINER[1] / 5


def test_a_table_of_cells_and_boxes_is_made_while_it_is_small():
    few, limit = foreground.TABLE // (CELLS[0] * CELLS[1]) // 2, 4 * foreground.TABLE
    assert made(MASKS['foreground'][1], few, CELLS) < limit
    assert made(MASKS['foreground'][1], few, FINER) < 16 * limit
    assert made(MASKS['foreground'][1], 20 * few, CELLS) < limit


def test_regions_are_on_the_levels_that_an_roi_head_reads():
    """mmdet's extractor counts no end pixel, DeFeat both."""
    extractor = MODELS.build(dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=7),
                                  out_channels=1, featmap_strides=[4, 8, 16, 32], _scope_='mmdet'))
    sides = torch.tensor([20.0, 111.2, 111.9, 112.0, 223.5, 224.0, 447.5, 448.0, 900.0])
    found = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], 1)
    rois = torch.cat([torch.zeros(len(sides), 1), found], 1)
    assert torch.equal(masks.assign_levels([found], 4, pixel=0)[0], extractor.map_roi_levels(rois, 4))
    assert not torch.equal(masks.assign_levels([found], 4)[0], extractor.map_roi_levels(rois, 4))
