import pytest
import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor

from kd_det.teachers import InputBridge

PLAIN = dict(pad_size_divisor=32)
IMAGENET = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32)
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False, pad_size_divisor=32)
GREY_PADDING = dict(pad_size_divisor=32, pad_value=114)
FORMS = dict(plain=PLAIN, imagenet=IMAGENET, caffe=CAFFE, grey_padding=GREY_PADDING)


@pytest.mark.parametrize('teacher', FORMS)
@pytest.mark.parametrize('student', FORMS)
def test_bridge_equals_the_teachers_own_preprocessing(student, teacher, batch):
    data = batch(shapes=((64, 96), (40, 70)))
    student, teacher = DetDataPreprocessor(**FORMS[student]), DetDataPreprocessor(**FORMS[teacher])
    shapes = [sample.img_shape for sample in data['data_samples']]
    images = student(batch(shapes=shapes))['inputs']
    bridged = InputBridge(student, teacher)(images, shapes)
    torch.testing.assert_close(bridged, teacher(data)['inputs'], rtol=1e-5, atol=2e-4)


def test_identical_preprocessing_passes_the_very_tensor():
    bridge = InputBridge(DetDataPreprocessor(**IMAGENET), DetDataPreprocessor(**IMAGENET))
    images = torch.randn(1, 3, 8, 8)
    assert bridge.is_identity and bridge(images, [(8, 8)]) is images
