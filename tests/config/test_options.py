"""``--cfg-options`` change a config once it is made: of an ensemble all teachers, or one."""
import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS

from kd_det.config import ConfigurationError
from kd_det.config.composition import PAPER, distillation_config, make_ensemble
from kd_det.config.files import load_config
from kd_det.config.options import merge_options, set_epochs

RETINANET = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
TEACHER = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'


@pytest.fixture
def two_teachers(distillation):
    """The config of two teachers, each with a term of its own."""
    config = distillation(dict(type='RetinaNet'), dict(config='teacher.py', checkpoint='x.pth'),
                          fgd=dict(type='mmdet.FGD', tap='neck', weight=dict(type='mmdet.Balance', ratio=0.5)),
                          pkd=dict(type='mmdet.PKD', tap='neck', weight=6.0))
    return make_ensemble(config, ['a.pth', 'b.pth'])


def test_options_override_and_data_root_reaches_all(data_config):
    config = data_config('data/coco/')
    merge_options(config, {'data_root': '/new', 'train_dataloader.batch_size': 4, 'val_evaluator.0.metric': 'bbox'})
    assert config.train_dataloader.batch_size == 4
    assert config.val_evaluator == [dict(ann_file='/new/val.json', metric='bbox')]


@pytest.mark.parametrize('options, said', [
    ({'val_evaluator.0.ann_file.key': 1}, '--cfg-options'),
    ({'val_evaluator.7.metric': 'bbox'}, '--cfg-options'),
    ({'other': 1}, "'other' is a variable of the config file"),
    ({'train_dataloder.batch_size': 1}, "Nearest: train_dataloader."),
    ({'quite_another': 1}, "no run reads a key 'quite_another'."),
])
def test_options_that_lead_nowhere(options, said, data_config):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        merge_options(data_config('data/coco/'), options)


def test_an_option_of_a_term_is_of_all_its_teachers_or_of_one(two_teachers):
    merge_options(two_teachers, {'model.distill.fgd.temperature': 0.8, 'model.distill.fgd_2.alpha': 2e-3,
                                 'model.distill.pkd_1.levels': [0, 1]})
    terms = two_teachers.model.distill
    assert list(terms) == ['fgd_1', 'fgd_2', 'pkd_1', 'pkd_2']
    assert terms.fgd_1.temperature == terms.fgd_2.temperature == 0.8
    assert terms.fgd_2.alpha == 2e-3 and 'alpha' not in terms.fgd_1
    assert terms.pkd_1.levels == [0, 1] and 'levels' not in terms.pkd_2


def test_a_weight_of_a_term_is_shared_out_and_a_weight_for_one_teacher_is_its_own(two_teachers):
    merge_options(two_teachers, {'model.distill.pkd.weight': 10.0, 'model.distill.fgd.weight.ratio': 0.8,
                                 'model.distill.fgd.weight.interval': 7, 'model.distill.fgd_2.weight.ratio': 0.3})
    terms = two_teachers.model.distill
    assert terms.pkd_1.weight == terms.pkd_2.weight == 5.0
    assert terms.fgd_1.weight == dict(type='mmdet.Balance', ratio=0.4, interval=7)
    assert terms.fgd_2.weight == dict(type='mmdet.Balance', ratio=0.3, interval=7)
    merge_options(two_teachers, {'model.distill.pkd_1.weight': 0.7, 'model.distill.pkd_2.weight': 0.3})
    terms = two_teachers.model.distill
    assert (terms.pkd_1.weight, terms.pkd_2.weight) == (0.7, 0.3)


@pytest.mark.parametrize('weight, option, share', [
    (dict(type='Warmup', value=3.0, epochs=1), 'weight.value', lambda term: term.weight.value),
    (dict(type='Warmup', value=dict(type='Balance', ratio=3.0), epochs=1), 'weight.value.ratio',
     lambda term: term.weight.value.ratio),
    (dict(type='Balance', ratio=dict(type='Decay', value=3.0, epochs=2)), 'weight.ratio.value',
     lambda term: term.weight.ratio.value)])
def test_the_number_within_a_schedule_is_shared_out(weight, option, share, distillation):
    one = distillation(dict(type='RetinaNet'), dict(config='teacher.py'), kd=dict(type='KD', weight=weight))
    config = make_ensemble(one, ['a.pth', 'b.pth'])
    assert share(config.model.distill.kd_1) == 1.5
    merge_options(config, {f'model.distill.kd.{option}': 5.0, 'model.distill.kd.weight.begin': 3})
    assert [share(term) for term in config.model.distill.values()] == [2.5, 2.5]
    assert [term.weight.begin for term in config.model.distill.values()] == [3, 3]


def test_options_before_and_after_there_are_several_teachers_mean_the_same():
    options = {'model.distill.frs_features.weight.value': 0.3, 'model.distill.frs_classes.temperature': 2.0,
               'model.teacher.fuse': False, 'model.distill.extra.type': 'mmdet.PKD', 'model.distill.extra.tap': 'neck',
               'train_cfg.max_epochs': 3}
    before, after = (distillation_config(RETINANET, TEACHER, 'x.pth', 'frs', balance=PAPER) for _ in range(2))
    merge_options(before, options)
    before = make_ensemble(before, ['a.pth', 'b.pth', 'c.pth'])
    after = make_ensemble(after, ['a.pth', 'b.pth', 'c.pth'])
    merge_options(after, options)
    assert after.to_dict() == before.to_dict() and after.model.distill.extra_3.teacher == 2


