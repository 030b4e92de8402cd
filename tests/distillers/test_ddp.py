import importlib.util
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.datasets import Unlabelled

RANK = Path(__file__).with_name('ddp_rank.py')


DENSE = dict(
    fgd=dict(type='FGD', alpha=0.1, beta=0.1, gamma=0.1, lambda_=0.1),
    seen=dict(type='FeatureImitation', mask='TeacherConfidence', normalizer='mask'),
    classes=dict(type='DenseClassification', normalizer='positives', weight=100.0),
    rich=dict(type='DenseClassification', weighting='richness', normalizer='richness', weight=100.0),
    sure=dict(type='DenseClassification', treatment='cwtm', weight=100.0),
    boxes=dict(type='DenseRegression', weighting='confidence', normalizer='confidence'),
    bounded=dict(type='DenseRegression', form='bounded', normalizer='positives', margin=1.0),
    ranks=dict(type='RankMimicking', weight=100.0),
    normalized=dict(type='CWD', normalize=True, weight=100.0),
    crossed=dict(type='CrossKD', weight=100.0))
TWO_STAGE = dict(
    regions=dict(type='FeatureImitation', mask='RoIPredictionDifference', normalizer='mask'),
    classes=dict(type='RoIClassification', normalizer='regions', weight=100.0),
    apart=dict(type='RoIClassification', form='decoupled', normalizer='own', weight=100.0),
    sure=dict(type='RoIClassification', treatment='cwtm', weight=100.0),
    moves=dict(type='RoIRegression', form='l1', normalizer='own'),
    rpn=dict(type='RPNImitation'),
    bounded=dict(type='RPNImitation', form='bounded', normalizer='positives', margin=1.0))
OF_QUERIES = dict(
    asked=dict(type='TargetQueries', weight=10.0),
    memory=dict(type='FeatureImitation', tap='encoder', mask='BoxForeground', normalizer='mask', adapter='conv3x3'))


def whole(faster_rcnn, **kwargs):
    """A Faster R-CNN whose samplers keep all anchors and regions, so that nothing is drawn."""
    model = faster_rcnn(**kwargs)
    for part in (model.train_cfg.rpn, model.train_cfg.rcnn):
        part.sampler.num = 10**6
    return model


@pytest.fixture
def batch_of_four(batch):
    """Makes a preprocessed batch: the first rank's two images, then the second's."""
    shapes = ((64, 64), (64, 48), (40, 64), (64, 64))
    boxes = (((8, 8, 40, 40), ), (), ((20, 4, 60, 30), (2, 10, 30, 38)), ((4, 4, 20, 60), ))
    return lambda student: MODELS.build(student.data_preprocessor)(batch(shapes, boxes), True)


@pytest.fixture
def on_two_ranks(run_ranks, tmp_path):
    """Gives the gradients, and of either rank the balances and the number of the teacher's weights."""

    def run(config, data) -> tuple:
        torch.save((config, data['inputs'], data['data_samples']), tmp_path / 'input.pth')
        run_ranks(RANK, tmp_path / 'input.pth', tmp_path / 'output.pth')
        return torch.load(tmp_path / 'output.pth', weights_only=True)

    return run


def _load_rank():
    spec = importlib.util.spec_from_file_location('ddp_rank', RANK)
    rank = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rank)
    return rank


@pytest.mark.parametrize('detector, terms, shard', [('retinanet', DENSE, False), ('faster_rcnn', TWO_STAGE, False),
                                                    ('faster_rcnn', TWO_STAGE, True), ('detr', OF_QUERIES, False)])
def test_two_ranks_give_the_gradients_of_one_process_with_the_whole_batch(detector, terms, shard, request,
                                                                          batch_of_four, on_two_ranks):
    make = request.getfixturevalue(detector)
    student = whole(make) if detector == 'faster_rcnn' else make('DABDETR') if detector == 'detr' else make()
    teacher = make('DABDETR', depth=50) if detector == 'detr' else make(neck=12)
    student.backbone.norm_eval = True  # BatchNorm's own batch statistics would differ between the two
    config = dict(type='DetectionDistiller', student=student,
                  teacher=dict(config=teacher, random_teacher=True, shard=shard), distill=terms)
    data = batch_of_four(student)
    gradients, of_ranks = on_two_ranks(config, data)
    expected, _, weights = _load_rank().distilled_gradients(config, data['inputs'], data['data_samples'])
    assert all((held < 0.8 * weights) if shard else (held == weights) for _, held in of_ranks)  # the heads stay whole
    assert gradients.keys() == expected.keys() and any(name.startswith('distill_terms') for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda text: f'{name}: {text}')


def test_a_student_that_is_trained_for_integers_has_the_ranges_of_both_ranks(retinanet, batch_of_four, on_two_ranks):
    config = dict(type='DetectionDistiller', student=retinanet(), quantize=dict(bits=8, ranges='learnt'),
                  teacher=dict(config=retinanet(neck=12), random_teacher=True), distill=dict(fgd=DENSE['fgd']))
    data = batch_of_four(retinanet())
    gradients, ((first, _), (second, _)) = on_two_ranks(config, data)
    expected, balances, _ = _load_rank().distilled_gradients(config, data['inputs'], data['data_samples'])
    assert torch.equal(first['ranges'], second['ranges']) and first['ranges'].any()
    torch.testing.assert_close(first['ranges'], balances['ranges'])
    assert gradients.keys() == expected.keys() and gradients['distill_quantizer.offsets'].any()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda text: f'{name}: {text}')


