"""Masks of boxes grow with cells + boxes, not with cells × boxes: by the elements that they make, not by the clock."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kd_det.functional import masks

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


MASKS = dict(
    foreground=lambda boxes, cells: masks.box_foreground(boxes, BATCH, cells, 'inverse_area'),
    background=lambda boxes, cells: masks.normalized_background(masks.box_foreground(boxes, BATCH, cells)),
    level=lambda boxes, cells: masks.level_foreground(boxes, masks.assign_levels(boxes, 4), 800 // cells[0], cells, 0),
)


def made(mask, count, cells):
    with Elements() as elements:
        mask(boxes_of(count), cells)
    return elements.made


@pytest.mark.parametrize('mask', MASKS.values(), ids=MASKS.keys())
def test_what_a_box_adds_hardly_depends_on_the_cells(mask):
    each, each_of_finer = ((made(mask, 500, cells) - made(mask, 50, cells)) / 900 for cells in (CELLS, FINER))
    assert (made(mask, 5000, CELLS) - made(mask, 500, CELLS)) / 9000 == pytest.approx(each, rel=0.01)
    assert 0 < each_of_finer < 2 * each and each < CELLS[0] * CELLS[1] / 4
