"""Every argument of every term is checked when it is built; what does not fit is refused by its name and value."""
import inspect

import pytest
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.losses import DistillTerm

TERMS = {name: each for name, each in MODELS.module_dict.items()
         if issubclass(each, DistillTerm) and each.__module__.startswith('kd_det.')}

# What no term takes, by the argument's name; several values where several things can be wrong.
NEGATIVE, FLAG = (-1.0, 'much', None, float('nan'), True), ('yes', 1, None)
WRONG = dict(
    tap=(3, dict(student='neck'), None), levels=('all', 1.5, (), ('0', ), True), adapter=('conv', None),
    resize=FLAG, pad_aware=FLAG, teacher=(-1, '0', 0.5, True), head=(3, dict(teacher='bbox_head'), None),
    mask=(3, 'BoxForegroundd', dict(type='BoxForeground', weighting='half')), distance=('cosin', None),
    form=('giuo', None), normalizer=('batches', None), weighting=('equal', None), reduction=('none', None),
    box_mapping=('images', None), stage=('last', -1, 1.5, None, True), temperature=(0, -1.0, '1', None, float('inf')),
    ratio=(1, -0.1, '0.5'),
    margin=NEGATIVE, beta=NEGATIVE, alpha=NEGATIVE, gamma=NEGATIVE, lambda_=NEGATIVE, inter=NEGATIVE, intra=NEGATIVE,
    foreground_weight=NEGATIVE, background_weight=NEGATIVE, background_class_weight=NEGATIVE, feature_weight=NEGATIVE,
    pooling_weight=NEGATIVE, relation_weight=NEGATIVE, distance_weight=NEGATIVE, angle_weight=NEGATIVE,
    objectness_weight=NEGATIVE, regression_weight=NEGATIVE, box_weight=NEGATIVE, distribution_weight=NEGATIVE,
    l1_weight=NEGATIVE, giou_weight=NEGATIVE, layers=(0, 1.5, '1', True), background=(-1, 0.5, None),
    costs=(1.0, (1.0, 2.0), (1.0, -2.0, 1.0), ('1', 1, 1)), remaining=(-1, 0.5, None))
GAP = ('DenseClassification', 'QueryClassification', 'CrossKD')  # their β is an exponent


def arguments_of(term: type) -> dict:
    """The arguments that a term takes, those of its bases too, as far as it passes on what it does not know."""
    arguments: dict = {}
    for base in term.__mro__:
        if '__init__' in vars(base) and issubclass(base, DistillTerm):
            parameters = dict(inspect.signature(base.__init__).parameters)
            passes_on = parameters.pop('kwargs', None)
            arguments = {**parameters, **arguments}
            if not passes_on:
                break
    return {name: each for name, each in arguments.items() if name != 'self'}


CASES = [(name, argument) for name, term in TERMS.items() for argument in arguments_of(term)]


def test_all_terms_and_all_their_arguments_are_tried():
    assert len(TERMS) > 20 and 'tap' in arguments_of(TERMS['FGD']) and 'tap' not in arguments_of(TERMS['CrossKD'])
    assert {argument for _, argument in CASES} == set(WRONG)  # a new argument gets what does not fit it there


@pytest.mark.parametrize(('name', 'argument'), CASES, ids=lambda each: each)
def test_a_value_that_does_not_fit_is_refused(name, argument):
    for value in WRONG[argument] + ((0.5, ) if name in GAP and argument == 'beta' else ()):
        with pytest.raises((ValueError, KeyError)) as error:
            MODELS.build({'type': name, argument: value})
        if argument == 'mask':
            assert any(each in str(error.value) for each in ('mask=3: expected', 'BoxForegroundd', "weighting='half'"))
        elif argument == 'costs':
            assert str(error.value).startswith('costs')
        else:
            assert str(error.value).startswith(f'{argument}={value!r}: expected ')


@pytest.mark.parametrize(('name', 'argument'), CASES, ids=lambda each: each)
def test_the_default_is_taken_when_given(name, argument):
    default = arguments_of(TERMS[name])[argument].default
    assert isinstance(MODELS.build({'type': name, argument: default}), TERMS[name])


def test_the_nearest_choice_is_told():
    message = r"^distance='cosin': expected one of mse, l1, smooth_l1, cosine\. Nearest: cosine\.$"
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='FeatureImitation', distance='cosin'))


def test_a_run_is_refused_before_it_begins(one_stage, distiller):
    terms = dict(hint=dict(type='FeatureImitation', distance='cosin'))
    message = r"^model\.distill\.hint: distance='cosin': expected one of .* Nearest: cosine\.$"
    with pytest.raises(ConfigurationError, match=message):
        distiller(one_stage('retina'), one_stage('retina'), distill=terms)
