import pytest
import torch
from mmdet.registry import MODELS

from kd_det.context import DistillContext, LevelSpec
from kd_det.losses import base


@pytest.fixture
def pyramid(golden):
    """DeFeat's golden values, and their context."""
    data = golden('defeat')
    strides, height, width = data.meta['strides'], 128, 192
    students, teachers = ([getattr(data, f'{side}{index}') for index in range(len(strides))]
                          for side in ('student', 'teacher'))
    levels = tuple(LevelSpec(4, stride) for stride in strides)
    boxes = [data.gt0, data.gt1]
    context = DistillContext(
        student=dict(neck=tuple(student.requires_grad_() for student in students)),
        teachers=[dict(neck=tuple(teachers))], student_levels=dict(neck=levels), teacher_levels=[dict(neck=levels)],
        boxes=boxes, labels=[torch.zeros(len(each)) for each in boxes], batch_shape=(height, width),
        image_shapes=[(height, width)] * 2)
    return data, context


def test_reproduces_the_authors_values(pyramid, term_of):
    data, context = pyramid
    weights = {f'{part}_weight': data.meta[f'weight_{part}'] for part in ('foreground', 'background')}
    parts = term_of(context, type='DecoupledImitation', **weights)(context)
    for part, value in parts.items():
        torch.testing.assert_close(value.detach(), getattr(data, f'loss_{part}'), rtol=1e-5, atol=0, check_dtype=False)
    # The golden file holds no gradient: it is that of the formula, over each level's masks.
    gradients = torch.autograd.grad(sum(parts.values()), context.student['neck'])
    for index, gradient in enumerate(gradients):
        student, teacher, mask = (getattr(data, f'{name}{index}').detach() for name in ('student', 'teacher', 'mask'))
        weight = sum(data.meta[f'weight_{part}'] * cells / (4 * cells.sum()).clamp(min=1e-9)
                     for part, cells in dict(foreground=mask, background=1 - mask).items())
        torch.testing.assert_close(gradient, (weight[:, None] * (student - teacher) / 5).float(), rtol=1e-4, atol=1e-9)


def test_a_mask_above_1_leaves_no_background_there(padded, term_of):
    parts = term_of(padded, type='DecoupledImitation', mask='SpatialAttention')(padded)
    assert all(0 < value < 1e3 for value in parts.values())


def test_padding_belongs_to_neither_part(padded, term_of, check_padding):
    term = term_of(padded, type='DecoupledImitation', mask='BoxForeground')
    paper = term_of(padded, type='DecoupledImitation', mask='BoxForeground', pad_aware=False)(padded)
    assert paper['foreground'] == term(padded)['foreground'] and paper['background'] != term(padded)['background']
    check_padding(term)


@pytest.mark.parametrize('config', [
    dict(type='DecoupledImitation', mask='BoxForeground'),
    dict(type='FeatureImitation', mask='BoxForeground', normalizer='twice_mask'),
    dict(type='FeatureImitation', normalizer='mask')], ids=['decoupled', 'boxes', 'everywhere'])
def test_ranks_average_to_the_whole_batch(config, padded, make_context, term_of, monkeypatch):
    """One image on each of two ranks, with unlike numbers of cells: the mean of their losses is that of one process."""
    student, teacher = padded.student['neck'][0], padded.teachers[0]['neck'][0]
    whole = sum(term_of(padded, **config)(padded).values())
    ranks = [make_context(student[rank:rank + 1], teacher[rank:rank + 1], padded.boxes[rank:rank + 1],
                          image_shapes=padded.image_shapes[rank:rank + 1]) for rank in range(2)]
    totals = [[], []]
    for rank, context in enumerate(ranks):
        monkeypatch.setattr(base, 'reduce_mean', lambda total: totals[rank].append(total) or total)
        term_of(context, **config)(context)
    means = [sum(pair) / 2 for pair in zip(*totals)]
    assert totals[0] and totals[0] != totals[1]
    values = []
    for context in ranks:
        received = iter(means)
        monkeypatch.setattr(base, 'reduce_mean', lambda total: next(received))
        values.append(sum(term_of(context, **config)(context).values()))
    torch.testing.assert_close(sum(values) / 2, whole)


def test_a_mask_over_channels_is_an_error():
    with pytest.raises(ValueError, match="^mask: expected a mask over the cells"):
        MODELS.build(dict(type='DecoupledImitation', mask='ChannelAttention'))
