"""kd-det benchmark-step: the parts of a step, from a config alone."""
import json

import pytest
import torch

from kd_det.checks.synthetic import random_distiller, synthetic_batch
from kd_det.cli.main import main
from kd_det.config.composition import method_terms
from kd_det.study.step_costs import (
    DISTILLED,
    PLAIN_TEACHER,
    STUDENT,
    TEACHER,
    TERM,
    Cost,
    StepCosts,
    measure_parts,
    measure_step,
)


@pytest.fixture
def config(faster_rcnn, run_config):
    model = dict(type='DetectionDistiller', student=faster_rcnn(),
                 teacher=dict(config=faster_rcnn(neck=12), checkpoint='no.pth'),
                 distill=dict(fgd=dict(type='FGD', weight=dict(type='Start', value=1.0, epochs=3)),
                              kd=dict(type='RoIClassification')))
    return run_config(model)


def test_a_config_is_enough(config, tmp_path, capsys):
    config.dump(tmp_path / 'config.py')
    arguments = ['--size', '64', '96', '--repeats', '1', '--boxes', '3', '--device', 'cpu', '--out',
                 str(tmp_path / 'o' / 'o.json')]
    assert main(['benchmark-step', str(tmp_path / 'config.py'), *arguments]) == 0
    assert 'plain forwards' in capsys.readouterr().out.replace('\n', ' ')
    record = json.loads((tmp_path / 'o' / 'o.json').read_text())
    assert set(record['parts']) == {STUDENT, DISTILLED, TEACHER, PLAIN_TEACHER, 'term fgd', 'term kd'}
    assert all(part['seconds'] > 0 and part['memory'] > 0 for part in record['parts'].values())
    assert record['ratio'] == record['distilling'] / record['parts'][PLAIN_TEACHER]['seconds']
    assert record['middle_half'] == [record['ratio']] * 2  # of one round
    assert record['size'] == [64, 96] and record['engines'][0]['fuse'] is True


def test_the_size_is_that_of_the_training_pipeline(config, tmp_path, capsys):
    config.train_dataloader.dataset.pipeline[2] = dict(type='Resize', scale=(100, 60), keep_ratio=True)
    config.dump(tmp_path / 'config.py')
    assert main(['benchmark-step', str(tmp_path / 'config.py'), '--repeats', '1', '--device', 'cpu',
                 '--batch-size', '1', '--out', str(tmp_path / 'o.json')]) == 0
    assert '1 × 60 × 80 pixels' in capsys.readouterr().out
    assert json.loads((tmp_path / 'o.json').read_text())['size'] == [60, 80]


def test_a_size_that_the_students_levels_do_not_fit_is_an_error(one_stage, run_config, tmp_path, capsys):
    student = one_stage('yolox')
    student.data_preprocessor, student.backbone.out_indices = dict(type='DetDataPreprocessor'), (1, 2, 3)
    student.neck = dict(type='YOLOXPAFPN', in_channels=[8, 16, 32], out_channels=8, num_csp_blocks=1)
    run_config(dict(type='DetectionDistiller', student=student, distill=dict(pkd=dict(type='PKD')),
                    teacher=dict(config=one_stage('yolox'), checkpoint='no.pth'))).dump(tmp_path / 'config.py')
    assert main(['benchmark-step', str(tmp_path / 'config.py'), '--size', '100', '100', '--device', 'cpu']) == 2
    error = capsys.readouterr().err
    assert 'fails on images of 100 × 100 pixels' in error and 'pad_size_divisor=32' in error


@pytest.mark.parametrize('channels', [1, 4])
def test_detectors_of_other_channels_are_measured(channels, retinanet, run_config):
    student, teacher = retinanet(), retinanet(neck=12)
    for model in (student, teacher):
        model.data_preprocessor, model.backbone.in_channels = dict(type='DetDataPreprocessor'), channels
    config = run_config(dict(type='DetectionDistiller', student=student, distill=dict(pkd=dict(type='PKD')),
                             teacher=dict(config=teacher, checkpoint='no.pth')))
    distiller = random_distiller(config)
    costs = measure_parts(distiller, synthetic_batch(distiller.student, images=1, size=(64, 64), boxes=3), repeats=1)
    assert costs[PLAIN_TEACHER].memory > 0


