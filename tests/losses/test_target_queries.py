"""Queries made of ground-truth boxes: what both decoders are asked, what is compared, and that nothing else changes."""
import copy

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import MODELS

from kd_det.config.classes import ClassMatch
from kd_det.context import Progress
from kd_det.distillers.class_sets import restrict_to_shared_classes
from kd_det.functional.boxes import giou_imitation
from kd_det.functional.queries import corners, noisy_targets
from kd_det.heads import HeadError
from kd_det.heads.decoders import BoxQueries
from kd_det.losses import TargetQueries

NAME, TERM = 'bbox_head.decoder', dict(type='TargetQueries')
KINDS = {'DAB-DETR': ('DABDETR', {}), 'Deformable DETR': ('DeformableDETR', {}),
         'two stages': ('DeformableDETR', dict(embed=256, as_two_stage=True)), 'DINO': ('DINO', {})}
every_kind = pytest.mark.parametrize('kind', KINDS)
two_kinds = pytest.mark.parametrize('kind', ['DAB-DETR', 'DINO'])  # where the others are run alike
# The second is padded; the third has no box.
IMAGES = dict(shapes=((64, 96), (48, 56), (64, 64)), boxes=(((8, 8, 40, 40), (50, 10, 90, 60)), ((4, 4, 40, 44), ), ()))


@pytest.fixture
def config(detr):
    return lambda kind, **changes: detr(KINDS[kind][0], **{**KINDS[kind][1], **changes})


@pytest.fixture
def make(distiller):
    """Makes a distiller of two DETRs, whose outputs differ from query to query; BatchNorm by its running statistics."""

    def build(student: dict, teacher: dict, **term):
        model = distiller(student, teacher, distill=dict(term={**TERM, **term})).train()
        for each in (model.student, model.build_teachers()[0].model):
            torch.manual_seed(len(each.state_dict()))
            for parameter in each.bbox_head.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.2)
            for module in each.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eval()
        return model

    return build


@pytest.fixture
def observed(batch):
    """Runs one step of a distiller without weights; returns its context, and the parts of the term."""

    def run(model, images=IMAGES):
        _, context, values = model.observe(**model.data_preprocessor(batch(**images), True), names=model.terms)
        return context, values['term']

    return run


@every_kind
def test_it_teaches_the_student_from_the_decoder_down_and_nothing_else(kind, config, make, observed):
    """Other widths, numbers of queries and of decoder layers."""
    model = make(config(kind), config(kind, depth=50, width=8, queries=14, layers=3))
    _, parts = observed(model)
    assert list(parts) == ['classes', 'l1', 'giou'] and all(part.isfinite() and part > 0 for part in parts.values())
    sum(parts.values()).backward()
    for part in ('backbone', 'neck', 'encoder', 'decoder', 'bbox_head'):
        gradients = [parameter.grad for parameter in getattr(model, part).parameters() if parameter.grad is not None]
        assert any(gradient.any() for gradient in gradients), part
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())


def test_unlike_detrs_answer_the_same_boxes(config, make, observed):
    _, parts = observed(make(config('Deformable DETR'), config('DINO', layers=1)))
    assert all(part.isfinite() and part > 0 for part in parts.values())


