"""Teachers of images of any number of channels, and of batches whose sides their pyramid does not divide."""
import copy

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from torch import nn

from kd_det.context import LevelError
from kd_det.heads.readers import read_dense
from kd_det.taps import Taps
from kd_det.teachers import Teacher, TeacherError, probe_config, probe_levels
from kd_det.teachers.bridge import crop_to_batch
from kd_det.teachers.probe import FeatureExtractor, find_input_channels

SHAPES = ((100, 76), (68, 90))
UNPADDED = dict(type='DetDataPreprocessor', pad_size_divisor=1)


@MODELS.register_module(force=True)
class NormalizedInput(nn.Module):
    """A backbone that prepares its images itself, before its first convolution."""

    def __init__(self, channels: int, by: str) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if by == 'batch norm' else nn.Identity()
        self.register_buffer('means', torch.ones(channels, 1, 1) if by == 'means' else torch.zeros(1))
        self.patches = nn.Linear(channels * 16, 8) if by == 'linear' else None
        self.last, self.first = nn.Conv2d(8, 8, 1), nn.Conv2d(channels, 8, 4, 4)  # registered in another order

    def forward(self, images):
        images = self.norm(images - self.means)
        if self.patches is None:
            return self.last(self.first(images)),
        tokens = self.patches(nn.functional.unfold(images, 4, stride=4).mT)
        return self.last(tokens.mT.unflatten(2, (images.shape[2] // 4, -1))),


@pytest.fixture
def yolox(one_stage):
    """Makes the model dict of a slim YOLOX, whose neck wants sides that are multiples of 32."""

    def make(**preprocessor) -> ConfigDict:
        model = one_stage('yolox', neck=8)
        model.type = 'YOLOX'
        model.data_preprocessor = dict(type='DetDataPreprocessor', **preprocessor)
        model.backbone = ConfigDict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125, out_indices=(2, 3, 4))
        model.test_cfg.nms = dict(type='nms', iou_threshold=0.65)
        model.neck = ConfigDict(type='YOLOXPAFPN', in_channels=[32, 64, 128], out_channels=8, num_csp_blocks=1)
        return model

    return make


def unpadded(model: dict) -> dict:
    """The same detector with a preprocessor that neither normalises nor pads to more than the batch."""
    return dict(model, data_preprocessor=UNPADDED)


# ---------------------------------------------------------------- channels


@pytest.mark.parametrize('by', ['batch norm', 'means', 'linear', 'nothing'])
@pytest.mark.parametrize('channels', [1, 2, 3, 4, 6, 13])
def test_channels_are_those_of_the_first_layer_that_runs(channels, by):
    model = dict(backbone=dict(type='NormalizedInput', channels=channels, by=by))
    if (channels, by) != (1, 'means'):  # one mean suits any number
        assert find_input_channels(FeatureExtractor(model)) == channels
    assert probe_config(model, ['backbone'])['backbone'] == ((8, 4), )


@pytest.mark.parametrize('backbone, channels', [
    (dict(type='ResNet', depth=18, base_channels=4, stem_channels=4, in_channels=4), 4),
    (dict(type='ResNetV1d', depth=18, base_channels=8, stem_channels=8, in_channels=2), 2),
    (dict(type='SwinTransformer', in_channels=6, embed_dims=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
          window_size=2, pretrain_img_size=256, use_abs_pos_embed=True), 6),
    (dict(type='PyramidVisionTransformer', in_channels=1, embed_dims=8, num_layers=[1, 1, 1, 1]), 1),
    (dict(type='CSPDarknet', deepen_factor=0.33, widen_factor=0.125), 3)])  # its first convolution has 12
def test_channels_of_backbones(backbone, channels):
    extractor = FeatureExtractor(dict(backbone=backbone))
    before = copy.deepcopy(extractor.state_dict())
    assert find_input_channels(extractor) == channels
    assert all(torch.equal(value, before[name]) for name, value in extractor.state_dict().items())
    levels = probe_config(dict(backbone=backbone), ['backbone'])
    assert probe_levels(extractor, Taps(extractor, ['backbone'])) == levels


@pytest.mark.parametrize('of_student, of_teacher', [(1, 1), (2, 2), (4, 4), (6, 6), (1, 3), (3, 1)])
def test_detectors_of_other_channels_are_distilled(of_student, of_teacher, retinanet, distiller, batch):
    student, teacher = (unpadded(retinanet()) for _ in range(2))
    student['backbone']['in_channels'], teacher['backbone']['in_channels'] = of_student, of_teacher
    data = batch()
    data['inputs'] = [torch.randint(256, (of_student, 64, 64), dtype=torch.uint8) for _ in range(2)]
    model = distiller(student, teacher, distill=dict(fgd=dict(type='FGD'), kd=dict(type='DenseClassification')))
    model.init_weights()
    assert all(torch.isfinite(value).all() for value in model.loss(**model.data_preprocessor(data, True)).values()
               if isinstance(value, torch.Tensor))


def test_a_teacher_of_other_channels_is_an_error(retinanet, distiller, batch):
    teacher = retinanet()
    teacher.backbone.in_channels = 4
    model = distiller(retinanet(), teacher)
    with pytest.raises(TeacherError, match='images of 3 channels, and the teacher takes images of 4'):
        model.loss(**model.data_preprocessor(batch(), True))


# ---------------------------------------------------------------- sizes


def given(batch, teacher: Teacher, own: nn.Module):
    """The unpadded batch, the shapes of its images, and what the teacher's own preprocessing makes of it."""
    data, padded = UNPADDED.copy(), own(batch(shapes=SHAPES), False)
    data = MODELS.build(data)(batch(shapes=SHAPES), False)
    return data['inputs'], data['data_samples'], padded['inputs'], padded['data_samples']


@pytest.mark.parametrize('cache', [None, dict(dtype='float32')])
def test_a_padded_batch_is_cut_back_to_the_students_cells(cache, yolox, batch, tmp_path):
    cache = cache and dict(cache, dir=str(tmp_path))
    teacher = Teacher(yolox(pad_size_divisor=32, pad_value=114), random_teacher=True, taps=['neck', 'backbone.stage2'],
                      heads=['bbox_head'], cache=cache, student_preprocessor=MODELS.build(UNPADDED))
    images, _, padded, _ = given(batch, teacher, teacher.model.data_preprocessor)
    assert images.shape[-2:] == (100, 90) and padded.shape[-2:] == (128, 96)
    with torch.no_grad():
        expected = copy.deepcopy(teacher.model).extract_feat(padded)
        maps = teacher.model.bbox_head(expected)
    for _ in range(2):  # the second time from the cache
        features, outputs = teacher.observe(images, SHAPES, ['bbox_head'])
        assert [level.shape[-2:] for level in features['neck']] == [(13, 12), (7, 6), (4, 3)]
        assert features['backbone.stage2'][0].shape[-2:] == (13, 12)
        for level, whole in zip(features['neck'], expected):
            torch.testing.assert_close(level, crop_to_batch(whole, (128, 96), (100, 90)), rtol=1e-4, atol=1e-5)
        dense = outputs['bbox_head']
        assert dense.shapes == ((13, 12), (7, 6), (4, 3)) and len(dense.boxes[0][0]) == len(dense.priors[0]) == 156
        cut = crop_to_batch(maps[0][0], (128, 96), (100, 90)).permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(dense.logits[0], cut, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['YOLOX', 'FasterRCNN', 'DeformableDETR', 'DETR'])
def test_detections_are_those_of_the_teachers_own_preprocessing(kind, yolox, faster_rcnn, detr, batch):
    config = dict(YOLOX=yolox, FasterRCNN=faster_rcnn).get(kind, lambda **_: detr(kind))()
    config.data_preprocessor = dict(UNPADDED, pad_size_divisor=32)
    teacher = Teacher(config, random_teacher=True, taps=[], student_preprocessor=MODELS.build(UNPADDED))
    images, samples, padded, padded_samples = given(batch, teacher, teacher.model.data_preprocessor)
    expected = copy.deepcopy(teacher.model).predict(padded, padded_samples, rescale=False)
    for found, each in zip(teacher.detect(images, samples), expected):
        torch.testing.assert_close(found.scores, each.pred_instances.scores, rtol=1e-3, atol=1e-4)
    assert samples[0].batch_input_shape == (100, 90)
    found = teacher.predict(images, samples)
    torch.testing.assert_close(found[0].pred_instances.scores, expected[0].pred_instances.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('precision', ['observe', 'predict', 'extract_feat'])
def test_a_teacher_that_does_not_pad_says_what_to_do(precision, yolox, batch):
    teacher = Teacher(yolox(pad_size_divisor=1), random_teacher=True, taps=['neck'],
                      student_preprocessor=MODELS.build(UNPADDED))
    images, samples, _, _ = given(batch, teacher, MODELS.build(UNPADDED))
    with pytest.raises(TeacherError, match='100 × 90 pixels.*pad_size_divisor=32 in the teacher'):
        getattr(teacher, precision)(images, samples if precision == 'predict' else SHAPES)


@pytest.mark.parametrize('student, terms', [
    ('retina', dict(fgd=dict(type='FGD'), frs=dict(type='FeatureImitation', mask='TeacherConfidence'))),
    ('yolox', dict(kd=dict(type='DenseClassification'), pkd=dict(type='PKD', tap='neck')))])
def test_terms_compare_the_cells_that_both_have(student, terms, yolox, one_stage, distiller, batch):
    model = distiller(unpadded(one_stage(student)), yolox(pad_size_divisor=32), distill=terms)
    model.init_weights()
    losses = model.loss(**model.data_preprocessor(batch(shapes=SHAPES), True))
    assert all(torch.isfinite(losses[f'loss_{name}']) for name in terms)


def test_levels_that_round_up_and_down_are_an_error_that_names_both_ways_out(retinanet, distiller, batch):
    model = distiller(unpadded(retinanet()), unpadded(retinanet()), distill=dict(pkd=dict(type='PKD')))
    for stage in model.build_teachers()[0].model.backbone.res_layers[1:]:  # 25 cells of stride 4 become 12, not 13
        for layer in (getattr(model.teacher.model.backbone, stage)[0].conv1,
                      getattr(model.teacher.model.backbone, stage)[0].downsample[0]):
            layer.register_forward_pre_hook(lambda _, given: given[0][..., :given[0].shape[2] // 2 * 2,
                                                                      :given[0].shape[3] // 2 * 2])
    with pytest.raises(LevelError, match='cover the same image with other cells.*pad_size_divisor.*resize=True'):
        model.loss(**model.data_preprocessor(batch(shapes=((100, 100), (100, 100))), True))


# ---------------------------------------------------------------- strides


@pytest.mark.parametrize('family, strides', [
    (family, strides) for family in ('retina', 'gfl', 'rtmdet', 'yolox', 'fcos_normalized')
    for strides in ([8.0, 16.0, 32.0], [(8, 8), (16.0, 16.0), [32, 32]])
    if (family, type(strides[0])) != ('fcos_normalized', tuple)])  # FCOS itself multiplies by its strides
def test_strides_may_be_floats_or_pairs(family, strides, one_stage, distiller, batch):

    def step(strides):
        teacher = one_stage(family, depth=50)
        teacher.bbox_head.get('anchor_generator', teacher.bbox_head).strides = strides
        model = distiller(one_stage(family), teacher, distill=dict(
            fgd=dict(type='FGD'), kd=dict(type='DenseClassification'),
            frs=dict(type='FeatureImitation', mask='TeacherConfidence')))
        model.init_weights()
        assert [level.stride for level in model.guide_connections.levels[0]['neck']] == [8, 16, 32]
        return model.loss(**model.data_preprocessor(batch(), True))

    expected, losses = step([8, 16, 32]), step(strides)
    assert all(torch.equal(losses[f'loss_{name}'], expected[f'loss_{name}']) for name in ('fgd', 'kd', 'frs'))


def test_levels_are_called_by_strides_that_are_not_whole(retinanet, distiller, batch):
    """As those of features that were resized: 256 pixels are 35 cells of 7.5."""
    class Resized(nn.Module):
        def forward(self, levels):
            return tuple(nn.functional.interpolate(level, tuple(-(-2 * side * 8 * 2**index // (15 * 2**index))
                                                                for side in level.shape[-2:]))
                         for index, level in enumerate(levels))

    strides = [7.5, 15.0, 30]
    config = retinanet(levels=3)
    config.bbox_head.anchor_generator.strides = strides
    student = MODELS.build(config)
    student.neck = nn.Sequential(student.neck, Resized())
    levels = probe_levels(student, Taps(student, ['neck']))['neck']
    assert levels == ((8, 7.5), (8, 15), (8, 30)) and isinstance(levels[1].stride, int)
    with torch.no_grad():
        dense = read_dense(student.bbox_head, student.bbox_head(student.extract_feat(torch.zeros(1, 3, 64, 64))))
    assert dense.strides == (7.5, 15, 30) and dense.level_of(7.5) == 0