def test_an_option_of_the_teacher_is_of_all_or_of_one(two_teachers):
    merge_options(two_teachers, {'model.teacher.fuse': False, 'model.teacher.1.classes': ['cat']})
    first, second = two_teachers.model.teacher
    assert first == dict(config='teacher.py', checkpoint='a.pth', fuse=False)
    assert second == dict(config='teacher.py', checkpoint='b.pth', fuse=False, classes=['cat'])


def test_options_reach_the_terms_of_a_sum_and_of_a_saved_ensemble(tmp_path):
    config = distillation_config(RETINANET, TEACHER, 'x.pth', 'fgd+pkd')
    merge_options(config, {'model.distill.pkd.levels': 3})
    assert config.model.distill.pkd['levels'] == 3 and 'levels' not in config.model.distill.fgd
    make_ensemble(config, ['a.pth', 'b.pth']).dump(tmp_path / 'saved.py')
    saved = load_config(tmp_path / 'saved.py')
    merge_options(saved, {'model.distill.pkd.levels': 2, 'model.distill.fgd_1.temperature': 0.8})
    terms = saved.model.distill
    assert terms.pkd_1['levels'] == terms.pkd_2['levels'] == 2
    assert (terms.fgd_1.temperature, terms.fgd_2.temperature) == (0.8, 0.5)


def test_terms_that_were_never_one_are_left_apart(distillation):
    teachers = [dict(config='a.py'), dict(config='b.py')]
    config = distillation(dict(type='RetinaNet'), teachers, fgd_1=dict(type='FGD'), pkd=dict(type='PKD', teacher=1))
    merge_options(config, {'model.distill.mgd': dict(type='MGD'), 'model.distill.pkd.levels': 2})
    assert config.model.distill.to_dict() == dict(
        fgd_1=dict(type='FGD'), pkd=dict(type='PKD', teacher=1, levels=2), mgd=dict(type='MGD'))


@pytest.mark.parametrize('option, said', [
    ('model.distill.fdg.temperature', "there is no term 'fdg', only fgd, fgd_1, fgd_2, pkd, pkd_1, pkd_2. "
     'Nearest: fgd.'),
    ('model.distill.fgd_3.temperature', "there is no term 'fgd_3', only fgd, fgd_1"),
    ('model.teacher.2.fuse', '--cfg-options')])
def test_an_option_of_what_an_ensemble_has_not_is_refused(option, said, two_teachers):
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        merge_options(two_teachers, {option: 1})


def test_an_option_of_a_term_that_there_is_not_is_refused():
    config = distillation_config(RETINANET, TEACHER, 'x.pth', 'none')
    with pytest.raises(ConfigurationError, match="there is no term 'fgd', only none."):
        merge_options(config, {'model.distill.fgd.temperature': 1})


def test_options_of_an_ensemble_are_what_its_terms_are_built_with(retinanet, distillation):
    teacher = dict(config=retinanet(), random_teacher=True)
    one = distillation(retinanet(), teacher, fgd=dict(type='FGD', temperature=0.5, weight=2.0))
    config = make_ensemble(one, ['a.pth', 'b.pth'])
    for each in config.model.teacher:
        del each['checkpoint']
    merge_options(config, {'model.distill.fgd.temperature': 0.8, 'model.distill.fgd_1.weight': 0.7})
    torch.manual_seed(0)
    distiller = MODELS.build(config.model)
    assert [term.temperature for term in distiller.terms.values()] == [0.8, 0.8]
    assert [distiller.schedules[name].full for name in distiller.terms] == [0.7, 1.0]


@pytest.mark.parametrize('schedule', [
    dict(type='StepLR', step_size=8, gamma=0.1),
    dict(type='MultiStepLR', milestones=[4, 8], gamma=0.1),
    dict(type='OneCycleLR', eta_max=0.1, total_steps=12),
    dict(type='OneCycleLR', eta_max=0.1, begin=0, end=12),
    dict(type='CosineRestartLR', periods=[4, 8], restart_weights=[1, 0.5], eta_min=0),
    dict(type='CosineAnnealingLR', T_max=12, eta_min=0),
    dict(type='ExponentialLR', gamma=0.9)], ids=lambda each: each['type'])
@pytest.mark.parametrize('epochs', [6, 24])
def test_every_schedule_is_stretched_with_the_epochs(schedule, epochs):
    """Step by step of the shortest, the learning rates of 12 epochs are those of twice, or half, as many."""

    def list_rates(max_epochs, stretched):
        config = Config(dict(train_cfg=dict(max_epochs=12), param_scheduler=dict(schedule)))
        if stretched:
            set_epochs(config, max_epochs)
        wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)))
        steps = 4  # in an epoch
        scheduler = PARAM_SCHEDULERS.get(schedule['type']).build_iter_from_epoch(
            optimizer=wrapper, epoch_length=steps, **{key: value for key, value in config.param_scheduler.items()
                                                      if key != 'type'})
        rates = []
        for _ in range(max_epochs * steps):
            rates.append(wrapper.get_lr()['lr'][0])
            wrapper.optimizer.step()
            scheduler.step()
        return rates

    before, after = list_rates(12, False), list_rates(epochs, True)
    step = len(before) // 24
    assert after[::len(after) // 24] == pytest.approx(before[::step], abs=0.012)
