"""Terms on the outputs of dense heads, in whole training steps and against their formulas."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.context import DistillContext
from kd_det.functional.boxes import distribution_kl, giou_imitation
from kd_det.functional.logits import permute_others, quality_bce
from kd_det.functional.masks import valuable_region
from kd_det.heads import DenseOutputs, HeadError
from kd_det.teachers import TeacherError

FAMILIES = ['retina', 'retina_softmax', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet', 'rtmdet_separate', 'yolox',
            'ssd', 'yolov3']
CLASSES, BOXES = dict(type='DenseClassification'), dict(type='DenseRegression')
LD = dict(type='DenseRegression', form='distribution', weighting='positives', normalizer='none')
BOUNDED = dict(type='DenseRegression', form='bounded')
RM = dict(type='RankMimicking')
CASES = [(name, dict(term, normalizer='confidence')) for name in FAMILIES for term in (CLASSES, BOXES)] + [
    ('gfl', CLASSES), ('gfl', LD), ('gfl', RM), ('fcos', RM), ('yolox', dict(BOXES, weighting='gap')),
    ('fcos', dict(BOXES, weighting='positives')), ('retina', BOUNDED), ('atss', BOUNDED), ('ssd', BOUNDED),
    ('gfl', dict(LD, weighting='valuable')),
    ('retina', dict(CLASSES, weighting='richness', normalizer='richness', beta=0))]


def _sharp(model):
    """Detectors start with tiny scores and equal boxes; these differ between cells."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)


@pytest.mark.parametrize('family, term', CASES)
def test_gradient_reaches_the_students_head_and_not_the_teacher(family, term, one_stage, distiller, parts_of):
    model = distiller(one_stage(family), one_stage(family, depth=50, neck=12), distill=dict(term=term))
    _sharp(model.bbox_head), _sharp(model.build_teachers()[0].model.bbox_head)
    before = model.teacher.fingerprint()
    parts, loss = parts_of(model.train())
    assert loss.isfinite() and loss > 0 and all(value.isfinite() for value in parts.values())
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in model.bbox_head.parameters())
    assert model.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before


@pytest.mark.parametrize('family, term', CASES)
def test_is_0_where_the_student_equals_the_teacher(family, term, one_stage, pupil_of_itself, parts_of):
    parts, loss = parts_of(pupil_of_itself(one_stage(family), **term))
    assert loss == 0 and all(value == 0 for value in parts.values())


@pytest.mark.parametrize('family, term', CASES)
def test_finite_without_boxes(family, term, one_stage, distiller, parts_of, batch):
    model = distiller(one_stage(family), one_stage(family), distill=dict(term=term)).train()
    _, loss = parts_of(model, batch(boxes=((), ())))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def _outputs(logits, boxes, **others):
    """Outputs of one level of 4 × 6 cells, one prior each."""
    return DenseOutputs(
        logits=(logits, ), activation='sigmoid', regressions=(boxes, ), shapes=((4, 6), ), strides=(8, ),
        decode=lambda: (boxes, ), generate_priors=None, **others)


@pytest.fixture
def context():
    """A step whose second image covers 2 × 3 of its 4 × 6 cells."""
    random = torch.Generator().manual_seed(0)

    def outputs(**others):
        corners = torch.rand(2, 24, 2, generator=random) * 20
        boxes = torch.cat([corners, corners + 5 + torch.rand(2, 24, 2, generator=random) * 20], -1).requires_grad_()
        return _outputs(torch.randn(2, 24, 3, generator=random).requires_grad_(), boxes,
                        distributions=(torch.randn(2, 24, 4, 5, generator=random), ), **others)

    assigned = torch.rand(2, 24, generator=random) > 0.8
    return DistillContext(
        student={}, teachers=[{}], student_levels={}, teacher_levels=[{}], boxes=[torch.zeros(0, 4)] * 2, labels=[],
        batch_shape=(32, 48), image_shapes=[(32, 48), (16, 24)],
        student_outputs=dict(bbox_head=outputs(assigned=(assigned, ))), teacher_outputs=[dict(bbox_head=outputs())])


