"""The mask of RoI heads: against its definition, and in whole training steps."""
import copy

import pytest
import torch

from kd_det.context import DistillContext
from kd_det.heads import HeadError, Regions, RoIOutputs
from kd_det.masks import build_mask

# Image, box: small on the finest level, large on the second; the last two overlap on the second image.
ROIS = torch.tensor([[0., 0, 0, 16, 16], [0., 0, 0, 192, 160], [1., 32, 32, 64, 64], [1., 48, 48, 96, 96]])


def _outputs(seed, classes=3):
    random = torch.Generator().manual_seed(seed)
    count = len(ROIS)
    regions = Regions(ROIS, torch.zeros(count, dtype=torch.long), torch.zeros(count, 4), torch.ones(count, 4),
                      torch.tensor([0, 1, 1, 0]))
    return RoIOutputs(regions, torch.randn(count, classes + 1, generator=random).requires_grad_(),
                      torch.zeros(count, 1, 4))


@pytest.fixture
def levels():
    """Two levels, of strides 8 and 16, of a batch of two images of which the second is padded."""

    def make(student, teachers):
        maps = [(torch.randn(2, 6, 24, 24), torch.randn(2, 6, 12, 12)) for _ in range(2)]
        context = DistillContext.of_features(*maps, image_shapes=[(192, 192), (80, 192)])
        context.student_outputs, context.teacher_outputs = dict(roi_head=student), [dict(roi_head=teachers)]
        return [context.read_level(index) for index in range(2)]

    return make


def _difference(student, teacher):
    p_s, p_t = (each.logits.softmax(1)[:, :-1].detach() for each in (student, teacher))
    return (p_t - p_s).square().mean(1)


def test_each_region_goes_to_the_cells_of_its_level_and_the_largest_counts(levels):
    student, teacher = _outputs(1), _outputs(2)
    finest, second = (build_mask('RoIPredictionDifference').cells(level) for level in levels(student, (teacher, )))
    values = _difference(student, teacher)
    expected = torch.zeros(2, 24, 24)
    expected[0, :2, :2] = values[0]
    expected[1, 4:8, 4:8] = values[2]
    expected[1, 6:12, 6:12] = torch.where(expected[1, 6:12, 6:12] > values[3], expected[1, 6:12, 6:12], values[3])
    expected[1, 10:] = 0  # padding
    torch.testing.assert_close(finest, expected)
    expected = torch.zeros(2, 12, 12)
    expected[0, :10, :12] = values[1]
    torch.testing.assert_close(second, expected)
    assert not finest.requires_grad and not second.requires_grad


def test_fades_as_the_student_approaches_the_teacher(levels):
    for level in levels(_outputs(1), (_outputs(1), )):
        assert build_mask('RoIPredictionDifference').cells(level).abs().max() == 0


def test_stages_of_a_cascade(levels):
    student, stages = _outputs(1), (_outputs(2), _outputs(3))
    level = levels(student, stages)[0]
    mean = stages[0]._replace(logits=(stages[0].logits + stages[1].logits) / 2)
    same = stages[0]._replace(logits=torch.stack([stages[stage].logits[row] for row, stage in enumerate((0, 1, 1, 0))]))
    for stage, teacher in (('mean', mean), ('same', same), (0, stages[0]), (1, stages[1])):
        cells = build_mask(dict(type='RoIPredictionDifference', stage=stage)).cells(level)
        torch.testing.assert_close(cells[0, 0, 0], _difference(student, teacher)[0])
    with pytest.raises(HeadError, match="stage=2: the teacher's RoI head has 2 stages"):
        build_mask(dict(type='RoIPredictionDifference', stage=2)).cells(level)


def test_class_sets_that_differ(levels):
    student, teacher = _outputs(1), _outputs(2, classes=5)
    level = levels(student, (teacher, ))[0]
    with pytest.raises(HeadError, match='student tells 3 classes apart, the teacher 5.*class_agnostic=True'):
        build_mask('RoIPredictionDifference').cells(level)
    cells = build_mask(dict(type='RoIPredictionDifference', class_agnostic=True)).cells(level)
    best = [each.logits[0].softmax(0)[:-1].max() for each in (student, teacher)]
    torch.testing.assert_close(cells[0, 0, 0], (best[0] - best[1]).square().detach())


@pytest.mark.parametrize('student, teacher', [('faster_rcnn', 'cascade_rcnn'), ('cascade_rcnn', 'faster_rcnn')])
def test_in_a_training_step(student, teacher, request, distiller, batch):
    make, taught_by = (request.getfixturevalue(kind) for kind in (student, teacher))
    masks = dict(type='MaskSum', masks=[dict(type='PredictionDifference', head='rpn_head'), 'RoIPredictionDifference'])
    term = dict(type='FeatureImitation', mask=masks)
    model = distiller(make(), taught_by(depth=50, neck=12), distill=dict(term=term))
    for data in (batch(), batch(boxes=((), ()))):
        data = model.data_preprocessor(copy.deepcopy(data), True)
        loss = model(**data, mode='loss')['loss_term']
        loss.backward()
        assert loss.isfinite() and loss > 0
    for head in (model.roi_head, model.rpn_head):  # no gradient through a mask
        assert all(parameter.grad is None for parameter in head.parameters())
