"""CrossKD in whole training steps, and against its formula."""
import copy
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import ATSSHead
from mmdet.registry import MODELS

from kd_det.config.files import ConfigurationError
from kd_det.functional.boxes import distribution_kl, giou_imitation
from kd_det.heads import HeadError

CROSSKD = dict(type='CrossKD')
FAMILIES = ['retina', 'retina_softmax', 'atss', 'gfl', 'fcos', 'fcos_normalized', 'rtmdet', 'rtmdet_separate', 'yolox']


def _sharp(*models):
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)


@pytest.fixture
def pair(one_stage, distiller):
    """A student and a teacher of one family, whose heads have towers of two convolutions."""

    def make(family: str, teacher: dict = MappingProxyType({}), **term):
        model = distiller(one_stage(family, stacked_convs=2), one_stage(family, depth=50, stacked_convs=2, **teacher),
                          distill=dict(term=dict(CROSSKD, **term))).train()
        _sharp(model.bbox_head, model.build_teachers()[0].model.bbox_head)
        return model

    return make


@pytest.mark.parametrize('family', FAMILIES)
def test_is_0_where_the_student_equals_the_teacher(family, one_stage, pupil_of_itself, parts_of):
    parts, loss = parts_of(pupil_of_itself(one_stage(family, stacked_convs=2), **CROSSKD))
    assert loss == 0 and all(value == 0 for value in parts.values())
    others = dict(yolox={'objectness'}, atss={'centerness'}, fcos={'centerness'}, fcos_normalized={'centerness'})
    assert set(parts) == {'classes', 'distribution' if family == 'gfl' else 'giou', *others.get(family, ())}


@pytest.mark.parametrize('family, first', [
    ('retina', ('cls_convs.0.', 'reg_convs.0.')), ('gfl', ('cls_convs.0.', 'reg_convs.0.')),
    ('fcos_normalized', ('cls_convs.0.', 'reg_convs.0.')),
    ('yolox', tuple(f'multi_level_{tower}_convs.{level}.0.' for tower in ('cls', 'reg') for level in range(3))),
    ('rtmdet_separate', tuple(f'{tower}_convs.{level}.0.' for tower in ('cls', 'reg') for level in range(3)))])
def test_reaches_the_students_first_layers_alone(family, first, pair, parts_of):
    model = pair(family)
    before = model.teacher.fingerprint()
    _, loss = parts_of(model)
    loss.backward()
    learns = {name for name, parameter in model.bbox_head.named_parameters() if parameter.grad is not None}
    assert loss > 0 and all(any(name.startswith(each) for name in learns) for each in first)
    assert all(name.startswith(first) for name in learns)
    assert model.backbone.conv1.weight.grad.any()
    assert all(parameter.grad is None for parameter in model.teacher.model.parameters())
    assert model.teacher.fingerprint() == before


def convolve(layer, feature):
    """A layer before its activation."""
    return layer.norm(layer.conv(feature)) if layer.with_norm else layer.conv(feature)


def align(feature, taught, valid):
    """Channel by channel, over the cells of all images that hold a part of one."""
    aligned = torch.empty_like(feature)
    for channel in range(feature.shape[1]):
        own, theirs = (each[:, channel][valid] for each in (feature, taught))
        unit = (feature[:, channel] - own.mean()) / (own.std() + 1e-6)
        aligned[:, channel] = unit * theirs.std() + theirs.mean()
    return aligned