@pytest.fixture
def inside():
    """(2, 24) the cells of the images."""
    inside = torch.zeros(2, 4, 6, dtype=torch.bool)
    inside[0], inside[1, :2, :3] = True, True
    return inside.flatten(1)


def test_classification_is_its_formula_over_the_cells_of_the_images(context, inside):
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    s, t = student.logits[0][inside], teacher.logits[0][inside].detach()
    each = F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction='none') * (t.sigmoid() - s.sigmoid()).abs()
    positives, confidence = student.assigned[0].sum(), t.sigmoid().amax(1)
    rich = (each.sum(1) * confidence).sum()
    for arguments, expected in ((dict(), each.sum() / positives), (dict(normalizer='none'), each.sum()),
                                (dict(normalizer='confidence'), each.sum() / confidence.sum()),
                                (dict(weighting='richness', normalizer='none'), rich),
                                (dict(least_richness=0.7, normalizer='none'), each[confidence >= 0.7].sum()),
                                (dict(weighting='richness', normalizer='none', least_richness=0.7),
                                 (each.sum(1) * confidence)[confidence >= 0.7].sum()),
                                (dict(weighting='richness', normalizer='richness'), rich / confidence.sum())):
        torch.testing.assert_close(MODELS.build(dict(CLASSES, **arguments))(context)['classes'], expected)
    MODELS.build(CLASSES)(context)['classes'].backward()
    assert student.logits[0].grad[inside].abs().min() > 0 and student.logits[0].grad[~inside].abs().max() == 0


def test_regression_is_its_formula_over_the_cells_of_the_images(context, inside):
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    giou = giou_imitation(student.boxes[0][inside], teacher.boxes[0][inside])
    s, t = student.logits[0][inside].sigmoid().detach(), teacher.logits[0][inside].sigmoid().detach()
    assigned = student.assigned[0][inside]
    kl = distribution_kl(student.distributions[0][inside], teacher.distributions[0][inside], 10.0, 'mean')
    for arguments, expected in ((dict(), giou * t.amax(1)), (dict(weighting='gap'), giou * (t - s).abs().amax(1)),
                                (dict(weighting='positives'), giou * s.amax(1) * assigned),
                                (dict(form='distribution', weighting='positives'), kl * s.amax(1) * assigned)):
        value, = MODELS.build(dict(BOXES, normalizer='none', **arguments))(context).values()
        torch.testing.assert_close(value, expected.sum())


@pytest.mark.parametrize('form', ['giou', 'distribution'])
def test_ignored_priors_are_neither_compared_nor_counted_where_the_probability_weighs(form, context, inside):
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    student.ignored = (torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) > 0.5, )
    counts = inside & ~student.ignored[0]
    weights = teacher.logits[0][counts].sigmoid().amax(1).detach()
    each = (giou_imitation(student.boxes[0][counts], teacher.boxes[0][counts]) if form == 'giou' else distribution_kl(
        student.distributions[0][counts], teacher.distributions[0][counts], 10.0, 'mean'))
    value, = MODELS.build(dict(BOXES, form=form, weighting='probability', normalizer='confidence'))(context).values()
    torch.testing.assert_close(value, (weights * each).sum() / weights.sum().clamp(min=1))
    assert weights.sum() > 1 and counts.sum() < inside.sum()


@pytest.mark.parametrize('beta', [0, 1])
def test_a_temperature_softens_sigmoids(context, beta):
    student, teacher = (each['bbox_head'].logits[0] for each in (context.student_outputs, context.teacher_outputs[0]))
    s, t = student / 3, teacher / 3
    each = F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction='none')
    each = each - torch.distributions.Bernoulli(logits=t).entropy() if beta == 0 else \
        each * (t.sigmoid() - s.sigmoid()).abs()
    value = MODELS.build(dict(CLASSES, beta=beta, temperature=3.0, normalizer='none'))(context)['classes']
    inside = context.valid((4, 6)).flatten(1).unsqueeze(-1)
    torch.testing.assert_close(value, 9 * (each * inside).sum())


