"""What every term keeps: found by where it lies, built from its name, checked without a line of its own.

A term that needs an argument, or whose other forms are to be checked as well, has its configs in ``CONFIGS``.
"""
import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS

import kd_det.losses
from kd_det.losses import DistillTerm

CONFIGS = dict(
    CWD=[dict(), dict(normalize=True)],
    CrossKD=[dict(), dict(align=False, box_weighting='confidence', box_normalizer='confidence')],
    DenseRegression=[dict(), dict(form='distribution', weighting='positives'), dict(form='bounded'),
                     dict(weighting='valuable'), dict(weighting='gap', normalizer='confidence'),
                     dict(weighting='probability')],
    DenseClassification=[dict(), dict(weighting='richness', normalizer='richness', beta=0), dict(normalizer='none'),
                         dict(treatment='cwtm'), dict(standardize=True)],
    FeatureImitation=[dict(), *(dict(distance=distance) for distance in ('l1', 'smooth_l1', 'cosine')),
                      dict(normalizer='mask', mask='SpatialAttention'), dict(normalizer='mask', mask='BoxForeground'),
                      dict(normalizer='mean', normalize=True)],
    QueryClassification=[dict(), dict(treatment='cwtm'), dict(standardize=True)],
    TargetQueries=[dict(), dict(beta=1.0, layers=1)],
    RoIClassification=[dict(), *(dict(form=form) for form in ('decoupled', 'coupled', 'weighted')),
                       dict(treatment='cwtm'), dict(standardize=True)],
    RoIRegression=[dict(), dict(form='l1'), dict(form='mse', normalizer='own')],
    RPNImitation=[dict(), dict(form='bounded', normalizer='positives')])

# Terms whose value is not 0 where the student equals the teacher.
NEVER_ZERO = dict(
    FKD='each comparison has an adapter, drawn at random, of equal widths too',
    MGD='it generates the feature from a random part of its cells',
    RoIClassification_weighted='a cross-entropy, which is at least the entropy of the teacher')

TERMS = [name for name in kd_det.losses.__all__ if name in MODELS.module_dict]
CASES = {'_'.join([name, *(str(value) for value in config.values())]): dict(config, type=name)
         for name in TERMS for config in CONFIGS.get(name, [{}])}
every_term = pytest.mark.parametrize('case', CASES)


@pytest.fixture
def evaluate():
    """Runs a term as the distiller does; draws the same numbers each time."""

    def run(term, context) -> dict:
        torch.manual_seed(1)
        with torch.autocast('cpu', enabled=False):
            parts = term(context)
        return parts if isinstance(parts, dict) else {'': parts}

    return run


@pytest.fixture
def connect(make_scene, find_scene):
    """Builds the term of a case and connects it to the scene of a situation, of its own or not; returns both."""

    def make(case: str, situation: str = 'plain', own: bool = False, **changes):
        scene = (make_scene if own else find_scene)(situation, **changes)
        torch.manual_seed(0)
        return scene.connect(MODELS.build(CASES[case])), scene

    return make


@every_term
def test_its_parts_are_finite_scalars_in_float32(case, situation, connect, evaluate):
    """Whatever it is shown: padding, no boxes, unlabelled images, an image that is all padding, levels of one cell."""
    term, scene = connect(case, situation)
    parts = evaluate(term, scene.show_to(term))
    assert isinstance(term, DistillTerm) and parts
    for name, value in parts.items():
        assert isinstance(name, str) and value.shape == () and value.dtype == torch.float32
        assert value.isfinite() and value >= 0
    learning = [*scene.student, *term.parameters()]
    total = sum(parts.values())
    gradients = ()
    if total.requires_grad:
        gradients = torch.autograd.grad(total, learning, allow_unused=True, retain_graph=True)
    assert all(each is None or each.isfinite().all() for each in gradients)


@every_term
def test_it_teaches_student_and_adapters_and_leaves_what_it_reads(case, connect, evaluate, tensors_of):
    term, scene = connect(case, own=True)
    context = scene.show_to(term)
    read = tensors_of(context)
    before = [each.detach().clone() for each in read]
    total = sum(evaluate(term, context).values())
    assert total > 0
    total.backward()
    assert any(each.grad is not None and each.grad.any() for each in scene.student)
    assert all(parameter.grad is not None for parameter in term.parameters() if parameter.requires_grad)
    for name, parameter in term.named_parameters():
        assert 'adapters' not in name or parameter.grad.any()
    assert all(torch.equal(now, then) for now, then in zip(read, before))
    taught = tensors_of([context.teachers, context.teacher_outputs])
    assert not any(each.requires_grad or each.grad is not None for each in taught)


@every_term
def test_without_boxes_it_teaches_or_says_that_it_does_not(case, connect, evaluate):
    """And its parameters get a gradient all the same, for which data-parallel training waits."""
    term, scene = connect(case, 'no_boxes')
    learning = [*term.parameters(), *scene.student]
    gradients = torch.autograd.grad(sum(evaluate(term, scene.show_to(term)).values()), learning, allow_unused=True,
                                    retain_graph=True)
    assert all(each is not None for each in gradients[:-len(scene.student)])
    assert term.only_at_boxes is not any(each is not None and bool(each.any()) for each in gradients)


