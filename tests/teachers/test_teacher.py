import copy

import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.registry import MODELS

from kd_det.taps import TapError, Taps
from kd_det.teachers import Teacher, TeacherError, probe_config, probe_levels


def test_absent_or_contradictory_checkpoint_is_an_error(retinanet):
    preprocessor = DetDataPreprocessor()
    with pytest.raises(TeacherError, match='no checkpoint.*random_teacher=True'):
        Teacher(retinanet(), taps=['neck'], student_preprocessor=preprocessor)
    with pytest.raises(TeacherError, match='contradicts'):
        Teacher(retinanet(), 'x.pth', random_teacher=True, taps=['neck'], student_preprocessor=preprocessor)


def test_building_draws_nothing_from_the_students_random_numbers(retinanet):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Teacher(retinanet(), random_teacher=True, taps=['neck'], student_preprocessor=DetDataPreprocessor())
    assert torch.equal(torch.rand(3), expected)


def test_features_are_those_of_the_plain_detector_in_eval_mode(retinanet, batch):
    config = retinanet(depth=50)
    teacher = Teacher(config, random_teacher=True, taps=['neck', 'backbone.layer2'],
                      student_preprocessor=MODELS.build(config['data_preprocessor']))
    images = torch.randn(2, 3, 64, 64)
    features = teacher.observe(images, [(64, 64)] * 2)[0]
    for read, expected in zip(features['neck'], teacher.model.eval().extract_feat(images)):
        assert torch.equal(read, expected) and not read.requires_grad
    assert features['backbone.layer2'][0].shape[1] == 4 * 2 * 4


def test_backbone_taps_do_not_run_the_neck(retinanet):
    teacher = Teacher(retinanet(), random_teacher=True, taps=['backbone'], student_preprocessor=DetDataPreprocessor())
    teacher.model.neck.forward = None  # calling it would fail
    assert len(teacher.observe(torch.randn(1, 3, 64, 64), [(64, 64)])[0]['backbone']) == 4


def test_a_copy_shares_the_teacher(retinanet):
    teacher = Teacher(retinanet(), random_teacher=True, taps=['neck'], student_preprocessor=DetDataPreprocessor())
    assert copy.deepcopy(dict(held=teacher))['held'] is teacher


def test_fingerprint_sees_every_parameter_and_buffer(retinanet):
    teacher = Teacher(retinanet(), random_teacher=True, taps=['neck'], student_preprocessor=DetDataPreprocessor())
    before = teacher.fingerprint()
    assert teacher.fingerprint() == before
    teacher.model.backbone.bn1.running_mean[0] += 1e-3
    assert teacher.fingerprint() != before


@pytest.mark.parametrize('path, levels', [('backbone', [(16, 4), (32, 8), (64, 16), (128, 32)]),
                                          ('neck', [(8, 8), (8, 16), (8, 32), (8, 64), (8, 128)]),
                                          ('backbone.layer3', [(64, 16)])])
def test_probe_tells_channels_and_strides(retinanet, path, levels):
    assert probe_config(retinanet(depth=50), [path])[path] == tuple(levels)


def test_probe_of_a_backbone_that_computes_while_it_is_built():
    swin = dict(backbone=dict(type='SwinTransformer', embed_dims=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
                              window_size=2))
    assert probe_config(swin, ['backbone'])['backbone'] == ((12, 4), (24, 8), (48, 16), (96, 32))


@pytest.mark.parametrize('kind, levels', [
    ('DETR', [(32, 32)]), ('ConditionalDETR', [(256, 32)]), ('DABDETR', [(32, 32)]),
    ('DeformableDETR', [(32, 8), (32, 16), (32, 32), (32, 64)]), ('DINO', [(256, 8), (256, 16), (256, 32), (256, 64)])])
def test_probe_of_an_encoder(kind, levels, detr):
    config = detr(kind)
    before = copy.deepcopy(config)
    assert probe_config(config, ['encoder', 'encoder.layers.0']) == {path: tuple(levels)
                                                                     for path in ('encoder', 'encoder.layers.0')}
    assert config == before
    student = MODELS.build(config)
    assert probe_levels(student, Taps(student, ['encoder', 'neck']))['encoder'] == tuple(levels)
    assert 'forward' not in vars(student.encoder)


def test_only_a_detr_has_an_encoder(retinanet):
    with pytest.raises(TapError, match="RetinaNet has no module 'encoder'"):
        probe_config(retinanet(), ['encoder'])