def test_plain_cross_entropy_counts_from_the_teachers_entropy(context):
    student, teacher = context.student_outputs['bbox_head'].logits[0], context.teacher_outputs[0]['bbox_head'].logits[0]
    value = MODELS.build(dict(CLASSES, beta=0, normalizer='none'))(context)['classes']
    value.backward()
    inside = context.valid((4, 6)).flatten(1).unsqueeze(-1)
    torch.testing.assert_close(student.grad, (student.sigmoid() - teacher.sigmoid()).detach() * inside)
    assert value > 0


@pytest.mark.parametrize('anchors', [1, 3])
def test_richness_of_a_cell_is_shared_by_its_priors_and_counted_once(anchors):
    """Two levels, each over its own richness."""
    random = torch.Generator().manual_seed(0)

    def outputs():
        logits = tuple(torch.randn(1, cells * anchors, 2, generator=random) for cells in (8, 2))
        return DenseOutputs(logits=logits, activation='sigmoid', regressions=(), shapes=((2, 4), (1, 2)),
                            strides=(8, 16), decode=None, generate_priors=None)

    student, teacher = outputs(), outputs()
    context = DistillContext(
        student={}, teachers=[{}], student_levels={}, teacher_levels=[{}], boxes=[torch.zeros(0, 4)], labels=[],
        batch_shape=(16, 32), image_shapes=[(16, 32)], student_outputs=dict(bbox_head=student),
        teacher_outputs=[dict(bbox_head=teacher)])
    expected = 0
    for s, t in zip(student.logits, teacher.logits):
        cells = t.sigmoid().view(-1, anchors * 2).amax(1)
        expected = expected + (quality_bce(s, t).view(-1, anchors).sum(1) * cells).sum() / cells.sum()
    parts = MODELS.build(dict(CLASSES, weighting='richness', normalizer='richness'))(context)
    torch.testing.assert_close(parts['classes'], expected)


@pytest.mark.parametrize('right', ['left', float('inf'), float('nan')])
def test_a_teachers_box_without_area_or_that_overflowed_teaches_nothing(context, right):
    boxes = context.teacher_outputs[0]['bbox_head'].boxes[0]
    boxes.data[..., 2] = boxes.data[..., 0] if right == 'left' else right
    value, = MODELS.build(dict(BOXES, normalizer='none'))(context).values()
    gradient, = torch.autograd.grad(value, context.student_outputs['bbox_head'].boxes)
    assert value == 0 and (gradient == 0).all()


def test_classes_of_a_head_with_objectness_count_where_the_teacher_sees_an_object(context, inside):
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    student.objectness, teacher.objectness = (torch.randn(2, 24), ), (torch.randn(2, 24), )
    parts = MODELS.build(dict(CLASSES, normalizer='none'))(context)
    s, t = (each.objectness[0][inside].unsqueeze(1) for each in (student, teacher))
    torch.testing.assert_close(parts['objectness'], quality_bce(s, t).sum())
    classes = quality_bce(student.logits[0][inside], teacher.logits[0][inside]) * t[:, 0].sigmoid()
    torch.testing.assert_close(parts['classes'], classes.sum())


def two_levels(*logits, **others):
    """Outputs of 4 × 6 and 2 × 3 cells, one prior each, without boxes."""
    return DenseOutputs(logits=logits, regressions=logits, shapes=((4, 6), (2, 3)), strides=(8, 16), decode=None,
                        generate_priors=None, **others)


@pytest.mark.parametrize('activation, arguments', [
    ('sigmoid', dict(beta=1.0)), ('sigmoid', dict(beta=0.0, temperature=2.0)), ('softmax', dict(temperature=3.0)),
    ('sigmoid', dict(weighting='richness')), ('objectness', dict())])
