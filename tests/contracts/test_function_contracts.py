"""What every public function of kd_det.functional keeps: found by where it lies, called by its arguments' names.

A function whose arguments have other names, or mean something else, has a line in :func:`own`.
"""
import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import Tensor

import kd_det.functional

# Pieces of the others, which cut the work into blocks or check it.
PIECES = {'by_channels', 'cut_channels', 'cut_into_blocks', 'sum_rows', 'map_rows', 'is_on_host', 'slices', 'constant',
          'check_shapes', 'check_exponent', 'sum_distance'}
MEASURES = 'fidelity.'  # in double precision, of detectors that have been trained


def find_functions() -> dict:
    """'features.pearson_distance' -> the function."""
    functions = {}
    for module in pkgutil.walk_packages(kd_det.functional.__path__, 'kd_det.functional.'):
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isroutine(value) and not name.startswith('_') and value.__module__ == module.name:
                functions[f"{module.name.removeprefix('kd_det.functional.')}.{name}"] = value
    return {place: value for place, value in functions.items()
            if place.rpartition('.')[2] not in PIECES and not place.startswith(MEASURES)}


FUNCTIONS = find_functions()
every_function = pytest.mark.parametrize('place', FUNCTIONS)

IMAGES, CHANNELS, CELLS, BATCH = 2, 3, (4, 6), (32, 48)


def boxes_of(count: int) -> Tensor:
    corners = 16 * torch.rand(count, 2)
    return torch.cat([corners, corners + 4 + 12 * torch.rand(count, 2)], 1)


