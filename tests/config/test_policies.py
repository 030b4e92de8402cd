"""Policies in the configs that are composed: several unlike teachers, whole weights, images held out."""
import pytest
from mmdet.registry import MODELS
from mmengine.config import Config

from kd_det.config.choices import POLICIES
from kd_det.config.distillation import compose_distillation
from kd_det.config.files import ConfigurationError
from kd_det.config.options import merge_options
from kd_det.config.policies import hold_out
from kd_det.distillers.policies import Policy


@pytest.fixture
def files(retinanet, faster_rcnn, run_config, tmp_path):
    """A student's config, and those of two unlike teachers."""
    for name, model in dict(first=retinanet(neck=12), second=faster_rcnn(neck=16)).items():
        Config(dict(model=model)).dump(tmp_path / f'{name}.py')
    return run_config(retinanet()), [str(tmp_path / f'{name}.py') for name in ('first', 'second')]


@pytest.mark.parametrize('policy', [*POLICIES, None])
def test_each_teacher_has_its_terms_with_the_weight_that_the_policy_shares_out(policy, files):
    student, teachers = files
    config, name = compose_distillation(student, teachers, ['a.pth', 'b.pth'], 'pkd', policy=policy)
    assert [each['config'] for each in config.model.teacher] == teachers
    assert [each['checkpoint'] for each in config.model.teacher] == ['a.pth', 'b.pth']
    assert [term['teacher'] for term in config.model.distill.values()] == [0, 1]
    ratios = [term['weight']['ratio'] for term in config.model.distill.values()]
    assert ratios == ([0.5, 0.5] if policy is None else [1, 1])
    assert name.endswith(f'_pkd_2_teachers_{policy}' if policy else '_pkd_2_teachers')
    dataset = config.train_dataloader.dataset
    assert (dataset.type == 'mmdet.HeldOut' and dataset.images == 64) == (policy in ('bandit', 'agent'))
    assert student.train_dataloader.dataset.type == 'CocoDataset' and 'policy' not in student.model
    for teacher in config.model.teacher:
        teacher.update(checkpoint=None, random_teacher=True)
    if policy == 'fixed':
        merge_options(config, {'model.policy.weights': [1, 0]})
    distiller = MODELS.build(config.model)
    assert isinstance(distiller.policy, Policy) == (policy is not None)


def test_options_reach_a_policy_and_the_terms_of_all_its_teachers(files):
    config, _ = compose_distillation(files[0], files[1], ['a.pth', 'b.pth'], 'pkd', policy='agent')
    merge_options(config, {'model.policy.interval': 5, 'model.distill.pkd.weight': 4.0,
                           'train_dataloader.dataset.images': 2})
    assert config.model.policy == dict(type='Agent', interval=5) and config.train_dataloader.dataset.images == 2
    assert [term['weight'] for term in config.model.distill.values()] == [4.0, 4.0]


def test_checkpoints_of_one_teacher_make_a_route(files):
    config, name = compose_distillation(files[0], files[1][:1], ['a.pth', 'b.pth', 'c.pth'], 'pkd', policy='route')
    assert [each['config'] for each in config.model.teacher] == files[1][:1] * 3
    assert name.endswith('_pkd_3_teachers_route')


def test_what_can_not_be_composed_is_told(files):
    student, teachers = files
    with pytest.raises(ConfigurationError, match='There are 2 teachers, but 3 checkpoints: give one for each'):
        compose_distillation(student, teachers, ['a.pth', 'b.pth', 'c.pth'], 'pkd')
    with pytest.raises(ConfigurationError, match=r"no policy 'agnet'. Nearest: agent"):
        compose_distillation(student, teachers, ['a.pth', 'b.pth'], 'pkd', policy='agnet')
    config, _ = compose_distillation(student, teachers[:1], ['a.pth'], 'pkd', policy='random')
    with pytest.raises(ConfigurationError, match=r'model\.policy: there is nothing to choose'):
        MODELS.build(config.model)


def test_images_are_held_out_of_labelled_data_alone(files):
    student, _ = files
    leaf = student.train_dataloader.dataset
    blank = dict(leaf, pipeline=[*leaf.pipeline, dict(type='Unlabelled')])
    student.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dict(type='RepeatDataset', times=2, dataset=leaf), blank, leaf])
    hold_out(student, 5)
    repeated, unlabelled, plain = student.train_dataloader.dataset.datasets
    assert repeated.type == 'RepeatDataset' and repeated.dataset.images == plain.images == 3
    assert unlabelled.type == 'CocoDataset' and plain.dataset == leaf
    before = student.to_dict()
    hold_out(student, 7)
    assert student.to_dict() == before  # they are held out already
    student.train_dataloader.dataset = blank
    with pytest.raises(ConfigurationError, match='needs labelled images'):
        hold_out(student, 2)


def test_auto_lets_a_bandit_choose_between_the_methods_that_fit(files):
    student, teachers = files
    config, name = compose_distillation(student, teachers[:1], ['a.pth'], 'auto')
    arms = config.model.policy.arms
    assert {'fgd', 'pkd', 'kd', 'crosskd'} <= set(arms) and not {'querykd', 'encoder'} & set(arms)  # of DETRs
    assert sorted(term for terms in arms.values() for term in terms) == sorted(config.model.distill)
    assert config.model.distill.pkd.weight == dict(type='mmdet.Balance', ratio=1)
    assert name.endswith('_auto_bandit') and config.train_dataloader.dataset.type == 'mmdet.HeldOut'
    config.model.teacher.update(checkpoint=None, random_teacher=True)
    policy = MODELS.build(config.model).policy
    assert list(policy.arms) == list(arms)
    # A Faster R-CNN teaches a RetinaNet by its features alone.
    other, _ = compose_distillation(student, teachers[1:], ['a.pth'], 'auto')
    assert 'pkd' in other.model.policy.arms and len(other.model.policy.arms) < len(arms)


def test_auto_may_be_given_the_methods_and_another_policy(files):
    student, teachers = files
    config, name = compose_distillation(student, teachers[:1], ['a.pth'], 'auto:pkd+fgd', policy='random')
    assert config.model.policy == dict(type='Random', arms=dict(pkd=['pkd'], fgd=['fgd']))
    assert name.endswith('_auto_pkd+fgd_random')
    for method, policy, message in (
            ('auto:pkd+querykd', None, 'querykd'), ('auto:pkd', None, 'nothing to choose between: pkd'),
            ('auto:pkd+fgd', 'agent', 'an? Agent chooses between teachers, not between methods')):
        with pytest.raises(ConfigurationError, match=message):
            compose_distillation(student, teachers[:1], ['a.pth'], method, policy=policy)
    with pytest.raises(ConfigurationError, match='not both'):
        compose_distillation(student, teachers, ['a.pth', 'b.pth'], 'auto')
