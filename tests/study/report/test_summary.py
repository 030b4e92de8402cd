"""What the report computes, with hand-made inputs."""
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from kd_det.config.files import ConfigurationError
from kd_det.study.report.detections import LabelledImage, build_ground_truth, choose_evenly, evaluate_boxes, find_images
from kd_det.study.report.evaluation import _draw_map, _match_classes, _relabel, describe_mask
from kd_det.study.report.page import _plot_terms, place_differences
from kd_det.study.report.studies import (
    collect_policy_curves,
    collect_task_curves,
    collect_term_curves,
    load_or_make,
    subtract_terms,
)
from kd_det.study.report.summary import (
    compare_with_inheriting,
    format_cell,
    name_baseline,
    state_differences,
    write_verdict,
)
from kd_det.training.pictures import MAP_COLOURS, MAX_CELLS, image_uri, map_uri


@pytest.fixture
def truth():
    """Two images, two cats and a dog; no bird anywhere."""
    images = [LabelledImage('a', 64, 64, [[0, 0, 20, 20], [30, 30, 60, 60]], [0, 1], [False, False]),
              LabelledImage('b', 64, 64, [[10, 10, 40, 40]], [0], [False])]
    return build_ground_truth(images, ('cat', 'dog', 'bird'))


def test_perfect_boxes_have_a_perfect_ap_and_absent_classes_none(truth):
    found = [[[0, 0, 20, 20, 0, 0.9], [30, 30, 60, 60, 1, 0.8]], [[10, 10, 40, 40, 0, 0.7]]]
    made = evaluate_boxes(truth, found)
    assert made['per_class'] == [pytest.approx(1), pytest.approx(1), None]
    assert np.allclose(made['precision']['50'], 1) and len(made['precision']['75']) == 101


def test_half_of_the_cats_and_no_dog(truth):
    made = evaluate_boxes(truth, [[[0, 0, 20, 20, 0, 0.9], [30, 30, 60, 60, 0, 0.3]], []])
    assert made['per_class'][0] == pytest.approx(51 / 101) and made['per_class'][1] == 0  # recalls 0 … 0.5 of 101
    assert made['precision']['50'][50] == pytest.approx(0.5) and made['precision']['50'][51] == 0


def test_loose_boxes_count_at_half_overlap_alone(truth):
    made = evaluate_boxes(truth, [[[0, 0, 20, 14, 0, 0.9]], []])  # IoU 0.7
    assert made['per_class'][0] == pytest.approx(51 / 101 * 5 / 10)  # 0.50 … 0.70
    assert made['precision']['50'][0] == pytest.approx(0.5) and made['precision']['75'][0] == 0


def test_a_detector_that_finds_nothing(truth):
    assert evaluate_boxes(truth, [[], []])['per_class'] == [0, 0, None]


def summary(difference, interval, verdict):
    return dict(bbox_mAP=dict(mean=30.0, difference=difference, interval=interval, verdict=verdict,
                              by_seed={0: difference}))


def test_the_verdict_claims_only_what_intervals_show():
    made = state_differences(dict(none=dict(bbox_mAP=dict(mean=30.0)),
                                  kd=summary(0.5, (-1.0, 2.0), 'no difference shown'),
                                  fgd=summary(4.0, (3.0, 5.0), 'gain'), rkd=summary(-2.0, (-3.0, -1.0), 'loss'),
                                  pkd=summary(9.0, None, 'one seed, no statement')))
    assert [each['name'] for each in made] == ['pkd', 'fgd', 'kd', 'rkd']
    assert [each['text'] for each in made] == [
        'one seed: no statement (+9.0)', '+4.0 mAP (+3.0 to +5.0)', 'no difference shown: +0.5 mAP (-1.0 to +2.0)',
        '-2.0 mAP (-3.0 to -1.0)']
    assert write_verdict(made) == (
        'fgd (+4.0 mAP, +3.0 to +5.0) detects better than the plain student; rkd (-2.0 mAP, -3.0 to -1.0) detects '
        'worse; for kd no difference is shown; one seed allows no statement on pkd.')