@every_kind
def test_values_are_those_of_the_formula_box_by_box(kind, config, make, observed):
    """Each box asked alone, so with nothing to attend to: in the loop, images and groups can not meet."""
    images = dict(IMAGES, boxes=(((8, 8, 40, 40), ), ((4, 4, 40, 44), ), ()))
    model = make(config(kind, layers=3), config(kind, queries=12), groups=2, box_noise=0.3, beta=0.0)
    model.set_progress(iteration=7, epoch=0.0)
    context, parts = observed(model, images)
    expected, asked = dict(classes=0, l1=0, giou=0), 0
    for image, (boxes, labels, (height, width)) in enumerate(zip(context.boxes, context.labels, context.image_shapes)):
        for box, label in zip(boxes, labels):
            share = box / torch.tensor([width, height, width, height])
            noisy, other = noisy_targets(share[None, None], label[None, None], 2, 0.3, 0.25, 3, step=7)
            for group in range(2):
                asked += 1
                question = BoxQueries(noisy[:, group].expand(3, 1, 4), other[:, group].expand(3, 1),
                                      torch.zeros(3, 1, 1, dtype=torch.bool))
                answers = (context.student_outputs[NAME].run(question), context.teacher_outputs[0][NAME].run(question))
                for layer in (-2, -1):  # as many as the teacher has
                    (s, first), (t, second) = ((each.logits[layer, image, 0], each.boxes[layer, image, 0])
                                               for each in answers)
                    target = t.sigmoid()
                    expected['classes'] += (F.binary_cross_entropy(s.sigmoid(), target, reduction='sum')
                                            - F.binary_cross_entropy(target, target, reduction='sum'))
                    expected['l1'] += 5 * (first - second).abs().sum()
                    distance, = giou_imitation(corners(first)[None], corners(second)[None])
                    expected['giou'] += 2 * distance
    assert asked == 4
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name] / 4, rtol=1e-4, atol=1e-5)


@every_kind
def test_0_where_the_student_equals_the_teacher(kind, config, pupil_of_itself, observed):
    """The cross-entropy counts from the teacher's own entropy, all that is left of it then."""
    for beta in (0.0, 1.0):
        context, parts = observed(pupil_of_itself(config(kind), **TERM, beta=beta))
        assert all(part.abs() < 1e-4 for part in parts.values())
    queries, _ = TargetQueries().make_queries(context, 3)
    student, teacher = (each.run(queries).logits for each in (context.student_outputs[NAME],
                                                              context.teacher_outputs[0][NAME]))
    entropy = torch.distributions.Bernoulli(logits=teacher).entropy()
    cross_entropy = F.binary_cross_entropy_with_logits(student, teacher.sigmoid(), reduction='none')
    torch.testing.assert_close(cross_entropy, entropy, rtol=1e-4, atol=1e-4)


@two_kinds
def test_the_students_own_losses_and_random_numbers_stay(kind, config, make, batch):
    student = config(kind)
    model = make(student, config(kind, layers=1), weight=1.0)
    plain = MODELS.build(student)
    plain.load_state_dict(model.student.state_dict())
    for module in [*plain.train().modules(), *model.student.modules()]:
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    found = []
    for each in (model, plain):
        torch.manual_seed(4)
        losses = each(**each.data_preprocessor(batch(**IMAGES), True), mode='loss')
        found.append((losses, torch.get_rng_state(), dict(each.named_buffers())))
    (losses, state, buffers), (expected, same, of_plain) = found
    assert losses['loss_term'] > 0 and torch.equal(state, same)
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert all(torch.equal(buffers[name], value) for name, value in of_plain.items())


@two_kinds
def test_each_image_is_asked_for_itself(kind, config, make, batch):
    """So that ranks see what one process sees: a batch adds up to its images, however many boxes others have."""
    model = make(config(kind), config(kind, layers=1))
    data = model.data_preprocessor(batch(**IMAGES), True)
    values = [model.observe(data['inputs'][images], data['data_samples'][images], model.terms).values['term']
              for images in (slice(0, 3), slice(0, 1), slice(1, 3))]
    for name in values[0]:  # three boxes, of which two are the first image's
        torch.testing.assert_close(3 * values[0][name], 2 * values[1][name] + values[2][name], rtol=1e-4, atol=1e-5)



def test_the_noise_is_that_of_the_iteration(config, make, observed):
    model = make(config('DAB-DETR'), config('DAB-DETR', layers=1))
    context, _ = observed(model)
    term, values = model.terms['term'], []
    for iteration in (3, 4, 3):
        context.progress = Progress(iteration, 0.0)
        torch.manual_seed(iteration + len(values))
        values.append({name: part.item() for name, part in term(context).items()})
    assert values[0] == values[2] and values[0]['l1'] != values[1]['l1']


