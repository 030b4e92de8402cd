import pytest

from kd_det.adapters import LevelError, pair_levels
from kd_det.context import Level

RETINANET = [Level(256, stride) for stride in (8, 16, 32, 64, 128)]
FASTER_RCNN = [Level(256, stride) for stride in (4, 8, 16, 32, 64)]


def test_levels_are_paired_by_stride_not_by_index():
    pairs = pair_levels(FASTER_RCNN, RETINANET, levels=(1, 2, -1))
    assert [(pair.student_index, pair.teacher_index) for pair in pairs] == [(1, 0), (2, 1), (4, 3)]


def test_a_level_without_partner_is_an_error_unless_resized():
    with pytest.raises(LevelError, match='level 0 of stride 4 has no partner.*resize=True'):
        pair_levels(FASTER_RCNN, RETINANET)
    assert [pair.teacher_index for pair in pair_levels(FASTER_RCNN, RETINANET, resize=True)] == [0, 0, 1, 2, 3]


def test_index_out_of_range_is_an_error():
    with pytest.raises(LevelError, match='there is no level 5'):
        pair_levels(RETINANET, RETINANET, levels=(0, 5))
