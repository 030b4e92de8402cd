"""Every argument that a config can give has a declared type; what fits is taken, all else refused by its place."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from inspect import Parameter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import mmdet.registry
import numpy as np
import pytest
from annotated_types import Ge, Gt, Le, Len, Lt, MinLen, Predicate
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS, TASK_UTILS
from mmengine.registry import Registry
from torch import nn
from typing_extensions import is_typeddict

from kd_det.config.arguments import Argument, ArgumentError, check_value, declared_arguments, describe_type
from kd_det.config.files import ConfigurationError
from kd_det.deploy.joined import JoinedDetector
from kd_det.deploy.prediction import FileDetector
from kd_det.deploy.pruned import Pruned
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.inheritance import Inheritance
from kd_det.distillers.policies import Policy
from kd_det.distillers.rounding import Quantization
from kd_det.distillers.schedules import Ramp, Schedule, ScheduleConfig
from kd_det.distillers.supervision import PseudoLabels
from kd_det.losses import DistillTerm
from kd_det.masks import BoxForeground, Mask, build_mask
from kd_det.masks.base import MaskConfig
from kd_det.study.fidelity import FidelityMetric
from kd_det.teachers.cache import TeacherCache
from kd_det.teachers.engine import Engine
from kd_det.teachers.guide import Guide
from kd_det.teachers.teacher import NOT_OF_CONFIGS, Teacher
from kd_det.training.finiteness import FiniteHook
from kd_det.training.hooks import DistillHook, Preflight
from kd_det.training.labels import NoisyLabels, WithoutClasses
from kd_det.training.probe import HeldOut, ProbeSettings
from kd_det.training.replay import ReplayedRandomness, Transform


def find_registered(registry, base: type) -> dict[str, type]:
    return {name: each for name, each in registry.module_dict.items()
            if issubclass(each, base) and each.__module__.startswith('kd_det.')}


TERMS, MASKS = find_registered(MODELS, DistillTerm), find_registered(MODELS, Mask)
SCHEDULES = find_registered(TASK_UTILS, Schedule)
BUILT = {**TERMS, **MASKS, **SCHEDULES}  # from nothing but their arguments
DECLARED = {**BUILT, **find_registered(MODELS, Guide), **find_registered(TASK_UTILS, Policy), **{
    each.__name__: each for each in (
        DetectionDistiller, DistillHook, Engine, FidelityMetric, FiniteHook, HeldOut, Inheritance, NoisyLabels,
        Preflight, ProbeSettings, PseudoLabels, Quantization, ReplayedRandomness, Teacher, TeacherCache,
        WithoutClasses)}}


def arguments_of(name: str) -> dict[str, Argument]:
    return {key: each for key, each in declared_arguments(DECLARED[name]).items() if key not in NOT_OF_CONFIGS}


CASES = [(name, argument) for name in DECLARED for argument in arguments_of(name)]
KINDS = {describe_type(each.annotation): each.annotation for name in DECLARED for each in arguments_of(name).values()}


# ------------------------------------------------------------------------------------------------------------ the types


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type, found in another way than pydantic's."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if get_origin(kind) is Annotated:
        return fits(value, inner[0]) and all(holds(value, limit) for limit in inner[1:])
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in inner
    if get_origin(kind) is Sequence:
        return isinstance(value, list | tuple | range) and all(fits(each, inner[0]) for each in value)
    if dict in (kind, get_origin(kind)):
        return isinstance(value, dict) and all(isinstance(key, str) for key in value if inner)
    if get_origin(kind) is Callable:
        return callable(value)
    if is_typeddict(kind):
        return isinstance(value, dict) and value.keys() == kind.__annotations__.keys() and all(
            isinstance(each, str) and each for each in value.values())
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if kind is int:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)
    if kind is float:
        try:
            return (isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
                    and math.isfinite(value))
        except OverflowError:  # an integer beyond all floats
            return False
    return value is None if kind is type(None) else isinstance(value, kind)


def holds(value: Any, limit: Any) -> bool:
    if isinstance(limit, Ge | Gt | Le | Lt):
        return {Ge: lambda: value >= limit.ge, Gt: lambda: value > limit.gt, Le: lambda: value <= limit.le,
                Lt: lambda: value < limit.lt}[type(limit)]()
    if isinstance(limit, Len | MinLen):
        return limit.min_length <= len(value) <= (getattr(limit, 'max_length', None) or len(value))
    return limit.func(value) if isinstance(limit, Predicate) else isinstance(limit, str)


ODD = (None, True, False, 0, 1, -1, 3, 0.5, -0.5, 1.5, math.nan, math.inf, -math.inf, 10**400, '', 'x', '1', 'True',
       'xx', b'x', 1j, [], [[]], [None], [True], [0, 0], [0.5], ['x', 'x'], ['x', ''], {}, {1: 1}, dict(student='x'),
       {1}, object, print, range(0), range(2), Path('x'), np.bool_(True), np.int64(-1), np.int64(2), np.float32(0.5),
       np.float64('nan'), np.zeros(2))


def beside(kind: Any) -> list:
    """Values at the edges of a declared type, on both sides of each."""
    bare, *limits = get_args(kind) or (kind, )
    if get_origin(kind) in (Union, UnionType):
        return [value for each in get_args(kind) for value in beside(each)]
    if get_origin(kind) is Literal:
        return [value for choice in get_args(kind) for value in (
            choice, np.str_(choice), f'{choice}s', choice[:-1], choice.upper(), [choice], f' {choice}')]
    if get_origin(kind) is Annotated:
        found = beside(bare)
        for limit in limits:
            if isinstance(limit, Ge | Gt | Le | Lt):
                bound = getattr(limit, type(limit).__name__.lower())
                found += [bound, bound - 1, bound + 1, float(bound), math.nextafter(bound, -math.inf), str(bound),
                          math.nextafter(bound, math.inf), np.int64(bound), np.float64(bound), -0.0, [bound]]
            elif isinstance(limit, Len | MinLen) and get_origin(bare) is Sequence:
                items = [each for each in [*beside(get_args(bare)[0]), *ODD] if fits(each, get_args(bare)[0])]
                found += [items[:1] * number for number in range(limit.min_length + 2)]
            elif isinstance(limit, Predicate):
                found += [[each, each] for each in (*beside(get_args(bare)[0]), *ODD)]
        return found
    if get_origin(kind) is Sequence:
        items = [*beside(bare), *ODD]
        good = next(each for each in items if fits(each, bare))
        return [value for each in items for value in ([each], (good, each))]
    if is_typeddict(kind):
        whole = dict.fromkeys(kind.__annotations__, 'x')
        return [whole, dict(whole, other='x'), *(dict(whole, **{key: odd}) for key in whole for odd in ('', 1, None)),
                *({key: whole[key]} for key in whole)]
    return []


TEXT = st.text('aä_. \n0✓', max_size=3)  # all of Unicode takes hypothesis seconds to look up
OWN = {  # of types that say less than what is meant
    MaskConfig: st.sampled_from(['BoxForeground', dict(type='SpatialAttention', temperature=0.1), BoxForeground()]),
    ScheduleConfig: st.floats(0, 1e9) | st.sampled_from([dict(type='Stop', value=1.0, epochs=2), Schedule(0.5)]),
    Transform: st.just(dict(type='RandomFlip')), Path: st.just(Path('x')), nn.Module: st.just(nn.Identity()),
    dict[str, Any]: st.just({}), dict: st.just({}), float: st.floats(allow_nan=False, allow_infinity=False), str: TEXT,
}


def inside(kind: Any) -> st.SearchStrategy:
    """Values of a declared type."""
    bare, *limits = get_args(kind) or (kind, )
    if kind in OWN:
        return OWN[kind]
    if get_origin(kind) in (Union, UnionType):
        return st.one_of(*map(inside, get_args(kind)))
    if Sequence in (get_origin(kind), get_origin(bare)):
        item = bare if get_origin(kind) is Sequence else get_args(bare)[0]
        sizes = [(each.min_length, getattr(each, 'max_length', 4)) for each in limits if isinstance(each, Len | MinLen)]
        return st.lists(inside(item), min_size=sizes[0][0] if sizes else 0, max_size=sizes[0][1] if sizes else 4,
                        unique_by=repr if any(isinstance(each, Predicate) for each in limits) else None)
    return (TEXT if bare is str else st.from_type(kind)).filter(lambda value: fits(value, kind))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANYTHING = SCALARS | st.lists(SCALARS, max_size=4) | st.dictionaries(
    st.sampled_from(['student', 'teacher', 'type', '']), SCALARS, max_size=3)


def trials(examples: int):
    return settings(derandomize=True, deadline=None, database=None, max_examples=examples,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def check_refusal(error: ArgumentError, place: str) -> None:
    assert error.place == place or error.place.startswith((f'{place}[', f'{place}.'))
    assert str(error).startswith(f'{error.place}: expected ') and ', got ' in error.problem, str(error)


def check_agreement(value: Any, kind: Any) -> None:
    """A value is taken where it fits, else refused by its place, and told what would."""
    if fits(value, kind):
        check_value('here', value, kind)
    else:
        with pytest.raises(ArgumentError) as refused:
            check_value('here', value, kind)
        check_refusal(refused.value, 'here')


def test_everything_that_a_config_builds_declares_all_its_arguments():
    assert len(TERMS) > 20 and len(MASKS) > 12 and set(SCHEDULES) == {
        'Warmup', 'SigmoidWarmup', 'Decay', 'Start', 'Stop', 'Balance'}
    assert 'tap' in arguments_of('FGD') and 'tap' not in arguments_of('CrossKD')
    for registry in vars(mmdet.registry).values():
        for each in registry.module_dict.values() if isinstance(registry, Registry) else ():
            if isinstance(each, type) and each.__module__.startswith('kd_det.'):  # and not some other test's
                definer = next((base for base in each.__mro__ if '__init__' in vars(base)), object)
                assert (not definer.__module__.startswith('kd_det.') or each in DECLARED.values()
                        or definer in (Pruned, FileDetector, JoinedDetector)), each
    assert Pruned.__init__.is_declared and declared_arguments(Pruned)['kept']  # the others are MMDetection's own
    assert FileDetector.__init__.is_declared and JoinedDetector.__init__.is_declared  # which commands write and build
    for name, argument in CASES:
        annotation, default = arguments_of(name)[argument]
        assert DECLARED[name].__init__.is_declared and not declared_arguments(DECLARED[name]).is_open
        assert annotation is not Parameter.empty and 'anything' not in describe_type(annotation), (name, argument)
        assert default is Parameter.empty or fits(default, annotation), (name, argument, default)  # it is not checked


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_a_type_takes_what_it_says_and_nothing_else(kind):
    values = [*beside(kind), *ODD]
    assert {fits(value, kind) for value in values} == {False, True}
    for value in values:
        check_agreement(value, kind)


@pytest.mark.parametrize('kind', KINDS.values(), ids=KINDS)
def test_what_is_drawn_from_a_type_is_taken(kind):

    @trials(15)
    @given(inside(kind), ANYTHING)
    def check(fitting, any_value):
        assert fits(fitting, kind)
        check_value('here', fitting, kind)
        check_agreement(any_value, kind)

    check()


def required(name: str) -> dict[str, Any]:
    """What has to be given beside any other argument."""
    known = dict(masks=['BoxForeground'], value=1.0, dir='cache', student={}, distill={}, teacher={}, config='x',
                 weights=[1.0, 1.0], dataset={}, transforms=[], labels=[0], build='x.py:x',
                 file='x.json', of=[dict(type='Peer', learner=0), dict(type='Peer')])
    return {key: known[key] for key, each in arguments_of(name).items() if each.default is Parameter.empty}


@pytest.mark.parametrize('name', DECLARED)
def test_what_does_not_fit_an_argument_is_refused_by_its_name(name):
    for argument, (kind, default) in arguments_of(name).items():
        wrong = [value for value in (*beside(kind), *ODD) if not fits(value, kind) and value is not default]
        assert len(wrong) > 10
        for value in wrong:
            with pytest.raises(ArgumentError) as refused:
                DECLARED[name](**{**required(name), argument: value})
            check_refusal(refused.value, argument)


@pytest.mark.parametrize('name', BUILT)
def test_what_fits_all_arguments_is_built(name):
    drawn, needed = {argument: inside(each.annotation) for argument, each in arguments_of(name).items()}, required(name)
    if name == 'NearAnchorForeground':
        drawn['anchors'] = st.sampled_from([None, dict(scales=[8], ratios=[1.0])])

    @trials(12)
    @given(st.fixed_dictionaries({key: drawn[key] for key in needed},
                                 optional={key: each for key, each in drawn.items() if key not in needed}))
    def check(arguments):
        assume(arguments.get('treatment') != 'dkpp' or arguments.get('form', 'plain') == 'plain')
        if issubclass(BUILT[name], Ramp):
            epochs, iterations = arguments.get('epochs'), arguments.pop('iterations', None)
            arguments |= dict(epochs=1.5) if epochs is iterations is None else {}
            arguments |= dict(iterations=iterations) if epochs is None and iterations is not None else {}
        if arguments.get('weights') is not None:
            assume(len(arguments['weights']) >= len(arguments['masks']))
            arguments['weights'] = arguments['weights'][:len(arguments['masks'])]
        assert isinstance(BUILT[name](**arguments), BUILT[name])

    check()


# ---------------------------------------------------------------------------------- what users have written by mistake

# What nothing takes, by the argument's name; several values where several things can be wrong.
NEGATIVE, FLAG, SHARE = (-1.0, 'much', None, float('nan'), True), ('yes', 1, None), (1.5, -0.1, '0.5', None, True)
WRONG = dict(
    # of terms
    tap=(3, dict(student='neck'), None), levels=('all', 1.5, (), ('0', ), True, 0, [0, 0]), adapter=('conv', None),
    resize=FLAG, pad_aware=FLAG, teacher=(-1, '0', 0.5, True), head=(3, dict(teacher='bbox_head'), None),
    mask=(3, 'BoxForegroundd', dict(type='BoxForeground', weighting='half')), distance=('cosin', None),
    form=('giuo', None), normalizer=('batches', None), weighting=('equal', None), treatment=('born_again', None),
    reduction=('none', None), standardize=FLAG,
    box_mapping=('images', None), stage=('last', -1, 1.5, None, True), temperature=(0, -1.0, '1', None, float('inf')),
    ratio=(1, -0.1, '0.5'), layers=(0, 1.5, '1', True), background=(-1, 0.5, None), remaining=(-1, 0.5, None),
    tokens=(0, -1, 2.5, None, True), prompts=(0, -1, 2.5, None, True),
    costs=(1.0, (1.0, 2.0), (1.0, -2.0, 1.0), ('1', 1, 1)),
    margin=NEGATIVE, beta=NEGATIVE, alpha=NEGATIVE, gamma=NEGATIVE, lambda_=NEGATIVE, inter=NEGATIVE, intra=NEGATIVE,
    foreground_weight=NEGATIVE, background_weight=NEGATIVE, background_class_weight=NEGATIVE, feature_weight=NEGATIVE,
    pooling_weight=NEGATIVE, relation_weight=NEGATIVE, distance_weight=NEGATIVE, angle_weight=NEGATIVE,
    objectness_weight=NEGATIVE, regression_weight=NEGATIVE, box_weight=NEGATIVE, distribution_weight=NEGATIVE,
    l1_weight=NEGATIVE, giou_weight=NEGATIVE, centerness_weight=NEGATIVE, normalize=FLAG, align=FLAG,
    class_weight=NEGATIVE, groups=(0, 1.5, None, True), box_noise=SHARE, label_noise=SHARE,
    box_weighting=('gap', None), box_normalizer=('boxes', None),
    # of masks
    xi=(2, 1.01, -0.1, '0.5', True, None), phi=(1, -0.1, None), top_k=(0, -1, 2.5, None, True), anchors=(3, [8]),
    num_levels=(0, 1.5, '4'), finest_scale=(0, -56, '56', None), class_agnostic=FLAG, source=('teachers', None),
    masks=([], 3, [3]), weights=(1.0, ['1'], [float('nan')], [True]),
    # of schedules
    value=NEGATIVE, epochs=(-1, '1', True, float('inf')), iterations=(-1, 1.5, '1', True), begin=NEGATIVE,
    start=NEGATIVE, end=NEGATIVE, interval=(0, 2.5, None, True), longest=(0, 2.5, '20', True),
    momentum=(1, -0.1, '0.5', None),
    # of the distiller and its hook
    student=('retinanet', None), distill=('fgd', None, []), inherit=('', [''], ['neck', 'neck'], 3, None, True),
    inherit_by=('grown', 3, None, True), rule=('grown', 3, None), noise=NEGATIVE,
    task_weight=NEGATIVE, pseudo_labels=(0.5, [], True), preflight=(False, 0.01, [64]), images=(0, 2.5, 'no', None),
    min_map=(float('nan'), -0.1, 1.5, '0'), mode=('joined', None), weight=('scores', *NEGATIVE), score=SHARE, iou=SHARE,
    nms_iou=SHARE, quantize=(8, [], True), bits=(1, 9, 8.0, '8', None, True), ranges=('moving', None),
    keep_float=('first', [''], ['first', 'first'], None), freeze=(0, 1.5, '0.5', None),
    # of other hooks, of a transform and a metric
    patience=(-1, 0.5, None, True), rounds=(0, 1.5, None, True), transforms=(3, 'RandomFlip', [3]),
    period=(0, 1.5, '2', True), prefix=(3, ),
    seed=(-1, 2**32, 0.5, None), confidence=SHARE, least_richness=SHARE, min_iou=SHARE, calibrated_from=SHARE,
    bins=(0, 2.5, None),
    collect_device=('cuda', None),
    # of a teacher
    config=(3, None), checkpoint=('', 3, True), random_teacher=FLAG, allow_missing=(5, 'neck', [''], None),
    allow_unexpected=(5, 'neck', ['']), classes=('cat', ['cat', 'cat'], ['']), checkpoint_prefix=(3, True),
    cache=('cache', True), fuse=FLAG, channels_last=FLAG, precision=('int8', None), compile=('yes', 1, None),
    shard=FLAG, dir=('', None, 3), dtype=('int8', None), max_gb=(0, -1, '20', True, float('nan')),
    # of other guides, and of learners
    name=('', 3, True), mean=(3, 'x', ['x']), std=(3, 'x', [0.0]), bgr_to_rgb=FLAG, out_indices=(3, 'x', [0.5]),
    image_size=(3, [3], [0, 3], [1.5, 3]), build=('', 3, None, 'teacher.py'), arguments=(3, []),
    label_offset=(0.5, None, '1'), pad_size_divisor=(0, 1.5, None), learner=(-1, 0.5, None),
    file=(3, None, True), annotations=(3, True, []), of=(3, [], [3], None), loss_weight=('1', True, float('nan')),
    # of policies, and of images that are held out
    policy=('random', 3, []), probe=('loss', 3, []), arms=('guide', 3, None, ['own']), per=('image', None),
    by=('score', None), order=(0, [0], [0, 0], [0, -1], 'x'), gain=SHARE, signal=('loss', None), trial=(0, 1.5, None),
    algorithm=('exp4', None), rate=(0, -1.0, '1', None), explore=(0.5, -0.1, '0', None), part=('test', None),
    scale=(0, -1.5, '2', None, True), shift=(0.6, -0.1, '0', None), labels=(0, [], [-1], [1, 1], ['red'], None),
    dataset=('coco', None, []), lazy_init=FLAG, metric=('accuracy', None), batch_size=(0, 1.5, '1'),
    peers=(-1, 0.5, None, ['x']), share=('neck', [''], ['neck', 'neck'], None))
GAP = ('DenseClassification', 'QueryClassification', 'TargetQueries', 'CrossKD')  # their β is an exponent


OTHERS = {'Balance.ratio': NEGATIVE, 'NoisyLabels.share': SHARE, 'NoisyLabels.classes': (1, 2.5, '3', True),
          'Sequence.patience': (0, 0.5, True),
          'Ensemble.weights': ('most', [1.0], 3, None, ['1', '1']),
          'Fusion.of': (3, [], [0], [-1, 0], None), 'DetectionDistiller.teacher': ('r101', None, ['r101']),
          'FidelityMetric.teacher': ('r101', None, []),
          'Backbone.config': (3, 'x'), 'External.levels': (3, [], [3], [[8, 0]], [[8]]),
          'DetectionDistiller.distill': ('fgd', [])}


def test_all_arguments_are_tried():
    assert {argument for _, argument in CASES} == set(WRONG)  # a new argument gets what does not fit it there


@pytest.mark.parametrize(('name', 'argument'), CASES, ids=lambda each: each)
def test_a_value_that_does_not_fit_is_refused(name, argument):
    values = OTHERS.get(f'{name}.{argument}', WRONG[argument])
    for value in values + ((0.5, ) if name in GAP and argument == 'beta' else ()):
        with pytest.raises(ArgumentError) as error:
            DECLARED[name](**{**required(name), argument: value})
        if argument == 'mask':
            assert any(each in str(error.value) for each in (
                'mask: expected', "mask.type: there is no 'BoxForegroundd'", 'mask.weighting: expected'))
        else:
            check_refusal(error.value, argument)


@pytest.mark.parametrize(('name', 'argument'), [case for case in CASES if case[0] in TERMS], ids=lambda each: each)
def test_the_default_is_taken_when_given(name, argument):
    default = arguments_of(name)[argument].default
    assert isinstance(MODELS.build({'type': name, argument: default}), TERMS[name])


def test_numbers_of_numpy_become_those_of_python():
    assert build_mask(dict(type='RoIPredictionDifference', stage=np.int64(1))).stage.__class__ is int
    assert MODELS.build(dict(type='FGD', levels=np.int64(2))).levels.__class__ is int
    assert MODELS.build(dict(type='FGD', levels=[np.int64(0)])).levels == [0]


def test_the_nearest_choice_is_told():
    message = r"^distance: expected one of mse, l1, smooth_l1, cosine, got 'cosin'\. Nearest: cosine\.$"
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='FeatureImitation', distance='cosin'))


def test_a_run_is_refused_before_it_begins(one_stage, distiller):
    terms = dict(hint=dict(type='FeatureImitation', distance='cosin'))
    message = r"^model\.distill\.hint\.distance: expected one of .*, got 'cosin'\. Nearest: cosine\.$"
    with pytest.raises(ConfigurationError, match=message):
        distiller(one_stage('retina'), one_stage('retina'), distill=terms)
