import numpy as np
import pytest

from kd_det.training.pictures import draw_channels


def test_channels_are_sorted_lines_by_level():
    axes, = draw_channels({'stride 8': np.array([1.0, 3.0, 2.0]), 'stride 16': np.array([0.5, 0.5])}).axes
    fine, coarse = axes.get_lines()
    np.testing.assert_allclose(fine.get_xydata(), [[1, 3], [2, 2], [3, 1]])
    np.testing.assert_allclose(coarse.get_ydata(), [0.5, 0.5])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['stride 8', 'stride 16']
    assert axes.get_ylim()[0] == 0


def test_no_level_is_an_error():
    with pytest.raises(ValueError, match='nothing to draw'):
        draw_channels({})