def test_cwtm_weighs_each_prior_by_the_teachers_maximum_over_its_mean(activation, arguments, context, inside):
    """On all levels together, and on the cells of the images alone; the sum of the weights stays what it was."""
    sides = []
    for _ in range(2):
        others = dict(objectness=(torch.randn(2, 24), torch.randn(2, 6))) if activation == 'objectness' else {}
        sides.append(two_levels(2 * torch.randn(2, 24, 4), torch.randn(2, 6, 4) - 2, **others,
                                activation='softmax' if activation == 'softmax' else 'sigmoid'))
    student, teacher = sides
    context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head'] = sides
    coarse = torch.tensor([[True] * 6, [True, True, False, False, False, False]])  # of 16 × 24 pixels
    weights, maxima, values = [], [], []
    for level, cells in enumerate((inside, coarse)):
        for image, cell in cells.nonzero().tolist():
            s, t = student.logits[level][image, cell], teacher.logits[level][image, cell]
            temperature = arguments.get('temperature', 1.0)
            soft = [(each / temperature).sigmoid() for each in (s, t)]
            if activation == 'softmax':
                maxima.append(t.softmax(0).max())
                values.append(9 * F.kl_div((s / 3).log_softmax(0), (t / 3).softmax(0), reduction='sum'))
            else:
                maxima.append(t.sigmoid().max())
                each = F.binary_cross_entropy(*soft, reduction='none') if arguments.get('beta', 1.0) else (
                    soft[1] * (soft[1] / soft[0]).log() + (1 - soft[1]) * ((1 - soft[1]) / (1 - soft[0])).log())
                gap = (soft[0] - soft[1]).abs() if arguments.get('beta', 1.0) else 1
                values.append(temperature**2 * (each * gap).sum())
            weights.append(torch.tensor(1.0))
            if 'weighting' in arguments:
                weights[-1] = maxima[-1]
            elif activation == 'objectness':
                weights[-1] = teacher.objectness[level][image, cell].sigmoid()
    mean = sum(w * m for w, m in zip(weights, maxima)) / sum(weights)
    expected = sum(w * m / mean * value for w, m, value in zip(weights, maxima, values))
    term = dict(CLASSES, normalizer='none', **arguments)
    parts = MODELS.build(dict(term, treatment='cwtm'))(context)
    torch.testing.assert_close(parts['classes'], expected)
    without = MODELS.build(term)(context)
    torch.testing.assert_close(without['classes'], sum(w * value for w, value in zip(weights, values)))
    assert parts.get('objectness') == without.get('objectness')


