"""Guides within guides, parts that learners share, and learners of unlike kinds: what a step and a run make of them."""
import copy
from types import SimpleNamespace

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.optim import OptimWrapper

import kd_det
from kd_det.config.files import ConfigurationError
from kd_det.datasets import UNLABELLED
from kd_det.distillers.learners import SharedPart, list_predictors
from kd_det.teachers.joining import check_alike
from kd_det.training.learners import clip_by_learner, evaluate_others, follow_student, list_averages

BRANCHES = [dict(type='Peer', learner=0), dict(type='Peer', learner=1)]
CLASSES = dict(type='DenseClassification')


@pytest.fixture
def build():
    """Makes a distiller whose learners and guides are at work."""

    def make(student, seed=0, **settings):
        torch.manual_seed(seed)
        model = MODELS.build(dict(type='kd_det.DetectionDistiller', student=student, **settings)).train()
        model.init_weights()
        return model

    return make


def frozen(*configs, **settings):
    return dict(type='Ensemble', of=[dict(config=each, random_teacher=True, **settings) for each in configs])


def step(model, data, training=True):
    return model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(data), training), mode='loss'))


@pytest.mark.parametrize('kind', ['RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3',
                                  'Faster R-CNN', 'Cascade R-CNN', 'Mask R-CNN'])
def test_frozen_detectors_of_every_family_have_a_mean(kind, detector_config, build, batch_for):
    student, teacher = detector_config(kind), detector_config(kind, widths=(6, 12))
    term = dict(type='RoIClassification' if 'R-CNN' in kind else 'DenseClassification')
    model = build(student, teacher=frozen(teacher, teacher), distill=dict(kd=term))
    data = batch_for(kind, ((96, 96), (64, 80)), (((8, 8, 40, 40), ), ((4, 4, 60, 50), )))
    total, logged = step(model, data)
    assert total.isfinite() and logged['loss_kd'] > 0
    (guide, ) = model.teachers
    first, second = (member.model for member in guide.members)
    assert not all(map(torch.equal, first.parameters(), second.parameters()))
    assert len(guide.fingerprint()) > 64 and not guide.state_dict()
    model.to(torch.float64)
    assert {each.dtype for each in first.parameters()} == {torch.float64}


def test_members_that_do_not_agree_are_one_error_before_the_first_step(retinanet, one_stage, build):
    student, term = retinanet(), dict(kd=CLASSES)
    with pytest.raises(ConfigurationError, match='model.teacher.of: the members can not be joined: the priors'):
        build(student, teacher=frozen(retinanet(), retinanet(levels=3)), distill=term)
    with pytest.raises(ConfigurationError, match='model.teacher.of: the members can not be joined: the head'):
        build(student, teacher=frozen(retinanet(), one_stage('atss')), distill=term)
    named = frozen(retinanet(), retinanet(), classes=['cat', 'dog', 'cow'])
    build(student, teacher=copy.deepcopy(named), distill=term)
    named['of'][1]['classes'] = ['dog', 'cat', 'cow']
    with pytest.raises(ConfigurationError, match='their classes are cat, dog, cow, and dog, cat, cow'):
        build(student, teacher=named, distill=term)


def test_a_mean_with_the_students_own_output_needs_its_classes(retinanet, build):
    members = [dict(type='Average'), dict(config=retinanet(), random_teacher=True, classes=['cat', 'dog', 'cow'])]
    model = build(retinanet(), teacher=dict(type='Ensemble', of=members), distill=dict(kd=CLASSES))
    model.match_classes(['cat', 'dog', 'cow'])
    with pytest.raises(ConfigurationError, match='or in another order'):
        model.match_classes(['dog', 'cat', 'cow'])


def test_an_average_within_an_ensemble_follows_and_is_stored(retinanet, build, batch):
    members = [dict(type='Average', momentum=0.5), dict(config=retinanet(), random_teacher=True)]
    model = build(retinanet(), teacher=dict(type='Ensemble', of=members), distill=dict(kd=CLASSES))
    step(model, batch())
    (guide, ) = model.teachers
    average = guide.members[0]
    before = average.model.bbox_head.retina_cls.bias.clone()
    with torch.no_grad():
        model.student.bbox_head.retina_cls.bias += 1
    guide.after_step()
    torch.testing.assert_close(average.model.bbox_head.retina_cls.bias, before + 0.5)
    state = copy.deepcopy(guide.state_dict())
    assert all(key.startswith('of.0.') for key in state)
    guide.after_step()
    guide.load_state_dict(state)
    torch.testing.assert_close(average.model.bbox_head.retina_cls.bias, before + 0.5)
    model.to(torch.float64)
    guide.after_step()
    torch.testing.assert_close(average.model.bbox_head.retina_cls.bias, before.double() + 0.75)