def test_the_verdict_on_many_and_on_none():
    many = state_differences({f'm{index}': summary(1.0, None, 'one seed, no statement') for index in range(9)})
    assert write_verdict(many) == 'One seed allows no statement on m0, m1, m2, m3, m4 and 4 others.'
    assert write_verdict([]) == 'There is no method beside the plain student, so nothing to compare.'


def test_methods_that_began_with_inherited_weights_are_compared_with_a_student_that_did():
    """fgd gains 2 and 4 points over inherit, pkd began elsewhere, kd inherited for seed 0; MixUp is another setting."""
    def run(variant, seed, start, points):
        return dict(variant=variant, seed=seed, status='finished', start=start, metrics=dict(bbox_mAP=points / 100))

    runs = [run('none', 0, 'a', 10), run('inherit', 0, 'b', 20), run('inherit', 1, 'c', 21), run('fgd', 0, 'b', 22),
            run('fgd', 1, 'c', 25), run('pkd', 0, 'a', 50), run('kd', 0, 'b', 19), run('kd', 1, 'a', 50),
            run('kd@augment=mixup', 0, 'b', 30), dict(variant='kd', seed=2, status='failed'),
            run('inherit', 2, 'd', 22), dict(run('fgd', 2, 'd', 0), metrics=dict(bbox_mAP=-1)),
            run('inherit', 3, 'e', 22), dict(run('fgd', 3, 'e', 0), metrics={})]
    made = {each['name']: each for each in compare_with_inheriting(runs)}
    assert set(made) == {'fgd', 'kd'}
    assert made['fgd']['by_seed'] == pytest.approx({0: 2, 1: 4}) and made['fgd']['difference'] == pytest.approx(3)
    assert made['kd']['text'] == 'one seed: no statement (-1.0)'
    assert write_verdict(list(made.values()), 'inherit alone').startswith('For fgd no difference is shown')
    assert compare_with_inheriting([each for each in runs if each['variant'] != 'inherit']) == []


def test_the_loss_without_the_terms():
    scalars = {'loss': {1: 9.0, 2: 5.0}, 'loss_fgd': {1: 3.0}, 'loss_kd': {1: 2.0, 2: 1.0}}
    assert subtract_terms(scalars, ['fgd', 'kd']) == {1: 4.0, 2: 4.0}
    assert subtract_terms(scalars, []) == scalars['loss']


def test_terms_are_told_apart_from_the_losses_of_the_task():
    distill = dict(fgd=dict(type='FGD', weight=dict(type='Balance', ratio=0.5)), fgd_b=dict(type='PKD'))
    config = Config(dict(model=dict(type='DetectionDistiller', distill=distill)))
    scalars = [{'loss': {1: 9.0}, 'loss_cls': {1: 1.0}, 'loss_fgd': {1: 3.0}, 'loss_fgd_b': {1: 2.0},
                'distill/fgd_relation': {1: 3.0}, 'distill/fgd_weight': {1: 0.25, 2: 0.0},
                'distill/fgd_b_level': {1: 2.0}, 'distill/fgd_b_gradient': {1: 0.75}}]
    terms = collect_term_curves(config, scalars)
    assert terms['fgd']['parts'] == {'relation': [{1: 3.0}]} and terms['fgd_b']['parts'] == {'level': [{1: 2.0}]}
    assert terms['fgd']['unweighted_pull'] == [{1: 2.0}]  # ratio / weight: what the weight of 0.25 halves
    assert terms['fgd_b']['unweighted_pull'] is None  # nobody measured it
    assert terms['fgd']['pull'] == [] and terms['fgd_b']['pull'] == [{1: 0.75}]  # as it was logged
    assert collect_task_curves(scalars, list(terms)) == {'loss_cls': [{1: 1.0}]}
    assert collect_term_curves(Config(dict(model=dict(type='RetinaNet'))), scalars) == {}