def test_a_balance_is_the_same_on_all_ranks(retinanet, batch_of_four, on_two_ranks):
    config = dict(type='DetectionDistiller', student=retinanet(),
                  teacher=dict(config=retinanet(neck=12), random_teacher=True),
                  distill=dict(pkd=dict(type='PKD', weight=dict(type='Balance', ratio=0.5))))
    _, ((first, _), (second, _)) = on_two_ranks(config, batch_of_four(retinanet()))
    assert torch.equal(first['pkd']['averages'], second['pkd']['averages']) and first['pkd']['averages'].any()
    for state in (first['pkd'], second['pkd']):  # of both steps: 4 boxes on 3 of the images of both ranks
        assert state['counts'].tolist() == [2, 6] and state['boxes'][0] / state['boxes'][1] == pytest.approx(4)


def test_learners_and_guides_are_the_same_on_two_ranks(one_stage, batch_of_four, on_two_ranks):
    """Peers, branches with a gate and the loss of their ensemble, fused features, an average; a term that waits."""
    student = one_stage('fcos')  # whose own loss divides by the objects of all ranks
    student.backbone.norm_eval = True
    members = [dict(type='Peer', learner=0), dict(type='Peer', learner=1)]
    term = dict(type='DenseClassification', normalizer='positives')
    config = dict(
        type='DetectionDistiller', student=student, peers=1, share=('backbone', 'neck'),
        teacher=[dict(type='Fusion'), dict(type='Ensemble', of=members, weights='gate'), dict(type='Average'),
                 *members, dict(type='Ensemble', of=members, weights=(1, 2))],
        distill=dict(fused=dict(term, teacher=0), mean=dict(term, learner=2, teacher=5), gated=dict(term, teacher=1),
                     mutual=dict(term, learner=1, teacher=3), other=dict(term, teacher=4),
                     own=dict(type='FGD', teacher=2, gamma=1.0, lambda_=1.0),
                     late=dict(type='FGD', learner=1, teacher=2, weight=dict(type='Start', value=1.0, epochs=1))))
    data = batch_of_four(student)
    gradients, _ = on_two_ranks(config, data)
    expected, *_ = _load_rank().distilled_gradients(config, data['inputs'], data['data_samples'])
    assert gradients.keys() == expected.keys() and gradients['distill_guides.1.linear.weight'].any()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda text: f'{name}: {text}')


@pytest.mark.parametrize('policy', [dict(type='Agent'), dict(type='Confidence'),
                                    dict(type='Sequence', epochs=1, trial=2)])
def test_a_policy_decides_for_the_images_of_all_ranks(policy, one_stage, retinanet, batch_of_four, on_two_ranks):
    student = one_stage('fcos')
    student.backbone.norm_eval = True
    other = one_stage('gfl', neck=8)  # whose loss divides by the objects of all ranks
    other.test_cfg.update(retinanet().test_cfg)
    teachers = [dict(config=each, random_teacher=True) for each in (retinanet(neck=12), other)]
    config = dict(type='DetectionDistiller', student=student, teacher=teachers, policy=policy,
                  distill={f'own_{index}': dict(type='FGD', levels=(0, 1, 2), teacher=index) for index in range(2)})
    data = batch_of_four(student)
    gradients, ((first, _), (second, _)) = on_two_ranks(config, data)
    expected, state, _ = _load_rank().distilled_gradients(config, data['inputs'], data['data_samples'])
    assert gradients.keys() == expected.keys() and any(gradient.any() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda text: f'{name}: {text}')
    for name, value in state['policy'].items():
        assert name == 'gains_state' or first['policy'][name] is second['policy'][name] is value is None or (
            torch.equal(torch.as_tensor(first['policy'][name]), torch.as_tensor(second['policy'][name])))
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(first['policy'][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('unlabelled', [[1], [1, 2, 3], [0, 1]])
def test_ranks_have_unlabelled_images_or_not(unlabelled, one_stage, batch_of_four, on_two_ranks):
    """A head that averages its divisors over the ranks is asked as often on all of them, whichever their images are."""
    student = one_stage('gfl')
    student.backbone.norm_eval = True
    config = dict(type='DetectionDistiller', student=student, distill=dict(sure=DENSE['sure'], fgd=DENSE['fgd']),
                  teacher=dict(config=one_stage('gfl', depth=50), random_teacher=True))
    data = batch_of_four(student)
    for row in unlabelled:
        Unlabelled()(dict(data_samples=data['data_samples'][row]))
    gradients, _ = on_two_ranks(config, data)
    expected, *_ = _load_rank().distilled_gradients(config, data['inputs'], data['data_samples'])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6, msg=lambda text: f'{name}: {text}')
