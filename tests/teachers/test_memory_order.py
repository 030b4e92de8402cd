"""What takes no other than the usual order of memory gets it: compiled mmcv's operators, and some convolutions."""
import copy
from functools import wraps

import mmcv._ext as extension
import pytest
import torch
from mmdet.registry import MODELS

from kd_det.compat.operators import served_operators
from kd_det.heads.roi import Regions
from kd_det.teachers import Teacher

SHAPES = [(64, 64)] * 2


@pytest.fixture(autouse=True)
def kernels_that_ignore_strides(monkeypatch):
    """Each operator gets its tensors as a compiled kernel sees them, by address and shape alone."""

    def ignoring(operator):

        @wraps(operator)
        def call(*args, **kwargs):
            as_stored = [_as_stored(each) for each in args]
            return operator(*as_stored, **{name: _as_stored(each) for name, each in kwargs.items()})

        return call

    for name in served_operators():
        monkeypatch.setattr(extension, name, ignoring(getattr(extension, name)))


def _as_stored(value):
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return value
    return value.as_strided(value.shape, torch.empty(value.shape, device='meta').stride())


@pytest.fixture
def pair(faster_rcnn, tmp_path):
    """Makes two teachers of equal weights, the plain detector and one with the engine's defaults."""

    def make(depth=18, **backbone) -> list:
        config = faster_rcnn(depth=depth)
        config.backbone.update(backbone)
        model = MODELS.build(config)
        for name, parameter in model.named_parameters():
            if 'conv_offset' in name:  # it starts at 0, and then samples where a plain convolution does
                torch.nn.init.normal_(parameter, std=0.1)
        torch.save(dict(state_dict=model.state_dict()), tmp_path / 'teacher.pth')
        return [Teacher(config, str(tmp_path / 'teacher.pth'), taps=['neck'], heads=['rpn_head', 'roi_head'], **engine,
                        student_preprocessor=MODELS.build(config.data_preprocessor))
                for engine in (dict(fuse=False, channels_last=False), dict())]

    return make


@pytest.mark.parametrize('kind', ['DCN', 'DCNv2'])
@pytest.mark.parametrize('groups', [1, 2])
def test_deformable_convolutions(pair, kind, groups):
    teachers = pair(depth=50, dcn=dict(type=kind, deform_groups=groups, fallback_on_stride=False),
                    stage_with_dcn=(False, True, True, True))
    images = torch.randn(2, 3, 64, 64)
    expected, found = (each.observe(images, SHAPES, taps=['neck'])[0]['neck'] for each in teachers)
    for level, other in zip(found, expected):
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('kind', ['ConvWS', 'ConvAWS'])
def test_convolutions_that_standardise_their_weights(pair, kind):
    teachers = pair(conv_cfg=dict(type=kind))
    images = torch.randn(2, 3, 64, 64)
    expected, found = (each.observe(images, SHAPES)[0]['neck'] for each in teachers)
    for level, other in zip(found, expected):
        assert (level - other).norm() <= 1e-4 * other.norm()


def test_regions_and_detections(pair, batch):
    plain, made = pair()
    data = plain.model.data_preprocessor(batch(), False)
    found, expected = (each.predict(data['inputs'], copy.deepcopy(data['data_samples']))[0].pred_instances
                       for each in (made, plain))
    assert len(expected) > 5
    torch.testing.assert_close(found.bboxes, expected.bboxes, rtol=1e-3, atol=1e-2)
    rois = torch.tensor([[0, 4., 4, 40, 50], [1, 10, 2, 60, 30]])
    regions = Regions(rois, torch.zeros(2, dtype=torch.long), torch.zeros(2, 4), torch.ones(2, 4),
                      torch.zeros(2, dtype=torch.long))
    student = dict(roi_head=type('Outputs', (), dict(regions=regions)))
    images = torch.randn(2, 3, 64, 64)
    found, expected = (each.observe(images, SHAPES, ['roi_head'], student, taps=[])[1]['roi_head'][0]
                       for each in (made, plain))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
