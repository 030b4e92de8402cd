import pytest
import torch
from mmdet.registry import MODELS

from kd_det.functional import masks as functional
from kd_det.masks import build_mask


@pytest.fixture
def level(make_context):
    """One level of stride 8 of a batch of two, the second image padded."""
    torch.manual_seed(0)
    boxes = [torch.tensor([[8., 16., 31., 40.]]), torch.tensor([[0., 0., 7., 7.]])]
    context = make_context(torch.randn(2, 6, 8, 12), torch.randn(2, 6, 8, 12), boxes, image_shapes=[(64, 96), (40, 56)])
    return context.read_level()


def test_boxes_land_in_the_right_cells_of_a_padded_batch(level):
    foreground = build_mask('BoxForeground').cells(level)
    # x from 8 to 31 and y from 16 to 40 at stride 8; the last cell is included, as in FGD
    assert foreground[0, 2:6, 1:5].all() and foreground[0].sum() == 16
    # the padded image's box of 8 pixels stays in its corner instead of being stretched by 96/56
    assert foreground[1, :2, :2].all() and foreground[1].sum() == 4
    stretched = build_mask(dict(type='BoxForeground', box_mapping='image')).cells(level)
    assert stretched[1].sum() > foreground[1].sum()


def test_background_is_the_rest_of_the_image_and_no_padding(level):
    background = build_mask('BoxBackground').cells(level)
    torch.testing.assert_close(background.sum((1, 2)), torch.ones(2))
    assert (background[1, 5:] == 0).all() and (background[1, :, 7:] == 0).all() and background[1, 4, 6] > 0
    assert ((background > 0) & (build_mask('BoxForeground').cells(level) > 0)).sum() == 0


def test_a_box_at_the_edge_of_its_image_covers_no_padding(make_context):
    """Its last cell, included as in FGD, would be the first one of padding."""
    feature = torch.zeros(1, 1, 8, 12)
    level = make_context(feature, feature, [torch.tensor([[8., 16., 56., 40.]])], image_shapes=[(40, 56)]).read_level()
    for weighting, value in (('binary', 1), ('inverse_area', 1 / (4 * 7))):  # the area is that of all its cells
        cells = build_mask(dict(type='BoxForeground', weighting=weighting)).cells(level)[0]
        torch.testing.assert_close(cells[2:5, 1:7], torch.full((3, 6), value, dtype=torch.float))
        assert (cells > 0).sum() == 3 * 6


@pytest.mark.parametrize('source', ['teacher', 'student', 'both'])
def test_attention_sources(level, source):
    features = dict(teacher=[level.teacher], student=[level.student], both=[level.teacher, level.student])[source]
    (spatial, ), (channel, ) = (build_mask(dict(type=kind, source=source, temperature=0.3, pad_aware=False))(level)
                                for kind in ('SpatialAttention', 'ChannelAttention'))
    torch.testing.assert_close(spatial.cells,
                               sum(functional.spatial_attention(each, 0.3) for each in features) / len(features))
    torch.testing.assert_close(channel.channels,
                               sum(functional.channel_attention(each, 0.3) for each in features) / len(features))
    assert spatial.channels is None and channel.cells is None


def test_pad_aware_attention_gives_padding_nothing(level):
    cells = build_mask('SpatialAttention').cells(level)
    assert (cells[~level.valid] == 0).all()
    torch.testing.assert_close(cells.sum((1, 2)), level.valid.sum((1, 2)).float())


def _dense(level, mask):
    """The (N, C, H, W) that the weightings of a mask stand for."""
    total = torch.zeros_like(level.teacher)
    for cells, channels, factor in mask(level):
        cells = level.valid.float() if cells is None else cells
        total += factor * cells[:, None] * (1 if channels is None else channels[..., None, None])
    return total


def test_products_distribute_over_sums(level):
    attention, channel = dict(type='SpatialAttention'), dict(type='ChannelAttention')
    either = dict(type='MaskSum', masks=['BoxForeground', channel], weights=[2.0, 0.5])
    nested = build_mask(dict(type='MaskProduct', masks=[either, attention]))
    foreground, spatial, channels = (_dense(level, build_mask(mask)) for mask in ('BoxForeground', attention, channel))
    torch.testing.assert_close(_dense(level, nested), (2 * foreground + 0.5 * channels) * spatial)


