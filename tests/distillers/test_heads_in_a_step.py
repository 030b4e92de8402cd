"""Heads are read and run for the terms that ask for them, and for no others."""
import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage

from kd_det.config import ConfigurationError
from kd_det.config.composition import check_terms
from kd_det.config.detectors import TeacherError, find_head_classes

OUTPUTS = dict(faster_rcnn=dict(rpn=dict(type='RPNImitation'), classes=dict(type='RoIClassification')),
               retinanet=dict(classes=dict(type='DenseClassification'), boxes=dict(type='DenseRegression')))


def _step(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model(**data, mode='loss')


def _forbid_heads(model):
    for name, child in model.named_children():
        if name.endswith('_head'):
            child.forward = None  # running it would fail


@pytest.fixture(params=['retinanet', 'faster_rcnn'])
def pair(request):
    make = request.getfixturevalue(request.param)
    return make(), make(depth=50, neck=12), OUTPUTS[request.param]


def test_a_feature_method_runs_no_head_of_the_teacher(pair, distiller, batch):
    model = distiller(*pair[:2], distill=dict(fgd=dict(type='FGD')))
    _forbid_heads(model.build_teachers()[0].model)
    assert _step(model, batch())['loss_fgd'] > 0


def test_each_part_of_the_teacher_runs_once(pair, distiller, batch):
    model = distiller(*pair[:2], distill=dict(pair[2], features=dict(type='FeatureImitation')))
    teacher, runs = model.build_teachers()[0].model, []
    for name in ('backbone', 'neck', 'bbox_head', 'rpn_head'):
        if name in dict(teacher.named_children()):
            getattr(teacher, name).register_forward_hook(lambda *args, name=name: runs.append(name))
    losses = _step(model, batch())
    assert len(runs) == len(set(runs)) == 3
    assert all(losses[f'loss_{name}'] > 0 for name in (*pair[2], 'features'))


def test_heads_of_stopped_terms_do_not_run(pair, distiller, batch):
    stopped = {name: dict(term, weight=dict(type='Stop', value=1.0, epochs=1)) for name, term in pair[2].items()}
    model = distiller(*pair[:2], distill=dict(stopped, features=dict(type='FeatureImitation')))
    model.set_progress(iteration=10, epoch=1.0)
    _forbid_heads(model.build_teachers()[0].model)
    losses = _step(model, batch())
    assert losses['loss_features'] > 0 and all(losses[f'loss_{name}'] == 0 for name in pair[2])


def test_nothing_is_kept_and_copies_train_no_one(pair, distiller, batch):
    model = distiller(*pair[:2], distill=pair[2]).train()
    averaged = ExponentialMovingAverage(model)
    assert all(loss.isfinite().all() for name, loss in _step(model, batch()).items() if name in pair[2])
    assert not model.connections.student_heads.taps._seen
    averaged.update_parameters(model)
    assert len(averaged.module.eval().val_step(batch())) == 2


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_finite_float32_under_autocast(pair, distiller, batch, dtype):
    model = distiller(*pair[:2], distill=pair[2]).train()
    with torch.autocast('cpu', dtype=dtype):
        losses = _step(model, batch(shapes=((64, 96), (33, 40))))
    for name in pair[2]:
        assert losses[f'loss_{name}'].isfinite() and losses[f'loss_{name}'].dtype == torch.float32
    model.parse_losses(losses)[0].backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def _c4(config, **backbone):
    """The same detector on one level of stride 16, without a neck."""
    config.pop('neck')
    config.backbone = dict(type='ResNet', depth=50, base_channels=4, num_stages=3, strides=(1, 2, 2),
                           dilations=(1, 1, 1), out_indices=(2, ), norm_eval=True, style='caffe', **backbone)
    config.rpn_head.update(in_channels=64, feat_channels=64)
    config.rpn_head.anchor_generator.strides = [16]
    config.roi_head.bbox_roi_extractor.update(out_channels=64, featmap_strides=[16])
    config.roi_head.bbox_head.in_channels = 64
    return config


def _trident(config):
    branches = dict(num_branch=3, test_branch_idx=1)
    _c4(config).backbone.update(type='TridentResNet', trident_dilations=(1, 2, 3), **branches)
    config.type = 'TridentFasterRCNN'
    config.roi_head.update(type='TridentRoIHead', **branches)
    return config


def _pisa(config):
    config.roi_head.type = 'PISARoIHead'
    config.train_cfg.rcnn.sampler.update(type='ScoreHLRSampler', k=0.5, bias=0.0)
    return config


def _crowddet(config):
    config.roi_head.type, head = 'MultiInstanceRoIHead', config.roi_head.bbox_head
    head.update(type='MultiInstanceBBoxHead', num_shared_fcs=2, loss_cls=dict(head.loss_cls, reduction='none'),
                loss_bbox=dict(head.loss_bbox, reduction='none'))
    return config


@pytest.mark.parametrize('change, term, message', [
    (_pisa, dict(type='RoIClassification'), 'PISARoIHead .* its bbox_loss does not .*Distil features, or its RPN'),
    (_crowddet, dict(type='RoIRegression'), 'A MultiInstanceRoIHead predicts several objects .*: distil features'),
    (_trident, dict(type='RPNImitation'), 'A TridentFasterRCNN passes each image through several branches'),
    (_trident, dict(type='FeatureImitation', tap='backbone'), 'Take a detector without branches .*, a FasterRCNN')])
def test_a_student_whose_step_can_not_be_read_is_refused_before_it(change, term, message, faster_rcnn, distiller):
    student, teacher = change(faster_rcnn()), faster_rcnn()
    with pytest.raises(ConfigurationError, match=f'^model.distill.a: .*{message}'):
        distiller(student, _c4(teacher) if change is _trident else teacher, distill=dict(a=term))
    if term['type'].startswith('RoI'):  # before any config is written, too
        with pytest.raises(ConfigurationError, match=message):
            check_terms('kd', dict(a=term), 'FasterRCNN', find_head_classes(student))


@pytest.mark.parametrize('change, make, term', [
    (_pisa, lambda config: config, dict(type='RoIClassification')),
    (_pisa, lambda config: config, dict(type='RPNImitation')),
    (_trident, _c4, dict(type='RoIClassification')), (_trident, _c4, dict(type='FeatureImitation', tap='backbone'))])
def test_the_same_detectors_teach(change, make, term, faster_rcnn, distiller, batch):
    model = distiller(make(faster_rcnn()), change(faster_rcnn()), distill=dict(a=term))
    for parameter in model.build_teachers()[0].model.parameters():  # TridentConv leaves them as the memory was
        torch.nn.init.normal_(parameter, std=0.1)
    assert _step(model.train(), batch())['loss_a'] > 0


@pytest.mark.parametrize('term', [dict(type='RoIClassification'), dict(type='RPNImitation'),
                                  dict(type='FeatureImitation', tap='backbone'), None])
def test_a_teacher_that_answers_by_all_of_its_branches_is_refused(term, faster_rcnn, distiller):
    """Else a term would read its first branch, or of a single image all; pseudo-labels would mix images."""
    teacher = _trident(faster_rcnn())
    teacher.backbone.test_branch_idx = teacher.roi_head.test_branch_idx = -1
    taught = dict(distill=dict(a=term)) if term else dict(distill={}, pseudo_labels=dict(score=0.5))
    with pytest.raises(TeacherError, match='a TridentFasterRCNN with test_branch_idx=-1, .*Set test_branch_idx=1'):
        distiller(_c4(faster_rcnn()), teacher, **taught)


def test_the_features_and_the_rpn_of_such_a_student_can_be_distilled(faster_rcnn, distiller, batch):
    terms = dict(a=dict(type='FeatureImitation'), b=dict(type='RPNImitation'))
    losses = _step(distiller(_pisa(faster_rcnn()), faster_rcnn(), distill=terms).train(), batch())
    assert losses['loss_a'] > 0 and losses['loss_b'] > 0
    distiller(_crowddet(faster_rcnn()), faster_rcnn(), distill=terms)


def test_a_head_whose_loss_asks_its_ancestors_assignment_for_nothing_tells_no_positives(retinanet, distiller, batch):
    student = retinanet()
    student.bbox_head.update(type='FreeAnchorRetinaHead', loss_bbox=dict(type='SmoothL1Loss', beta=0.11))
    with pytest.raises(ConfigurationError, match="a: A FreeAnchorRetinaHead does not tell which .*'confidence'"):
        distiller(student, retinanet(), distill=dict(a=dict(type='DenseClassification')))
    term = dict(type='DenseClassification', normalizer='confidence')
    assert _step(distiller(student, retinanet(), distill=dict(a=term)).train(), batch())['loss_a'] > 0