def test_dkpp_compares_with_the_teachers_other_classes_in_a_random_order(context, inside):
    student, teacher = (context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head'])
    values, permuted = [], []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        values.append(MODELS.build(dict(CLASSES, normalizer='none', treatment='dkpp'))(context)['classes'])
        torch.manual_seed(seed)
        permuted.append(permute_others(teacher.logits[0]))
        torch.testing.assert_close(values[-1], quality_bce(student.logits[0][inside], permuted[-1][inside]).sum())
    assert values[0] == values[1] != values[2]
    assert torch.equal(permuted[0].argmax(-1), teacher.logits[0].argmax(-1))
    values[-1].backward()
    assert student.logits[0].grad[inside].abs().min() > 0 and teacher.logits[0].grad is None


@pytest.mark.parametrize('activation', ['sigmoid', 'softmax'])
def test_standardised_classes_are_compared_whatever_their_scale(activation, context, inside):
    sides = [two_levels(2 * torch.randn(2, 24, 4), torch.randn(2, 6, 4) - 2, activation=activation) for _ in range(2)]
    context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head'] = sides
    coarse = torch.tensor([[True] * 6, [True, True, False, False, False, False]])  # of 16 × 24 pixels
    term = MODELS.build(dict(CLASSES, normalizer='none', beta=1.0, temperature=2.0, standardize=True))
    expected = 0
    for level, cells in enumerate((inside, coarse)):
        for image, cell in cells.nonzero().tolist():
            raw = (side.logits[level][image, cell] for side in sides)
            s, t = ((each - each.mean()) / each.std() / 2 for each in raw)
            if activation == 'softmax':
                expected += 4 * F.kl_div(s.log_softmax(0), t.softmax(0), reduction='sum')
            else:
                expected += 4 * quality_bce(s[None], t[None]).squeeze()
    torch.testing.assert_close(term(context)['classes'], expected)
    scaled = replace(sides[0], logits=tuple(3 * each + 1 for each in sides[0].logits))
    context.student_outputs['bbox_head'] = scaled
    torch.testing.assert_close(term(context)['classes'], expected)


def test_standardising_needs_three_classes(one_stage, distiller, parts_of):
    model = distiller(one_stage('retina', classes=2), one_stage('retina', classes=2),
                      distill=dict(term=dict(CLASSES, standardize=True))).train()
    with pytest.raises(HeadError, match='standardize=True leaves nothing to learn of 2 classes'):
        parts_of(model)


def test_dkpp_needs_classes_that_can_change_places(one_stage, distiller, parts_of):
    model = distiller(one_stage('retina', classes=2), one_stage('retina', classes=2),
                      distill=dict(term=dict(CLASSES, treatment='dkpp'))).train()
    with pytest.raises(HeadError, match="treatment='dkpp' lets the classes .* of which 2 have too few: three"):
        parts_of(model)


def test_normalisers_are_at_least_1(context):
    student = context.student_outputs['bbox_head']
    student.assigned = (torch.zeros(2, 24, dtype=torch.bool), )
    torch.testing.assert_close(MODELS.build(CLASSES)(context)['classes'],
                               MODELS.build(dict(CLASSES, normalizer='none'))(context)['classes'])


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_classes_and_objectness_of_one_side_are_compared_with_the_others_classes_as_one_probability(
        side, context, inside):
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    objectness = (torch.randn(2, 24).requires_grad_(), )
    (student if side == 'student' else teacher).objectness = objectness
    s, t = (each.logits[0][inside].sigmoid() for each in (student, teacher))
    ours, theirs = (each * objectness[0][inside].sigmoid().unsqueeze(1) if name == side else each
                    for name, each in (('student', s), ('teacher', t)))
    theirs = theirs.detach()
    bce, gap = F.binary_cross_entropy(ours, theirs, reduction='none'), (theirs - ours).abs()
    parts = MODELS.build(dict(CLASSES, normalizer='none'))(context)
    torch.testing.assert_close(parts, dict(classes=(bce * gap).sum()))
    watched = [student.logits[0], *([objectness[0]] if side == 'student' else [])]
    for actual, expected in zip(*(torch.autograd.grad(value, watched) for value in (parts['classes'],
                                                                                    (bce * gap).sum()))):
        torch.testing.assert_close(actual, expected)
    giou = giou_imitation(student.boxes[0][inside], teacher.boxes[0][inside])
    for weighting, weight in (('gap', gap.amax(1)), ('probability', theirs.amax(1))):
        value, = MODELS.build(dict(BOXES, normalizer='none', weighting=weighting))(context).values()
        torch.testing.assert_close(value, (giou * weight.detach()).sum())
    assert (student if side == 'student' else teacher).objectness is objectness  # for masks and other terms


@pytest.mark.parametrize('student, teacher', [('yolox', 'rtmdet'), ('rtmdet', 'yolox')])
@pytest.mark.parametrize('term', [CLASSES, dict(BOXES, weighting='gap'), dict(type='CrossKD')])
def test_objectness_of_one_side_in_a_step(student, teacher, term, one_stage, distiller, parts_of):
    model = distiller(one_stage(student), one_stage(teacher), distill=dict(term=term)).train()
    _sharp(model.bbox_head), _sharp(model.build_teachers()[0].model.bbox_head)
    parts, loss = parts_of(model)
    loss.backward()
    assert loss > 0 and model.backbone.conv1.weight.grad.any()
    assert ('objectness' in parts) is (term['type'] == 'CrossKD' and teacher == 'yolox')  # both are of its head


def test_bounded_form_is_its_formula_over_the_positive_priors_of_the_images(context, inside):
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    student.targets = (torch.randn(2, 24, 4) * student.assigned[0].unsqueeze(-1), )
    chosen = student.assigned[0] & inside
    s, t, y = (each[0][chosen] for each in (student.regressions, teacher.regressions, student.targets))
    ours, theirs = (s - y).square().sum(1), (t - y).square().sum(1)
    for margin in (0.0, 100.0):
        value = MODELS.build(dict(BOUNDED, margin=margin))(context)['bounded']
        torch.testing.assert_close(value, ours[ours + margin > theirs].sum() / student.assigned[0].sum())
    student.targets = None
    with pytest.raises(HeadError, match="form='bounded' compares the errors of anchors' deltas"):
        MODELS.build(BOUNDED)(context)


def test_levels_are_paired_by_stride(one_stage, distiller, parts_of):
    """A teacher with one more, finer level: each of the student's is compared with that of its stride."""
    teacher = one_stage('retina')
    teacher.neck.update(start_level=0, num_outs=4)
    teacher.bbox_head.anchor_generator.strides = [4, 8, 16, 32]
    parts, loss = parts_of(distiller(one_stage('retina'), teacher, distill=dict(term=CLASSES)).train())
    assert loss > 0
    with pytest.raises(ConfigurationError, match=r"term: The student's head has a level of stride 4; the strides of "
                                                 r"the teacher's are \[8, 16, 32\]"):
        distiller(teacher, one_stage('retina'), distill=dict(term=CLASSES))


ONE = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32])


