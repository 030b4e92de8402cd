"""Every method on every kind of detector that the catalogue says it serves, and its refusal of all others.

One step of a tiny pair serves all methods of a kind at once.
"""
import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn

from kd_det.config.classes import ClassMatch
from kd_det.config.composition import distillation_config, find_model_family, method_terms
from kd_det.config.detectors import DETECTORS
from kd_det.config.files import ConfigurationError
from kd_det.config.methods import methods
from kd_det.distillers import DetectionDistiller
from kd_det.distillers.class_sets import restrict_to_shared_classes
from kd_det.distillers.detection_distiller import Observation
from kd_det.distillers.student_wrapper import TERMS
from kd_det.losses import (
    MGD,
    CrossKD,
    DenseClassification,
    DenseRegression,
    DistillTerm,
    FeatureTerm,
    QueryClassification,
    QueryRegression,
    RankMimicking,
    RoIClassification,
    TargetQueries,
)

SERVED = {method.name: method.detectors for method in methods()}
CASES = [(method, detector) for detector in DETECTORS for method in SERVED if detector in SERVED[method]]
REFUSED = [(method, detector) for detector in DETECTORS for method in SERVED if detector not in SERVED[method]]

# One image is padded. Some necks end with a level of few cells; relations need as many images.
THREE_IMAGES = dict(
    shapes=((96, 96), (64, 80), (96, 96)),
    boxes=(((8, 8, 40, 40), (30, 20, 94, 90), (52, 4, 68, 20)), ((20, 4, 60, 50), ),
           ((4, 10, 70, 80), (2, 30, 30, 62))))
NO_BOXES = dict(shapes=((32, 32), (32, 20)), boxes=((), ()))  # and necks that end with a single cell

# What the terms that compare outputs of heads read; those that compare features read what they tap.
OUTPUTS = {DenseClassification: ('logits', 'objectness'), DenseRegression: ('regressions', ),
           RankMimicking: ('logits', ), RoIClassification: ('logits', ),
           QueryClassification: ('logits', ), QueryRegression: ('boxes', )}

# These look at some places alone, so that some levels of these small images may teach nothing.
LOCAL = dict(
    fgfi='all boxes here are small enough for the finest level',
    pgd='boxes here cover the whole of the coarsest level, which has no background then',
    ld='priors that the assigner gave to a box', rm='boxes with several such priors',
    kd='regions, all small enough for the finest level', dkd='as kd',
    querykd='the queries of Conditional DETR and DAB-DETR begin without content: their first attention learns nothing',
    targetquery='as querykd, of DAB-DETR')

# Terms whose value is not 0 where the student equals the teacher.
NEVER_ZERO = dict(
    fkd='each comparison has an adapter, drawn at random, of equal widths too',
    frs_features='a 3×3 convolution, drawn at random, of equal widths too',
    foundation='a 1×1 convolution, drawn at random, of equal widths too',
    mgd='it generates the feature from a random part of its cells')
ROUNDING = 1e-5
ROUNDED = 'attention takes another path through PyTorch where nothing learns'
ALMOST_ZERO = dict.fromkeys(
    ('encoder', 'querykd_classes', 'querykd_boxes', 'targetquery', 'targetquery_memory'), ROUNDED)
NOT_ZERO = {('Cascade R-CNN', term): "it learns from the mean of a cascade teacher's stages" for term in ('kd', 'dkd')}

# The teacher computes as the student does, in the same order.
AS_LOADED = dict(fuse=False, channels_last=False)


