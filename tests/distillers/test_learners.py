"""Several learners in one step: each as if alone, none noticed by the student, and each taught by the others."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.optim import OptimWrapper

from kd_det.config.files import ConfigurationError
from kd_det.distillers.student_wrapper import PEERS
from kd_det.training.learners import clip_by_learner

PEERS_OF_TWO = [dict(type='Peer', learner=0), dict(type='Peer', learner=1)]


@pytest.fixture
def mutual(retinanet):
    """Makes a distiller of learners without a frozen teacher."""

    def make(student=None, seed=0, **settings):
        torch.manual_seed(seed)
        model = MODELS.build(dict(type='kd_det.DetectionDistiller', student=student or retinanet(),
                                  **dict(dict(peers=1), **settings)))
        return model.train()

    return make


def step(model, data):
    return model.parse_losses(model.loss(**model.data_preprocessor(copy.deepcopy(data), True)))


def train(model, data, steps=3, clip=None):
    """Trains as a run does; of a distiller clipped by learner."""
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
                           clip_grad=None if clip is None else dict(max_norm=clip))
    if hasattr(model, 'learners'):
        class Run:
            optim_wrapper = wrapper
        clip_by_learner(Run, model)
    for number in range(steps):
        torch.manual_seed(number)  # as the hook of a distillation does: a sampler draws as many numbers as it likes
        model.train_step(copy.deepcopy(data), wrapper)
    return model


def same(one, other):
    return all(torch.equal(one.state_dict()[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
def test_without_terms_each_learner_ends_as_if_alone(kind, request, mutual, batch):
    make = request.getfixturevalue(kind)
    model = mutual(make(), peers=[make(depth=50), make()], seed=3)
    model.init_weights()
    alone = [copy.deepcopy(peer) for peer in model.peers]
    torch.manual_seed(3)
    plain = MODELS.build(make())
    plain.init_weights()
    assert same(plain, model) and not same(model.peers[1], plain)
    # Clipping far below the gradients' norms would couple them, if it were by one norm.
    train(model, batch(), clip=0.1)
    for own, found in zip([plain, *alone], [model.student, *model.peers]):
        before = copy.deepcopy(own)
        assert same(train(own.train(), batch(), clip=0.1), found)
        assert not same(before, own)


def test_the_student_alone_is_seen_from_outside(mutual, retinanet):
    model, plain = mutual(peers=2), MODELS.build(retinanet())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    assert len(model.peers) == 2 and any(name.startswith(PEERS) for name, _ in model.named_parameters())


def test_mutual_learning_is_the_papers_update(mutual, batch):
    """Each learner's loss is its task's, and the divergence from the other's prediction, which gets no gradient."""
    term = dict(type='DenseClassification', beta=0.0, normalizer='none')
    model = mutual(teacher=PEERS_OF_TWO, distill=dict(of_student=dict(term, teacher=1),
                                                      of_peer=dict(term, learner=1, teacher=0)))
    model.init_weights()
    total, logged = step(model, batch())
    total.backward()
    found = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()

    data = model.data_preprocessor(batch(), True)
    learners, logits, losses = [model.student, model.peers[0]], [], []
    for learner in learners:
        losses.append(model.parse_losses(learner.loss(**copy.deepcopy(data)))[0])
        maps, _ = learner.bbox_head(learner.extract_feat(data['inputs']))
        logits.append(torch.cat([each.permute(0, 2, 3, 1).flatten() for each in maps]))
    for own, other in (logits, logits[::-1]):
        taught = other.detach().sigmoid()
        divergence = taught * (taught.log() - own.sigmoid().log())
        divergence += (1 - taught) * ((1 - taught).log() - (1 - own.sigmoid()).log())
        losses.append(divergence.sum())
    assert {'loss_of_student', 'loss_of_peer', 'peer1/loss_cls', 'loss_cls'} <= set(logged)
    sum(losses).backward()
    torch.testing.assert_close(total, sum(losses), rtol=1e-5, atol=1e-4)
    for gradient, weight in zip(found, model.parameters()):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-4)


KINDS = ['RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3', 'Faster R-CNN', 'Cascade R-CNN',
         'DETR', 'Deformable DETR', 'DINO']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('share', [(), ('backbone', 'neck')])
def test_peers_of_every_family_teach_each_other(kind, share, detector_config, mutual, batch_for):
    student = detector_config(kind)
    term = (dict(type='RoIClassification') if 'R-CNN' in kind else
            dict(type='QueryClassification') if 'D' in kind[:5] and kind != 'RTMDet' else
            dict(type='DenseClassification'))
    distill = dict(outputs=dict(term, learner=0, teacher=1), peers=dict(term, learner=1, teacher=0),
                   features=dict(type='PKD', learner=1, teacher=0))
    model = mutual(student, teacher=PEERS_OF_TWO, distill=distill, share=share)
    model.init_weights()
    data = batch_for(kind, shapes=((96, 96), (64, 80)), boxes=(((8, 8, 40, 40), ), ((4, 4, 60, 50), )))
    total, logged = step(model, data)
    assert total.isfinite() and {f'loss_{name}' for name in distill} <= set(logged)
    total.backward()
    lacking = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    plain = MODELS.build(student).train()
    step(plain, data)[0].backward()
    idle = {name for name, weight in plain.named_parameters() if weight.grad is None}
    assert not [name for name in lacking if name.removeprefix(f'{PEERS}.0.') not in idle]
    assert len(model.peers[0].state_dict()) < len(plain.state_dict()) if share else same(model.peers[0], model.peers[0])