def test_the_spread_over_the_rounds_is_told():
    costs = StepCosts({PLAIN_TEACHER: Cost(2.0, 0)}, [1.0, 3.0, 2.0, 9.0, 1.5])
    assert (costs.distilling, costs.ratio) == (2.0, 1.0)
    low, high = costs.middle_half
    assert 0.5 < low < 1.0 < high < 4.5


def test_measuring_moves_no_weight_and_runs_every_term_at_full_weight(config):
    distiller = random_distiller(config)
    before = {name: value.clone() for name, value in distiller.named_parameters()}
    batch = synthetic_batch(distiller.student, images=2, size=(64, 64), boxes=3)
    assert all(sample.gt_instances.labels.max() < 3 for sample in batch['data_samples'])
    costs = measure_step(distiller, batch, config.optim_wrapper, repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in distiller.named_parameters())
    assert costs.parts[DISTILLED].memory > costs.parts[STUDENT].memory


@pytest.mark.parametrize('method', ['bckd', 'crosskd', 'pfi'])
def test_terms_of_dense_heads(method, retinanet, run_config):
    config = run_config(dict(type='DetectionDistiller', student=retinanet(),
                             teacher=dict(config=retinanet(neck=12), checkpoint='no.pth'),
                             distill=method_terms(method, 'one_stage')))
    distiller = random_distiller(config)
    costs = measure_parts(distiller, synthetic_batch(distiller.student, images=2, size=(64, 64), boxes=3), repeats=1)
    assert set(costs) == {TEACHER, PLAIN_TEACHER, *(TERM + name for name in distiller.terms)}


def test_a_plain_detector_is_an_error(retinanet, run_config, tmp_path, capsys):
    run_config(retinanet()).dump(tmp_path / 'plain.py')
    assert main(['benchmark-step', str(tmp_path / 'plain.py')]) == 2
    assert 'is a plain detector' in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--repeats', '--batch-size', '--threads'])
def test_counts_are_at_least_1(option, capsys):
    with pytest.raises(SystemExit):
        main(['benchmark-step', 'config.py', option, '0'])
    assert f"argument {option}: expected an integer of at least 1, got '0'" in capsys.readouterr().err


def test_other_guides_and_learners_are_measured(retinanet, faster_rcnn, run_config, tmp_path, capsys):
    """A backbone and the student's mean teach; then peers each other, and an ensemble of theirs, by their RoI heads."""
    config = run_config(dict(
        type='DetectionDistiller', student=retinanet(),
        teacher=[dict(type='Backbone', name='test_vit', checkpoint='no.pth'), dict(type='Average')],
        distill=dict(tokens=dict(type='FeatureImitation'), kd=dict(type='DenseClassification', teacher=1)),
        policy=dict(type='Random')))
    config.dump(tmp_path / 'config.py')
    arguments = ['--size', '64', '96', '--repeats', '1', '--device', 'cpu', '--out', str(tmp_path / 'o.json')]
    assert main(['benchmark-step', str(tmp_path / 'config.py'), *arguments]) == 0
    assert 'Distilling costs' in capsys.readouterr().out
    record = json.loads((tmp_path / 'o.json').read_text())
    assert set(record['parts']) == {STUDENT, DISTILLED, TEACHER, 'term tokens', 'term kd'}
    assert record['ratio'] is None and record['teacher_weights'] > 0
    peers = run_config(dict(
        type='DetectionDistiller', student=faster_rcnn(), peers=1,
        teacher=[dict(type='Peer', learner=1), dict(type='Ensemble', of=[dict(type='Peer', learner=each)
                                                                         for each in (0, 1)])],
        distill=dict(one=dict(type='RoIClassification'), other=dict(type='RoIClassification', learner=1, teacher=1))))
    distiller = random_distiller(peers)
    costs = measure_parts(distiller, synthetic_batch(distiller.student, images=1, size=(64, 64), boxes=3), repeats=1)
    assert set(costs) == {TEACHER, 'term one', 'term other'} and all(cost.memory > 0 for cost in costs.values())
