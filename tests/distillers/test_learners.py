"""Several learners in one step: each as if alone, none noticed by the student, and each taught by the others."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper

import kd_det
from kd_det.config.choices import LEARNT_FROM
from kd_det.config.files import ConfigurationError
from kd_det.distillers.learners import group_parameters, list_predictors
from kd_det.distillers.student_wrapper import PEERS
from kd_det.losses.base import sum_parts
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
    return model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(data), True), mode='loss'))


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


def two_images(batch_for, kind):
    return batch_for(kind, shapes=((96, 96), (64, 80)), boxes=(((8, 8, 40, 40), ), ((4, 4, 60, 50), )))


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
        losses.append(model.parse_losses(learner.loss(*map(copy.deepcopy, (data['inputs'], data['data_samples']))))[0])
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
            dict(type='QueryClassification') if kind in ('DETR', 'Deformable DETR', 'DINO') else
            dict(type='DenseClassification'))
    distill = dict(outputs=dict(term, learner=0, teacher=1), peers=dict(term, learner=1, teacher=0),
                   features=dict(type='PKD', learner=1, teacher=0))
    model = mutual(student, teacher=PEERS_OF_TWO, distill=distill, share=share)
    model.init_weights()
    data = two_images(batch_for, kind)
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
    assert [len(group) for group in group_parameters(model.learners, model.shares_trunk)][1] == 0
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
    (dict(peers=0, distill={}), 'at least one teacher'),
    (dict(peers=0, teacher=dict(type='Average')), 'model.distill: expected terms by name'),
    (dict(teacher=dict(type='Ensemble', of=PEERS_OF_TWO, weights='gate')), 'a gate is given what all members share'),
    (dict(teacher=dict(type='Ensemble', of=PEERS_OF_TWO, weights=(1, 2, 3))), '2 numbers of 0 or more'),
    (dict(teacher=dict(type='Ensemble', of=[dict(type='Average'), dict(type='Peer')], loss_weight=1.0)),
     'reach learners'),
    (dict(distill=dict(pkd=dict(type='PKD')), teacher=dict(type='Ensemble', of=PEERS_OF_TWO)), 'puts out none'),
    (dict(teacher=dict(type='Fusion', of=(0, 4))), 'an index below'),
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


def test_the_average_begins_with_the_student_though_no_term_reads_it_yet(make_runner, retinanet):
    """Or no image, on one rank of several."""

    class Begin(Hook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.state = copy.deepcopy(runner.model.state_dict())

    late, begin = dict(type='PKD', weight=dict(type='Start', value=1.0, epochs=1)), Begin()
    runner = make_runner(dict(type='DetectionDistiller', student=retinanet(), distill=dict(pkd=late),
                              teacher=dict(type='Average', momentum=0.25)),
                         epochs=1, **{'train_dataloader.batch_size': 8})
    runner.register_hook(begin)
    runner.train()
    assert runner.iter == 1
    for key, value in runner.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(runner.model.teacher.model.state_dict()[key],
                                       0.75 * begin.state[key] + 0.25 * value)


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


def agreeing(kind, request):
    """A student, and the term that compares classes."""
    make = request.getfixturevalue('detector_config')
    return make(kind), dict(type='RoIClassification' if 'R-CNN' in kind else 'DenseClassification')


ALL = [dict(type='Peer', learner=index) for index in range(3)]
JOINED = ['RetinaNet', 'GFL', 'FCOS', 'YOLOX', 'RTMDet', 'Faster R-CNN', 'Cascade R-CNN']


@pytest.mark.parametrize('weights', ['mean', 'gate', (1, 2, 1)])
@pytest.mark.parametrize('kind', JOINED)
def test_an_ensemble_of_branches_teaches_each_of_them(kind, weights, request, mutual, batch_for):
    student, term = agreeing(kind, request)
    distill = {f'kd{index}': dict(term, learner=index) for index in range(3)}
    model = mutual(student, peers=2, share=('backbone', 'neck'), teacher=dict(type='Ensemble', of=ALL, weights=weights),
                   distill=distill)
    model.init_weights()
    total, logged = step(model, two_images(batch_for, kind))
    assert total.isfinite() and all(logged[f'loss_{name}'] > 0 for name in distill)
    total.backward()
    own = [name for name in logged if name.startswith('guide0/')]
    if weights == 'gate':
        assert any('loss_cls' in name for name in own)
        gate = model._modules['distill_guides']['0']
        assert gate.linear.weight.grad is not None
    else:
        assert not own
    assert 'distill' not in ''.join(model.state_dict())


def test_an_ensemble_says_the_mean_of_its_members(mutual, batch):
    """And its loss is the student's own loss of the mean of the maps: EnsembleNet's, with the heads' own."""
    model = mutual(peers=2, teacher=dict(type='Ensemble', of=ALL, weights=(1, 2, 1), loss_weight=0.5),
                   distill=dict(kd=dict(type='DenseClassification', normalizer='none')))
    model.init_weights()
    data = model.data_preprocessor(batch(), True)
    (observation, *_), learnt, _ = model.observe_learners(data['inputs'], data['data_samples'], ['kd'])
    models, shares = [model.student, *model.peers], (0.25, 0.5, 0.25)
    maps = [each.bbox_head(each.extract_feat(data['inputs'])) for each in models]
    expected = tuple([sum(share * level for share, level in zip(shares, same)) for same in zip(*kind)]
                     for kind in zip(*maps))
    found = observation.context.teacher_outputs[0]['bbox_head']
    for level, own in zip(found.logits, expected[0]):
        torch.testing.assert_close(level, own.permute(0, 2, 3, 1).reshape(level.shape))
        assert not level.requires_grad
    head = model.student.bbox_head
    head.forward = lambda *_: expected
    losses = head.loss(model.student.extract_feat(data['inputs']), data['data_samples'])
    del head.forward
    for name, value in losses.items():
        torch.testing.assert_close(sum(learnt[f'guide0/{name}']), 0.5 * sum(value))
    sum(sum(value) for value in learnt.values()).backward()
    assert all(each.bbox_head.retina_cls.weight.grad.abs().sum() > 0 for each in models)