@every_term
def test_it_is_0_where_the_student_equals_the_teacher(case, connect, evaluate):
    term, scene = connect(case, equal=True)
    values = evaluate(term, scene.show_to(term)).values()
    if case in NEVER_ZERO:
        assert sum(values) > 0  # or it would not belong into that table
    else:
        assert [value.item() for value in values] == pytest.approx([0] * len(values), abs=1e-6)


@every_term
def test_features_in_half_precision_are_compared_in_float32(case, connect, evaluate):
    term, scene = connect(case)
    half = {path: tuple(level.half() for level in levels) for path, levels in scene.context.student.items()}
    taught = {path: tuple(level.half() for level in levels) for path, levels in scene.context.teachers[0].items()}
    for value in evaluate(term, scene.show_to(term, student=half, teachers=[taught])).values():
        assert value.dtype == torch.float32 and value.isfinite()


@every_term
def test_it_can_be_pickled_copied_and_restored(case, connect, evaluate):
    term, scene = connect(case)
    context = scene.show_to(term)
    expected = evaluate(term, context)
    restored = scene.connect(MODELS.build(CASES[case]))
    restored.load_state_dict(term.state_dict())
    for other in (term, pickle.loads(pickle.dumps(term)), copy.deepcopy(term), restored):
        assert evaluate(other, scene.show_to(term)) == expected


@every_term
def test_it_learns_from_the_teacher_of_its_index(case, connect, evaluate):
    term, scene = connect(case, own=True)
    expected, context = evaluate(term, scene.show_to(term)), scene.show_to(term)
    context.teachers, context.teacher_outputs = [{}, *context.teachers], [{}, *context.teacher_outputs]
    second = MODELS.build(dict(CASES[case], teacher=1))
    scene.context.teacher_levels.append(scene.context.teacher_levels[0])
    scene.connect(second).load_state_dict(term.state_dict())
    assert second.teacher_index == 1 and evaluate(second, context) == expected


# ---------------------------------------------------------------- steps drawn at random


@pytest.fixture
def evaluate_as(evaluate, monkeypatch):
    """Runs every term on a scene, of whose images each was one of another scene, and draws the numbers of that one."""

    def connect_all(scene) -> dict:
        torch.manual_seed(0)
        few = scene.context.student_outputs['roi_head'].num_classes < 3  # of which nothing is left to standardise
        return {case: scene.connect(MODELS.build(config)) for case, config in CASES.items()
                if not (few and config.get('standardize'))}

    def run(terms: dict, scene, images) -> dict:
        rand = torch.rand

        def draw(count, *shape, **options):
            return rand(max(images) + 1, *shape, **options)[images] if count == len(images) else rand(count, *shape)

        with monkeypatch.context() as patch:
            patch.setattr(torch, 'rand', draw)
            return {f'{case} {name}': value.item() for case, term in terms.items()
                    for name, value in evaluate(term, scene.show_to(term)).items()}

    run.connect = connect_all
    return run


@given(data=st.data())
def test_the_order_of_images_boxes_and_classes_means_nothing(data, forms, form_scene, permute, evaluate_as):
    scene = form_scene(data.draw(forms()))
    terms = evaluate_as.connect(scene)
    expected = evaluate_as(terms, scene, [*range(len(scene.context.boxes))])
    assert evaluate_as(terms, *permute(scene, data)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(data=st.data())
def test_a_batch_that_comes_twice_has_the_value_that_terms_claim(data, forms, form_scene, double, evaluate_as):
    scene = form_scene(data.draw(forms(least_side=16, least_boxes=1)))
    terms = evaluate_as.connect(scene)
    once = evaluate_as(terms, scene, [*range(len(scene.context.boxes))])
    twice = evaluate_as(terms, *double(scene))
    claimed = {name: value for name, value in once.items() if terms[name.split()[0]].independent_of_batch_size}
    assert {name: twice[name] for name in claimed} == pytest.approx(claimed, rel=1e-4, abs=1e-6)


@every_term
def test_it_claims_to_be_independent_of_the_batch_size_where_it_is(case, connect, double, evaluate_as):
    term, scene = connect(case)
    once, twice = (evaluate_as({case: term}, *each) for each in ((scene, [0, 1, 2]), double(scene)))
    assert term.independent_of_batch_size is (twice == pytest.approx(once, rel=1e-4))


@given(data=st.data())
def test_they_are_0_where_the_student_equals_the_teacher(data, forms, form_scene, evaluate_as):
    form = data.draw(forms())
    scene = form_scene(form._replace(widths=(form.widths[0], ) * 2), equal=True)
    terms = {case: term for case, term in evaluate_as.connect(scene).items() if case not in NEVER_ZERO}
    values = evaluate_as(terms, scene, [*range(len(scene.context.boxes))])
    assert values == pytest.approx(dict.fromkeys(values, 0), abs=1e-6)


@pytest.mark.parametrize('name', TERMS)
def test_its_docstring_tells_its_arguments(name, documented_arguments):
    documented_arguments(getattr(kd_det.losses, name))


@pytest.mark.parametrize('name', TERMS)
def test_it_refuses_arguments_of_another_kind_when_it_is_built(name, refuse_arguments):
    refuse_arguments(dict(CONFIGS.get(name, [{}])[0], type=name))
