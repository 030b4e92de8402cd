"""What is drawn at random: the student as without distillation, adapters from the run's seed, each teacher anew."""
import copy
import random

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

from kd_det.checks.synthetic import random_distiller

TERMS = dict(fgd=dict(type='FGD'), mgd=dict(type='MGD'))


def _equal(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[key], other[key]) for key in state)


def _drawn(state, other) -> list[bool]:
    """Of each tensor that is drawn, no constant: whether it is the same in both."""
    return [torch.equal(state[key], other[key]) for key in state if state[key].unique().numel() > 2]


def test_adapters_follow_the_seed_of_the_run_and_the_student_is_the_plain_one(retinanet, make_runner):
    model = dict(type='DetectionDistiller', student=retinanet(), distill=TERMS,
                 teacher=dict(config=retinanet(neck=12), random_teacher=True))
    one, same, other, plain = (make_runner(config, seed=seed, name=f'{index}').model for index, (config, seed) in
                               enumerate([(model, 3), (model, 3), (model, 4), (retinanet(), 3)]))
    assert _equal(one.terms.state_dict(), same.terms.state_dict())
    assert not any(_drawn(one.terms.state_dict(), other.terms.state_dict()))
    assert _equal(one.state_dict(), plain.state_dict())


def test_a_term_more_at_the_end_changes_none_before_it(retinanet, distiller):
    fewer = distiller(retinanet(), retinanet(neck=12), distill=TERMS).terms.state_dict()
    more = distiller(retinanet(), retinanet(neck=12), distill=dict(TERMS, pkd=dict(type='PKD'))).terms.state_dict()
    assert fewer.keys() < more.keys() and _equal(fewer, {key: more[key] for key in fewer})
    first, second = (more[f'{name}.adapters.0.weight'] for name in ('fgd', 'pkd'))
    assert first.shape == second.shape and not torch.equal(first, second)


def test_random_teachers_differ_and_each_is_the_same_again(retinanet, distiller):
    teacher = dict(config=retinanet(neck=12), random_teacher=True)

    def build(count, seed=0):
        model = distiller(retinanet(), None, teacher=[dict(teacher) for _ in range(count)], distill={})
        torch.manual_seed(seed)
        return [each.model.state_dict() for each in model.build_teachers()]

    first, second, third = teachers = build(3)
    assert not any(_drawn(first, second)) and not any(_drawn(first, third)) and not any(_drawn(second, third))
    assert all(map(_equal, teachers, build(3))) and all(map(_equal, build(2), teachers))
    assert _equal(build(1)[0], first)
    assert not any(same for state, other in zip(build(3, seed=1), teachers) for same in _drawn(state, other))


def test_dry_runs_draw_their_teachers_so_too(retinanet):
    teachers = [dict(config=retinanet(neck=12), checkpoint='nowhere.pth') for _ in range(2)]
    model = random_distiller(Config(dict(model=dict(
        type='DetectionDistiller', student=retinanet(), teacher=teachers,
        distill=dict(one=dict(type='FGD'), two=dict(type='FGD', teacher=1))))))
    first, second = (teacher.model.state_dict() for teacher in model.build_teachers())
    assert not any(_drawn(first, second))


def test_teachers_leave_the_generators_as_they_were(retinanet, distiller):
    model = distiller(retinanet(), None, distill={},
                      teacher=[dict(config=retinanet(), random_teacher=True) for _ in range(2)])
    before = torch.get_rng_state(), random.getstate(), copy.deepcopy(np.random.get_state()[1])
    model.build_teachers()
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_a_student_is_initialised_as_without_its_teachers(retinanet, distiller):
    model = distiller(retinanet(), retinanet(neck=12), distill=TERMS)
    model.init_weights()
    torch.manual_seed(0)
    plain = MODELS.build(retinanet())
    plain.init_weights()
    assert _equal(model.state_dict(), plain.state_dict())