def common(cells: tuple[int, int], boxes: int) -> dict:
    """By the name of an argument: features and masks of some cells, of images with so many boxes each."""
    batch = [8 * side for side in cells]
    valid = torch.ones(IMAGES, *cells, dtype=torch.bool)
    valid[1, cells[0] // 2 + 1:] = False
    y, x = torch.meshgrid(*(8. * torch.arange(side) for side in cells), indexing='ij')
    priors = torch.stack([x, y, x + 8, y + 8], -1).view(-1, 4)
    feature = torch.randn(IMAGES, CHANNELS, *cells)
    return dict(
        student=feature, teacher=torch.randn_like(feature), feature=torch.randn_like(feature),
        generated=torch.randn_like(feature), mask=torch.rand(IMAGES, *cells), foreground=torch.rand(IMAGES, *cells),
        background=torch.rand(IMAGES, *cells), valid=valid, temperature=0.5,
        boxes=[boxes_of(boxes) for _ in range(IMAGES)], labels=[torch.arange(boxes) % CHANNELS for _ in range(IMAGES)],
        levels=[torch.zeros(boxes, dtype=torch.long) for _ in range(IMAGES)], level=0, num_levels=3, stride=8.0,
        batch_shape=tuple(batch), feature_shape=cells, image_shapes=[tuple(batch), (batch[0] // 2 + 1, batch[1])],
        num_images=IMAGES, student_probs=feature.sigmoid(), teacher_probs=torch.rand_like(feature),
        probabilities=torch.rand(IMAGES, len(priors), CHANNELS), predictions=priors.expand(IMAGES, -1, -1) + 1,
        points=priors.view(-1, 2, 2).mean(1), priors=priors,
        rois=torch.cat([torch.arange(boxes)[:, None] % IMAGES, boxes_of(boxes)], 1), values=torch.rand(boxes))


def rows(count: int, width: int) -> dict:
    """Of functions over rows, of boxes, regions or samples."""
    return dict(student=torch.randn(count, width), teacher=torch.randn(count, width), temperature=2.0)


def own(cells: tuple[int, int], boxes: int) -> dict:
    """What the arguments of a function, or of all in a module, are where they are not the common ones."""
    shared, count = common(cells, boxes), IMAGES * boxes
    distributions, maps = torch.randn(2, count, 4, 5), torch.randn(2, IMAGES, CHANNELS, *cells)
    target = torch.rand(count)
    corners = torch.arange(2.)[None, :].expand(IMAGES, 2)
    painted = dict(image=torch.arange(IMAGES), num_images=IMAGES)
    return {
        'features.masked_imitation': dict(channel_weight=torch.rand(IMAGES, CHANNELS)),
        'features.fkd_loss': dict(student_channels=torch.randn(IMAGES, CHANNELS), student_relation=maps[0],
                                  student_cells=torch.randn(IMAGES, 1, *cells), teacher_relation=maps[1]),
        'features.sum_channels': dict(difference=maps[0], channel_weight=torch.rand(IMAGES, CHANNELS)),
        'features.sum_cells': dict(weight=torch.rand(IMAGES, *cells)),
        'features.unit': dict(vectors=maps[0], dim=1),
        'focal_global.fgd_loss': dict(student_relation=maps[0], teacher_relation=maps[1]),
        'focal_global.context_pool': dict(logits=torch.randn(IMAGES, 1, *cells)),
        'focal_global.fgd_sums': dict(student_attend=torch.randn(CHANNELS), teacher_attend=torch.randn(CHANNELS)),
        'focal_global.fgd_loss_of_sums': dict(
            sums=kd_det.functional.focal_global.fgd_sums(shared['student'], shared['teacher'], torch.randn(CHANNELS),
                                                         torch.randn(CHANNELS), 0.5, shared['valid']),
            shift=torch.randn(IMAGES, CHANNELS, 1, 1)),
        'gradients.scale_gradient': dict(values=maps[0], shares=torch.rand(IMAGES)),
        'structure': dict(prompts=torch.randn(3, 2, CHANNELS), masks=torch.rand(IMAGES, 2, *cells), cells=cells,
                          low=torch.randn(IMAGES, CHANNELS, *(-(-side // 2) for side in cells)),
                          bands=torch.randn(IMAGES, CHANNELS, 3, *(-(-side // 2) for side in cells))),
        'structure.prompt_masks': dict(frequencies=maps[0], prompts=torch.randn(2, CHANNELS)),
        'masks.attention.attend_to_cells': dict(response=torch.rand(IMAGES, *cells)),
        'masks.attention.attend_to_channels': dict(response=torch.rand(IMAGES, CHANNELS)),
        'masks.attention.spatial_softmax': dict(logits=torch.randn(IMAGES, *cells)),
        'masks.foreground.paint_rectangles': dict(painted, first=corners, last=corners + 1, weight=torch.rand(IMAGES)),
        'masks.foreground.paint_runs': dict(painted, first=torch.zeros(IMAGES, cells[0], dtype=torch.long),
                                            stop=torch.ones(IMAGES, cells[0], dtype=torch.long), width=cells[1]),
        'masks.foreground.list_cells': dict(first=torch.zeros(boxes, 2, dtype=torch.long), width=cells[1],
                                            stop=torch.tensor(cells[::-1]).expand(boxes, 2)),
        'masks.predictions.prediction_quality_of_grids': dict(
            logits=[torch.randn(IMAGES, len(shared['priors']), CHANNELS)], predictions=[shared['predictions']],
            points=[shared['points'].view(*cells, 2)], activation='sigmoid'),
        'masks.pyramid.valuable_region': dict(priors=[shared['priors'], shared['priors'][:1]]),
        'masks.pyramid.valuable_region_of_grids': dict(priors=[shared['priors'], shared['priors'][:1]],
                                                       shapes=[cells, (1, 1)]),
        'boxes': dict(student=boxes_of(count), teacher=boxes_of(count), target=boxes_of(count), a=boxes_of(count),
                      b=boxes_of(count)),
        'boxes.distribution_kl': dict(student=distributions[0], teacher=distributions[1]),
        'boxes.find_nearest': dict(predictions=shared['predictions'], boxes=shared['boxes'],
                                   candidates=torch.rand(IMAGES, len(shared['priors'])) < 0.5),
        'dense': dict(rows(count, CHANNELS), weight=torch.rand(count)),
        'dense.sum_distribution_kl': dict(student=distributions[0], teacher=distributions[1]),
        **{f'dense.{name}': dict(student=boxes_of(count), teacher=boxes_of(count), target=boxes_of(count))
           for name in ('sum_giou_imitation', 'sum_differences', 'sum_bounded_regression')},
        'logits': rows(count, CHANNELS),
        'logits.class_probabilities': dict(logits=torch.randn(count, CHANNELS), activation='softmax'),
        'logits.cell_probabilities': dict(logits=torch.randn(count, 2, CHANNELS), activation='softmax'),
        'logits.joint_logits': dict(logits=torch.randn(count, CHANNELS), objectness=torch.randn(count)),
        'logits.largest_gap': dict(activation='sigmoid'),
        'logits.decoupled_kl': dict(labels=torch.arange(count) % CHANNELS),
        'logits.combine_decoupled': dict(target=target, non_target=torch.rand(count),
                                         teacher_target_probability=torch.rand(count)),
        'logits.rank_mimicking': dict(student=torch.randn(count), teacher=torch.randn(count), num_groups=2,
                                      groups=torch.arange(count) % 3 - 1),
        'logits.weighted_cross_entropy': dict(background=-1),
        'logits.largest_probability': dict(logits=torch.randn(count, CHANNELS), activation='softmax', background=True),
        'logits.confidence_weights': dict(confidence=torch.rand(count), weight=torch.rand(count)),
        'logits.permute_others': dict(logits=torch.randn(count, CHANNELS)),
        'logits.standardized_logits': dict(logits=torch.randn(count, CHANNELS)),
        'logits.restricted_logits': dict(logits=torch.randn(count, CHANNELS), classes=[2, 0], background=False),
        'moments': dict(moments=torch.rand(2, CHANNELS), target=torch.rand(2, CHANNELS)),
        'moments.pool_moments': dict(moments=[torch.rand(IMAGES, 2, width) for width in (CHANNELS, 4)],
                                     counts=[torch.tensor([3, 0])] * 2),
        'queries.query_cost': dict(student_logits=torch.randn(2, 4, 3), teacher_logits=torch.randn(2, 5, 3),
                                   student_boxes=torch.rand(2, 4, 4), teacher_boxes=torch.rand(2, 5, 4)),
        'queries.match_queries': dict(cost=torch.rand(IMAGES, 5, 6), candidates=torch.arange(6).expand(IMAGES, 6),
                                      box_cost=torch.rand(IMAGES, 6, boxes), num_boxes=[boxes] * IMAGES,
                                      assigned=torch.full((IMAGES, 5), -1)),
        'queries.noisy_targets': dict(boxes=torch.rand(IMAGES, boxes, 4).sort(-1).values, groups=2,
                                      labels=torch.zeros(IMAGES, boxes, dtype=torch.long)),
        'queries.hide_other_groups': dict(known=torch.rand(IMAGES, boxes) < 0.5, groups=2),
        'queries.corners': dict(boxes=torch.rand(count, 4)),
        'relations': rows(max(count, 1), CHANNELS),
        'relations.token_relations': {name: shared[name] for name in ('student', 'teacher', 'temperature')},
        'relations.flow_matrix': dict(feature_a=maps[0], feature_b=maps[1]),
        'relations.flow_distance': dict(student=torch.randn(IMAGES, 3, 4), teacher=torch.randn(IMAGES, 3, 4)),
        'relations.non_local': dict(query=maps[0], key=maps[1][..., :1, :1], value=maps[0][..., :1, :1])}


# Situation: cells of the maps, boxes of an image.
SITUATIONS = dict(plain=(CELLS, 3), no_boxes=(CELLS, 0), one_cell=((1, 1), 1))

# Whose value is not 0 where the student equals the teacher.
NEVER_ZERO = {
    'features.fkd_loss': 'it compares the means with what an adapter made of them',
    'focal_global.fgd_loss': 'the relations are those of blocks of each side',
    'focal_global.fgd_sums': 'sums, of which the loss is made',
    'logits.decoupled_kl': "its third value is the teacher's probability of the target",
    'logits.weighted_cross_entropy': "at least the teacher's entropy"}

# What is no loss.
LOOKS_ALONE = {'logits.largest_gap': 'a weight, without gradient'}

# Who learns on the teacher's side as well.
LEARNS_ON_BOTH_SIDES = {'focal_global.relation_distance': 'what a block of each side makes of its feature'}


def arguments_of(place: str, situation: str) -> dict:
    """What a function is called with: all that it needs, and what is known of the rest."""
    cells, boxes = SITUATIONS[situation]
    special = own(cells, boxes)
    known = {**common(cells, boxes), **special.get(place.rpartition('.')[0], {}), **special.get(place, {})}
    parameters = inspect.signature(FUNCTIONS[place]).parameters.values()
    missing = [each.name for each in parameters if each.default is each.empty and each.name not in known]
    assert not missing, f'{place} takes {missing}: say what they are in own() of this file.'
    return {each.name: known[each.name] for each in parameters if each.name in known}


def results_of(value) -> list[Tensor]:
    """The tensors that a function returns."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in (value.values() if isinstance(value, dict) else value) for tensor in results_of(each)]


def tensors_in(arguments: dict) -> list[Tensor]:
    nested = (value if isinstance(value, (list, tuple)) else [value] for value in arguments.values())
    return [each for values in nested for each in values if isinstance(each, Tensor)]


def in_double(arguments: dict) -> dict:

    def convert(value):
        if isinstance(value, (list, tuple)):
            made = map(convert, value)
            return value._make(made) if hasattr(value, '_make') else type(value)(made)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: convert(value) for name, value in arguments.items()}


@pytest.mark.parametrize('situation', SITUATIONS)
@every_function
def test_its_results_are_finite_and_what_it_is_given_stays(place, situation):
    arguments = arguments_of(place, situation)
    before = [each.clone() for each in tensors_in(arguments)]
    results = results_of(FUNCTIONS[place](**arguments))
    assert results and all(each.isfinite().all() for each in results)
    assert all(each.dtype != torch.float64 for each in results)
    assert all(torch.equal(now, then) for now, then in zip(tensors_in(arguments), before))


@every_function
def test_it_computes_in_double_precision_what_it_computes_in_single(place):
    arguments = arguments_of(place, 'plain')
    torch.manual_seed(0)  # some draw
    single = results_of(FUNCTIONS[place](**arguments))
    torch.manual_seed(0)
    double = results_of(FUNCTIONS[place](**in_double(arguments)))
    for one, other in zip(single, double, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('place', [place for place, function in FUNCTIONS.items()
                                   if {'student', 'teacher'} <= {*inspect.signature(function).parameters}
                                   and place not in LEARNS_ON_BOTH_SIDES | LOOKS_ALONE.keys()])
def test_the_student_learns_and_the_teacher_is_a_constant(place):
    arguments = arguments_of(place, 'plain')
    student, teacher = (arguments[side].clone().requires_grad_() for side in ('student', 'teacher'))
    results = results_of(FUNCTIONS[place](**{**arguments, 'student': student, 'teacher': teacher}))
    sum(each.sum() for each in results).backward()
    assert student.grad.isfinite().all() and student.grad.any() and teacher.grad is None
    equal = results_of(FUNCTIONS[place](**{**arguments, 'student': arguments['teacher'].clone()}))
    assert (sum(each.abs().sum() for each in equal) > 1e-4) == (place in NEVER_ZERO)


@pytest.mark.parametrize('place', [place for place in FUNCTIONS if place.startswith('masks.')
                                   and not place.startswith('masks.attention')])
def test_a_mask_carries_no_gradient(place):
    arguments = arguments_of(place, 'plain')
    learning = {name: value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in arguments.items()}
    assert not any(each.requires_grad for each in results_of(FUNCTIONS[place](**learning)))
