"""The student's heads are read from its own loss, the teacher's run on its own features."""
import copy
import weakref

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.heads import (
    DenseOutputs,
    HeadError,
    StudentHeads,
    TeacherForward,
    capture,
    find_head,
    read_dense,
    run_heads,
)
from kd_det.taps import TapError


@pytest.fixture
def step(batch):
    """Builds a detector and reads its heads in one training step; returns the detector and the outputs."""

    def run(config, names, data=None):
        torch.manual_seed(0)
        model = MODELS.build(config).train()
        data = model.data_preprocessor(copy.deepcopy(data or batch()), True)
        heads = StudentHeads(model, names)
        with heads.capture() as outputs:
            model(**data, mode='loss')
        return model, outputs

    return run


def _spied(head, method, given):
    """Keeps what a method is given."""
    original = getattr(head, method)
    setattr(head, method, lambda *args, **kwargs: given.append((args, kwargs)) or original(*args, **kwargs))


@pytest.mark.parametrize('detector, name', [('retinanet', 'bbox_head'), ('faster_rcnn', 'rpn_head')])
def test_dense_outputs_are_what_the_loss_sees(detector, name, request, batch):
    model, given = MODELS.build(request.getfixturevalue(detector)()), []
    head = getattr(model, name)
    heads = StudentHeads(model, [name])
    _spied(head, 'loss_by_feat_single', given)
    with heads.capture() as outputs:
        model(**model.data_preprocessor(batch(), True), mode='loss')
    dense = outputs[name]
    assert len(given) == len(dense.logits) == 5 and any(positives.any() for positives in dense.assigned)
    for (args, _), logits, positives in zip(given, dense.logits, dense.assigned):
        maps, _, _, labels = args[:4]
        assert torch.equal(logits, maps.permute(0, 2, 3, 1).reshape(2, -1, head.cls_out_channels))
        assert logits.requires_grad
        assert torch.equal(positives, labels.reshape(2, -1) < head.num_classes)


def test_regions_and_outputs_are_those_of_the_loss(faster_rcnn, batch):
    model, given = MODELS.build(faster_rcnn()), []
    heads, head = StudentHeads(model, ['roi_head']), model.roi_head.bbox_head
    _spied(head, 'loss', given)
    with heads.capture() as outputs:
        model(**model.data_preprocessor(batch(), True), mode='loss')
    (logits, deltas, rois, labels, _, targets, _), _ = given[0]
    roi, stds = outputs['roi_head'], torch.tensor([0.1, 0.1, 0.2, 0.2])
    assert roi.logits.requires_grad and roi.deltas.requires_grad
    assert torch.equal(roi.logits, logits)
    assert torch.equal(roi.regions.rois, rois) and torch.equal(roi.regions.labels, labels)
    torch.testing.assert_close(roi.deltas.flatten(1) / stds.repeat(3), deltas)
    torch.testing.assert_close(roi.regions.targets / roi.regions.stds, targets)
    foreground = labels < 3
    assert foreground.any() and not foreground.all()
    torch.testing.assert_close(roi.labelled_deltas()[foreground],
                               roi.deltas[foreground, labels[foreground]])


def test_targets_of_a_head_that_regresses_decoded_boxes(faster_rcnn, step):
    config = faster_rcnn()
    config.roi_head.bbox_head.update(reg_decoded_bbox=True, loss_bbox=dict(type='GIoULoss'))
    model, outputs = step(config, ['roi_head'])
    regions = outputs['roi_head'].regions
    foreground = regions.labels < 3
    boxes = model.roi_head.bbox_head.bbox_coder.decode(regions.rois[:, 1:], regions.targets / regions.stds)[foreground]
    truth = torch.tensor([[8., 8, 40, 40], [20, 4, 60, 30], [2, 30, 30, 62]])
    assert torch.cdist(boxes, truth).amin(1).max() < 1e-2 and regions.targets[~foreground].abs().max() == 0


def test_stages_of_a_cascade_follow_one_another(cascade_rcnn, step):
    model, outputs = step(cascade_rcnn(), ['roi_head', 'rpn_head'])
    roi = outputs['roi_head']
    assert len(roi.logits) > 32 and roi.deltas.shape[1:] == (1, 4) and set(outputs) == {'roi_head', 'rpn_head'}
    assert {tuple(stds) for stds in roi.regions.stds.tolist()} == {
        tuple(torch.tensor(stage.bbox_coder.stds).tolist()) for stage in model.roi_head.bbox_head}
    assert (roi.regions.stages == (roi.regions.stds[:, 0] < 0.1)).all()


