"""What passes the towers of a student's head, and a teacher's head entered within its towers."""
import copy

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.heads import HeadError, StudentHeads, TeacherTowers, TowerFeatures, check_head, find_head, read_dense
from kd_det.heads.towers import measure_moments, read_towers, record_towers, tower_widths

FAMILIES = ['retina', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet', 'rtmdet_separate', 'yolox']
FIELDS = ('logits', 'regressions', 'boxes', 'centerness', 'distributions', 'objectness')


def _passed(head, inputs, remaining=1) -> TowerFeatures:
    with record_towers(head, remaining) as readings:
        head(inputs)
    return read_towers(readings)


def _entered(head, remaining=1) -> TeacherTowers:
    return TeacherTowers(head, remaining, measure_moments(TowerFeatures((), ()), ()))


@pytest.mark.parametrize('remaining', [0, 1, 2, 'half'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_head_that_resumes_its_own_features_ends_as_it_does(family, remaining, dense_head, features):
    """Scales of the levels and units of the boxes included."""
    head, inputs = dense_head(family, stacked_convs=2).eval().requires_grad_(False), features()
    expected = read_dense(head, head(inputs))
    before, in_place = dict(head.named_modules()), [getattr(each, 'inplace', None) for each in head.modules()]
    features, towers = _passed(head, inputs, remaining), _entered(head, remaining)
    for given in (features.activated(), towers.activate(features.classes, features.boxes)):
        outputs = towers.resume(*given)
        for field in FIELDS:
            for one, other in zip(getattr(outputs, field) or (), getattr(expected, field) or ()):
                assert torch.equal(one, other) and one.requires_grad
    assert dict(head.named_modules()) == before
    assert [getattr(each, 'inplace', None) for each in head.modules()] == in_place and True in in_place
    assert not any('forward' in vars(module) for module in before.values())


@pytest.mark.parametrize('family', FAMILIES)
def test_each_tower_is_fed_by_its_own_features_on_its_own_level(family, dense_head, features):
    head, inputs = dense_head(family, stacked_convs=2).eval().requires_grad_(False), features()
    classes, boxes = ([level.detach().requires_grad_() for level in levels]
                      for levels in _passed(head, inputs).activated())
    outputs = _entered(head).resume(classes, boxes)
    outputs.boxes[1].sum().backward()
    reached = [level.grad is not None and bool(level.grad.any()) for level in (*classes, *boxes)]
    assert reached == [False] * 4 + [True, False]
    assert all(parameter.grad is None for parameter in head.parameters())


@pytest.mark.parametrize('family', ['gfl', 'yolox'])
def test_the_students_features_are_those_of_its_loss(family, one_stage, batch):
    """Before the activation, which leaves them as they are, though it would write in place; and no loss changes."""
    torch.manual_seed(0)
    model, given = MODELS.build(one_stage(family, stacked_convs=2)).train(), []
    data = model.data_preprocessor(copy.deepcopy(batch()), True)
    expected = copy.deepcopy(model)(**copy.deepcopy(data), mode='loss')
    depths = {'bbox_head.towers': 0, 'bbox_head.towers.1': 1, 'bbox_head.towers.2': 2}
    heads, last = StudentHeads(model, ['bbox_head', *depths]), getattr(model.bbox_head, 'gfl_cls', None)
    for layer in [last] if last is not None else model.bbox_head.multi_level_conv_cls:
        layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    with heads.capture() as outputs:
        losses = model(**data, mode='loss')
    assert model.parse_losses(losses)[0] == model.parse_losses(expected)[0]
    towers = [outputs[name] for name in depths]
    assert [[len(levels) for levels in tower[:2]] for tower in towers] == [[3, 3]] * 3 and len(given) == 3
    assert all(map(torch.equal, towers[0].activated()[0], given))
    assert all((level < 0).any() for tower in towers[:2] for levels in tower[:2] for level in levels)
    assert all(one is other for one, other in zip(*towers[2][:2]))  # both towers begin with the neck's features
    assert towers[2].activated() == towers[2][:2]
    loss = losses['loss_cls']
    gradients = torch.autograd.grad(sum(loss) if isinstance(loss, list) else loss, towers[1].classes)
    assert all(gradient.any() for gradient in gradients)


def test_widths_and_depths(dense_head, features):
    """As the features have them, in every family."""
    for family in FAMILIES:
        head = dense_head(family, stacked_convs=2, feat_channels=6).eval()
        widths = tower_widths(head)
        for remaining, expected in {0: 6, 1: 6, 2: 8, 'half': 6}.items():
            assert widths.before(remaining) == (expected, expected)
            assert [levels[0].shape[1] for levels in _passed(head, features(), remaining)[:2]] == [expected, expected]
        with pytest.raises(HeadError, match='remaining=3 convolutions: the depth of a tower is 2'):
            widths.before(3)
    with pytest.raises(HeadError, match='remaining=half convolutions: the depth of a tower is 0'):
        tower_widths(dense_head('fcos', stacked_convs=0)).before('half')
    head = dense_head('yolox', stacked_convs=2)
    head.multi_level_cls_convs[1][1].conv.out_channels = 5
    with pytest.raises(HeadError, match=r"'multi_level_cls_convs' of a YOLOXHead .*\[\(8, 8, 5\), \(8, 8, 8\)\]"):
        tower_widths(head)


def test_a_head_without_towers(dense_head, one_stage):
    for family in ('ssd', 'yolov3', 'rpn'):
        heads = dict(bbox_head=type(dense_head(family)))
        with pytest.raises(HeadError, match='has no towers.*RetinaNet, ATSS, GFL, FCOS, RTMDet and YOLOX'):
            check_head('Detector', heads, 'bbox_head.towers')
    with pytest.raises(HeadError, match='A SSDHead has no towers'):
        find_head(MODELS.build(one_stage('ssd')), 'bbox_head.towers')


def test_a_tower_is_whole_again_after_an_error(dense_head, features):
    head = dense_head('fcos', stacked_convs=2).eval()
    classes, boxes = _passed(head, features()).activated()
    before = dict(head.named_modules())
    with pytest.raises(RuntimeError, match='channels'):
        _entered(head).resume([level[:, :4] for level in classes], boxes)
    assert dict(head.named_modules()) == before


def test_the_convolution_of_a_deformable_ones_offsets_is_no_layer(dense_head):
    plain, deformable = (tower_widths(dense_head('fcos', **options)) for options in ({}, dict(dcn_on_last_conv=True)))
    assert plain == deformable