@pytest.mark.parametrize('student, teacher, changes, message', [
    ('gfl', 'retina', {}, 'a GFLHead, has 1 priors on each cell with sigmoid classes, the teacher, a .*, 4 priors'),
    ('retina', 'retina_softmax', {}, '4 priors on each cell with sigmoid classes, .* 4 .* with softmax classes'),
    ('retina', 'retina', dict(anchor_generator=dict(ONE, ratios=[1.0, 0.5])), '4 priors on each cell .*, the .*, 2 p'),
])
def test_heads_of_other_priors_or_activations_are_refused_when_it_is_built(
        student, teacher, changes, message, one_stage, distiller):
    with pytest.raises(ConfigurationError, match=f'^model.distill.term: On the level of stride 8 .*{message}'):
        distiller(one_stage(student), one_stage(teacher, **changes), distill=dict(term=CLASSES))


def test_heads_of_other_classes_are_refused_in_the_first_step(one_stage, distiller, parts_of):
    with pytest.raises(HeadError, match='student tells 3 classes apart, the teacher 5'):
        parts_of(distiller(one_stage('retina'), one_stage('retina', classes=5), distill=dict(term=CLASSES)).train())


L1 = dict(type='RPNImitation', head='bbox_head')


@pytest.mark.parametrize('student, teacher, term, message', [
    ('atss', 'fcos', BOUNDED, 'student, a ATSSHead, are shifts and scales of anchors, .* a FCOSHead, distances to the '
                              "four sides. Compare decoded boxes, by DenseRegression with form='giou'"),
    ('rtmdet', 'yolox', L1, 'a RTMDetHead, are distances to the four sides, .* YOLOXHead, shifts in strides'),
    ('gfl', 'atss', L1, 'a GFLHead, are distances to the four sides, .* shifts and scales of anchors'),
    ('rtmdet', 'fcos', L1, r"level of stride 8 the student's centre of the first prior is \[0.0, 0.0\] in pixels, the "
                           r"teacher's \[4.0, 4.0\]. Give the student's anchor_generator .offset and center_offset"),
    ('atss', dict(anchor_generator=dict(ONE, octave_base_scale=4)), BOUNDED, r"prior is \[-32.0, .*'s \[-16.0, "),
    ('gfl', dict(anchor_generator=dict(ONE, center_offset=0.5)), LD, r"is \[0.0, 0.0\] in pixels, .*'s \[4.0, 4.0\]"),
    ('atss', dict(bbox_coder=dict(type='TBLRBBoxCoder', normalizer=2.0)), BOUNDED, r'TBLRBBoxCoder\(.*normalizer=2.0'),
    ('fcos', 'fcos', BOUNDED, 'what the positive priors of this head regress to is not known')])
def test_regressions_of_other_encodings_or_priors_are_refused_when_it_is_built(
        student, teacher, term, message, one_stage, distiller, parts_of):
    other = one_stage(student, **teacher) if isinstance(teacher, dict) else one_stage(teacher)
    with pytest.raises(ConfigurationError, match=f'^model.distill.term: .*{message}'):
        distiller(one_stage(student), other, distill=dict(term=term))
    if term is L1 or term is BOUNDED:  # what the message says works
        terms = dict(boxes=BOXES, objects=dict(L1, regression_weight=0))
        distiller(one_stage(student), other, distill=terms)
        _, loss = parts_of(distiller(one_stage(student), other, distill=dict(term=terms['objects'])).train())
        assert loss.isfinite()


