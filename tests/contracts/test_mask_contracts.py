"""What every mask keeps: found by where it lies, built from its name, checked without a line of its own.

A mask that needs an argument, or whose other forms are to be checked as well, has its configs in ``CONFIGS``.
"""
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS

import kd_det.masks
from kd_det.masks import CellMask, Mask, build_mask
from kd_det.masks.base import Weighting

TEACHER_WIDTH = 12

CONFIGS = dict(
    BoxForeground=[dict(), dict(weighting='inverse_area')],
    SpatialAttention=[dict(), dict(source='both')],
    ChannelAttention=[dict(), dict(source='both')],
    PredictionDifference=[dict(), dict(head='rpn_head', anchors='mean'), dict(class_agnostic=True)],
    PredictionQuality=[dict(), dict(head='rpn_head')],
    MaskProduct=[dict(masks=['BoxForeground', 'ChannelAttention'])],
    MaskSum=[dict(masks=['TeacherConfidence', 'BoxBackground'], weights=[1.0, 0.5])])

MASKS = [name for name in kd_det.masks.__all__ if name in MODELS.module_dict]
CASES = {'_'.join([name, *(str(value) for key, value in config.items() if key not in ('masks', 'weights'))]):
         dict(config, type=name) for name in MASKS for config in CONFIGS.get(name, [{}])}
every_mask = pytest.mark.parametrize('case', CASES)


def show_levels(mask: Mask, scene, **changes) -> list:
    """The levels of a scene, with what a mask declares to read alone."""
    inner = [module for module in mask.modules() if isinstance(module, Mask)]
    context = scene.show(*([head for each in inner for head in getattr(each, side)]
                           for side in ('student_heads', 'teacher_heads')), **changes)
    return [context.read_level(index) for index in range(len(context.student['neck']))]


@pytest.fixture
def look(find_scene):
    """Builds the mask of a case; returns it and the levels of a situation, with what it declares to read alone."""

    def make(case: str, situation: str = 'plain', **changes):
        mask, scene = build_mask(CASES[case]), find_scene(situation, student_width=TEACHER_WIDTH)  # as if adapted
        return mask, show_levels(mask, scene, **changes)

    return make


@every_mask
def test_its_weights_are_finite_and_none_is_on_padding(case, situation, look):
    """Whatever it is shown: padding, no boxes, unlabelled images, an image that is all padding, levels of one cell."""
    mask, levels = look(case, situation)
    for level in levels:
        images, channels, *shape = level.student.shape
        weightings = mask(level)
        assert isinstance(weightings, tuple) and weightings
        for weighting in weightings:
            assert isinstance(weighting, Weighting) and isinstance(weighting.factor, float)
            assert not (weighting.cells is None and weighting.channels is None)
            for weights, expected in ((weighting.cells, (images, *shape)), (weighting.channels, (images, channels))):
                if weights is not None:
                    assert weights.shape == expected and weights.dtype == torch.float32
                    assert weights.isfinite().all() and (weights >= 0).all() and not weights.requires_grad
            if weighting.cells is not None:
                assert not weighting.cells[~level.valid].any()


@every_mask
def test_it_looks_somewhere(case, look):
    """The scene has boxes of several sizes, and outputs and features of random numbers."""
    mask, levels = look(case)
    assert any(weights.any() for level in levels for each in mask(level)
               for weights in each[:2] if weights is not None)


@every_mask
def test_it_leaves_what_it_reads(case, look, tensors_of):
    mask, levels = look(case)
    read = tensors_of([levels[0].context, *(level.valid for level in levels)])
    before = [each.detach().clone() for each in read]
    for level in levels:
        mask(level)
    assert all(torch.equal(now, then) for now, then in zip(read, before))


@every_mask
def test_it_says_whether_it_is_made_of_boxes(case, look):
    mask, levels = look(case)
    nothing = dict(boxes=[torch.zeros(0, 4)] * 3, labels=[torch.zeros(0, dtype=torch.long)] * 3)
    _, without = look(case, **nothing)
    changes = not all(torch.equal(*map(as_one, pair)) for pair in zip(map(mask, levels), map(mask, without)))
    assert isinstance(mask.needs_boxes, bool) and changes == mask.needs_boxes


@every_mask
def test_it_says_whether_it_looks_at_boxes_alone(case, look):
    mask, levels = look(case, 'no_boxes')
    looks = any(all(weights.any() for weights in each[:2] if weights is not None)
                for level in levels for each in mask(level))
    assert mask.only_at_boxes is not looks


def as_one(weightings) -> torch.Tensor:
    """All weights in one row."""
    return torch.cat([weights.flatten() for each in weightings for weights in each[:2] if weights is not None])


@every_mask
def test_it_can_be_pickled_and_copied(case, look):
    mask, levels = look(case)
    for other in (mask, pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask)):
        assert not other.state_dict()
        assert all(torch.equal(as_one(mask(level)), as_one(other(level))) for level in levels)


@every_mask
def test_it_weighs_an_imitation(case, make_scene):
    """Within a term, on features in half precision: the heads that it reads are asked for, the student learns."""
    scene = make_scene('plain')
    term = scene.connect(MODELS.build(dict(type='FeatureImitation', mask=CASES[case])))
    half = {path: tuple(level.half() for level in levels) for path, levels in scene.context.student.items()}
    value = term(scene.show_to(term, student=half))['imitation']
    value.backward()
    assert value.dtype == torch.float32 and value > 0 and value.isfinite()
    assert any(level.grad.any() for level in scene.student[:3])
    assert all(each.grad is None for each in scene.student[3:])  # no gradient through a mask


@pytest.mark.parametrize('case', [case for case, config in CASES.items()
                                  if issubclass(MODELS.get(config['type']), CellMask)])
def test_it_reads_the_teacher_of_its_term(case, look):
    mask, levels = look(case)
    expected = [mask.cells(level) for level in levels]
    _, levels = look(case)
    for level, cells in zip(levels, expected):
        level.context.teachers = [{}, level.context.teachers[-1]]
        level.context.teacher_outputs = [{}, level.context.teacher_outputs[-1]]
        level.teacher_index = 1
        assert torch.equal(mask.cells(level), cells)


@given(data=st.data())
def test_an_image_has_its_weights_whatever_its_place_and_whatever_comes_beside_it(data, forms, form_scene, permute,
                                                                                  double):
    """The order of images, boxes and classes means nothing, nor do copies of the images."""
    form = data.draw(forms())
    scene = form_scene(form._replace(widths=(form.widths[1], ) * 2))
    for other, images in (permute(scene, data), double(scene)):
        for case, config in CASES.items():
            mask = build_mask(config)
            for level, same in zip(show_levels(mask, scene), show_levels(mask, other)):
                for expected, actual in zip(mask(level), mask(same)):
                    assert expected.factor == actual.factor
                    for one, another in zip(expected[:2], actual[:2]):
                        assert (one is None) is (another is None)
                        if one is not None:
                            torch.testing.assert_close(another, one[images], rtol=1e-4, atol=1e-6,
                                                       msg=lambda text: f'{case}: {text}')


@pytest.mark.parametrize('name', MASKS)
def test_its_docstring_tells_its_arguments(name, documented_arguments):
    documented_arguments(getattr(kd_det.masks, name))


@pytest.mark.parametrize('name', MASKS)
def test_it_refuses_arguments_of_another_kind_when_it_is_built(name, refuse_arguments):
    refuse_arguments(dict(CONFIGS.get(name, [{}])[0], type=name))
