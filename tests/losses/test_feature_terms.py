import pytest
import torch
from mmdet.registry import MODELS

import kd_det.losses
from kd_det.context import DistillContext, LevelSpec
from kd_det.losses import FeatureTerm


@pytest.fixture
def context(make_context):
    torch.manual_seed(0)
    boxes = [torch.tensor([[8., 8., 24., 24.]]), torch.zeros(0, 4)]
    return make_context(torch.randn(2, 4, 8, 12, requires_grad=True), torch.randn(2, 4, 8, 12), boxes)


def test_unmasked_imitation_is_the_mean_squared_error(context, connected):
    term = connected(MODELS.build(dict(type='FeatureImitation', normalizer='mean')), context)
    expected = torch.nn.functional.mse_loss(context.student['neck'][0], context.teachers[0]['neck'][0])
    torch.testing.assert_close(term(context)['imitation'], expected)


def test_masked_imitation_sees_only_the_mask(context, connected):
    term = connected(MODELS.build(dict(type='FeatureImitation', mask='BoxForeground', distance='l1')), context)
    term(context)['imitation'].backward()
    gradient = context.student['neck'][0].grad
    assert gradient[0, :, 1:4, 1:4].abs().min() > 0
    assert gradient[0, :, 4:].abs().max() == 0 and gradient[1].abs().max() == 0


@pytest.mark.parametrize('normalizer', ['batch', 'mask', 'twice_mask', 'twice_elements', 'cells', 'mean'])
def test_sum_of_masks_is_the_sum_of_terms(normalizer, context, connected):
    masks = ['BoxForeground', dict(type='MaskProduct',
                                   masks=['BoxBackground', dict(type='ChannelAttention', temperature=0.5)])]

    def value(mask):
        term = MODELS.build(dict(type='FeatureImitation', normalizer=normalizer, mask=mask))
        return connected(term, context)(context)['imitation']

    whole = value(dict(type='MaskSum', masks=masks, weights=[1.0, 0.5]))
    torch.testing.assert_close(whole, value(masks[0]) + 0.5 * value(masks[1]))
    nested = value(dict(type='MaskProduct', masks=[dict(type='MaskSum', masks=masks, weights=[1.0, 0.5]),
                                                   'BoxForeground']))
    assert nested == value('BoxForeground')  # where there is a box there is no background


def test_levels_are_compared_with_those_of_their_stride():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(1, 4, 64 // stride, 64 // stride) for stride in strides]
                        for strides in ((8, 16), (4, 8, 16)))
    teacher[2] = student[1]
    context = DistillContext(
        student=dict(neck=tuple(student)), teachers=[dict(neck=tuple(teacher))],
        student_levels=dict(neck=(LevelSpec(4, 8), LevelSpec(4, 16))),
        teacher_levels=[dict(neck=(LevelSpec(4, 4), LevelSpec(4, 8), LevelSpec(4, 16)))],
        boxes=[torch.zeros(0, 4)], labels=[torch.zeros(0)], batch_shape=(64, 64), image_shapes=[(64, 64)])
    for levels, expected in (((1, ), torch.tensor(0.)), ((0, ), torch.nn.functional.mse_loss(student[0], teacher[1]))):
        term = MODELS.build(dict(type='FeatureImitation', levels=levels, normalizer='mean'))
        term.connect(context.student_levels, context.teacher_levels[0])
        torch.testing.assert_close(term(context)['imitation'], expected)


def test_unlike_strides_need_resize(make_context, connected):
    context = make_context(torch.randn(1, 4, 4, 6), torch.randn(1, 4, 8, 12), [torch.zeros(0, 4)],
                           image_shapes=[(64, 96)])
    context.student_levels['neck'] = (LevelSpec(4, 16), )
    with pytest.raises(ValueError, match='no partner'):
        connected(MODELS.build(dict(type='FeatureImitation')), context)
    teacher = context.teachers[0]['neck'][0]
    # Bilinear, at half the size and corners unaligned: each cell is the mean of the four that it covers.
    expected = (context.student['neck'][0] - teacher.view(1, 4, 4, 2, 6, 2).mean((3, 5))).square().sum()
    term = connected(MODELS.build(dict(type='FeatureImitation', resize=True)), context)
    torch.testing.assert_close(term(context)['imitation'], expected)


def test_sizes_that_differ_at_equal_stride_are_an_error(make_context, connected):
    context = make_context(torch.randn(1, 4, 8, 12), torch.randn(1, 4, 8, 13), [torch.zeros(0, 4)])
    with pytest.raises(ValueError, match='cover the same image with other cells'):
        connected(MODELS.build(dict(type='FeatureImitation')), context)(context)


def test_different_paths_in_student_and_teacher(make_context, connected):
    context = make_context(torch.randn(1, 4, 8, 12), torch.randn(1, 4, 8, 12), [torch.zeros(0, 4)])
    for held in (context.teachers[0], context.teacher_levels[0]):
        held['backbone.layer2'] = held.pop('neck')
    term = MODELS.build(dict(type='FeatureImitation', tap=dict(student='neck', teacher='backbone.layer2')))
    assert (term.student_taps, term.teacher_taps) == (('neck', ), ('backbone.layer2', ))
    assert connected(term, context)(context)['imitation'] > 0


FEATURE_TERMS = sorted(name for name in kd_det.losses.__all__ if name in MODELS.module_dict
                       and issubclass(MODELS.get(name), FeatureTerm))


@pytest.mark.parametrize('name', FEATURE_TERMS)
def test_normalised_features_are_compared_as_if_they_had_passed_batch_normalisation(name, term_of):
    torch.manual_seed(0)
    student, teacher = ([scale * torch.randn(3, 4, *cells) + 2 for cells in ((8, 12), (4, 6))] for scale in (3, 0.1))
    boxes = [torch.tensor([[8., 8., 24., 24.], [30., 4., 90., 60.]])] * 3
    norm = torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    values, others = [], dict(adapter='none') if name == 'FKD' else {}  # its own convolution is drawn at random
    for normalize, sides in ((True, (student, teacher)), (False, ([*map(norm, each)] for each in (student, teacher)))):
        context = DistillContext.of_features(*sides, boxes=boxes)
        torch.manual_seed(1)
        term = term_of(context, type=name, tap='neck', normalize=normalize, **others)
        torch.manual_seed(2)
        values.append(term(context))
    assert len(FEATURE_TERMS) > 10 and any(value > 0 for value in values[0].values())
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-5)


def test_an_adapter_before_a_normalisation_has_no_bias_and_neither_sees_padding(padded, term_of, check_padding):
    term = term_of(padded, type='CWD', normalize=True, adapter='conv1x1')
    assert [type(each) for each in term.adapters] == [torch.nn.Conv2d] and term.adapters[0].bias is None
    check_padding(term)
    plain = term_of(padded, type='CWD', adapter='conv1x1')
    assert plain.adapters[0].bias is not None