@pytest.mark.parametrize('config, message', [
    (dict(type='SpatialAttention', source='me'), "^source: expected one of teacher, student, both, got 'me'"),
    (dict(type='SpatialAttention', source='teachers'), "^source: expected one of .*, got 'teachers'. Nearest: teacher"),
    (dict(type='ChannelAttention', temperature=0.0), '^temperature: expected a number above 0, got 0.0'),
    (dict(type='ChannelAttention', pad_aware='no'), "^pad_aware: expected True or False, got 'no'"),
    (dict(type='MaskProduct'), '^masks: expected a list that is not empty, .* got nothing'),
    (dict(type='MaskProduct', masks=[]), '^masks: expected a list that is not empty'),
    (dict(type='MaskProduct', masks='BoxForeground'), "^masks: expected a list .*, each the name .*, got 'Box"),
    (dict(type='MaskProduct', masks=[3]), r'^masks\[0\]: expected the name or the dict of a mask, got 3'),
    (dict(type='MaskProduct', masks=['PKD']), r"^masks\[0\].type: expected a mask, which PKD is not, got 'PKD'"),
    (dict(type='MaskSum', masks=['BoxForeground'], weights=[1, 2]), '^weights: expected one for each of the 1 masks'),
    (dict(type='MaskSum', masks=['BoxForeground'], weights=['1']), r"^weights\[0\]: expected a number, got '1'"),
    (dict(type='BoxForeground', box_mapping='pad'), "^box_mapping: expected one of batch, image, got 'pad'"),
    (dict(type='BoxForeground', weighting='area'), "^weighting: expected one of binary, inverse_area, got 'area'"),
    (dict(type='LevelForeground', finest_scale=0), '^finest_scale: expected a number above 0, got 0'),
    (dict(type='LevelForeground', num_levels=2.5), '^num_levels: expected an integer of at least 1 or None, got 2'),
    (dict(type='NearAnchorForeground', phi=1), '^phi: expected a number of at least 0 and below 1, got 1'),
    (dict(type='PredictionDifference', class_agnostic=1), '^class_agnostic: expected True or False, got 1'),
    (dict(type='PredictionDifference', head=dict(teacher='rpn_head')), '^head: expected a text .* or dict'),
    (dict(type='PredictionQuality', xi=1.5), '^xi: expected a number from 0 to 1, got 1.5'),
    (dict(type='PredictionQuality', top_k=0), '^top_k: expected an integer of at least 1, got 0'),
    (dict(type='QueryConfidence', top_k=-1), '^top_k: expected an integer of at least 1, got -1'),
    (dict(type='RoIPredictionDifference', stage=-1), '^stage: expected mean, same, or an integer .* 0, got -1'),
    (dict(type='RoIPredictionDifference', num_levels=0), '^num_levels: expected an integer of at least 1, got 0'),
    (dict(type='MaskSum', masks=['BoxForeground', dict(type='QueryConfidence', top_k=0)]), r'^masks\[1\].top_k'),
    (dict(type='NearAnchorForeground', anchors=dict(scale=[8], ratios=[1])), '^anchors.scale: .* Nearest: scales'),
    (dict(type='NearAnchorForeground', anchors=dict(scales=[8])), "^anchors: expected .* missing .* 'ratios'"),
    (dict(type='NearAnchorForeground', anchors=dict(ratios=[1])), '^anchors: expected settings of an AnchorGenerator'),
    (dict(type='NearAnchorForeground', anchors=dict(scales=[8], ratios=[1], center_offset=2)), '^anchors: .* range'),
    *((dict(type='NearAnchorForeground', anchors=dict(scales=scales, ratios=ratios)), '^anchors: expected .* above 0')
      for scales, ratios in (([], [1]), ([8], []), ([0], [1]), ([-8], [1]), ([8], [float('nan')]), ([8], [0])))])
def test_faulty_masks_are_errors(config, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(config)
