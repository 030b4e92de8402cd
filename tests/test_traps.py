"""The known traps of detector distillation, each with the tests that fail when the code steps into it."""
import ast
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.config.composition import method_terms
from kd_det.context import DistillContext
from kd_det.heads import DenseOutputs

HERE = Path(__file__).parent

# Trap -> file: tests. Those of this file are below.
TRAPS = {
    'a padded batch: boxes are scaled by the batch, not by each image': {
        'masks/test_masks.py': ['test_boxes_land_in_the_right_cells_of_a_padded_batch',
                                'test_background_is_the_rest_of_the_image_and_no_padding'],
        'functional/masks/test_mask_foreground.py': ['test_image_shapes_stretch_the_boxes_of_smaller_images'],
        'functional/test_functional_features.py': ['test_padding_cells_neither_matter_nor_learn']},
    'loops over boxes: masks of a batch are made at once, and the host waits for nothing': {
        'functional/masks/test_mask_foreground.py': [
            'test_box_foreground_of_many_boxes_makes_no_table_of_cells_times_boxes'],
        'functional/test_functional_host_sync.py': ['test_training_path_never_waits_for_the_device']},
    'images without boxes: finite losses, finite gradients': {
        'masks/test_pyramid.py': ['test_no_boxes_no_foreground'],
        'functional/test_functional_features.py': ['test_fgd_is_finite_where_all_is_background_or_all_foreground',
                                                   'test_empty_mask_gives_zero'],
        'losses/test_dense_terms.py': ['test_finite_without_boxes'],
        'losses/test_roi_terms.py': ['test_finite_without_boxes', 'test_no_regions_at_all'],
        'matrix/test_matrix.py': ['test_a_method_is_finite_without_boxes']},
    'no positives in the batch: a sum is divided by 1, not by 1e-6': {
        'losses/test_dense_terms.py': ['test_normalisers_are_at_least_1'],
        'test_traps.py': ['test_no_box_in_the_batch_ranks_nothing']},
    'a gradient through a mask: masks are constants': {
        'functional/masks/test_mask_foreground.py': ['test_masks_of_boxes_carry_no_gradient'],
        'functional/test_functional_features.py': ['test_no_gradient_flows_through_masks'],
        'masks/test_prediction_masks.py': ['test_terms_gather_the_heads_of_their_masks']},
    'units: a head in eval mode speaks others than in train mode, FCOS with norm_on_bbox strides of them': {
        'heads/test_dense.py': ['test_train_and_eval_mode_read_the_same',
                                'test_fcos_with_normalised_boxes_puts_out_other_units_in_eval_mode'],
        'losses/test_dense_terms.py': ['test_is_0_where_the_student_equals_the_teacher']},
    'a flattened batch: what is matched or suppressed is so image by image': {
        'test_traps.py': ['test_candidates_are_ranked_image_by_image'],
        'losses/test_dense_terms.py': ['test_rank_mimicking_is_its_formula_box_by_box']},
    'pyramids: levels are paired by stride, not by index': {
        'test_pair_levels.py': ['test_levels_are_paired_by_stride_not_by_index'],
        'losses/test_feature_terms.py': ['test_levels_are_compared_with_those_of_their_stride'],
        'losses/test_dense_terms.py': ['test_levels_are_paired_by_stride'],
        'losses/test_crosskd.py': ['test_levels_are_paired_by_stride']},
    'a level of one cell has no deviation to standardise by': {
        'losses/test_pkd.py': ['test_a_single_cell_in_a_batch_of_one_counts_as_0'],
        'functional/test_functional_features.py': ['test_loss_is_finite_on_tiny_and_constant_features']},
    'sums grow with batch and image: what claims not to, does not': {
        'losses/test_pkd.py': ['test_batch_size_and_resolution_do_not_matter'],
        'losses/test_cwd.py': ['test_batch_size_and_resolution_do_not_matter'],
        'test_traps.py': ['test_batch_size_and_resolution_do_not_matter', 'test_published_sums_grow_with_the_image']},
    'an in-place layer behind a tap overwrites what was read': {
        'test_taps.py': ['test_value_is_safe_from_later_in_place_layers',
                         'test_a_write_that_no_copy_can_keep_away_is_an_error']},
    'a mean over each rank alone: normalisers count the batch of all ranks': {
        'distillers/test_ddp.py': ['test_two_ranks_give_the_gradients_of_one_process_with_the_whole_batch']},
}