@pytest.mark.parametrize('student, teacher, term', [
    ('retina', dict(bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1.0, 1.0, 1.0, 1.0])), BOUNDED),
    ('gfl', dict(anchor_generator=dict(ONE, octave_base_scale=4)), LD), ('rtmdet', 'gfl', L1), ('atss', 'fcos', BOXES),
    ('rtmdet', 'fcos', CLASSES), ('fcos', 'fcos_normalized', L1)])
def test_of_heads_that_encode_boxes_alike_other_settings_are_no_matter(student, teacher, term, one_stage, distiller):
    other = one_stage(student, **teacher) if isinstance(teacher, dict) else one_stage(teacher)
    distiller(one_stage(student), other, distill=dict(term=term))


@pytest.mark.parametrize('term', [CLASSES, BOXES, RM, dict(type='CrossKD')])
def test_several_anchors_are_those_of_the_teacher_in_its_order(term, one_stage, distiller):
    anchors = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[1.0, 0.5],
                   strides=[8, 16, 32])
    with pytest.raises(ConfigurationError, match='term: On the level of stride 8 the anchors of the student, a Reti.*, '
                                                 'are of 45.25 × 22.63, .*, of 32 × 32, .*anchor by anchor'):
        distiller(one_stage('retina'), one_stage('retina', anchor_generator=anchors), distill=dict(term=term))


def test_distributions_that_can_not_be_compared(one_stage, distiller, parts_of):
    with pytest.raises(ConfigurationError, match="A ATSSHead predicts no distributions.*choose form='giou'"):
        distiller(one_stage('atss'), one_stage('gfl'), distill=dict(term=LD))
    with pytest.raises(ConfigurationError, match="teacher's bbox_head.distributions. A ATSSHead predicts no"):
        distiller(one_stage('gfl'), one_stage('atss'), distill=dict(term=LD))
    with pytest.raises(ConfigurationError, match='term: The student distributes .* over 5 bins, the teacher over 9'):
        distiller(one_stage('gfl'), one_stage('gfl', reg_max=8), distill=dict(term=LD))


def test_a_head_that_is_not_there(retinanet, faster_rcnn, distiller):
    absent = "A FasterRCNN has no 'bbox_head'; it has rpn_head, roi_head"
    with pytest.raises(ConfigurationError, match=f'model.distill.term: {absent}'):
        distiller(faster_rcnn(), retinanet(), distill=dict(term=CLASSES))
    with pytest.raises(TeacherError, match=f"learns from the teacher's bbox_head. {absent}"):
        distiller(retinanet(), faster_rcnn(), distill=dict(term=CLASSES)).build_teachers()


@pytest.mark.parametrize('arguments', [
    dict(CLASSES, normalizer='x'), dict(CLASSES, weighting='x'), dict(BOXES, form='x'), dict(BOXES, weighting='x'),
    dict(BOXES, reduction='x')])
def test_unknown_arguments(arguments):
    with pytest.raises(ValueError, match="^[a-z]+: expected one of .*, got 'x'"):
        MODELS.build(arguments)


def test_localisation_distillation_equals_mmdets_own_head(one_stage, distiller, batch):
    """The same student, teacher and batch in LDHead, whose loss is a sum over the positive priors."""
    model = distiller(one_stage('gfl'), one_stage('gfl', depth=50, neck=12), distill=dict(term=LD)).train()
    teacher = model.build_teachers()[0].model
    _sharp(model.bbox_head), _sharp(teacher.bbox_head)
    boxes = ((8, 8, 40, 40), ), ((20, 4, 60, 30), (2, 10, 30, 46))
    data = model.data_preprocessor(batch(shapes=((64, 96), (48, 64)), boxes=boxes), True)
    features = []
    model.neck.register_forward_hook(lambda module, inputs, output: features.append(output))
    ours = model(**data, mode='loss')['loss_term']
    config = one_stage('gfl')
    head = MODELS.build(dict(config.bbox_head, type='LDHead', train_cfg=config.train_cfg, test_cfg=config.test_cfg,
                             loss_ld=dict(type='KnowledgeDistillationKLDivLoss', loss_weight=1.0, T=10)))
    head.load_state_dict(model.bbox_head.state_dict())
    theirs = head.loss(features[0], teacher.bbox_head(teacher.extract_feat(data['inputs'])), data['data_samples'])
    torch.testing.assert_close(ours, sum(theirs['loss_ld']), rtol=1e-4, atol=0)
    assert ours > 0


