"""Masks of predictions: from outputs made by hand, and in whole training steps of both kinds of detectors."""
import copy

import pytest
import torch

from kd_det.context import ComparedLevel
from kd_det.heads import DenseOutputs, HeadError
from kd_det.masks import PredictionQuality, build_mask


def _outputs(anchors=2, classes=3, seed=0, activation='sigmoid', stride=8, shape=(8, 12)):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, shape[0] * shape[1] * anchors, classes + (activation == 'softmax'), generator=random)
    return DenseOutputs(logits=(logits.requires_grad_(), ), activation=activation, regressions=(), shapes=(shape, ),
                        strides=(stride, ), decode=None, generate_priors=None)


@pytest.fixture
def level(make_context):
    """One level of stride 8 of a batch of two, the second image padded, with the outputs of a head on it."""

    def make(student=None, teacher=None) -> ComparedLevel:
        context = make_context(torch.randn(2, 6, 8, 12), torch.randn(2, 6, 8, 12), [torch.zeros(0, 4)] * 2,
                               image_shapes=[(64, 96), (40, 56)])
        context.student_outputs = dict(bbox_head=student or _outputs(seed=1))
        context.teacher_outputs = [dict(bbox_head=teacher or _outputs(seed=2))]
        return context.read_level()

    return make


@pytest.mark.parametrize('anchors', ['max', 'mean'])
@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_prediction_difference_of_a_cell(level, anchors, activation):
    student, teacher = (_outputs(seed=seed, activation=activation) for seed in (1, 2))
    cells = build_mask(dict(type='PredictionDifference', anchors=anchors)).cells(level(student, teacher))
    row, column = 2, 5
    p_s, p_t = (side.logits[0][0].view(8, 12, 2, -1)[row, column] for side in (student, teacher))
    p_s, p_t = (p.sigmoid() if activation == 'sigmoid' else p.softmax(-1)[:, :-1] for p in (p_s, p_t))
    p_s, p_t = (p.amax(0) if anchors == 'max' else p.mean(0) for p in (p_s, p_t))
    torch.testing.assert_close(cells[0, row, column], (p_t - p_s).square().mean().detach())
    assert cells.shape == (2, 8, 12) and not cells.requires_grad


def test_difference_fades_as_the_student_approaches_the_teacher(level):
    assert build_mask('PredictionDifference').cells(level(_outputs(seed=2), _outputs(seed=2))).abs().max() == 0


def test_confidence_is_the_teachers_largest_probability(level):
    teacher = _outputs(seed=2)
    cells = build_mask('TeacherConfidence').cells(level(teacher=teacher))
    torch.testing.assert_close(cells[0], teacher.logits[0][0].view(8, 12, 6).sigmoid().amax(-1).detach())


@pytest.mark.parametrize('mask', ['PredictionDifference', 'TeacherConfidence'])
def test_padding_gets_no_weight(level, mask):
    cells = build_mask(mask).cells(level())
    assert (cells[1, 5:] == 0).all() and (cells[1, :, 7:] == 0).all()
    assert (cells[1, :5, :7] > 0).all() and (cells[0] > 0).all()


def test_class_sets_that_differ(level):
    compared = level(_outputs(classes=3), _outputs(classes=1))
    with pytest.raises(HeadError, match='student tells 3 classes apart, the teacher 1.*class_agnostic=True'):
        build_mask('PredictionDifference').cells(compared)
    cells = build_mask(dict(type='PredictionDifference', class_agnostic=True)).cells(compared)
    student, teacher = (side.cell_probabilities(0).amax(1) for side in (
        compared.context.student_outputs['bbox_head'], compared.context.teacher_outputs[0]['bbox_head']))
    torch.testing.assert_close(cells[0], (student - teacher).square()[0].detach())


def test_a_head_that_does_not_look_at_these_features(level):
    with pytest.raises(HeadError, match='no level of stride 8; its strides are .16.'):
        build_mask('TeacherConfidence').cells(level(teacher=_outputs(stride=16)))
    with pytest.raises(HeadError, match=r'features have \(8, 12\) cells but the head \(4, 6\)'):
        build_mask('TeacherConfidence').cells(level(teacher=_outputs(shape=(4, 6))))


def _priors(strides, shapes, anchors):
    """Squares of two strides around the centre of each cell."""
    priors = []
    for stride, (height, width) in zip(strides, shapes):
        rows, columns = (torch.arange(cells) * stride + stride / 2 for cells in (height, width))
        centers = torch.stack(torch.meshgrid(rows, columns, indexing='ij'), -1).flip(-1).reshape(-1, 2)
        priors.append(torch.cat([centers - stride, centers + stride], 1).repeat_interleave(anchors, 0))
    return tuple(priors)