def test_variants_in_several_settings_are_compared_each_with_its_own_plain_student():
    made = state_differences({'fgd': summary(4.0, (3.0, 5.0), 'gain'),
                              'fgd@augment=mosaic': summary(2.0, (1.0, 3.0), 'gain')})
    assert [each['twin'] for each in made] == ['none', 'none@augment=mosaic']
    assert write_verdict(made, name_baseline(made)).endswith('detect better than their plain students.')
    assert write_verdict(made[1:], name_baseline(made[1:])).endswith('detects better than its plain student.')
    assert write_verdict(made[:1], name_baseline(made[:1])).endswith('detects better than the plain student.')


def test_the_cell_of_a_difference_has_two_lines_where_nothing_is_shown():
    cells = [format_cell(each['bbox_mAP']) for each in (
        summary(4.0, (3.0, 5.0), 'gain'), summary(0.5, (-1.0, 2.0), 'no difference shown'),
        summary(9.0, None, 'one seed, no statement'))]
    assert cells == ['+4.0 ± 1.0', '+0.5 ± 1.5\nno difference shown', '+9.0\none seed']
    assert format_cell(dict(mean=30.0)) == ''


def test_differences_are_placed_on_one_axis():
    made = place_differences(state_differences(dict(fgd=summary(4.0, (2.0, 6.0), 'gain'),
                                            kd=summary(-4.0, None, 'one seed, no statement'))))
    fgd, kd = made['rows']
    assert kd['interval'] is None and kd['seeds'] == [kd['mean']]
    zero, per_point = made['ticks']['0'], (fgd['mean'] - kd['mean']) / 8
    assert zero == pytest.approx(kd['mean'] + 4 * per_point, abs=0.02)
    assert fgd['interval'] == pytest.approx([zero + 2 * per_point, zero + 6 * per_point], abs=0.02)
    assert 0 < kd['mean'] and fgd['interval'][1] < 100


def test_images_are_found_by_their_names():
    images = [LabelledImage(file, 64, 64, [], [], []) for file in ('data/a/1.jpg', 'data/b/1.jpg', 'data/b/2.png')]
    assert find_images(images, ['2.png', '2', 'a/1.jpg', 'b/1']) == [2, 2, 0, 1]
    with pytest.raises(ConfigurationError, match='3.jpg: 0 of the 3 .* There are 1.jpg, 1.jpg, 2.png'):
        find_images(images, ['3.jpg'])
    with pytest.raises(ConfigurationError, match='1.jpg: 2 of the 3 .* folder'):
        find_images(images, ['1.jpg'])


def test_masks_are_named_in_words():
    assert describe_mask('fgd: foreground_BoxForeground') == 'fgd, box foreground'
    assert describe_mask('kd: mask_masks_0_RoIPredictionDifference') == 'kd, RoI prediction difference (0)'


def test_a_map_that_is_not_finite_has_no_picture_and_one_that_is_in_part_is_clipped():
    cells, valid = torch.arange(6.).view(2, 3), torch.ones(2, 3, dtype=torch.bool)
    nothing = _draw_map(4, cells * float('nan'), valid)
    assert nothing == dict(stride=4, not_finite=6, low=None, high=None, source=None)
    cells[0, 0], cells[1, 2] = float('nan'), float('inf')
    made = _draw_map(4, cells, valid)
    assert (made['not_finite'], made['low'], made['high']) == (2, 1.0, 4.0)
    picture = np.asarray(decoded(made['source']).convert('RGB')).astype(int).sum(-1)
    assert picture[0, 0] == picture[0, 1] == picture.min() and picture[1, 2] == picture[1, 1] == picture.max()


