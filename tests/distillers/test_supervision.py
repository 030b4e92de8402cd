"""Unlabelled images: no background for the student's own loss, and all that terms teach without boxes."""
import copy

import pytest
import torch

from kd_det.datasets import Unlabelled
from kd_det.distillers.supervision import compute_labelled_losses, read_supervision

IMAGES = dict(shapes=((64, 64), (64, 64), (48, 64)), boxes=(((8, 8, 40, 40), ), (), ((2, 10, 30, 46), )))


def _unlabelled(data, rows):
    for row in rows:
        Unlabelled()(dict(data_samples=data['data_samples'][row]))
    return data


def _prepared(model, data):
    return model.data_preprocessor(copy.deepcopy(data), True)


def _step(model, data, seed=0):
    torch.manual_seed(seed)
    return model.loss(**_prepared(model, data))


@pytest.fixture(params=['retinanet', 'faster_rcnn'])
def make(request):
    return request.getfixturevalue(request.param)


def test_own_losses_are_those_of_the_labelled_images_alone(make, distiller, batch):
    model = distiller(make(), make(neck=12), distill={}).eval()  # in training mode BatchNorm sees the other images
    data = _prepared(model, _unlabelled(batch(**IMAGES), [1]))
    samples = data['data_samples']
    features = model.student.extract_feat(data['inputs'])
    torch.manual_seed(0)
    actual = compute_labelled_losses(model.student, data['inputs'], features, read_supervision(samples), {})
    torch.manual_seed(0)
    expected = model.student.loss(data['inputs'][[0, 2]], [samples[0], samples[2]])
    assert actual.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(actual[name], loss)
    assert 'extract_feat' not in vars(model.student)
    background = model.student.loss(data['inputs'], samples)
    key = 'loss_cls' if 'loss_bbox' in background and 'loss_rpn_cls' not in background else 'loss_rpn_cls'
    assert not torch.equal(sum(actual[key]), sum(background[key]))


def test_a_batch_that_nobody_labelled_has_losses_of_0(make, distiller, batch):
    model = distiller(make(), make(neck=12), distill=dict(pkd=dict(type='PKD')))
    losses = _step(model, _unlabelled(batch(**IMAGES), range(3)))
    value, _ = model.parse_losses(losses)
    value.backward()
    assert losses['loss_pkd'] > 0 and value == losses['loss_pkd']
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    heads = [each for name, each in gradients.items() if 'head' in name]
    assert heads and all(each is not None and each.abs().max() == 0 for each in heads)  # DDP waits for them
    assert gradients['neck.fpn_convs.0.conv.weight'].abs().max() > 0


def test_labelled_batches_are_as_ever(make, distiller, batch):
    """Bit for bit those of the student, and no head runs twice."""
    model = distiller(make(), make(neck=12), distill=dict(fgd=dict(type='FGD')))
    state = copy.deepcopy(model.student.state_dict())
    actual, runs = _step(model, batch(**IMAGES)), []
    model.student.load_state_dict(state)
    torch.manual_seed(0)
    expected = model.student.loss(*_prepared(model, batch(**IMAGES)).values())
    for name, loss in expected.items():
        assert torch.equal(torch.stack(loss) if isinstance(loss, list) else loss,
                           torch.stack(actual[name]) if isinstance(loss, list) else actual[name])
    head = getattr(model, 'rpn_head', None) or model.bbox_head
    head.register_forward_hook(lambda *_: runs.append(1))
    _step(model, batch(**IMAGES))
    assert len(runs) == 1


FEATURES = dict(type='FeatureImitation', normalizer='mask')
WITHOUT_BOXES = dict(
    retinanet=dict(
        difference=dict(FEATURES, mask='PredictionDifference'), confidence=dict(FEATURES, mask='TeacherConfidence'),
        spatial=dict(FEATURES, mask='SpatialAttention'), channels=dict(FEATURES, mask='ChannelAttention'),
        richness=dict(type='DecoupledImitation', mask=dict(type='TeacherConfidence')),
        classes=dict(type='DenseClassification'), boxes=dict(type='DenseRegression', weighting='gap'),
        counted=dict(type='DenseClassification', normalizer='confidence'), attention=dict(type='AttentionImitation'),
        pkd=dict(type='PKD'), cwd=dict(type='CWD'), mgd=dict(type='MGD'), dist=dict(type='DIST'), fkd=dict(type='FKD'),
        fgd=dict(type='FGD')),
    faster_rcnn=dict(
        difference=dict(FEATURES, mask=dict(type='PredictionDifference', head='rpn_head')),
        rpn=dict(type='RPNImitation'), classes=dict(type='RoIClassification')))
OF_BOXES = dict(
    foreground=dict(FEATURES, mask='BoxForeground'), background=dict(FEATURES, mask='BoxBackground'),
    defeat=dict(type='DecoupledImitation'), anchors=dict(type='DecoupledImitation', mask='NearAnchorForeground'),
    quality=dict(FEATURES, mask='PredictionQuality'), level=dict(FEATURES, mask='LevelForeground'),
    ranks=dict(type='RankMimicking'), valuable=dict(type='DenseRegression', weighting='positives'))


@pytest.mark.parametrize('family', WITHOUT_BOXES)
def test_what_needs_no_boxes_is_learnt_from_unlabelled_images(family, request, distiller, batch):
    make = request.getfixturevalue(family)
    model = distiller(make(), make(neck=12), distill=WITHOUT_BOXES[family])
    losses = _step(model, _unlabelled(batch(**IMAGES), range(3)))
    for name in model.terms:
        gradient = torch.autograd.grad(losses[f'loss_{name}'], model.backbone.conv1.weight, retain_graph=True)[0]
        assert losses[f'loss_{name}'].isfinite() and losses[f'loss_{name}'] > 0 and gradient.abs().max() > 0, name
        assert gradient.isfinite().all()


def test_what_needs_boxes_learns_nothing_from_unlabelled_images(retinanet, distiller, batch):
    """Above all no background: they may be full of objects."""
    model = distiller(retinanet(), retinanet(neck=12), distill=OF_BOXES)
    empty = batch(shapes=IMAGES['shapes'], boxes=((), (), ()))
    losses = _step(model, _unlabelled(copy.deepcopy(empty), range(3)))
    assert {name: float(losses[f'loss_{name}']) for name in model.terms} == dict.fromkeys(model.terms, 0.0)
    losses = _step(model, empty)  # labelled as empty
    assert losses['loss_background'] > 0 and losses['loss_defeat'] > 0


def test_positives_of_unlabelled_images_are_counted_by_the_teachers_scores(retinanet, distiller, batch):
    """A batch with unlabelled images must not divide all images by the positives of some."""
    model = distiller(retinanet(), retinanet(neck=12), distill=dict(
        positives=dict(type='DenseClassification'),
        confidence=dict(type='DenseClassification', normalizer='confidence')))
    losses = _step(model, _unlabelled(batch(**IMAGES), range(3)))
    assert torch.equal(losses['loss_positives'], losses['loss_confidence'])
    term, seen = model.terms['positives'], []
    term.register_forward_hook(lambda module, args, _: seen.append(term.pair_levels(args[0])))
    _step(model, _unlabelled(batch(**IMAGES), [1]))
    levels, = seen
    expected = sum(level.student.positives(level.student_level)[[0, 2]].sum() + level.confidence()[1].sum()
                   for level in levels)
    torch.testing.assert_close(term._divisors(levels)[0], expected.clamp(min=1))
