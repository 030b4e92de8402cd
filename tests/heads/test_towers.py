"""What passes the towers of a student's head, and a teacher's head entered within its towers."""
import copy

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.heads import HeadError, StudentHeads, TeacherTowers, TowerFeatures, check_head, find_head, read_dense
from kd_det.heads.towers import read_towers, record_towers, tower_widths

FAMILIES = ['retina', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet']
FIELDS = ('logits', 'regressions', 'boxes', 'centerness', 'distributions')


def _passed(head, inputs) -> TowerFeatures:
    with record_towers(head) as calls:
        head(inputs)
    return read_towers(calls)


@pytest.mark.parametrize('remaining', [0, 1, 2])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_head_that_resumes_its_own_features_ends_as_it_does(family, remaining, dense_head, features):
    """Scales of the levels and units of the boxes included."""
    head, inputs = dense_head(family, stacked_convs=2).eval().requires_grad_(False), features()
    expected = read_dense(head, head(inputs))
    classes, boxes = _passed(head, inputs).before(remaining)
    before = dict(head.named_modules())
    outputs = TeacherTowers(head).resume(classes, boxes, remaining)
    for field in FIELDS:
        for one, other in zip(getattr(outputs, field) or (), getattr(expected, field) or ()):
            assert torch.equal(one, other) and one.requires_grad
    assert dict(head.named_modules()) == before and 'forward' not in vars(head.cls_convs[0])


@pytest.mark.parametrize('family', FAMILIES)
def test_each_tower_is_fed_by_its_own_features_on_its_own_level(family, dense_head, features):
    head, inputs = dense_head(family, stacked_convs=2).eval().requires_grad_(False), features()
    classes, boxes = ([level.detach().requires_grad_() for level in levels]
                      for levels in _passed(head, inputs).before(1))
    outputs = TeacherTowers(head).resume(classes, boxes, 1)
    outputs.boxes[1].sum().backward()
    reached = [level.grad is not None and bool(level.grad.any()) for level in (*classes, *boxes)]
    assert reached == [False] * 4 + [True, False]
    assert all(parameter.grad is None for parameter in head.parameters())


def test_the_students_features_are_those_of_its_loss(one_stage, batch):
    torch.manual_seed(0)
    model = MODELS.build(one_stage('gfl', stacked_convs=2)).train()
    heads, given = StudentHeads(model, ['bbox_head', 'bbox_head.towers']), []
    model.bbox_head.gfl_cls.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with heads.capture() as outputs:
        losses = model(**model.data_preprocessor(copy.deepcopy(batch()), True), mode='loss')
    towers = outputs['bbox_head.towers']
    assert [len(tower) for tower in towers] == [3, 3] and len(given) == 3
    assert all(one is other for one, other in zip(towers.before(0)[0], given))
    assert all(one is other for one, other in zip(*towers.before(2)))  # both towers begin with the neck's features
    gradients = torch.autograd.grad(sum(losses['loss_cls']), towers.before(1)[0])
    assert all(gradient.any() for gradient in gradients)


def test_widths_and_depths(dense_head, features):
    """As the features have them, in every family."""
    for family in FAMILIES:
        head = dense_head(family, stacked_convs=2, feat_channels=6).eval()
        widths, passed = tower_widths(head), _passed(head, features())
        for remaining, expected in enumerate((6, 6, 8)):
            assert widths.before(remaining) == (expected, expected)
            assert [levels[0].shape[1] for levels in passed.before(remaining)] == [expected, expected]
        with pytest.raises(HeadError, match='remaining=3 convolutions: the depth of a tower is 2'):
            widths.before(3)


def test_a_head_without_towers(dense_head, one_stage):
    for family in ('ssd', 'yolox', 'rpn', 'rtmdet_separate'):
        heads = dict(bbox_head=type(dense_head(family)))
        with pytest.raises(HeadError, match='has no towers.*RetinaNet, ATSS, GFL, FCOS and RTMDet'):
            check_head('Detector', heads, 'bbox_head.towers')
    with pytest.raises(HeadError, match='A SSDHead has no towers'):
        find_head(MODELS.build(one_stage('ssd')), 'bbox_head.towers')


def test_a_tower_is_whole_again_after_an_error(dense_head, features):
    head = dense_head('fcos', stacked_convs=2).eval()
    classes, boxes = _passed(head, features()).before(1)
    before = dict(head.named_modules())
    with pytest.raises(RuntimeError, match='channels'):
        TeacherTowers(head).resume([level[:, :4] for level in classes], boxes, 1)
    assert dict(head.named_modules()) == before
