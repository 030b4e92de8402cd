import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_det.context import DistillContext, LevelError
from kd_det.masks import build_mask

GOLDENS = Path(__file__).parents[1] / 'goldens'
STRIDES = (4, 8, 16, 32, 64)


@pytest.fixture
def compared():
    """Makes the compared levels of a batch, one for each stride."""

    def make(boxes, strides=STRIDES, batch_shape=(128, 192), image_shapes=None) -> list:
        features = [torch.zeros(len(boxes), 2, *(-(-side // stride) for side in batch_shape)) for stride in strides]
        context = DistillContext.of_features(features, features, strides, boxes, image_shapes=image_shapes,
                                             batch_shape=batch_shape)
        return [context.read_level(index) for index in range(len(strides))]

    return make


@pytest.mark.parametrize('name, mask', [
    ('defeat', 'LevelForeground'),
    ('fgfi', dict(type='NearAnchorForeground', anchors=dict(scales=[8], ratios=[0.5, 1.0, 2.0]), phi=0.5))])
def test_reproduces_the_authors_masks(name, mask, compared):
    golden = np.load(GOLDENS / f'{name}.npz')
    assert json.loads(str(golden['meta']))['strides'] == list(STRIDES)
    mask = build_mask(mask)
    for level in compared([torch.tensor(golden['gt0']), torch.tensor(golden['gt1'])]):
        assert torch.equal(mask.cells(level).double(), torch.tensor(golden[f'mask{level.index}']))


@pytest.mark.parametrize('strides', [(8, 16, 32), (8, 16, 32, 64, 128), STRIDES])
@pytest.mark.parametrize('mask', ['LevelForeground', 'NearAnchorForeground'])
def test_each_box_is_on_one_level_however_many_there_are(mask, strides, compared):
    """The largest box belongs to the last level of this pyramid, not to one that the pyramid lacks."""
    for size in (30, 130, 300, 1500):
        levels = compared([torch.tensor([[4., 4., 4. + size, 4. + size]])], strides, batch_shape=(1536, 1536))
        found = [build_mask(mask).cells(level).any().item() for level in levels]
        expected = min(max(int(np.log2(size / 56)), 0), len(strides) - 1)
        assert found == [index == expected for index in range(len(strides))]


def test_number_of_levels_is_that_of_the_tap(compared):
    """A backbone of four levels, tapped as well, does not shorten the neck's five; what is given goes before."""
    level = compared([torch.tensor([[0., 0., 1000., 1000.]])])[3]
    context = level.context
    for side in (context.student, context.teachers[0], context.student_levels):
        side['backbone'] = side['neck'][:4]
    assert build_mask('LevelForeground').cells(context.read_level(3, 'backbone')).any()
    assert not build_mask('LevelForeground').cells(level).any()
    assert build_mask(dict(type='LevelForeground', num_levels=4)).cells(level).any()


@pytest.mark.parametrize('mask', ['LevelForeground', 'NearAnchorForeground'])
def test_levels_that_begin_with_the_coarsest(mask, compared):
    """As those of YOLOv3's neck: a small box is on the finest level, wherever that is."""
    boxes = [torch.tensor([[4., 4., 44., 44.], [100., 100., 250., 250.]])]
    finest_first, coarsest_first = (compared(boxes, strides, (256, 256)) for strides in ((8, 16, 32), (32, 16, 8)))
    for level, same in zip(finest_first, reversed(coarsest_first)):
        assert torch.equal(build_mask(mask).cells(level), build_mask(mask).cells(same))


def test_anchors_of_the_students_head_serve(compared):
    """Its strides are replaced by the level's."""
    level = compared([torch.tensor([[40., 40., 170., 170.]])], batch_shape=(256, 256))[1]
    head = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[1.0], strides=[16, 32, 64])
    cells = build_mask(dict(type='NearAnchorForeground', anchors=head)).cells(level)[0]
    # The best anchors, of side 8·4·2^(2/3) = 51 pixels, lie wholly within the box; those centred on its edge are not
    # half as good any more, those a cell further in are.
    near = 8 * cells.nonzero()
    assert (near.min(), near.max()) == (48, 168) and cells[12, 12] == 1


def test_near_anchors_are_not_in_the_padding(compared):
    boxes, shapes = [torch.tensor([[124., 20., 140., 60.]])], [(128, 140)]
    level = compared(boxes, image_shapes=shapes)[0]
    aware, paper = (build_mask(dict(type='NearAnchorForeground', pad_aware=aware)).cells(level)
                    for aware in (True, False))
    assert paper[~level.valid].any() and not aware[~level.valid].any()
    assert torch.equal(aware[level.valid], paper[level.valid])


@pytest.mark.parametrize('mask', ['LevelForeground', 'NearAnchorForeground'])
def test_no_boxes_no_foreground(mask, compared):
    for level in compared([torch.zeros(0, 4), torch.zeros(0, 4)]):
        assert build_mask(mask).cells(level).abs().max() == 0


@pytest.mark.parametrize('mask', ['LevelForeground', 'NearAnchorForeground'])
def test_cells_that_are_not_square_are_refused(mask, compared):
    level = compared([torch.tensor([[0., 0., 30., 30.]])])[0]
    level.teacher = level.teacher[:, :, :, ::2]  # a stride of 8 by 4
    message = '32 × 24 cells of a batch of 128 × 192 pixels does not have square cells of 4'
    with pytest.raises(LevelError, match=message):
        build_mask(mask).cells(level)


@pytest.mark.parametrize('mask', ['LevelForeground', 'NearAnchorForeground'])
def test_levels_of_one_stride_are_refused(mask, compared):
    level = replace(compared([torch.tensor([[0., 0., 30., 30.]])])[0], strides=(4, 4, 8, 16))
    with pytest.raises(LevelError, match='2 levels of the tap have the stride 4: to which of them a box belongs'):
        build_mask(mask).cells(level)


def test_no_cell_of_padding_is_foreground(compared):
    """Not beside a box that ends at its image's edge, nor within one that goes beyond it."""
    boxes = [torch.tensor([[4., 4., 40., 30.], [30., 8., 64., 40.]])]
    for level in compared(boxes, (8, 16, 32, 64), batch_shape=(64, 64), image_shapes=[(64, 40)]):
        cells = build_mask('LevelForeground').cells(level)
        assert not cells[~level.valid].any()
        assert cells.any() == (level.index == 0)