@pytest.fixture
def detecting(level):
    """A teacher of two levels that predicts its priors, and the first box best from two cells of the second level."""
    shapes, strides, anchors = ((8, 12), (4, 6)), (8, 16), 2
    boxes = [priors.expand(2, -1, 4).clone() for priors in _priors(strides, shapes, anchors)]
    truth = torch.tensor([[30., 14., 70., 50.], [8., 8., 24., 24.]])
    boxes[1][0, [(6 + 2) * 2 + 1, (12 + 3) * 2]] = truth[0]
    boxes[0][1, 0] = float('inf')
    logits = tuple(torch.zeros(2, len(each[0]), 3) for each in boxes)
    teacher = DenseOutputs(logits=logits, activation='sigmoid', regressions=(), shapes=shapes, strides=strides,
                           decode=lambda: tuple(boxes), generate_priors=lambda: _priors(strides, shapes, anchors))
    compared = level(teacher=teacher)
    compared.context.boxes = [truth[:1], truth[1:]]
    compared.context.labels = [torch.tensor([2]), torch.tensor([0])]
    return compared


def test_quality_is_where_the_teacher_detects_a_box_best(detecting):
    """The boxes compete for the cells of all levels; both of these are as far from their mean."""
    context, mask = detecting.context, build_mask(dict(type='PredictionQuality', top_k=2))
    coarse = ComparedLevel(*[torch.zeros(2, 6, 4, 6)] * 3, 1, (8, 16), context)
    fine, coarse = mask.cells(detecting), mask.cells(coarse)
    assert fine.shape == (2, 8, 12) and coarse.shape == (2, 4, 6)
    assert fine[0].max() == 0 and coarse[0].nonzero().tolist() == [[1, 2], [2, 3]]
    torch.testing.assert_close(coarse[0, 1, 2], torch.tensor(-0.5).exp(), rtol=1e-3, atol=0)
    # The second image: two of the four cells of the first level within its box, which predict it equally well.
    assert (fine[1] > 0).sum() == (fine[1, 1:3, 1:3] > 0).sum() == 2 and coarse[1].max() == 0


def test_quality_is_computed_once_for_all_levels(detecting, monkeypatch):
    mask = build_mask('PredictionQuality')
    first = mask.cells(detecting)
    monkeypatch.setattr(PredictionQuality, '_spread_quality', None)
    assert torch.equal(mask.cells(detecting), first)


def test_quality_of_the_only_class_and_of_no_boxes(detecting):
    outputs = detecting.context.teacher_outputs[0]['bbox_head']
    expected = build_mask('PredictionQuality').cells(detecting)
    outputs.logits = tuple(logits[..., :1] for logits in outputs.logits)
    detecting.context._computed.clear()
    assert torch.equal(build_mask('PredictionQuality').cells(detecting), expected)
    detecting.context.boxes, detecting.context.labels = [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2
    detecting.context._computed.clear()
    assert build_mask('PredictionQuality').cells(detecting).abs().max() == 0


def test_boxes_of_classes_that_the_teacher_lacks_get_no_quality(detecting):
    """Beyond its classes, or -1 where only some are shared."""
    detecting.context.labels = [torch.tensor([3]), torch.tensor([-1])]
    assert build_mask('PredictionQuality').cells(detecting).abs().max() == 0
    outputs = detecting.context.teacher_outputs[0]['bbox_head']
    outputs.logits = tuple(logits[..., :1] for logits in outputs.logits)  # with a single class every known box is one
    detecting.context._computed.clear()
    cells = build_mask(dict(type='PredictionQuality', top_k=100)).cells(detecting)
    assert cells[0].max() > 0 and cells[1].max() == 0


def test_unknown_word_for_anchors():
    with pytest.raises(ValueError, match="^mask.anchors: expected one of max, mean, got 'sum'"):
        build_mask(dict(type='TeacherConfidence', anchors='sum'))


@pytest.mark.parametrize('detector, head', [('retinanet', 'bbox_head'), ('faster_rcnn', 'rpn_head')])
@pytest.mark.parametrize('mask', ['PredictionDifference', 'TeacherConfidence'])
def test_terms_gather_the_heads_of_their_masks(detector, head, mask, request, distiller, batch):
    """Within a product and a sum, on images with and without boxes."""
    make = request.getfixturevalue(detector)
    product = dict(type='MaskProduct', masks=[dict(type=mask, head=head), 'ChannelAttention'])
    masks = dict(type='MaskSum', masks=[product, 'BoxBackground'], weights=[1.0, 0.5])
    model = distiller(make(), make(depth=50, neck=12), distill=dict(term=dict(type='FeatureImitation', mask=masks)))
    assert set(model.terms['term'].teacher_heads) == {head}
    assert set(model.terms['term'].student_heads) == ({head} if mask == 'PredictionDifference' else set())
    for data in (batch(), batch(boxes=((), ()))):
        data = model.data_preprocessor(copy.deepcopy(data), True)
        loss = model(**data, mode='loss')['loss_term']
        loss.backward()
        assert loss.isfinite() and loss > 0
    assert all(parameter.grad is None for parameter in getattr(model, head).parameters())  # no gradient through a mask
