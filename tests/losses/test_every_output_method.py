"""Every method that reads heads, as its config files have it, on every family of heads that it claims."""
import copy

import pytest
import torch
from mmdet.registry import MODELS

from kd_det.composition import available_methods, head_family, method_terms

DETECTORS = dict(
    two_stage=['faster_rcnn', 'cascade_rcnn'],
    one_stage=['retina', 'retina_softmax', 'atss', 'gfl', 'rtmdet', 'ssd'],
    anchor_free=['fcos', 'fcos_normalized', 'yolox'],
    detr=['DETR', 'ConditionalDETR', 'DABDETR', 'DeformableDETR', 'DINO'])
NOT_FOR = dict(
    ld={'retina', 'retina_softmax', 'atss', 'rtmdet', 'ssd'},  # they predict no distributions
    crosskd={'ssd', 'yolox'},  # their heads have no towers
    rm={'yolox'})  # untrained, its assigner gives each box a single candidate, which ranks alone


# Their towers have a single convolution, which is to be the student's.
FOR_THESE_HEADS = dict(crosskd=dict(crosskd=dict(type='CrossKD', remaining=0)))


def reads_heads(config: dict) -> bool:
    term = MODELS.build({key: value for key, value in config.items() if key != 'weight'})
    return bool(term.student_heads or term.teacher_heads)


METHODS = {method: files for method, files in available_methods().items()
           if any(map(reads_heads, method_terms(method, next(iter(files))).values()))}
CASES = [(method, family, detector) for method, files in METHODS.items() for family in files
         for detector in DETECTORS[family] if detector not in NOT_FOR.get(method, ())]


@pytest.fixture
def make(request):
    """Makes the model dict of a detector, or of a one-stage detector with that head."""

    def make(name: str, **kwargs) -> dict:
        if name in DETECTORS['two_stage']:
            return request.getfixturevalue(name)(**kwargs)
        if name in DETECTORS['detr']:
            kwargs.pop('neck', None)  # as wide as the transformer
            return request.getfixturevalue('detr')(name, **kwargs)
        return request.getfixturevalue('one_stage')(name, **kwargs)

    return make


@pytest.fixture
def step(batch):

    def run(model, data=None) -> dict:
        model.set_progress(iteration=1000, epoch=1.0)  # behind any warm-up
        data = model.data_preprocessor(copy.deepcopy(data or batch()), True)
        return model(**data, mode='loss')

    return run


def test_the_output_methods_are_all_here():
    assert set(METHODS) >= {'bckd', 'crosskd', 'dkd', 'frs', 'kd', 'ld', 'pfi', 'pgd', 'querykd', 'rm'}


def test_names_of_terms_do_not_meet_in_sums_of_methods():
    names = [name for method, files in available_methods().items() for name in method_terms(method, next(iter(files)))]
    assert len(names) == len(set(names))


@pytest.mark.parametrize('method, family, detector', CASES)
def test_method_trains_the_student_and_nothing_else(method, family, detector, make, distiller, step):
    student, terms = make(detector), method_terms(method, family)
    terms = {**terms, **FOR_THESE_HEADS.get(method, {})}
    assert head_family(student) == family
    model = distiller(student, make(detector, depth=50, neck=12), distill=terms).train()
    teacher = model.build_teachers()[0].model
    for each in (model.student, teacher):  # heads start with the same small scores everywhere
        for name, parameter in each.named_parameters():
            if '_head' in name and parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    losses = step(model)
    values = [losses[f'loss_{name}'] for name in terms]
    assert all(value.isfinite() and value > 0 for value in values)
    sum(values).backward()
    assert model.backbone.conv1.weight.grad.any()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.terms.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    if method not in ('encoder', 'pfi', 'pgd'):  # which compare features
        heads = [parameter for name, parameter in model.student.named_parameters() if '_head' in name]
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in heads)


@pytest.mark.parametrize('method, family, detector', CASES)
def test_method_is_finite_without_boxes_on_a_padded_batch(method, family, detector, make, distiller, step, batch):
    terms = {**method_terms(method, family), **FOR_THESE_HEADS.get(method, {})}
    model = distiller(make(detector), make(detector), distill=terms).train()
    losses = step(model, batch(shapes=((64, 96), (33, 40)), boxes=((), ())))
    values = [losses[f'loss_{name}'] for name in model.terms]
    assert all(value.isfinite() for value in values)
    sum(values).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def _warmed_up(two_stage: float, one_stage: float, anchor_free: float, **others) -> dict:
    values = dict(two_stage=two_stage, one_stage=one_stage, anchor_free=anchor_free)
    return {family: dict(weight=dict(type='Warmup', value=value, iterations=500), **others)
            for family, value in values.items()}


@pytest.mark.parametrize('method, term, expected', [
    ('dkd', 'dkd', dict(two_stage=dict(form='decoupled', alpha=1.0, beta=0.25, temperature=1.0))),
    ('bckd', 'bckd_classes', {family: dict(beta=1.0, weight=1.0) for family in ('one_stage', 'anchor_free')}),
    ('bckd', 'bckd_boxes', {family: dict(weighting='gap', weight=4.0) for family in ('one_stage', 'anchor_free')}),
    ('ld', 'ld', dict(one_stage=dict(weighting='positives', weight=0.25, temperature=10.0, normalizer='none'))),
    ('ld', 'ld_valuable', dict(one_stage=dict(weighting='valuable', weight=0.25 * 4 / 16, temperature=10.0))),
    ('crosskd', 'crosskd', dict(one_stage=dict(remaining=1, beta=1.0, box_weight=1.0, distribution_weight=4.0),
                                anchor_free=dict(remaining=2, weight=0.4, box_weight=0.75 / 0.4))),
    ('frs', 'frs_features', _warmed_up(0.002, 0.005, 0.01, adapter='conv3x3', normalizer='mask')),
    ('frs', 'frs_classes', _warmed_up(0.1, 0.02, 0.05, beta=0, weighting='richness')),
])
def test_weights_are_the_published_ones(method, term, expected):
    assert set(available_methods()[method]) == set(expected)
    for family, arguments in expected.items():
        config = method_terms(method, family)[term]
        assert {key: config[key] for key in arguments} == arguments