@pytest.mark.parametrize('trap', TRAPS)
def test_every_trap_has_its_tests(trap):
    for file, tests in TRAPS[trap].items():
        defined = {node.name for node in ast.parse((HERE / file).read_text(encoding='utf-8')).body
                   if isinstance(node, ast.FunctionDef)}
        assert tests and set(tests) <= defined, file


@pytest.fixture
def value(make_context, connected):
    """Makes the value of a method's only term on one level of stride 8, from features and boxes in pixels."""

    def make(config: dict, student, teacher, boxes) -> torch.Tensor:
        arguments = {key: each for key, each in config.items() if key not in ('weight', 'levels')}
        shape = tuple(8 * cells for cells in student.shape[-2:])
        context = make_context(student, teacher, boxes, shape)
        return sum(connected(MODELS.build(dict(arguments, tap='neck')), context)(context).values())

    return make


@pytest.fixture
def pair():
    """Features of two images of 8 × 12 cells, whose boxes end where cells do."""
    random = torch.Generator().manual_seed(0)
    boxes = [torch.tensor([[8., 8., 64., 40.]]), torch.tensor([[0., 16., 32., 64.], [48., 8., 96., 32.]])]
    return torch.randn(2, 6, 8, 12, generator=random), torch.randn(2, 6, 8, 12, generator=random), boxes


def _larger(student, teacher, boxes):
    """The same batch at twice the resolution: each cell becomes four."""
    features = (each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (student, teacher))
    return (*features, [2 * each for each in boxes])


@pytest.mark.parametrize('method', ['pkd', 'cwd', 'defeat', 'fitnets', 'dist'])
def test_batch_size_and_resolution_do_not_matter(method, pair, value):
    """But for the n − 1 in a standard deviation of n cells."""
    config, = method_terms(method, 'one_stage').values()
    student, teacher, boxes = pair
    expected = value(config, *pair)
    assert expected > 0
    for larger in ((torch.cat([student] * 2), torch.cat([teacher] * 2), boxes * 2), _larger(*pair)):
        torch.testing.assert_close(value(config, *larger), expected, rtol=1e-2, atol=0)


def test_published_sums_grow_with_the_image(pair, value):
    config = dict(type='FeatureImitation', normalizer='batch')
    torch.testing.assert_close(value(config, *_larger(*pair)), 4 * value(config, *pair))


def _ranked(images, boxes) -> torch.Tensor:
    """The value of rank mimicking over some of three images with four positive priors each, at the same places."""
    random = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0., 0.], [8., 0.], [0., 8.], [8., 8.]])
    predicted = torch.cat([corners, corners + 8], 1).expand(3, 4, 4)

    def outputs() -> DenseOutputs:
        return DenseOutputs(
            logits=(torch.randn(3, 4, 2, generator=random)[images], ), activation='sigmoid', regressions=(),
            shapes=((2, 2), ), strides=(8, ), decode=lambda: (predicted[images], ), generate_priors=None,
            assigned=(torch.ones(3, 4, dtype=torch.bool)[images], ))

    context = DistillContext(
        student={}, teachers=[{}], student_levels={}, teacher_levels=[{}], boxes=[boxes] * len(images),
        labels=[torch.zeros(len(boxes), dtype=torch.long)] * len(images), batch_shape=(16, 16),
        image_shapes=[(16, 16)] * len(images), student_outputs=dict(bbox_head=outputs()),
        teacher_outputs=[dict(bbox_head=outputs())])
    return MODELS.build(dict(type='RankMimicking'))(context)['rank']


def test_candidates_are_ranked_image_by_image():
    """The images show the same box at the same place; the candidates of one are none of another's."""
    box = torch.tensor([[0., 0., 16., 16.]])
    alone = [_ranked([image], box) for image in range(3)]
    assert len({round(float(each), 4) for each in alone}) == 3
    torch.testing.assert_close(_ranked([0, 1, 2], box), sum(alone) / 3)


def test_no_box_in_the_batch_ranks_nothing():
    assert _ranked([0, 1], torch.zeros(0, 4)) == 0