def test_a_teacher_with_classes_in_another_order_is_read_by_their_names(tmp_path):
    def shared(names, classes=('cat', 'dog')):
        torch.save(dict(state_dict={}, meta=dict(dataset_meta=dict(classes=names))), tmp_path / 'teacher.pth')
        return _match_classes(dict(config={}, checkpoint=str(tmp_path / 'teacher.pth')), len(names), classes)

    found = [[0., 0., 9., 9., label, 0.5] for label in (0, 1, 2)]
    assert _relabel(found, shared(('bird', 'dog', 'cat'))) == [[0., 0., 9., 9., 1, 0.5], [0., 0., 9., 9., 0, 0.5]]
    assert shared(('cat', 'dog')) is None
    with pytest.raises(ConfigurationError, match='no name in common'):
        shared(('car', 'bus'))


def test_images_are_spread_over_the_data():
    assert list(choose_evenly(10, 2)) == [2, 7] and list(choose_evenly(3, 8)) == [0, 1, 2]


def test_what_was_found_is_kept_until_its_cause_changes(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return made[-1]

    assert [load_or_make(tmp_path, 'a', cause, make) for cause in ('x', 'x', 'y')] == [0, 0, 1]


def decoded(uri: str) -> Image.Image:
    import base64
    import io
    return Image.open(io.BytesIO(base64.b64decode(uri.split(',')[1])))


def test_maps_keep_their_shape_and_large_ones_their_mean():
    cells = np.zeros((2, 4), np.float32)
    cells[1, 3] = 1
    picture = np.asarray(decoded(map_uri(cells)).convert('RGB')).astype(int).sum(-1)
    assert picture.shape == (2, 4) and picture[1, 3] == picture.max() > picture[0, 0] == picture.min()
    assert decoded(map_uri(np.random.rand(10, 4 * MAX_CELLS))).size == (MAX_CELLS, 2)
    assert len(decoded(map_uri(np.random.rand(40, 40))).getcolors()) <= MAP_COLOURS
    assert len(decoded(map_uri(np.full((3, 3), 7.0))).getcolors()) == 1


@pytest.mark.parametrize('image, colour', [
    (np.full((4, 4), 100, np.uint8), (100, 100, 100)),
    (np.full((4, 4, 2), (100, 7), np.uint8), (100, 100, 100)),
    (np.full((4, 4, 3), (10, 100, 200), np.uint8), (200, 100, 10)),  # blue first
    (np.full((4, 4, 6), (10, 100, 200, 1, 2, 3), np.uint8), (200, 100, 10)),
    (np.full((4, 4, 3), (-1.0, np.nan, 1.0)), (255, 0, 0)),
    (np.full((4, 4, 3), (0, 32768, 65535), np.uint16), (255, 128, 0)),
])
def test_images_of_any_channels_are_shown(image, colour):
    shown = decoded(image_uri(image))
    assert abs(np.asarray(shown).astype(int) - colour).max() <= 3


def test_large_images_become_small():
    picture = decoded(image_uri(np.asarray(Image.new('RGB', (2000, 1000), 'red'))[..., ::-1]))
    assert picture.size == (480, 240) and picture.format == 'JPEG'


def test_the_weights_of_a_policy_are_drawn_beside_the_terms():
    scalars = [{'policy/guide0': {1: 1.0, 2: 0.0}, 'policy/guide1': {1: 0.0, 2: 1.0}, 'policy/probe': {1: -2.0},
                'loss': {1: 3.0}}, {'policy/guide0': {1: 0.5}, 'loss': {1: 3.0}}]
    policy = collect_policy_curves(scalars)
    assert policy == dict(weights=dict(guide0=[{1: 1.0, 2: 0.0}, {1: 0.5}], guide1=[{1: 0.0, 2: 1.0}]),
                          score=dict(score=[{1: -2.0}]))
    assert collect_policy_curves([{'loss': {1: 3.0}}]) == dict(weights={}, score={})
    plots = _plot_terms(dict(task=dict(loss_cls=[{1: 1.0}]), terms={}, policy=policy))
    assert len(plots) == 3 and 'who taught' in plots[1] and 'probe' in plots[2]
    assert len(_plot_terms(dict(task=dict(loss_cls=[{1: 1.0}]), terms={}, policy=collect_policy_curves([])))) == 1