def test_the_model_is_left_as_it_was(faster_rcnn, batch):
    model = MODELS.build(faster_rcnn())
    head = model.roi_head.bbox_head
    before = dict(vars(head)), dict(vars(model.rpn_head))
    heads = StudentHeads(model, ['rpn_head', 'roi_head'])
    with pytest.raises(RuntimeError, match='in the loss'):
        with heads.capture():
            assert 'loss_and_target' in vars(head)
            raise RuntimeError('in the loss')
    assert (set(vars(head)), set(vars(model.rpn_head))) == tuple(map(set, before))


def test_a_head_that_did_not_run_is_an_error(retinanet, faster_rcnn):
    with pytest.raises(TapError, match="'bbox_head' saw 0 forwards"):
        with StudentHeads(MODELS.build(retinanet()), ['bbox_head']).capture():
            pass
    with pytest.raises(HeadError, match='computed no loss'):
        with StudentHeads(MODELS.build(faster_rcnn()), ['roi_head']).capture():
            pass


def test_heads_that_can_not_be_read(retinanet, faster_rcnn):
    model = MODELS.build(retinanet())
    with pytest.raises(HeadError, match="A RetinaNet has no 'roi_head'; it has bbox_head"):
        find_head(model, 'roi_head')
    config = faster_rcnn()
    config.roi_head.bbox_head.bbox_coder = dict(type='TBLRBBoxCoder')
    with pytest.raises(HeadError, match='StandardRoIHead with a Shared2FCBBoxHead can not be read'):
        find_head(MODELS.build(config), 'roi_head')
    config.roi_head['bbox_head'] = dict(type='SABLHead', num_classes=3, cls_in_channels=8, reg_in_channels=8)
    with pytest.raises(HeadError, match='StandardRoIHead with a SABLHead can not be read'):
        find_head(MODELS.build(config), 'roi_head')


@pytest.mark.parametrize('kind, stages', [('faster_rcnn', 1), ('cascade_rcnn', 2)])
def test_the_teacher_looks_at_the_students_regions_in_its_own_features(kind, stages, faster_rcnn, request, step):
    _, student = step(faster_rcnn(), ['roi_head'])
    torch.manual_seed(1)
    teacher = MODELS.build(request.getfixturevalue(kind)(depth=50, neck=12)).eval()
    features = teacher.extract_feat(torch.randn(2, 3, 64, 64))
    regions = student['roi_head'].regions
    outputs = run_heads(['rpn_head', 'roi_head'], TeacherForward(teacher, features, student))
    assert len(outputs['roi_head']) == stages and outputs['rpn_head'].logits[0].shape == (2, 16 * 16 * 2, 1)
    for stage, read in enumerate(outputs['roi_head']):
        extractor, head = teacher.roi_head.bbox_roi_extractor, teacher.roi_head.bbox_head
        extractor, head = (extractor[stage], head[stage]) if stages > 1 else (extractor, head)
        logits, deltas = head(extractor(features[:4], regions.rois))
        assert read.regions is regions and torch.equal(read.logits, logits)
        normalized = read.deltas / torch.tensor(head.bbox_coder.stds)
        torch.testing.assert_close(normalized.flatten(1), deltas)


def _htc(cascade):
    extractor = dict(cascade.roi_head.bbox_roi_extractor, featmap_strides=[8])
    cascade.type = 'HybridTaskCascade'
    cascade.roi_head.update(
        type='HybridTaskCascadeRoIHead', semantic_roi_extractor=extractor, mask_roi_extractor=extractor,
        semantic_head=dict(type='FusedSemanticHead', num_ins=5, fusion_level=1, seg_scale_factor=1 / 8, num_convs=1,
                           in_channels=8, conv_out_channels=8, num_classes=5),
        mask_head=[dict(type='HTCMaskHead', with_conv_res=bool(stage), num_convs=1, in_channels=8, conv_out_channels=8,
                        num_classes=3) for stage in range(2)])
    return cascade


