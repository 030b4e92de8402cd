"""Pictures, by what is drawn in them."""
import copy
import json
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.structures import InstanceData

from kd_det.config import ConfigurationError
from kd_det.training import pictures
from kd_det.training.pictures import (
    draw_channels,
    draw_curves,
    draw_detections,
    draw_maps,
    overlay_map,
    read_scalars,
    save_figure,
)

RED, GREEN = (255, 0, 0), (0, 255, 0)


def pixels(axes):
    """What a panel of a figure shows, (h, w, 3), cut out of the rendered figure."""
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    rendered = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    x0, y0, x1, y1 = axes.get_window_extent().extents.round().astype(int)
    return rendered[rendered.shape[0] - y1:rendered.shape[0] - y0, x0:x1]


def where(panel, colour):
    """Bounds (left, top, right, bottom) of the pixels of a colour, as shares of the panel; None if there is none."""
    rows, columns = np.nonzero(abs(panel - np.array(colour)).max(2) < 60)
    if not len(rows):
        return None
    height, width = panel.shape[:2]
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return np.array([left / width, top / height, right / width, bottom / height])


@pytest.fixture
def panels():
    grey = np.full((50, 100, 3), 128, np.uint8)
    truth = InstanceData(bboxes=torch.tensor([[20., 10., 60., 40.]]), labels=torch.tensor([0]))
    found = InstanceData(bboxes=torch.tensor([[10., 5., 30., 20.], [50., 5., 90., 45.]]), labels=torch.tensor([1, 0]),
                         scores=torch.tensor([0.9, 0.1]))
    figure = draw_detections(grey, {'truth': truth, 'found': found}, classes=('cat', 'dog'), palette=(RED, GREEN))
    return figure


