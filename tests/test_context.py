"""What the terms may read in one step."""
import torch

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