def _scnet(cascade):
    cascade = _htc(cascade)
    cascade.type, cascade.roi_head.type = 'SCNet', 'SCNetRoIHead'
    for head in cascade.roi_head.bbox_head:
        head.update(type='SCNetBBoxHead', num_shared_fcs=2)
    cascade.roi_head.update(
        semantic_head=dict(cascade.roi_head.semantic_head, type='SCNetSemanticHead'),
        mask_head=dict(type='SCNetMaskHead', num_convs=1, in_channels=8, conv_out_channels=8, num_classes=3),
        glbctx_head=dict(type='GlobalContextHead', num_convs=1, in_channels=8, conv_out_channels=8, num_classes=3))
    return cascade


@pytest.mark.parametrize('kind', [_htc, _scnet])
def test_a_cascade_with_branches_of_the_whole_image_gives_them_to_its_box_heads(kind, cascade_rcnn, faster_rcnn, step):
    _, student = step(faster_rcnn(), ['roi_head'])
    torch.manual_seed(1)
    teacher = MODELS.build(kind(cascade_rcnn())).eval()
    features = teacher.extract_feat(torch.randn(2, 3, 64, 64))
    forward = TeacherForward(teacher, features, student)
    first = run_heads(['roi_head'], forward)['roi_head'][0]
    branches = dict(semantic_feat=teacher.roi_head.semantic_head(features)[1])
    if kind is _scnet:
        branches['glbctx_feat'] = teacher.roi_head.glbctx_head(features)[1]
    expected = teacher.roi_head._bbox_forward(0, features, first.regions.rois, **branches)
    torch.testing.assert_close(first.logits, expected['cls_score'])
    for branch, feature in branches.items():  # each is heard
        without = teacher.roi_head._bbox_forward(0, features, first.regions.rois,
                                                 **{**branches, branch: torch.zeros_like(feature)})
        assert not torch.allclose(first.logits, without['cls_score'])


def test_a_roi_head_has_no_parts(faster_rcnn):
    for name, absent in (('roi_head.towers', 'has no towers'), ('roi_head.positives', 'does not tell which priors')):
        with pytest.raises(HeadError, match=f'A StandardRoIHead {absent}'):
            find_head(MODELS.build(faster_rcnn()), name)


LD = dict(type='DenseRegression', form='distribution', weighting='valuable', normalizer='none')


@pytest.mark.parametrize('terms, read', [
    ([dict(type='DenseClassification')], {'logits'}), ([LD], {'distributions'}),
    ([LD, dict(type='DenseClassification')], {'logits', 'distributions'}),
    ([dict(type='DenseRegression', weighting='gap')], {'logits', 'regressions'}),
    ([dict(type='DecoupledImitation', mask=dict(type='PredictionQuality'))], {'logits', 'regressions'}),
    ([dict(type='CrossKD')], {'logits', 'regressions', 'distributions'})])
def test_what_no_term_reads_of_a_teachers_head_is_let_go_of(terms, read, one_stage, distiller, batch, monkeypatch):
    model = distiller(one_stage('gfl'), one_stage('gfl', neck=12), distill=dict(zip('ab', terms))).train()
    data, made = model.data_preprocessor(batch(), True), {}

    def note(head, *arguments):
        outputs = read_dense(head, *arguments)
        if not head.training:
            made.update({name: weakref.ref(getattr(outputs, name)[0])
                         for name in ('logits', 'regressions', 'distributions')})
        return outputs

    monkeypatch.setattr(capture, 'read_dense', note)
    torch.manual_seed(0)
    observation = model.observe(**copy.deepcopy(data), names=model.terms)  # which holds on to the outputs
    assert {name for name, each in made.items() if each() is not None} == read
    taught = observation.context.teacher_outputs[0]['bbox_head']
    assert [(*taught.logits[0].shape[:2], 4, *rest) for rest in ((), (taught.distributions[0].shape[-1], ))] == [
        taught.regressions[0].shape, taught.distributions[0].shape]
    if 'regressions' not in read:
        with pytest.raises(HeadError, match="not kept.*add 'boxes'"):
            taught.boxes
    monkeypatch.setattr(DenseOutputs, 'keep', lambda outputs, kinds: outputs)
    torch.manual_seed(0)
    whole = model.observe(**copy.deepcopy(data), names=model.terms)
    assert {name for name, each in made.items() if each() is not None} == set(made)
    for name, value in whole.values.items():
        assert value.keys() == observation.values[name].keys()
        assert all(torch.equal(each, observation.values[name][part]) for part, each in value.items())
