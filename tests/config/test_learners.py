"""A distillation of several learners, composed from a student's config: who learns what from whom, at which weight."""
import pytest
from mmdet.registry import MODELS

from kd_det.config.composition import distillation_config
from kd_det.config.distillation import compose_distillation
from kd_det.config.files import ConfigurationError
from kd_det.config.learners import add_learners


@pytest.fixture
def alone(run_config, retinanet):
    """A distillation without a teacher, of which there are to be several learners."""
    return distillation_config(run_config(retinanet()), None, None, 'kd', balance='paper')


def describe(config):
    return {name: (term.learner, term.teacher) for name, term in config.model.distill.items()}


@pytest.mark.parametrize('guide, terms, kinds', [
    ('peers', {'kd_0_peer1': (0, 1), 'kd_0_peer2': (0, 2), 'kd_1_peer0': (1, 0), 'kd_1_peer2': (1, 2),
               'kd_2_peer0': (2, 0), 'kd_2_peer1': (2, 1)}, ['Peer'] * 3),
    ('mean', {'kd_0_guide': (0, 0), 'kd_1_guide': (1, 0), 'kd_2_guide': (2, 0)}, ['Ensemble']),
    ('gate', {'kd_0_guide': (0, 0), 'kd_1_guide': (1, 0), 'kd_2_guide': (2, 0)}, ['Ensemble']),
    ('fusion', {'kd_0_guide': (0, 0), 'kd_1_guide': (1, 0), 'kd_2_guide': (2, 0), 'kd_fusion': (3, 1)},
     ['Fusion', 'Ensemble'])])
def test_who_learns_from_whom(guide, terms, kinds, alone):
    config = add_learners(alone, 2, ('backbone', 'neck'), guide)
    assert describe(config) == terms and [each['type'] for each in config.model.teacher] == kinds
    assert list(alone.model.distill) == ['kd']
    model = MODELS.build(config.model)
    assert len(model.learners) == 3 + (guide == 'fusion')
    published = alone.model.distill.kd.get('weight', 1.0) / (2 if guide == 'peers' else 1)
    assert all(term.weight == dict(type='mmdet.SigmoidWarmup', value=published, epochs=alone.train_cfg.max_epochs)
               for term in config.model.distill.values())


def test_what_is_learnt_of_a_learner_begins_gently_and_of_a_teacher_at_once(run_config, retinanet):
    student = run_config(retinanet())
    student.train_cfg = dict(type='IterBasedTrainLoop', max_iters=50)
    student.dump(student.work_dir + '.py')
    made = add_learners(distillation_config(student, student.work_dir + '.py', 'weights.pth', 'kd'), 1).model.distill
    assert made.kd_0.weight['type'] == 'mmdet.Balance'
    assert made.kd_0_peer1.weight == dict(type='mmdet.SigmoidWarmup', value=made.kd_0.weight, iterations=50)


def test_a_frozen_teacher_teaches_every_learner(run_config, retinanet, tmp_path):
    teacher = tmp_path / 'teacher.py'
    run_config(retinanet(depth=50)).dump(teacher)
    config = distillation_config(run_config(retinanet()), str(teacher), 'weights.pth', 'kd')
    made = add_learners(config, [str(teacher)], guide='mean')
    assert describe(made) == {'kd_0': (0, 0), 'kd_0_guide': (0, 1), 'kd_1': (1, 0), 'kd_1_guide': (1, 1)}
    assert made.model.peers[0].backbone.depth == 50
    made.dump(tmp_path / 'made.py')


def test_learners_learn_of_each_other_by_published_weights_unless_a_ratio_is_given(run_config, retinanet):
    student = run_config(retinanet())
    student.dump(student.work_dir + '.py')
    for balance, published in ((None, True), (0.3, False)):
        config, name = compose_distillation(student, [student.work_dir + '.py'], ['weights.pth'], 'pkd', peers=1,
                                            balance=balance)
        terms = config.model.distill
        assert terms.pkd_0.weight.type == 'mmdet.Balance' and terms.pkd_0_peer1.weight.type == 'mmdet.SigmoidWarmup'
        assert terms.pkd_0_peer1.weight.value == (10.0 if published else terms.pkd_0.weight)
        assert name == 'student_pkd_peers_of_2'


def test_mistakes(alone, run_config, retinanet):
    with pytest.raises(ConfigurationError, match='one peer at least'):
        add_learners(alone, 0)
    with pytest.raises(ConfigurationError, match='a distillation with one teacher or none'):
        add_learners(add_learners(alone, 1), 1)