def test_a_shared_trunk_runs_once_and_learns_from_both(mutual, batch):
    model, runs = mutual(share=('backbone', 'neck')), []
    model.init_weights()
    model.backbone.conv1.register_forward_hook(lambda *_: runs.append(1))
    total, logged = step(model, batch())
    assert len(runs) == 1 and model.backbone is model.peers[0].backbone.part
    (both, ) = torch.autograd.grad(total, [model.backbone.conv1.weight], retain_graph=True)
    own = sum(value for name, value in logged.items() if name.startswith('loss') and name != 'loss')
    peer = sum(value for name, value in logged.items() if name.startswith('peer1/loss'))
    torch.testing.assert_close(total, own + peer)
    assert both.abs().sum() > 0
    assert [len(group) for group in model.group_parameters()][1] == 0
    with torch.no_grad():  # beyond training it is the student's trunk
        data = model.eval().data_preprocessor(batch(), False)
        assert len(model.peers[0].extract_feat(data['inputs'])) == 5


@pytest.mark.parametrize('settings, message', [
    (dict(share=('neck', )), 'all parts from the image on'),
    (dict(share=('bbox_head', )), 'parts among backbone, neck'),
    (dict(teacher=dict(type='Peer', learner=2)), 'an index below 2'),
    (dict(distill=dict(pkd=dict(type='PKD', learner=2)), teacher=PEERS_OF_TWO), 'an index below 2'),
    (dict(distill=dict(crosskd=dict(type='CrossKD')), teacher=PEERS_OF_TWO), 'Take a frozen teacher'),
    (dict(teacher=dict(type='Peeer')), "there is no 'Peeer'"),
    (dict(teacher=dict(type='Peer'), pseudo_labels=dict(score=0.5)), 'a guide that detects'),
    (dict(peers=[dict(type='ResNet', depth=18)]), 'model.peers'),
    (dict(peers=0), 'at least one teacher'),
])
def test_a_mistake_is_one_clear_error(settings, message, mutual):
    with pytest.raises(ConfigurationError, match=message):
        mutual(**settings)


def test_peers_with_another_trunk_can_not_share_it(mutual, retinanet):
    with pytest.raises(ConfigurationError, match=r'model.peers\[0\].*neck.*is shared, but is not that'):
        mutual(peers=[retinanet(neck=12)], share=('backbone', 'neck'))


def test_the_average_follows_the_student(mutual, batch, retinanet):
    model = mutual(peers=0, teacher=dict(type='Average', momentum=0.25), distill=dict(pkd=dict(type='PKD')))
    model.init_weights()
    (average, ) = model.build_teachers()
    assert average.checkpoint is None and average.has_student_labels
    train(model, batch(), steps=1)
    expected = {key: value.clone() for key, value in model.student.state_dict().items()}
    average.after_step()  # before the first step it was the copy of the student as that was then
    first = {key: value.clone() for key, value in average.model.state_dict().items()}
    train(model, batch(), steps=1)
    average.after_step()
    for key, value in average.model.state_dict().items():
        if value.is_floating_point():
            now = model.student.state_dict()[key]
            torch.testing.assert_close(value, 0.75 * first[key] + 0.25 * now, rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(first[key], value) for key, value in expected.items())


def finished(runner):
    runner.train()
    return runner


def test_a_resumed_run_ends_as_the_uninterrupted_one(make_runner, retinanet, stop_after):
    settings = dict(peers=[retinanet(depth=50)], teacher=[*PEERS_OF_TWO, dict(type='Average', momentum=0.1)],
                    distill=dict(a=dict(type='DenseClassification', teacher=1, weight=dict(type='Balance', interval=2)),
                                 b=dict(type='DenseClassification', learner=1, teacher=0),
                                 c=dict(type='PKD', learner=1, teacher=2)))
    model = dict(type='DetectionDistiller', student=retinanet(), **settings)
    hooks = dict(custom_hooks=[dict(type='EMAHook', momentum=0.1, update_buffers=True)])
    whole = finished(make_runner(copy.deepcopy(model), epochs=2, name='whole', val=True, **hooks))
    halted = make_runner(copy.deepcopy(model), epochs=2, name='halted', **hooks)
    halted.register_hook(stop_after(1))
    with pytest.raises(KeyboardInterrupt):
        halted.train()
    resumed = make_runner(copy.deepcopy(model), epochs=2, name='halted', resume=True, **hooks)
    resumed.train()
    assert same(whole.model, resumed.model)
    assert same(whole.model.peers[0], resumed.model.peers[0])
    metrics = whole.message_hub.log_scalars
    assert 'val/peer1/coco/bbox_mAP' in metrics and 'val/coco/bbox_mAP' in metrics
    stored = torch.load(f'{whole.work_dir}/epoch_2.pth', weights_only=False)['distill']
    assert not any(key.startswith('distill') for key in stored['peers'][0])
    plain = MODELS.build(retinanet(depth=50))
    plain.load_state_dict(stored['peers'][0], strict=True)
    average = whole.hooks  # of the peer, while it was evaluated
    assert average and any(not torch.equal(stored['peers'][0][key], value)
                           for key, value in stored['trained_peers'][0].items())