@pytest.mark.parametrize('heads', [[], ['bbox_head.queries']])
@pytest.mark.parametrize('kind', ['DETR', 'DINO'])
def test_an_encoder_runs_once_and_the_decoder_only_for_its_queries(kind, heads, detr, batch):
    config = detr(kind)
    teacher = Teacher(config, random_teacher=True, taps=['encoder'], heads=heads,
                      student_preprocessor=MODELS.build(config['data_preprocessor']))
    data = teacher.model.data_preprocessor(batch(shapes=((64, 64), (48, 56))), False)
    if not heads:
        teacher.model.decoder.forward = None  # calling it would fail
    features, outputs = teacher.observe(data['inputs'], [(64, 64), (48, 56)], heads, {})
    maps, list_of_outputs = features['encoder'], list(outputs)
    assert list_of_outputs == heads and not maps[0].requires_grad
    with torch.no_grad():
        inputs, _ = teacher.model.pre_transformer(teacher.model.extract_feat(data['inputs']), data['data_samples'])
        memory = teacher.model.forward_encoder(**inputs)['memory']
    torch.testing.assert_close(torch.cat([level.flatten(2).mT for level in maps], 1), memory)


def test_a_teacher_at_twice_the_size_sees_twice_the_cells_and_boxes_are_the_students(retinanet, batch):
    config = retinanet(depth=50)
    teacher = Teacher(config, random_teacher=True, scale=2.0, taps=['neck'],
                      student_preprocessor=MODELS.build(config['data_preprocessor']))
    data = teacher.model.data_preprocessor(batch(shapes=((64, 64), (48, 56))), False)
    shapes = [(64, 64), (48, 56)]
    features = teacher.observe(data['inputs'], shapes)[0]['neck']
    seen = teacher.bridge(data['inputs'], shapes)
    assert seen.shape[-2:] == (128, 128)
    for read, expected in zip(features, teacher.model.extract_feat(seen)):
        assert torch.equal(read, expected)
    before = [sample.metainfo for sample in data['data_samples']]
    found = teacher.detect(data['inputs'], data['data_samples'])
    assert [sample.metainfo for sample in data['data_samples']] == before
    large = copy.deepcopy(data['data_samples'])
    for sample, (height, width) in zip(large, shapes):
        sample.set_metainfo(dict(img_shape=(2 * height, 2 * width), batch_input_shape=(128, 128)))
    expected = [each.pred_instances.bboxes for each in teacher.model.predict(seen, large, rescale=False)]
    assert len(expected[1]) and all(torch.equal(each.bboxes, boxes / 2) for each, boxes in zip(found, expected))
    rescaled = teacher.predict(data['inputs'], copy.deepcopy(data['data_samples']))  # a scale factor of 1
    assert all(each.pred_instances.bboxes.allclose(boxes / 2) for each, boxes in zip(rescaled, expected))
    assert [each.img_shape for each in rescaled] == shapes


@pytest.mark.parametrize('scale, strides', [(1.5, [8 / 1.5, 16 / 1.5, 32 / 1.5]), (2.0, [4, 8, 16])])
def test_strides_are_told_in_the_students_pixels(scale, strides, retinanet):
    found = probe_config(retinanet(levels=3), ['neck'], scale)['neck']
    assert [level.stride for level in found] == strides
    assert all(isinstance(level.stride, int) for level in found) == (scale == 2.0)


def test_levels_of_a_larger_image_are_paired_by_what_they_cover(retinanet, distiller, batch):
    """At one and a half no level has the student's stride; at twice the next one has, and as many cells."""

    def step(scale, **term):
        model = distiller(retinanet(levels=3), {}, distill=dict(pkd=dict(type='PKD', **term)),
                          teacher=dict(config=retinanet(depth=50, levels=3), random_teacher=True, scale=scale)).train()
        losses = model.loss(**model.data_preprocessor(batch(), True))
        return [pair.teacher_level for pair in model.terms['pkd'].pairs], losses['loss_pkd']

    assert step(1.5, resize=True)[0] == [1, 2, 2]
    pairs, loss = step(2.0, levels=2)
    assert pairs == [1, 2] and loss.isfinite() and loss > 0
    with pytest.raises(ValueError, match='has no partner.*5.33.*resize=True'):
        step(1.5)


def test_outputs_of_heads_are_not_compared_at_another_scale(retinanet, distiller):
    with pytest.raises(ValueError, match=r"outputs of the teacher's bbox_head, which with model.teacher.scale=1.5 lie"):
        distiller(retinanet(), retinanet(), distill=dict(kd=dict(type='DenseClassification')),
                  teacher=dict(config=retinanet(), random_teacher=True, scale=1.5))
