"""What the terms may read in one step."""
from dataclasses import replace

import pytest
import torch
from mmdet.registry import MODELS

from kd_det import context as module
from kd_det.context import DistillContext, LevelSpec


def test_a_context_from_plain_tensors():
    boxes = [torch.tensor([[0., 0., 8., 8.]]), torch.zeros(0, 4)]
    context = DistillContext.of_features([torch.zeros(2, 4, 8, 12), torch.zeros(2, 4, 4, 6)],
                                         [torch.zeros(2, 6, 8, 12), torch.zeros(2, 6, 4, 6)], 16, boxes)
    assert context.student_levels == dict(neck=(LevelSpec(4, 16), LevelSpec(4, 32)))
    assert context.teacher_levels == [dict(neck=(LevelSpec(6, 16), LevelSpec(6, 32)))]
    assert context.batch_shape == (128, 192) and context.image_shapes == [(128, 192)] * 2
    assert context.boxes == boxes and [each.tolist() for each in context.labels] == [[0], []]
    assert context.fully_labelled and context.valid((8, 12)).all()


def test_other_attributes_of_a_context_from_plain_tensors():
    feature = torch.zeros(1, 4, 8, 12)
    context = DistillContext.of_features(feature, feature, [4], labels=[torch.zeros(0).long()], batch_shape=(30, 48),
                                         image_shapes=[(16, 48)], tap='backbone', labelled=(False, ))
    assert list(context.student) == ['backbone'] and context.batch_shape == (30, 48)
    assert context.valid((8, 12)).sum() == 5 * 12 and not context.fully_labelled


@pytest.fixture
def context():
    return DistillContext.of_features([torch.randn(2, 4, 8, 12), torch.randn(2, 4, 4, 6)],
                                      [torch.randn(2, 6, 8, 12), torch.randn(2, 6, 4, 6)],
                                      boxes=[torch.tensor([[0., 0., 8., 8.]]), torch.zeros(0, 4)])


def count_boxes(context: DistillContext) -> int:
    return context.once(('count', ), lambda: sum(map(len, context.boxes)))


def test_computed_once(context):
    results = [context.once('key', list) for _ in range(2)]
    assert results[0] is results[1] and context.once('other', list) is not results[0]


def test_a_context_made_of_another_computes_anew(context):
    """Neither has what the other computed, before or after it was made."""
    assert count_boxes(context) == 1
    unboxed = replace(context, boxes=[torch.zeros(0, 4)] * 2)
    assert count_boxes(unboxed) == 0 and count_boxes(context) == 1
    unboxed.once('later', lambda: 'of the new')
    assert context.once('later', lambda: 'of the old') == 'of the old'
    with pytest.raises((TypeError, ValueError), match='_computed'):
        replace(context, _computed={})


def test_valid_cells_are_handed_on_while_they_hold(context, monkeypatch):
    before = context.valid((8, 12))
    smaller = replace(context, image_shapes=[(64, 96), (8, 8)])
    assert smaller.valid((8, 12))[1].sum() == 1 and context.valid((8, 12)).all()
    monkeypatch.setattr(module, 'valid_cells', None)  # computed no more
    assert replace(context, labels=[]).valid((8, 12)) is before


def test_a_level_as_both_have_it(context):
    level = context.read_level(1)
    assert level.student is level.raw_student is context.student['neck'][1]
    assert level.teacher is context.teachers[0]['neck'][1]
    assert (level.stride, level.strides, level.shape) == (16, (8, 16), (4, 6)) and level.valid.shape == (2, 4, 6)


@pytest.mark.parametrize('levels', [None, (1, )])
def test_a_term_gives_masks_the_raw_feature_and_all_strides_of_its_tap(context, levels, connected, monkeypatch):
    seen = []
    term = connected(MODELS.build(dict(type='PKD', levels=levels)), context)
    monkeypatch.setattr(term, 'compare', lambda level, position: seen.append(level) or {})
    term(context)
    assert [level.index for level in seen] == list(levels or (0, 1))
    for level in seen:
        assert torch.equal(level.raw_student, context.student['neck'][level.index])
        assert level.student.shape == level.teacher.shape and level.strides == (8, 16)


@pytest.mark.parametrize('seed', range(20))
def test_whether_cells_are_padding_is_known_without_looking_at_them(seed):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(16, 64, (2, ), generator=generator)
    cells = tuple(-(-side // 8) for side in batch.tolist())
    shapes = [tuple((batch - less).tolist()) for less in torch.randint(0, 9, (2, 2), generator=generator)]
    feature = torch.zeros(2, 1, *cells)
    context = DistillContext.of_features(feature, feature, batch_shape=tuple(batch.tolist()), image_shapes=shapes)
    level = context.read_level()
    assert context.has_padding(cells) == (not level.valid.all())
    assert level.inside is (level.valid if context.has_padding(cells) else None)