@pytest.mark.parametrize('kind', ['DETR', 'Deformable DETR', 'DINO'])
def test_the_mean_of_queries_teaches(kind, detector_config, mutual, batch_for):
    mean = dict(type='Ensemble', of=PEERS_OF_TWO)
    model = mutual(detector_config(kind), teacher=mean, distill=dict(kd=dict(type='QueryClassification')))
    model.init_weights()
    total, logged = step(model, two_images(batch_for, kind))
    assert logged['loss_kd'] > 0 and total.isfinite()
    assert 'ensemble/' not in list_predictors(model.learners, model.teachers)
    with pytest.raises(ConfigurationError, match='neither a loss nor a gate'):
        mutual(detector_config(kind), teacher=dict(mean, loss_weight=1.0),
               distill=dict(kd=dict(type='QueryClassification')))


def test_a_gate_is_the_papers(mutual, batch):
    model = mutual(share=('backbone', 'neck'), distill=dict(kd=dict(type='DenseClassification')),
                   teacher=dict(type='Ensemble', of=PEERS_OF_TWO, weights='gate'))
    gate = model.guides[0].module
    levels = tuple(torch.randn(3, 8, side, side) for side in (8, 4))
    pooled = sum(level.mean((2, 3)) for level in levels) / 2
    scores = pooled @ gate.linear.weight.T + gate.linear.bias
    scores = (scores - scores.mean(0)) / (scores.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(gate(levels), scores.relu().softmax(1), rtol=1e-4, atol=1e-5)
    assert gate(tuple(level[:1] for level in levels)).sum().item() == pytest.approx(1)  # a batch of one image


@pytest.mark.parametrize('kind', ['RetinaNet', 'Faster R-CNN'])
def test_fused_features_have_a_learner_of_their_own(kind, request, mutual, batch_for):
    student, term = agreeing(kind, request)
    if kind == 'RetinaNet':
        student.test_cfg.update(nms=dict(type='nms', iou_threshold=0.5), max_per_img=20)
    mean = dict(type='Ensemble', of=PEERS_OF_TWO)
    model = mutual(student, teacher=[dict(type='Fusion', of=(0, 1)), mean],
                   distill=dict(a=dict(term, learner=0), b=dict(term, learner=1),
                                fused=dict(term, learner=2, teacher=1)))
    model.init_weights()
    fuse = model.learners[2].student.neck.levels[0]
    assert len(model.learners) == 3
    assert fuse.depthwise_conv.conv.in_channels == 2 * model.student.neck.out_channels
    total, logged = step(model, two_images(batch_for, kind))
    assert 'peer2/loss_cls' in logged and total.isfinite()
    logged['loss'].item()
    total.backward()
    gradients = {name: weight.grad for name, weight in model.peers[1].named_parameters()}
    assert all(each is not None for each in gradients.values())
    with torch.no_grad():
        data = model.eval().data_preprocessor(two_images(batch_for, kind), False)
        for predict in list_predictors(model.learners, model.teachers).values():
            with model.predicting_as(predict):
                assert len(model(**data, mode='predict')) == 2


def branches(make_runner, retinanet):
    """A finished run of two branches that learn from their ensemble."""
    model = dict(type='DetectionDistiller', student=retinanet(), peers=1, share=('backbone', 'neck'),
                 teacher=dict(type='Ensemble', of=PEERS_OF_TWO, weights='gate'),
                 distill={f'kd{index}': dict(type='DenseClassification', learner=index, weight=dict(
                     type='SigmoidWarmup', value=9.0, epochs=2)) for index in (0, 1)})
    return finished(make_runner(model, epochs=1, val=True))


def test_learners_and_their_ensemble_are_evaluated(make_runner, retinanet):
    runner = branches(make_runner, retinanet)
    found = {name for name in runner.message_hub.log_scalars if name.endswith('coco/bbox_mAP')}
    assert found == {'val/coco/bbox_mAP', 'val/peer1/coco/bbox_mAP', 'val/ensemble/coco/bbox_mAP'}


def test_any_learner_leaves_as_a_plain_detector(make_runner, retinanet, tmp_path):
    runner = branches(make_runner, retinanet)
    config, checkpoint = copy.deepcopy(runner.cfg), f'{runner.work_dir}/epoch_1.pth'
    config.update(test_dataloader=config.val_dataloader, test_evaluator=config.val_evaluator,
                  test_cfg=dict(type='TestLoop'))
    exported = kd_det.export(config, checkpoint, tmp_path / 'peer.pth', learner=1)
    plain = MODELS.build(retinanet())
    plain.load_state_dict(torch.load(exported.checkpoint, weights_only=False)['state_dict'], strict=True)
    peer = runner.model.peers[0]
    assert all(torch.equal(value, {**runner.model.state_dict(), **peer.state_dict()}[key])
               for key, value in plain.state_dict().items())
    assert not torch.equal(plain.bbox_head.retina_cls.weight, runner.model.bbox_head.retina_cls.weight)
    with pytest.raises(ConfigurationError, match='1 learners beside the student'):
        kd_det.export(config, checkpoint, tmp_path / 'other.pth', learner=2)
    # So does what branches say together: as evaluated in training.
    joined = kd_det.export(config, checkpoint, tmp_path / 'joined.pth', learner='ensemble')
    found = kd_det.evaluate(joined.config, joined.checkpoint, work_dir=tmp_path / 'test').metrics['coco/bbox_mAP']
    assert found == runner.message_hub.log_scalars['val/ensemble/coco/bbox_mAP'].current()
    with pytest.raises(ConfigurationError, match='as a checkpoint alone'):
        kd_det.export(config, checkpoint, tmp_path / 'joined.onnx', learner='ensemble')


def test_an_ensemble_of_one_detector_twice_predicts_as_it(mutual, batch):
    model = mutual(teacher=dict(type='Ensemble', of=PEERS_OF_TWO), distill=dict(kd=dict(type='DenseClassification')))
    model.init_weights()
    model.peers[0].load_state_dict(model.student.state_dict())
    data = model.eval().data_preprocessor(batch(), False)
    plain = model.student.predict(data['inputs'], copy.deepcopy(data['data_samples']))
    model.build_teachers()
    with model.predicting_as(list_predictors(model.learners, model.teachers)['ensemble/']):
        found = model(**data, mode='predict')
    for own, other in zip(plain, found):
        torch.testing.assert_close(own.pred_instances.bboxes, other.pred_instances.bboxes, rtol=1e-4, atol=1e-3)


def test_members_with_other_priors_have_no_mean(mutual, retinanet, one_stage):
    other_units = retinanet()
    other_units.bbox_head.bbox_coder.target_stds = [1.0, 1.0, 1.0, 1.0]
    for peer in (retinanet(levels=3), one_stage('atss'), other_units):
        with pytest.raises(ConfigurationError, match='the members can not be joined'):
            mutual(peers=[peer], teacher=dict(type='Ensemble', of=PEERS_OF_TWO),
                   distill=dict(kd=dict(type='DenseClassification')))


@pytest.mark.parametrize('rescale', [True, False])
def test_joined_detectors_give_boxes_of_the_image_that_was_asked_for(rescale, retinanet, batch):
    joined = MODELS.build(dict(type='JoinedDetector', detectors=[retinanet(), retinanet()], share=())).eval()
    joined.init_weights()
    plain = joined.detectors[0]
    joined.detectors[1].load_state_dict(plain.state_dict())
    data = plain.data_preprocessor(batch(), False)
    for sample in data['data_samples']:
        sample.set_metainfo(dict(scale_factor=(0.5, 0.5)))
    own, other = (model.predict(data['inputs'], copy.deepcopy(data['data_samples']), rescale=rescale)[0].pred_instances
                  for model in (plain, joined))
    assert len(own) and own.bboxes.max() > 64 * rescale
    torch.testing.assert_close(own.bboxes, other.bboxes, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('guide', LEARNT_FROM)
def test_a_run_of_what_learners_learn_from(guide, run_config, retinanet, tmp_path):
    """As the command line composes it: checked, trained, and going on after a halt as if there had been none."""
    saved = []
    for name, halts in (('whole', (2, )), ('halted', (1, 2))):
        for epochs in halts:
            config = run_config(retinanet(), epochs=2)
            config.param_scheduler = []
            result = kd_det.distill(
                config, method='kd', peers=1, share=('backbone', 'neck'), guide=guide, seed=0, work_dir=tmp_path / name,
                resume=epochs == 2 and len(halts) == 2, options={'train_cfg.max_epochs': epochs})
        saved.append(torch.load(result.checkpoint, weights_only=False))
    whole, halted = (leaves([each['state_dict'], each['distill'], each['optimizer']['state']]) for each in saved)
    assert len(whole) == len(halted) and all(map(torch.equal, whole, halted))


def leaves(state) -> list:
    """The tensors of what a checkpoint holds, in order."""
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [leaf for each in inner for leaf in leaves(each)]


def test_a_frozen_teacher_runs_once_and_its_roi_head_over_the_regions_of_all_learners(faster_rcnn, mutual, batch):
    """One of the learners samples fewer regions, and one reads features alone."""
    fewer = faster_rcnn()
    fewer.train_cfg.rcnn.sampler.num = 12
    terms = dict(own=dict(type='RoIClassification'), features=dict(type='PKD', learner=1),
                 fewer=dict(type='RoIClassification', learner=2))
    model = mutual(faster_rcnn(), peers=[faster_rcnn(), fewer], distill=terms,
                   teacher=dict(config=faster_rcnn(depth=50, neck=12), random_teacher=True))
    runs, data = [], batch()
    for part in ('backbone', 'roi_head.bbox_head'):
        module = model.build_teachers()[0].model.get_submodule(part)
        module.register_forward_hook(lambda *_, part=part: runs.append(part))

    def observe(names):
        torch.manual_seed(1)  # of the samplers
        given = model.data_preprocessor(copy.deepcopy(data), True)
        return [each.values for each in model.observe_learners(given['inputs'], given['data_samples'], names)[0]]

    together = observe(terms)
    assert runs == ['backbone', 'roi_head.bbox_head']
    assert [list(each) for each in together] == [[name] for name in terms]
    for learner, name in enumerate(terms):
        value, expected = (sum_parts(each[learner][name]) for each in (together, observe([name])))
        torch.testing.assert_close(value, expected)
        assert value > 0