def test_the_valuable_region_is_beside_the_positives(context):
    """Around a box of the first image; weighted by the overlap with it."""
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    rows, columns = torch.meshgrid(torch.arange(4) * 8. + 4, torch.arange(6) * 8. + 4, indexing='ij')
    centers = torch.stack([columns, rows], -1).reshape(-1, 2)
    priors = torch.cat([centers - 16, centers + 16], 1)
    student.generate_priors = lambda: (priors, )
    context.boxes = [torch.tensor([[8., 2., 38., 30.]]), torch.zeros(0, 4)]
    region = valuable_region([priors], context.boxes)
    student.assigned = ((region > 0) & (torch.arange(24) % 2 == 0), )  # some of it is positive
    chosen = (region > 0) & ~student.assigned[0]
    assert chosen.any() and student.assigned[0].any() and not region[1].any()
    kl = distribution_kl(student.distributions[0][chosen], teacher.distributions[0][chosen], 10.0, 'mean')
    expected = (kl * region[chosen]).sum()
    value, = MODELS.build(dict(LD, weighting='valuable'))(context).values()
    torch.testing.assert_close(value, expected.detach())


def test_rank_mimicking_is_its_formula_box_by_box(context):
    """Two boxes on the first image, one on the second, with three, two and one candidates."""
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    truth = torch.tensor([[0., 0, 10, 10], [20, 20, 40, 30], [5, 5, 20, 12]])
    context.boxes, context.labels = [truth[:2], truth[2:]], [torch.tensor([2, 0]), torch.tensor([1])]
    candidates = {(0, 0): [3, 9, 20], (0, 1): [5, 6], (1, 2): [2]}
    assigned = torch.zeros(2, 24, dtype=torch.bool)
    expected = 0
    for ((image, box), priors), label in zip(candidates.items(), (2, 0, 1)):
        assigned[image, priors] = True
        teacher.boxes[0].data[image, priors] = truth[box] + torch.rand(len(priors), 4)
        s, t = (side.logits[0][image, priors, label].detach() / 2 for side in (student, teacher))
        expected = expected + (t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum() / 3
    student.assigned = (assigned, )
    value = MODELS.build(dict(RM, temperature=2.0))(context)['rank']
    torch.testing.assert_close(value.detach(), expected)
    value.backward()
    assert (student.logits[0].grad.abs().sum(-1) > 0)[assigned].tolist() == [True, True, True, True, True, False]
    assert student.logits[0].grad[~assigned].abs().max() == 0


def test_a_positive_that_overlaps_no_box_is_no_candidate_of_any():
    """RM asks which box the teacher's box of a positive overlaps most; that may be none."""
    torch.manual_seed(0)
    corners = torch.tensor([[0., 0., 8., 8.], [8., 0., 16., 8.], [0., 8., 8., 16.], [8., 8., 16., 16.]])

    def outputs() -> DenseOutputs:
        return DenseOutputs(
            logits=(torch.randn(1, 4, 2), ), activation='sigmoid', regressions=(), shapes=((2, 2), ), strides=(8, ),
            decode=lambda: (corners[None], ), generate_priors=None, assigned=(torch.ones(1, 4, dtype=torch.bool), ))

    def rank(box: list) -> torch.Tensor:
        context = DistillContext(
            student={}, teachers=[{}], student_levels={}, teacher_levels=[{}], boxes=[torch.tensor([box])],
            labels=[torch.zeros(1, dtype=torch.long)], batch_shape=(640, 640), image_shapes=[(640, 640)],
            student_outputs=dict(bbox_head=outputs()), teacher_outputs=[dict(bbox_head=outputs())])
        return MODELS.build(RM)(context)['rank']

    assert rank([500., 500., 600., 600.]) == 0 and rank([0., 0., 16., 16.]) > 0