@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('family', ['retina', 'atss', 'gfl', 'fcos_normalized'])
def test_is_its_formula(family, padded, pair, batch):
    """The student's features aligned, and the teacher's last convolutions and predictions, by hand, prior by prior."""
    model = pair(family, box_weight=2.0, distribution_weight=2.0, centerness_weight=3.0)
    images = dict(shapes=((64, 64), (40, 50)), boxes=(((8, 8, 40, 40), (2, 30, 60, 62)), ((4, 4, 30, 36), )))
    data = model.data_preprocessor(copy.deepcopy(batch(**images) if padded else batch()), True)
    context = model.observe(**data, names=['term']).context
    head, passed = model.teacher.model.bbox_head, context.student_outputs['bbox_head.towers.1']
    student, teacher = context.student_outputs['bbox_head'], context.teacher_outputs[0]['bbox_head']
    with torch.no_grad():
        neck = model.teacher.model.extract_feat(data['inputs'])
    names = dict(retina=('retina_cls', 'retina_reg'), atss=('atss_cls', 'atss_reg', 'atss_centerness'),
                 gfl=('gfl_cls', 'gfl_reg'), fcos_normalized=('conv_cls', 'conv_reg', 'conv_centerness'))
    layers = [getattr(head, name) for name in names[family]]
    values, weights, counted = dict.fromkeys(('classes', 'boxes', 'centerness'), 0.), 0., 0
    for level, (logits, stride) in enumerate(zip(teacher.logits, (8, 16, 32))):
        crossed = []
        for tower, features in ((head.cls_convs, passed.classes), (head.reg_convs, passed.boxes)):
            with torch.no_grad():
                taught = convolve(tower[0], neck[level])
            valid = context.valid(taught.shape[-2:])
            crossed.append(convolve(tower[1], align(features[level], taught, valid).relu()).relu())
        classes, boxes, *centerness = (layer(crossed[index > 0]).permute(0, 2, 3, 1)
                                       for index, layer in enumerate(layers))
        if family == 'fcos_normalized':
            centerness = [layers[2](crossed[0]).permute(0, 2, 3, 1)]  # of this head it grows from the classes' tower
        if family != 'retina':
            boxes = head.scales[level](boxes)
        valid = valid.flatten(1).repeat_interleave(logits.shape[1] // valid[0].numel(), 1)
        if family == 'gfl':
            boxes = boxes.reshape(len(logits), -1, 4, 5)
        else:
            boxes = boxes.reshape(len(logits), -1, 4)
            priors = teacher.priors[level].expand_as(boxes).flatten(0, 1)
            if family == 'fcos_normalized':
                centers, distances = priors.unflatten(1, (2, 2)).mean(1), boxes.flatten(0, 1).clamp(min=0) * stride
                decoded = torch.cat([centers - distances[:, :2], centers + distances[:, 2:]], 1)
            else:
                decoded = head.bbox_coder.decode(priors, boxes.flatten(0, 1))
            boxes = decoded.view_as(boxes)
        for image, prior in valid.nonzero().tolist():
            t, x = logits[image, prior], classes.reshape(logits.shape)[image, prior]
            p = t.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(x, p, reduction='none')
            values['classes'] += (entropy * (p - x.sigmoid()).abs()).sum()
            positive, box = student.assigned[level][image, prior], teacher.boxes[level][image, prior]
            counted += positive.item()
            if centerness and positive:
                c = centerness[0].reshape(len(logits), -1)[image, prior]
                target = teacher.centerness[level][image, prior]
                values['centerness'] += F.binary_cross_entropy_with_logits(
                    c, target.sigmoid()) - F.binary_cross_entropy_with_logits(target, target.sigmoid())
            if student.ignored is not None and student.ignored[level][image, prior]:
                continue
            weights += p.max()
            if family == 'gfl':
                values['boxes'] += p.max() * distribution_kl(
                    boxes[image, prior][None], teacher.distributions[level][image, prior][None], 1.0, 'sum')[0]
            elif (box[2:] > box[:2]).all():
                values['boxes'] += p.max() * giou_imitation(boxes[image, prior][None], box[None])[0]
    parts, positives = dict(model.terms['term'](context)), max(counted, 1)
    torch.testing.assert_close(parts.pop('classes'), values['classes'] / positives, rtol=1e-4, atol=1e-6)
    if family in ('atss', 'fcos_normalized'):
        torch.testing.assert_close(parts.pop('centerness'), 3 * values['centerness'] / positives, rtol=1e-4, atol=1e-6)
    divisor = weights.clamp(min=1) if family == 'gfl' else positives
    torch.testing.assert_close(*parts.values(), 2 * values['boxes'] / divisor, rtol=1e-4, atol=1e-6)
    assert values['boxes'] > 0 and counted and (family != 'retina' or student.ignored[0].any())


@pytest.mark.parametrize('family', ['gfl', 'fcos_normalized'])
def test_without_alignment_the_features_cross_as_they_are(family, pair, batch):
    """Behind the student's own activation; boxes weighed by the score, and divided by its sum."""
    model = pair(family, align=False, box_weighting='confidence', box_normalizer='confidence', centerness_weight=0.0)
    context = model.observe(**model.data_preprocessor(copy.deepcopy(batch()), True), names=['term']).context
    head, passed = model.teacher.model.bbox_head, context.student_outputs['bbox_head.towers.1']
    teacher, boxes = context.teacher_outputs[0]['bbox_head'], 0
    regress = head.gfl_reg if family == 'gfl' else head.conv_reg
    for level, stride in enumerate((8, 16, 32)):
        cross = head.reg_convs[1](passed.boxes[level].relu())
        cross = head.scales[level](regress(cross)).permute(0, 2, 3, 1)
        if family == 'gfl':
            distributions = teacher.distributions[level].flatten(0, 1)
            divergence = distribution_kl(cross.reshape(-1, 4, 5), distributions, 1.0, 'sum')
        else:
            distances = cross.reshape(-1, 4).clamp(min=0) * stride
            centers = teacher.priors[level].unflatten(1, (2, 2)).mean(1).repeat(2, 1)
            decoded = torch.cat([centers - distances[:, :2], centers + distances[:, 2:]], 1)
            real = (teacher.boxes[level][..., 2:] > teacher.boxes[level][..., :2]).all(-1)
            divergence = giou_imitation(decoded, teacher.boxes[level].flatten(0, 1)) * real.flatten()
        boxes = boxes + (teacher.scores(level).flatten() * divergence).sum()
    confidence = sum(teacher.scores(level).sum() for level in range(3))
    parts = dict(model.terms['term'](context))
    assert parts.pop('classes') > 0
    torch.testing.assert_close(*parts.values(), model.terms['term'].box_weight * (
        4 if family == 'gfl' else 1) * boxes / confidence.clamp(min=1))


@pytest.mark.parametrize('align', [True, False])
def test_scale_and_offset_of_a_channel_matter_where_features_are_not_aligned(align, pair, batch):
    model = pair('retina', align=align)
    context = model.observe(**model.data_preprocessor(copy.deepcopy(batch()), True), names=['term']).context
    before, towers = model.terms['term'](context), context.student_outputs['bbox_head.towers.1']
    moved = towers._replace(classes=tuple(5 * level + 3 for level in towers.classes))
    context.student_outputs['bbox_head.towers.1'] = moved
    after = {name: value.item() for name, value in model.terms['term'](context).items()}
    assert (after['classes'] == pytest.approx(before['classes'].item(), rel=1e-4)) is align
    assert after['giou'] == before['giou'].item()


@pytest.mark.parametrize('family, layer', [('atss', 'atss_centerness'), ('fcos', 'conv_centerness')])
def test_the_teachers_centerness_weighs_the_boxes_by_choice(family, layer, pair, parts_of):
    for weighting in ('probability', 'confidence'):
        model = pair(family, centerness_weight=0, box_weighting=weighting)
        before, _ = parts_of(model)
        torch.nn.init.constant_(getattr(model.teacher.model.bbox_head, layer).bias, -100.0)
        after, _ = parts_of(model)
        assert set(after) == set(before) == {'classes', 'giou'} and after['classes'] == before['classes'] > 0
        assert bool(after['giou'] == before['giou']) is (weighting == 'probability') and before['giou'] > 1e-3


def test_a_cached_teacher_gives_the_moments_of_its_features(one_stage, distiller, batch, tmp_path):
    """What a run without a cache computes; a batch that is found again runs no convolution of the teacher's towers."""
    configs = [one_stage('atss', stacked_convs=2), one_stage('atss', depth=50, stacked_convs=2)]
    losses = []
    for cache in (None, dict(dir=str(tmp_path), dtype='float32')):
        teacher = dict(config=configs[1], random_teacher=True, cache=cache)
        model = distiller(configs[0], None, teacher=teacher, distill=dict(term=CROSSKD)).train()
        _sharp(model.bbox_head, model.build_teachers()[0].model.bbox_head)
        for _ in range(2):
            data = model.data_preprocessor(copy.deepcopy(batch(((64, 64), (40, 50)))), True)
            losses.append(model.eval().train().loss(**data)['loss_term'])
    model.build_teachers()
    assert model.teacher.cache.counts.hits == model.teacher.cache.counts.misses == 2
    assert losses[0] > 0 and losses[2] == losses[0] and losses[3] == losses[1]


def test_levels_are_paired_by_stride(pair, batch):
    """A student's head that lists its levels in another order crosses the same."""
    model = pair('retina')
    data = model.data_preprocessor(copy.deepcopy(batch()), True)
    context = model.observe(**data, names=['term']).context
    expected, outputs = model.terms['term'](context), context.student_outputs
    student, towers = outputs['bbox_head'], outputs['bbox_head.towers.1']
    for field in ('logits', 'regressions', 'shapes', 'strides', 'assigned', 'ignored'):
        setattr(student, field, getattr(student, field)[::-1])
    outputs['bbox_head.towers.1'] = towers._replace(classes=towers.classes[::-1], boxes=towers.boxes[::-1])
    assert {name: value.item() for name, value in model.terms['term'](context).items()} == {
        name: value.item() for name, value in expected.items()}
    student.strides, student.shapes = student.strides[1:], student.shapes[1:]
    student.logits = student.logits[1:]
    with pytest.raises(HeadError, match=r"student's .* strides \[16, 8\], the teacher's \[8, 16, 32\]"):
        model.terms['term'](context)


@pytest.mark.parametrize('family', FAMILIES[2:])
def test_heads_of_other_widths_take_an_adapter_by_themselves(family, one_stage, distiller, parts_of):
    """It is there when the optimizer is made, before there is a teacher, and moves no random number of the student."""
    student, teacher = one_stage(family, stacked_convs=2), one_stage(family, stacked_convs=2, feat_channels=12)
    model = distiller(student, teacher, distill=dict(term=CROSSKD)).train()
    adapters = model.terms['term'].adapters
    assert model.teachers is None and [tuple(each.weight.shape[:2]) for each in adapters] == [(12, 8)] * 2
    assert set(adapters.parameters()) <= set(model.parameters())
    torch.manual_seed(0)
    assert torch.equal(MODELS.build(copy.deepcopy(student)).backbone.conv1.weight, model.backbone.conv1.weight)
    _sharp(model.bbox_head, model.build_teachers()[0].model.bbox_head)
    _, loss = parts_of(model)
    loss.backward()
    assert all(each.weight.grad.any() for each in adapters)
    with pytest.raises(ConfigurationError, match="adapter='none' needs equal channels, but the student has 8 and "):
        distiller(student, teacher, distill=dict(term=dict(CROSSKD, adapter='none')))


def test_width_of_the_neck_before_all_convolutions(pair, parts_of):
    """With the whole tower the teacher's, it is its neck's width that counts, not its head's."""
    model = pair('gfl', dict(feat_channels=10, neck=12), remaining=2)
    assert [tuple(each.weight.shape[:2]) for each in model.terms['term'].adapters] == [(12, 8)] * 2
    _, loss = parts_of(model)
    assert loss > 0


def test_towers_of_other_depths_share_their_last_convolutions(one_stage, distiller, parts_of):
    student, teacher = one_stage('fcos', stacked_convs=1), one_stage('fcos', depth=50, stacked_convs=3)
    _, loss = parts_of(distiller(student, teacher, distill=dict(term=CROSSKD)).train())
    assert loss.isfinite() and loss > 0
    with pytest.raises(ConfigurationError, match='term: remaining=2 convolutions: the depth of a tower is 1'):
        distiller(student, teacher, distill=dict(term=dict(CROSSKD, remaining=2)))


class OwnAssignment(ATSSHead):
    """Overrides what it assigns."""

    def get_targets(self, *args, **kwargs):
        return super().get_targets(*args, **kwargs)


def test_what_is_advised_for_a_student_that_tells_no_positives_works(one_stage, distiller, parts_of):
    MODELS.register_module(module=OwnAssignment, force=True)
    student, teacher = one_stage('atss', type='OwnAssignment'), one_stage('atss')
    advice = r"normalizer='confidence' \(of CrossKD also centerness_weight=0\)"
    with pytest.raises(ConfigurationError, match=f'A OwnAssignment does not tell which priors .*{advice}'):
        distiller(student, teacher, distill=dict(term=CROSSKD))
    with pytest.raises(ConfigurationError, match='centerness of .* ATSSHead .* OwnAssignment .*centerness_weight=0'):
        distiller(student, teacher, distill=dict(term=dict(CROSSKD, normalizer='confidence')))
    advised = dict(CROSSKD, normalizer='confidence', centerness_weight=0)
    parts, loss = parts_of(distiller(student, teacher, distill=dict(term=advised)).train())
    assert loss > 0 and set(parts) == {'classes', 'giou'}


def test_levels_that_the_teacher_alone_has_are_refused_when_it_is_built(one_stage, distiller):
    teacher = one_stage('gfl')
    teacher.neck.update(num_outs=4)
    teacher.bbox_head.anchor_generator.strides = [8, 16, 32, 64]
    with pytest.raises(ConfigurationError, match=r"term: The student's head has levels of the strides \[8, 16, 32\], "
                                                 r"the teacher's \[8, 16, 32, 64\]: CrossKD needs the same"):
        distiller(one_stage('gfl'), teacher, distill=dict(term=CROSSKD))


def test_mistakes_are_named_where_they_are(one_stage, distiller):
    with pytest.raises(ConfigurationError, match='model.distill.term.remaining: expected an integer'):
        distiller(one_stage('gfl'), one_stage('gfl'), distill=dict(term=dict(CROSSKD, remaining=-1)))
    with pytest.raises(ConfigurationError, match='model.distill.term: A SSDHead has no towers'):
        distiller(one_stage('ssd'), one_stage('gfl'), distill=dict(term=CROSSKD))
    with pytest.raises(ConfigurationError, match="teacher's bbox_head.towers.1. A YOLOV3Head has no towers"):
        distiller(one_stage('gfl'), one_stage('yolov3'), distill=dict(term=CROSSKD))
