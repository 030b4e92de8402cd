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
