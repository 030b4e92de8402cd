"""Heads are read and run for the terms that ask for them, and for no others."""
import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage

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