class Lesson(NamedTuple):
    """One step with all methods that serve a kind of detectors."""
    distiller: DetectionDistiller
    observation: Observation
    terms: dict[str, list[str]]  # their names, by method

    def parts(self, method: str, without: Iterable[str] = ()) -> dict[str, Tensor]:
        return {f'{name}_{part}': value for name in self.terms[method] if name not in without
                for part, value in self.observation.values[name].items()}

    def gradients(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Of the sum of some tensors, for each parameter that they depend on."""
        names, parameters = zip(*self.distiller.named_parameters())
        total = sum(value.sum() for value in values)
        gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return {name: gradient for name, gradient in zip(names, gradients) if gradient is not None}


@pytest.fixture(scope='module')
def last_lesson():
    return {}


@pytest.fixture
def lesson(last_lesson, detector_config, distiller, batch_for):
    """Makes the :class:`Lesson` of a kind of detectors, once for the tests that follow one another."""

    def make(detector: str, images: dict, equal: bool = False) -> Lesson:
        key = (detector, str(images), equal)
        if key not in last_lesson:
            student = detector_config(detector)
            methods = {method: method_terms(method, find_model_family(student)) for method in SERVED
                       if detector in SERVED[method]}
            teacher = dict(config=detector_config(detector, teacher=not equal), random_teacher=True, **AS_LOADED)
            model = distiller(student, teacher['config'], teacher=teacher,
                              distill={name: term for terms in methods.values() for name, term in terms.items()})
            awake(model, equal)
            data = model.data_preprocessor(batch_for(detector, **images), True)
            last_lesson.clear()
            last_lesson[key] = Lesson(model, model.observe(data['inputs'], data['data_samples'], model.terms),
                                      {method: list(terms) for method, terms in methods.items()})
        return last_lesson[key]

    return make


def awake(model: DetectionDistiller, equal: bool = False) -> DetectionDistiller:
    """Trained a little, as it were: heads begin with the same small scores everywhere, some blocks as the identity."""
    teacher = model.build_teachers()[0].model
    for module in (model.student, teacher):
        module.init_weights()
    for module in (model.student, teacher, *(() if equal else (model.terms, ))):
        for name, parameter in module.named_parameters():
            if '_head' in name and parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.05 if 'reg' in name else 0.15)  # no boxes without width
            elif not parameter.any():
                nn.init.constant_(parameter, 0.01)
    if equal:
        teacher.load_state_dict(model.student.state_dict())
    for module in model.train().modules():
        if equal and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # by its running statistics, as in the teacher
    return model


def read_by(term: DistillTerm, observation: Observation) -> list[Tensor]:
    """What a term compares of the student."""
    student = observation.context.student_outputs
    if isinstance(term, FeatureTerm):
        return [observation.context.student[term.student_path][pair.student_level] for pair in term.pairs]
    if isinstance(term, CrossKD):
        towers = student[term.student_towers]
        return [*towers.classes, *towers.boxes]
    if isinstance(term, TargetQueries):
        return [student[term.student_head].memory]
    outputs = student[term.student_heads[0]]
    fields = [getattr(outputs, name, None) for name in OUTPUTS[type(term)]]
    levels = [field if isinstance(field, tuple) else (field, ) for field in fields if field is not None]
    return [level for field in levels for level in field]


def is_weight(parameter: Tensor) -> bool:
    """Not a bias: its gradient may cancel where a softmax or a standardisation follows."""
    return parameter.dim() > 1


def parts_of_detectors(names: Iterable[str]) -> set:
    """``'backbone'``, ``'neck'``, …, and each term's own."""
    return {'.'.join(name.split('.')[:2 if name.startswith(TERMS) else 1]) for name in names}


def test_names_of_terms_do_not_meet_in_sums_of_methods():
    for family, detector in (('one_stage', 'GFL'), ('two_stage', 'Faster R-CNN'), ('detr', 'DINO')):
        names = [name for method, served in SERVED.items() if detector in served
                 for name in method_terms(method, family)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize('method, detector', CASES)
def test_a_method_teaches_what_it_reads_and_leaves_the_teacher(method, detector, lesson):
    seen = lesson(detector, THREE_IMAGES)
    values = seen.parts(method)
    assert values and all(value.isfinite() for value in values.values()) and sum(values.values()) > 0
    gradients = seen.gradients(list(values.values()))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    learning = [name for name, gradient in gradients.items() if gradient.any()]
    terms = {name: seen.distiller.terms[name] for name in seen.terms[method]}
    read = [name for term in terms.values() for name in seen.gradients(read_by(term, seen.observation))]
    read = [name for name in read if 'dn_query' not in name]  # DINO's denoising queries, which are left out
    expected = [name for name, parameter in seen.distiller.named_parameters() if is_weight(parameter)
                and (name in read or any(name.startswith(f'{TERMS}.{term}.') for term in terms))]
    if method in LOCAL:
        learning, expected = parts_of_detectors(learning), parts_of_detectors(expected)
    assert {'backbone.conv1.weight', 'backbone'} & set(expected) and set(expected) <= set(learning)
    teacher = seen.distiller.teacher.model
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())


@pytest.mark.parametrize('method, detector', CASES)
def test_a_method_is_exactly_0_where_the_student_equals_the_teacher(method, detector, lesson):
    seen = lesson(detector, THREE_IMAGES, equal=True)
    unequal = {*NEVER_ZERO, *(term for kind, term in NOT_ZERO if kind == detector)}
    assert {name: value.item() for name, value in seen.parts(method, without=unequal.union(ALMOST_ZERO)).items()
            if value != 0} == {}
    assert all(value.abs() < ROUNDING for name in set(ALMOST_ZERO).intersection(seen.terms[method])
               for value in seen.observation.values[name].values())
    assert all(value > 0 for name in unequal.intersection(seen.terms[method])
               for value in seen.observation.values[name].values())  # or it would not belong into the tables above


@pytest.mark.parametrize('method, detector', CASES)
def test_a_method_is_finite_without_boxes(method, detector, lesson):
    seen = lesson(detector, NO_BOXES)
    values = list(seen.parts(method).values())
    assert all(value.isfinite() for value in values)
    assert all(gradient.isfinite().all() for gradient in seen.gradients(values).values())


@pytest.mark.parametrize('method', SERVED)
def test_a_method_trains_alone(method, detector_config, distiller, batch_for):
    """As a run has it: what other methods tap is not there."""
    detector = SERVED[method][0]
    student = detector_config(detector)
    terms = method_terms(method, find_model_family(student))
    model = awake(distiller(student, detector_config(detector, teacher=True), distill=terms))
    model.set_progress(iteration=1000, epoch=1.0)  # behind any warm-up
    before = model.teacher.fingerprint()
    losses = model(**model.data_preprocessor(batch_for(detector, **THREE_IMAGES), True), mode='loss')
    assert all(losses[f'loss_{name}'] > 0 for name in terms)
    assert all(any(key.startswith(f'distill/{name}_') for key in losses) for name in terms)
    model.parse_losses(losses)[0].backward()
    assert model.backbone.conv1.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before


@pytest.mark.parametrize('method, detector', REFUSED)
def test_a_method_refuses_a_detector_that_it_does_not_serve(method, detector, detector_config):
    student = Config(dict(model=detector_config(detector)))
    with pytest.raises(ConfigurationError, match=f"method '{method}' (does not serve this student|has no weights for)"):
        distillation_config(student, 'teacher.py', 'teacher.pth', method)


def choose_detectors(families: dict[str, str]) -> list[str]:
    """Few kinds of detectors that have every method in every family that it has weights for, by the family of each."""
    chosen, left = [], {(method, families[detector]) for method, detector in CASES}
    while left:
        taught = {detector: left & {(method, families[detector]) for method in SERVED if detector in SERVED[method]}
                  for detector in DETECTORS}
        chosen.append(max(taught, key=lambda detector: len(taught[detector])))
        left -= taught[chosen[-1]]
    return chosen


def test_on_two_ranks_every_term_teaches_on_each(detector_config, distiller, batch_for, run_ranks, tmp_path):
    """Also where the images of one have no boxes, but for those that say that they compare at boxes alone."""
    families = {detector: find_model_family(detector_config(detector)) for detector in DETECTORS}
    lessons, only_at_boxes = {}, {}
    for detector in choose_detectors(families):
        student, teacher = detector_config(detector), detector_config(detector, teacher=True)
        terms = {name: term for method, served in SERVED.items() if detector in served
                 for name, term in method_terms(method, families[detector]).items()}
        config = dict(type='DetectionDistiller', student=student, distill=terms,
                      teacher=dict(config=teacher, random_teacher=True, **AS_LOADED))
        model = awake(MODELS.build(config))
        batches = [model.data_preprocessor(batch_for(detector, **{**THREE_IMAGES, **changes}), True)
                   for changes in ({}, dict(boxes=((), (), ())))]
        states = [module.state_dict() for module in (model.student, model.terms, model.teacher.model)]
        lessons[detector] = config, states, [(each['inputs'], each['data_samples']) for each in batches]
        only_at_boxes[detector] = {name: term.only_at_boxes for name, term in model.terms.items()}
    torch.save(lessons, tmp_path / 'input.pth')
    run_ranks(Path(__file__).with_name('two_ranks.py'), tmp_path / 'input.pth', tmp_path / 'output.pth')
    with_boxes, without = torch.load(tmp_path / 'output.pth', weights_only=True)
    assert with_boxes == {detector: dict.fromkeys(terms, (True, True)) for detector, terms in only_at_boxes.items()}
    assert without == {detector: {name: (not alone, True) for name, alone in terms.items()}
                       for detector, terms in only_at_boxes.items()}


# ---------------------------------------------------------------- detectors and images drawn at random


class Images(NamedTuple):
    """What a batch is made of: of each image the seed of its pixels, height and width, boxes, and their classes."""

    seeds: list
    shapes: list
    boxes: list
    labels: list

    def of(self, images: Iterable[int], orders: Sequence[Sequence[int]]) -> 'Images':
        """The batch of these images, each with its boxes in another order."""
        images = list(images)
        return Images([self.seeds[image] for image in images], [self.shapes[image] for image in images],
                      [[self.boxes[image][box] for box in orders[image]] for image in images],
                      [[self.labels[image][box] for box in orders[image]] for image in images])


@st.composite
def draw_images(draw, classes: int) -> Images:
    shapes = draw(st.lists(st.tuples(*[st.integers(33, 80)] * 2), min_size=1, max_size=3))
    share, boxes = st.floats(0, 1, width=32), []
    for height, width in shapes:
        corners = draw(st.lists(st.tuples(share, share, share, share), max_size=3, unique=True))
        boxes.append([((width - 8) * x, (height - 8) * y, (width - 8) * x + 8 + (width - 8) * (1 - x) * w,
                       (height - 8) * y + 8 + (height - 8) * (1 - y) * h) for x, y, w, h in corners])
    labels = [[draw(st.integers(0, classes - 1)) for _ in each] for each in boxes]
    return Images(list(range(len(shapes))), shapes, boxes, labels)


@pytest.fixture
def random_pair(detector_config, distiller, batch_for, monkeypatch):
    """Draws a student with all methods that serve its kind and a teacher like it, both with the same weights.

    Also returns the student's config, and what makes a batch of :class:`Images`.
    """
    # In a step MGD draws by the place of an image.
    monkeypatch.setattr(MGD, 'draw_kept_cells', lambda self, feature: torch.ones_like(feature[:, :1]))

    def make(detector: str, data: st.DataObject, classes: int) -> tuple:
        widths = data.draw(st.sampled_from([(4, 16), (4, 8), (8, 24)]))
        student = detector_config(detector, widths=widths, classes=classes)
        for part in ('rpn', 'rcnn') if 'roi_head' in student else ():  # all anchors and regions, so none are drawn
            stages = student.train_cfg[part]
            for stage in stages if isinstance(stages, list) else [stages]:
                stage.sampler.num = 10**6
        terms = {name: dict(term, weight=dict(type='Start', value=1.0, iterations=1))
                 for method, served in SERVED.items() if detector in served
                 for name, term in method_terms(method, find_model_family(student)).items()}
        for term in terms.values():
            if term['type'] == 'mmdet.TargetQueries':
                term['label_noise'] = 0.0  # it draws a class by its place among them
        model = awake(distiller(student, student, distill=terms, seed=data.draw(st.integers(0, 9)),
                                teacher=dict(config=student, random_teacher=True, **AS_LOADED)), equal=True)

        def load(images: Images) -> dict:
            batch = batch_for(detector, images.shapes, images.boxes)
            batch['inputs'] = [torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(seed))
                               for seed, shape in zip(images.seeds, images.shapes)]
            for sample, labels in zip(batch['data_samples'], images.labels):
                sample.gt_instances.labels = torch.tensor(labels, dtype=torch.long)
            return model.data_preprocessor(batch, True)

        return model, student, load

    return make


