import pytest

from kd_det.context import LevelError, LevelSpec, pair_levels

RETINANET = [LevelSpec(256, stride) for stride in (8, 16, 32, 64, 128)]
YOLOX = [LevelSpec(256, stride) for stride in (8, 16, 32)]
FASTER_RCNN = [LevelSpec(256, stride) for stride in (4, 8, 16, 32, 64)]


def test_levels_are_paired_by_stride_not_by_index():
    pairs = pair_levels(FASTER_RCNN, RETINANET, levels=(1, 2, -1))
    assert [(pair.student_level, pair.teacher_level) for pair in pairs] == [(1, 0), (2, 1), (4, 3)]


def test_a_level_without_partner_is_an_error_unless_resized():
    with pytest.raises(LevelError, match='level 0 of stride 4 has no partner.*resize=True'):
        pair_levels(FASTER_RCNN, RETINANET)
    assert [pair.teacher_level for pair in pair_levels(FASTER_RCNN, RETINANET, resize=True)] == [0, 0, 1, 2, 3]


def test_index_out_of_range_is_an_error():
    with pytest.raises(LevelError, match='there is no level 5'):
        pair_levels(RETINANET, RETINANET, levels=(0, 5))


@pytest.mark.parametrize('levels', [(0, 0), (0, -5), (1, -1, 4)])
def test_a_level_is_named_once(levels):
    with pytest.raises(LevelError, match=r'of the 5 levels of the tap, these are \[.*\]\. Name each level once'):
        pair_levels(RETINANET, RETINANET, levels=levels)


def test_a_number_of_levels_is_the_first_so_many_at_most():
    """So that one file serves pyramids of five levels and of three."""
    assert [pair.student_spec.stride for pair in pair_levels(RETINANET, RETINANET, levels=4)] == [8, 16, 32, 64]
    assert pair_levels(YOLOX, RETINANET, levels=4) == pair_levels(YOLOX, RETINANET)


@pytest.mark.parametrize('levels', [0, -1])
def test_a_number_of_levels_below_one_is_an_error(levels):
    """-1 as a number would leave the last level out; who writes it means that level."""
    with pytest.raises(LevelError, match=rf'at least 1.*levels=\({levels},\)'):
        pair_levels(RETINANET, RETINANET, levels=levels)


def test_of_levels_of_one_stride_the_first_goes_with_the_first():
    """As dilated backbones have them, and stacks of hourglasses; a shorter pyramid's last with the rest."""
    dilated = [LevelSpec(channels, stride) for channels, stride in ((64, 4), (128, 8), (256, 16), (512, 16))]
    assert [pair.teacher_level for pair in pair_levels(dilated, dilated)] == [0, 1, 2, 3]
    assert [pair.teacher_level for pair in pair_levels(dilated, dilated, levels=(3, ))] == [3]
    assert [pair.teacher_level for pair in pair_levels(dilated, dilated[:3])] == [0, 1, 2, 2]
    assert [pair.teacher_level for pair in pair_levels([LevelSpec(8, 32)] * 2, dilated, resize=True)] == [2, 3]