@pytest.mark.parametrize('settings, message', [
    (dict(peers=1, teacher=dict(type='Ensemble', of=[*BRANCHES, dict(type='Fusion')])), 'made of no others'),
    (dict(peers=1, teacher=BRANCHES, distill=dict(kd=dict(type='PKD', learner=1, teacher=1))), 'This one is itself'),
    (dict(peers=1, teacher=BRANCHES, distill=dict(kd=dict(type='RoIClassification', teacher=1))), 'distill.kd'),
    (dict(peers=[dict(config='x.py', checkpont='y')]), 'checkpont'),
    (dict(peers=[dict(checkpoint='y')]), 'config')])
def test_mistakes(settings, message, retinanet, build):
    with pytest.raises(ConfigurationError, match=message):
        build(retinanet(), **settings)


def test_peers_that_can_not_learn_from_the_students_batches(retinanet, faster_rcnn, detector_config, build):
    other = retinanet()
    other.data_preprocessor = dict(other.data_preprocessor, mean=[0, 0, 0])
    build(retinanet(), peers=[other])
    with pytest.raises(ConfigurationError, match=r'model.peers\[0\].data_preprocessor: it shares'):
        build(retinanet(), peers=[other], share=('backbone', ))
    with pytest.raises(ConfigurationError, match=r'model.peers\[0\]: it tells 5 classes apart'):
        build(retinanet(), peers=[retinanet(classes=5)])
    with pytest.raises(ConfigurationError, match='it learns masks, a MaskRCNN'):
        build(faster_rcnn(), peers=[detector_config('Mask R-CNN')])
    with pytest.raises(ConfigurationError, match=r"model.teacher.learner: a term reads its roi_head. A RetinaNet has"):
        build(faster_rcnn(), peers=[retinanet()], teacher=dict(type='Peer'),
              distill=dict(kd=dict(type='RoIClassification')))


def test_a_branch_does_not_learn_within_the_students_part(faster_rcnn, build):
    for term, path in ((dict(type='RPNImitation'), 'rpn_head'),
                       (dict(type='PKD', tap='backbone.layer3'), r'backbone\.')):
        with pytest.raises(ConfigurationError, match=f"distill.kd.*learner: expected 0, for '{path}"):
            build(faster_rcnn(), peers=1, share=('backbone', 'neck', 'rpn_head'), teacher=BRANCHES,
                  distill=dict(kd=dict(term, learner=1)))


def test_what_more_than_features_are_read_with_is_not_joined(faster_rcnn):
    model = MODELS.build(faster_rcnn())
    model.roi_head._bbox_forward = lambda x, rois, semantic_feat: None
    with pytest.raises(ConfigurationError, match='can not be joined, which are read with more than features'):
        check_alike([model, model])


def test_peers_follow_what_hooks_set_in_the_student(detector_config, build, batch):
    model = build(detector_config('YOLOX'), peers=1)
    model.bbox_head.use_l1 = True  # mmdet's YOLOXModeSwitchHook
    follow_student(model)
    assert {'loss_l1', 'peer1/loss_l1'} <= set(step(model, batch())[1])


def whole(model):
    """A two-stage detector whose samplers draw nothing, and whose batch normalisation stands still."""
    for part in (model.train_cfg.rpn, *(model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else
                                        [model.train_cfg.rcnn])):
        part.sampler.num = 10**6
    model.backbone.norm_eval = True
    return model