def observe(model, batch: dict) -> Observation:
    """What all terms read, and their values before any weight."""
    torch.manual_seed(5)
    return model.observe(batch['inputs'], batch['data_samples'], model.terms)


def flatten(values: dict) -> dict[str, float]:
    """All parts of all terms."""
    return {f'{name} {part}': each.item() for name, value in values.items() for part, each in value.items()}


def learn(model: nn.Module, batch: dict) -> tuple[dict, dict]:
    """The losses of a step, and the gradients of the student's weights."""
    torch.manual_seed(5)
    model.zero_grad()
    losses = model(**copy.deepcopy(batch), mode='loss')
    model.parse_losses(losses)[0].backward()
    return losses, {name: parameter.grad for name, parameter in model.named_parameters() if not name.startswith(TERMS)}


@pytest.mark.parametrize('detector', DETECTORS)
@settings(max_examples=settings.default.max_examples // 5)
@given(data=st.data())
def test_equalities_hold_for_any_detector(detector, data, random_pair):
    classes = data.draw(st.integers(1, 4))
    images = data.draw(draw_images(classes))
    # Of few examples the first would be the simplest, a single image without boxes.
    assume(len({*images.shapes}) > 1 and any(images.boxes) or settings.default.max_examples > 5)
    model, student, load = random_pair(detector, data, classes)

    # Where the student equals the teacher all terms are 0.
    values = flatten(observe(model, load(images)).values)
    unequal = {*NEVER_ZERO, *(term for kind, term in NOT_ZERO if kind == detector)}
    assert {name: value for name, value in values.items() if name.split()[0] not in unequal
            and abs(value) > (ROUNDING if name.split()[0] in ALMOST_ZERO else 0)} == {}

    # The order of images and of the boxes of each means nothing, nor does that of the classes.
    for parameter in model.teacher.model.parameters():
        parameter.add_(0.2 * parameter.abs().mean() * torch.randn_like(parameter))
    observation = observe(model, load(images))
    expected = flatten(observation.values)
    order, by_class, *orders = (tuple(data.draw(st.permutations(range(count))))
                                for count in (len(images.shapes), classes, *map(len, images.boxes)))
    permuted = observe(model, load(images.of(order, orders)))
    assert flatten(permuted.values) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    names = tuple(map(str, range(classes)))
    view = restrict_to_shared_classes(observation.context, 0, ClassMatch(names, names, by_class, by_class))
    renamed = {name: term(view) for name, term in model.terms.items()}
    assert flatten(renamed) == pytest.approx(expected, rel=1e-3, abs=1e-5)

    # Nor do copies of the images, where there are boxes, to terms that claim it.
    if any(images.boxes):
        twice = images.of([*order, *order], [range(len(each)) for each in images.boxes])
        values = flatten(observe(model, load(twice)).values)
        claimed = [name for name in expected if model.terms[name.split()[0]].independent_of_batch_size]
        assert {name: values[name] for name in claimed} == pytest.approx(
            {name: expected[name] for name in claimed}, rel=1e-3, abs=1e-5)

    # With all weights at 0 it learns what the plain student learns, bit for bit.
    plain = MODELS.build(student)
    plain.load_state_dict(model.state_dict())
    losses, gradients = learn(model.train(), load(images))
    of_plain, expected = learn(plain.train(), load(images))
    assert all(losses[f'loss_{name}'] == 0 for name in model.terms)
    assert all(torch.equal(one, other) for name in of_plain for one, other in zip(
        *(each[name] if isinstance(each[name], list) else [each[name]] for each in (losses, of_plain))))
    assert all(gradient is None if expected[name] is None else torch.equal(gradient, expected[name])
               for name, gradient in gradients.items())