def test_boxes_are_drawn_in_their_class_colour_where_they_are(panels):
    truth, found = (pixels(axes) for axes in panels.axes)
    np.testing.assert_allclose(where(truth, RED), [0.2, 0.2, 0.6, 0.8], atol=0.02)
    assert where(truth, GREEN) is None
    assert (abs(truth[truth.shape[0] // 2, int(truth.shape[1] * 0.4)] - 128) < 2).all(), 'a box is not filled'
    left, top, right, bottom = where(found, GREEN)
    np.testing.assert_allclose([left, right, bottom], [0.1, 0.3, 0.4], atol=0.02)
    assert top < 0.1, 'the score stands above the box'


def test_boxes_with_low_scores_are_left_out(panels):
    assert where(pixels(panels.axes[1]), RED) is None


def test_panels_have_titles_and_the_legend_names_the_classes_shown(panels):
    assert [axes.get_title() for axes in panels.axes] == ['truth', 'found']
    assert [text.get_text() for text in panels.legends[0].get_texts()] == ['cat', 'dog']


def test_an_image_without_boxes_is_shown():
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    figure = draw_detections(np.full((8, 8, 3), 200, np.uint8), {'nothing': nothing}, ('cat', ), (RED, ))
    assert (abs(pixels(figure.axes[0])[5:-5, 5:-5] - 200) < 2).all()


def test_overlay_colours_each_pixel_by_its_cell():
    image = np.full((4, 6, 3), 100, np.uint8)
    cells = np.array([[0., 1., 2.], [0., 0., 0.]])
    opaque = overlay_map(image, cells, opacity=1, colours='gray')
    expected = np.repeat(np.repeat(np.array([[0, 128, 255], [0, 0, 0]]), 2, 0), 2, 1)
    np.testing.assert_allclose(opaque, np.stack([expected] * 3, -1), atol=1)
    half = overlay_map(image, cells, opacity=0.5, colours='gray')
    np.testing.assert_allclose(half, opaque / 2 + 50, atol=1)
    assert (image == 100).all(), 'the image itself stays as it is'


def test_overlay_of_a_constant_map_and_of_an_uneven_size():
    image = np.zeros((5, 7, 3), np.uint8)
    assert (overlay_map(image, np.full((2, 2), 3.0), opacity=1, colours='gray') == 0).all()
    assert overlay_map(image, np.eye(3)).shape == image.shape


@pytest.mark.parametrize('cells', [np.zeros(3), np.array([[0, np.nan]])])
def test_overlay_refuses_what_is_no_map(cells):
    with pytest.raises(ValueError, match='map of'):
        overlay_map(np.zeros((4, 4, 3), np.uint8), cells)


def test_maps_follow_the_image():
    image = np.full((20, 20, 3), 255, np.uint8)
    left = np.tile([1.0, 0.0], (4, 1))
    figure = draw_maps(image, {'left': left, 'right': 1 - left}, columns=2)
    assert [axes.get_title() for axes in figure.axes] == ['image', 'left', 'right', '']
    shown, bright_left, bright_right, empty = (pixels(axes).mean((0, 2)) for axes in figure.axes)
    assert shown.min() > 250 and empty.min() > 250
    middle = len(bright_left) // 2
    assert bright_left[5:middle - 5].min() > bright_left[middle + 5:-5].max()
    assert bright_right[5:middle - 5].max() < bright_right[middle + 5:-5].min()


def write_lines(file, *records):
    file.write_text('\n'.join(json.dumps(record) for record in records))
    return file


def test_scalars_are_means_over_training_epochs_and_values_after_validation(tmp_path):
    file = write_lines(
        tmp_path / 'scalars.json',
        dict(loss=4.0, epoch=1, iter=10, step=10), dict(loss=2.0, epoch=1, iter=20, step=20),
        {'coco/bbox_mAP': 0.25, 'step': 1},
        dict(loss=1.0, epoch=2, iter=30, step=30, note='text'), {'coco/bbox_mAP': 0.5, 'step': 2})
    assert read_scalars(file) == {'loss': {1: 3.0, 2: 1.0}, 'coco/bbox_mAP': {1: 0.25, 2: 0.5}}


def test_scalars_of_a_resumed_run_replace_what_was_lost(tmp_path):
    first = write_lines(tmp_path / 'first.json',
                        dict(loss=4.0, epoch=1, iter=10, step=10), dict(loss=9.0, epoch=2, iter=20, step=20))
    second = write_lines(tmp_path / 'second.json', dict(loss=2.0, epoch=2, iter=20, step=20))
    assert read_scalars([first, second]) == {'loss': {1: 4.0, 2: 2.0}}


GOOD = b'{"loss": 4.0, "epoch": 1, "step": 10}\n'


@pytest.mark.parametrize('line', [
    b'{"loss": 3', b'[1, 2]', b'3', b'null', b'"step"', b'{"loss": 3}', b'{"loss": 3, "step": null}', b'', b'\xff\xfe',
    b'{"loss": 3, "step": [1]}', b'{"loss": 3, "step": 1, "epoch": "1"}', b'{"loss": 3, "step": NaN}', b'[' * 100000,
    b'{"loss": 3, "step": true}', b'\0' * 50])
def test_a_broken_line_is_named(line, tmp_path):
    file = tmp_path / 'scalars.json'
    file.write_bytes(GOOD + line + b'\n' + line + b'\n' + GOOD.replace(b'10', b'20'))
    with pytest.raises(ConfigurationError, match="scalars.json', line 2: expected a JSON object with a 'step', found"):
        read_scalars(file)
    said = []
    assert read_scalars(file, said.append) == {'loss': {1: 4.0}}  # the lines before and after it count
    assert len(said) == 1 and 'line 2' in said[0] and 'and 1 more; left out' in said[0]


@pytest.mark.parametrize('end', [b'', b'{', b'{"loss": 3.0, "epoch": 2, "st', b'{"name": "caf\xc3', b'\0\0\0'])
def test_a_line_that_a_killed_run_has_not_ended_does_not_count(end, tmp_path):
    file = tmp_path / 'scalars.json'
    file.write_bytes(GOOD + end)
    assert read_scalars(file) == {'loss': {1: 4.0}}
    file.write_bytes(end)
    assert read_scalars(file) == {}


def test_numbers_that_no_figure_holds_are_left_out(tmp_path):
    file = tmp_path / 'scalars.json'
    file.write_text('{"loss": ' + '9' * 400 + ', "other": NaN, "step": 1}\n')
    assert list(read_scalars(file)) == ['other']


def test_curves_are_means_with_a_band_of_all_runs():
    curves = dict(plain=[{1: 0.0, 2: 1.0}, {1: 0.5, 2: 2.0, 3: 9.0}], distilled=[{1: 1.0, 2: 3.0}])
    figure = draw_curves({'mAP': curves})
    axes, = figure.axes
    plain, distilled = axes.get_lines()
    np.testing.assert_allclose(plain.get_xydata(), [[1, 0.25], [2, 1.5]])
    np.testing.assert_allclose(distilled.get_xydata(), [[1, 1], [2, 3]])
    band, = axes.collections
    assert set(map(tuple, band.get_paths()[0].vertices)) == {(1, 0), (1, 0.5), (2, 1), (2, 2)}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['plain', 'distilled']


def test_panels_stand_in_rows_of_so_many():
    figure = draw_curves({name: dict(plain=[{1: 0.0}]) for name in 'abc'}, columns=2)
    figure.draw_without_rendering()
    lefts, tops = zip(*((axes.get_position().x0, axes.get_position().y1) for axes in figure.axes))
    assert lefts[0] == pytest.approx(lefts[2]) and lefts[1] > lefts[0]
    assert tops[0] == pytest.approx(tops[1]) and tops[2] < tops[0]


def test_nothing_to_draw_is_an_error():
    with pytest.raises(ValueError, match='no panel'):
        draw_curves({})
    with pytest.raises(ValueError, match='no panel'):
        draw_detections(np.zeros((4, 4, 3), np.uint8), {}, (), ())


def test_names_are_no_formulas_and_all_are_in_the_legend():
    names = ['a$b$c', '$\\frac', '_hidden', 'cost $5']
    figure = draw_curves({names[0]: {name: [{1: 0.0}] for name in names}})
    legend = figure.axes[0].get_legend().get_texts()
    assert [text.get_text().replace(r'\$', '$') for text in legend] == names
    figure.draw_without_rendering()  # two dollars would be a formula, or an error
    nothing = InstanceData(bboxes=torch.zeros(1, 4), labels=torch.zeros(1, dtype=torch.long))
    draw_detections(np.zeros((8, 8, 3), np.uint8), {names[1]: nothing}, (names[0], ), (RED, )).draw_without_rendering()
    draw_maps(np.zeros((8, 8, 3), np.uint8), {names[0]: np.eye(2)}).draw_without_rendering()
    draw_channels({names[0]: np.ones(3)}).draw_without_rendering()


@pytest.fixture
def fonts(monkeypatch):
    """Makes only matplotlib's own fonts known, and one more that has the signs of a family of others."""

    def make(**more):
        manager = copy.deepcopy(font_manager.fontManager)
        manager.ttflist = [entry for entry in manager.ttflist if 'mpl-data' in entry.fname]
        manager.ttflist += [font_manager.FontEntry(fname=name, name=name, style='normal', weight=400) for name in more]
        monkeypatch.setattr(pictures.font_manager, 'fontManager', manager)
        monkeypatch.setattr(pictures.font_manager, 'findSystemFonts', list)
        charmap = pictures._read_signs.__wrapped__
        monkeypatch.setattr(pictures, '_read_signs',
                            lambda file: set(map(ord, more[file])) if file in more else charmap(file))
        pictures._find_fonts.cache_clear()

    yield make
    pictures._find_fonts.cache_clear()


def drawn(figure, tmp_path):
    """What stands over the figure once it is saved, with the fonts; a sign without a glyph would be a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        save_figure(figure, tmp_path / 'x.png')
    title = figure.axes[0].title
    return title.get_text(), title.get_fontfamily()


def test_signs_that_no_font_has_are_spelt_out(fonts, tmp_path, monkeypatch):
    fonts()
    said = []
    monkeypatch.setattr(pictures.MMLogger.get_current_instance(), 'warning', said.append)
    figure = Figure()
    figure.subplots().set_title('猫 Ünï Кот 1')
    assert drawn(figure, tmp_path)[0] == '\\u732b Ünï Кот 1'
    assert len(said) == 1 and 'Install one that has' in said[0]
    assert pictures.names_to_draw(('猫', 'a$b$c')) == ('\\u732b', r'a\$b\$c')
    assert pictures.names_to_draw(('cat', )) == ('cat', )


def test_fonts_that_have_the_signs_are_used(fonts, tmp_path, monkeypatch):
    latin = ''.join(map(chr, range(33, 127)))
    fonts(Cats='猫', Wide=f'猫犬{latin}')
    assert pictures._find_fonts(frozenset(map(ord, '猫犬')))[0] == ['Wide']
    assert pictures._find_fonts(frozenset(map(ord, '猫🐈'))) == (['Cats'], {ord('🐈')})
    with matplotlib.rc_context():
        assert pictures.names_to_draw(('猫', '犬')) == ('猫', '犬')
        assert matplotlib.rcParams['font.sans-serif'][0] == 'Wide'


@pytest.mark.skipif(not [path for path in font_manager.findSystemFonts() if 'wqy' in path or 'NotoSansCJK' in path],
                    reason='needs a font with Chinese signs, such as Noto Sans CJK')
def test_an_installed_font_shows_them(tmp_path):
    figure = Figure()
    figure.subplots().set_title('猫')
    title, families = drawn(figure, tmp_path)
    assert title == '猫' and len(families) == 2


def test_channels_are_sorted_lines_by_level():
    axes, = draw_channels({'stride 8': np.array([1.0, 3.0, 2.0]), 'stride 16': np.array([0.5, 0.5])}).axes
    fine, coarse = axes.get_lines()
    np.testing.assert_allclose(fine.get_xydata(), [[1, 3], [2, 2], [3, 1]])
    np.testing.assert_allclose(coarse.get_ydata(), [0.5, 0.5])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ['stride 8', 'stride 16']
    assert axes.get_ylim()[0] == 0


def test_channels_of_no_level_are_an_error():
    with pytest.raises(ValueError, match='nothing to draw'):
        draw_channels({})