@pytest.mark.parametrize('kind', ['Faster R-CNN', 'RetinaNet'])
def test_learners_and_ensembles_learn_from_labelled_images_alone(kind, faster_rcnn, retinanet, build, batch):
    two_stage = kind == 'Faster R-CNN'
    student = whole(faster_rcnn()) if two_stage else retinanet()
    student.backbone.norm_eval = True
    share = ('backbone', 'neck', 'rpn_head')[:2 + two_stage]
    model = build(student, peers=1, share=share, teacher=dict(type='Ensemble', of=BRANCHES, loss_weight=1.0))
    data = batch()
    data['data_samples'][0].set_metainfo({UNLABELLED: True})
    _, partly = step(model, data)
    _, alone = step(model, {name: each[1:] for name, each in data.items()})
    assert {'loss_cls', 'peer1/loss_cls', 'guide0/loss_cls'} <= set(partly) == set(alone)
    for name, value in alone.items():
        torch.testing.assert_close(partly[name], value, rtol=1e-3, atol=1e-5, msg=lambda text: f'{name}: {text}')
    for sample in data['data_samples']:
        sample.set_metainfo({UNLABELLED: True})
    total, _ = step(model, data)
    total.backward()
    assert total == 0 and all(each.grad is not None for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize('kind', ['Cascade R-CNN', 'Mask R-CNN'])
def test_an_ensemble_of_one_two_stage_detector_twice_predicts_as_it(kind, detector_config, build, batch_for):
    ensemble = dict(type='Ensemble', of=BRANCHES)
    model = build(detector_config(kind), peers=1, teacher=[ensemble, dict(ensemble, weights=(1, 3))])
    assert list(list_predictors(model.learners, model.teachers)) == ['peer1/', 'ensemble/', 'ensemble1/']
    model.peers[0].load_state_dict(model.student.state_dict())
    data = model.eval().data_preprocessor(batch_for(kind, ((64, 64), ), (((8, 8, 40, 40), ), )), False)
    with torch.no_grad():
        plain = model.student.predict(data['inputs'], copy.deepcopy(data['data_samples']))
        with model.predicting_as(list_predictors(model.learners, model.teachers)['ensemble/']):
            found = model(**data, mode='predict')
    for own, other in zip(plain, found):
        torch.testing.assert_close(own.pred_instances.bboxes, other.pred_instances.bboxes, rtol=1e-4, atol=1e-3)


def test_no_masks_are_learnt_of_joined_regions(detector_config, build, batch_for):
    kind = 'Mask R-CNN'
    model = build(detector_config(kind), peers=1, teacher=dict(type='Ensemble', of=BRANCHES, loss_weight=1.0),
                  distill=dict(kd=dict(type='RoIClassification')))
    data = batch_for(kind, ((96, 96), (64, 80)), (((8, 8, 40, 40), ), ((4, 4, 60, 50), )))
    total, logged = step(model, data)
    total.backward()
    assert {'loss_mask', 'peer1/loss_mask', 'guide0/loss_cls'} <= set(logged) and 'guide0/loss_mask' not in logged
    assert model.roi_head.with_mask


def test_features_are_fused_in_a_batch_of_one_image_too(retinanet, build, batch):
    """A level of one cell has no spread of its own."""
    model = build(retinanet(), peers=1, share=('backbone', 'neck'), teacher=dict(type='Fusion'))
    data = batch(((64, 64), ), (((8, 8, 40, 40), ), ))
    total, logged = step(model, data)
    total.backward()
    assert total.isfinite() and logged


def test_a_copy_of_branches_is_whole_of_its_own(retinanet, build, batch):
    model = build(retinanet(), peers=1, share=('backbone', 'neck'), teacher=dict(type='Fusion'))
    twin = copy.deepcopy(model)
    part = twin.peers[0].backbone
    assert isinstance(part, SharedPart) and part.part is twin.backbone is not model.backbone
    own = {id(each) for each in model.parameters()}
    with torch.no_grad():
        for each in twin.parameters():
            assert id(each) not in own
            each.zero_()
        data = twin.eval().data_preprocessor(batch(), False)
        for peer in twin.learners[1:]:
            assert all(not level.any() for level in peer.extract_feat(data['inputs'], data['data_samples']))


@pytest.mark.parametrize('kinds', [('RetinaNet', 'YOLOX'), ('RTMDet', 'Faster R-CNN')])
def test_unlike_learners_in_half_precision(kinds, detector_config, build, batch):
    """With images of their own normalisation, in bfloat16, with activation checkpointing."""
    student, peer = map(detector_config, kinds)
    student.backbone.with_cp = True
    peer.data_preprocessor = dict(peer.data_preprocessor, mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=False)
    model = build(student, peers=[peer], teacher=[*BRANCHES, dict(type='Average')],
                  distill=dict(a=dict(type='PKD', teacher=1, tap='backbone'), c=dict(type='PKD', teacher=2),
                               b=dict(type='PKD', tap='backbone', learner=1, teacher=0)))
    with torch.autocast('cpu', torch.bfloat16):
        total, _ = step(model, batch())
    total.backward()
    assert total.isfinite() and all(each.grad is not None for each in model.peers[0].backbone.parameters()
                                    if each.requires_grad)
    assert model.to(torch.float64).learners[1].bridge.scale.dtype == torch.float64


def test_zero_weights_leave_the_student_as_it_is_alone(retinanet, build, batch):
    """Beside a peer, an average and an ensemble of frozen detectors, whose terms have no weight."""
    zero = dict(CLASSES, weight=0.0)
    model = build(retinanet(), peers=1, inherit='auto',
                  teacher=[dict(type='Average'), frozen(retinanet(), retinanet()), dict(type='Peer')],
                  distill=dict(a=zero, b=dict(zero, teacher=1), c=dict(zero, teacher=2)))
    torch.manual_seed(0)
    plain = MODELS.build(retinanet()).train()
    plain.init_weights()
    assert list(model.state_dict()) == list(plain.state_dict())
    for each in (model, plain):
        torch.manual_seed(1)
        total, logged = step(each, batch())
        sum(value for name, value in logged.items() if name in ('loss_cls', 'loss_bbox')).backward()
        assert torch.rand(()) == pytest.approx(0.7576, abs=1e-4)  # the generator has not moved
    for own, other in zip(model.student.parameters(), plain.parameters()):
        assert own is not other and torch.equal(own, other) and torch.equal(own.grad, other.grad)


def test_a_detector_without_a_head_of_boxes_can_still_learn(retinanet, build, batch):
    """As those of masks or points alone, which have a head of another name."""
    taught = dict(teacher=dict(config=retinanet(), random_teacher=True), distill=dict(pkd=dict(type='PKD')))
    model = build(retinanet(), **taught)
    head = model.student._modules.pop('bbox_head')
    model.student.loss = lambda inputs, samples: head.loss(model.student.extract_feat(inputs), samples)
    assert step(model, batch())[0].isfinite()


def test_a_gate_is_averaged_and_goes_on_after_a_halt(make_runner, retinanet, stop_after):
    model = dict(type='DetectionDistiller', student=retinanet(), peers=1, share=('backbone', 'neck'),
                 teacher=dict(type='Ensemble', of=BRANCHES, weights='gate'), distill=dict(kd=CLASSES))
    settings = dict(val=True, name='gate', custom_hooks=[dict(type='EMAHook', momentum=0.3, update_buffers=True)])
    runner = make_runner(copy.deepcopy(model), epochs=1, **settings)
    runner.train()
    state = torch.get_rng_state()
    assert 'ensemble/coco/bbox_mAP' in evaluate_others(runner, runner.model)
    assert torch.equal(state, torch.get_rng_state())  # the loader draws, where the student's training goes on

    halted = make_runner(copy.deepcopy(model), epochs=2, resume=True, **settings)
    halted.register_hook(stop_after(1))
    with pytest.raises(KeyboardInterrupt):
        halted.train()
    gates = [[each.learning_guides['0'].state_dict() for each in (run.model, list_averages(run)[0].ema_model.module)]
             for run in (runner, halted)]
    for found, expected in zip(gates[1], gates[0]):
        assert found and all(torch.equal(value, expected[key]) for key, value in found.items())
    trained, averaged = gates[0]
    assert not torch.equal(trained['linear.weight'], averaged['linear.weight'])
    assert averaged['norm.running_var'].ne(1).all()


def test_gradients_that_add_up_are_clipped_by_learner(retinanet, build, batch):
    """Over two batches; what is logged is the student's norm."""
    model = build(retinanet(), peers=1)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01), accumulative_counts=2,
                           clip_grad=dict(max_norm=0.1))
    clip_by_learner(SimpleNamespace(optim_wrapper=wrapper), model)
    wrapper.initialize_count_status(model, 0, 4)
    norms, before = [], [list(map(torch.clone, learner.student.parameters())) for learner in model.learners]
    clip, wrapper.clip_func = wrapper.clip_func, lambda *given, **options: norms.append(clip(*given, **options))
    for _ in range(2):
        model.train_step(batch(), wrapper)
    assert len(norms) == 1 and norms[0] > 0.1
    for learner, start in zip(model.learners, before):
        moved = torch.stack([(now - then).norm() for now, then in zip(learner.student.parameters(), start)]).norm()
        assert moved.item() == pytest.approx(0.01 * 0.1, rel=1e-2)


@pytest.mark.parametrize('kind', ['fusion', 'frozen', 'alone'])
def test_checks_know_every_kind(kind, run_config, retinanet):
    """Learners that guides stand for, members that are loaded, and learners without any guide."""
    settings = dict(
        fusion=dict(peers=1, teacher=[dict(type='Fusion'), dict(type='Ensemble', of=BRANCHES)],
                    distill=dict(kd=dict(CLASSES, learner=2, teacher=1))),
        frozen=dict(teacher=dict(type='Ensemble', of=[dict(config=retinanet(), checkpoint='lacking.pth')] * 2),
                    distill=dict(kd=CLASSES)),
        alone=dict(peers=1))[kind]
    config = run_config(dict(type='DetectionDistiller', student=retinanet(), **settings))
    diagnosis = kd_det.doctor(config)
    faults = [(finding.subject, finding.found) for finding in diagnosis.findings if finding.fault]
    assert [subject for subject, _ in faults] == (
        [f'teacher.of[{index}] checkpoint' for index in (0, 1)] if kind == 'frozen' else [])
    if kind == 'frozen':
        assert len(kd_det.inspect(config, random_teacher=True).terms) == 1