@two_kinds
def test_without_boxes_it_is_0_with_a_gradient_of_0(kind, config, make, observed):
    model = make(config(kind), config(kind))
    _, parts = observed(model, dict(shapes=((64, 64), (40, 48)), boxes=((), ())))
    assert [part.item() for part in parts.values()] == [0, 0, 0]
    sum(parts.values()).backward()
    gradients = [parameter.grad for parameter in model.student.parameters() if parameter.grad is not None]
    assert len(gradients) > 50 and not any(gradient.any() for gradient in gradients)


def test_boxes_of_a_class_that_the_teacher_lacks_are_left_out(config, make, observed):
    model = make(config('DINO'), config('DINO', classes=5), label_noise=0.0)
    with pytest.raises(HeadError, match='The student tells 3 classes apart by sigmoid, the teacher 5 classes apart'):
        observed(model)
    model = make(config('DINO'), config('DINO'), label_noise=0.0)
    context, parts = observed(model)
    names, term = ('a', 'b', 'c'), model.terms['term']
    everyone = restrict_to_shared_classes(context, 0, ClassMatch(names, names, (2, 0, 1), (2, 0, 1)))
    for name, part in term(everyone).items():  # the same classes in another order
        torch.testing.assert_close(part, parts[name])
    view = restrict_to_shared_classes(context, 0, ClassMatch(names, ('c', 'a', 'x'), (0, 2), (1, 0)))
    assert [each.tolist() for each in view.labels] == [[0, -1], [0], []]
    with_it, (queries, _) = term(view), term.make_queries(view, 2)
    context.boxes[0], context.labels[0] = context.boxes[0][:1], context.labels[0][:1]
    without = term(restrict_to_shared_classes(context, 0, ClassMatch(names, ('c', 'a', 'x'), (0, 2), (1, 0))))
    for name, part in with_it.items():
        torch.testing.assert_close(part, without[name])
    embedded = [each[NAME].classes for each in (view.student_outputs, view.teacher_outputs[0])]
    assert embedded == [(0, 2), (1, 0)] and queries.labels.max() == 0


def test_a_number_of_layers(config, make, observed):
    model = make(config('DAB-DETR', layers=3), config('DAB-DETR', layers=3))
    context, parts = observed(model)
    one, three = (TargetQueries(layers=layers)(context) for layers in (1, 3))
    assert three == parts and all(0 < one[name] < part for name, part in parts.items())


def test_a_peer_teaches_and_does_not_learn_by_it(config, distiller, batch):
    """Nor does it draw other numbers."""
    model = distiller(config('DINO'), None, peers=1, teacher=dict(type='Peer', learner=1), distill=dict(term=TERM))
    model.init_weights()
    data = model.train().data_preprocessor(batch(**IMAGES), True)
    _, _, values = model.observe(**data, names=model.terms)
    sum(values['term'].values()).backward()
    assert model.decoder.layers[0].ffn.layers[1].weight.grad.any()
    assert all(parameter.grad is None for parameter in model.peers[0].parameters())


def test_images_that_count_less_teach_less(config, make, observed):
    model = make(config('DINO'), config('DINO'))
    context, _ = observed(model)
    weights = [each.weight for each in model.decoder.modules() if isinstance(each, torch.nn.Linear)]
    gradients = []
    for shares in ((1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)):
        value = sum(model.terms['term'](context.weigh_images(torch.tensor(shares))).values())
        gradients.append([each for each in torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
                          if each is not None])
    for whole, first, second in zip(*gradients):
        torch.testing.assert_close(first + second, whole, rtol=1e-3, atol=1e-5)
    assert gradients[1][0].any() and gradients[2][0].any()


@two_kinds
def test_a_step_in_half_precision(kind, config, make, batch):
    """What the decoder is given then comes from under autocast; the term computes in float32."""
    model = make(config(kind), config(kind, layers=1), weight=0.5)
    data = model.data_preprocessor(copy.deepcopy(batch(**IMAGES)), True)
    with torch.autocast('cpu', torch.bfloat16):
        loss, log = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    assert loss.isfinite() and log['loss_term'] > 0 and log['distill/term_l1'].dtype == torch.float32
