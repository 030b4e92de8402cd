import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor

from kd_det.teachers import InputBridge, TeacherError
from kd_det.teachers.bridge import crop_to_batch, explain_size_mismatch

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
    images = torch.randn(1, 3, 32, 32)
    assert bridge.is_identity and bridge(images, [(32, 32)]) is images


# ---------------------------------------------------------------- channels

GRAY = dict(mean=[110.0], std=[58.0], pad_size_divisor=32)


@pytest.mark.parametrize('teacher', ['imagenet', 'caffe', 'plain', 'grey_padding'])
@pytest.mark.parametrize('student', [GRAY, PLAIN])
def test_a_colour_teacher_sees_the_gray_value_three_times(student, teacher):
    student, teacher = DetDataPreprocessor(**student), DetDataPreprocessor(**FORMS[teacher])
    images = [torch.randint(256, (1, *shape), dtype=torch.uint8) for shape in ((64, 90), (40, 70))]
    shapes = [image.shape[-2:] for image in images]
    given = student(dict(inputs=images, data_samples=None))['inputs']
    bridged = InputBridge(student, teacher, channels=3)(given, shapes)
    expected = teacher(dict(inputs=[image.expand(3, -1, -1) for image in images], data_samples=None))['inputs']
    torch.testing.assert_close(bridged, expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize('student', FORMS)
def test_a_gray_teacher_sees_what_opencv_reads(student):
    colour = np.random.randint(0, 256, (64, 96, 3), np.uint8)
    gray = torch.from_numpy(cv2.cvtColor(colour, cv2.COLOR_BGR2GRAY))[None]
    student, teacher = DetDataPreprocessor(**FORMS[student]), DetDataPreprocessor(**GRAY)
    given = student(dict(inputs=[torch.from_numpy(colour).permute(2, 0, 1)], data_samples=None))['inputs']
    bridged = InputBridge(student, teacher, channels=1)(given, [(64, 96)])
    expected = teacher(dict(inputs=[gray], data_samples=None))['inputs']
    assert bridged.shape == (1, 1, 64, 96) and (bridged - expected).abs().max() < 0.51 / 58  # OpenCV rounds


def test_one_mean_for_all_channels_is_that_mean_three_times():
    one, three = (DetDataPreprocessor(mean=[127.5] * count, std=[50.0] * count) for count in (1, 3))
    images = torch.randn(1, 3, 32, 32)
    assert InputBridge(one, three, 3)(images, [(32, 32)]) is images is InputBridge(three, one, 3)(images, [(32, 32)])
    caffe = DetDataPreprocessor(**CAFFE)
    assert torch.equal(*(InputBridge(each, caffe, 3)(images, [(32, 32)]) for each in (one, three)))


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_as_many_channels_pass(channels):
    images = torch.randn(1, channels, 32, 32)
    plain, gray = DetDataPreprocessor(), DetDataPreprocessor(mean=[5.0], std=[2.0])
    assert InputBridge(plain, plain, channels)(images, [(32, 32)]) is images
    assert torch.equal(InputBridge(plain, gray, channels)(images, [(32, 32)]), images * 0.5 - 2.5)


@pytest.mark.parametrize('given, wanted', [(4, 3), (3, 4), (2, 1), (1, 4), (6, 4)])
def test_other_channels_are_an_error_that_tells_both(given, wanted):
    bridge = InputBridge(DetDataPreprocessor(), DetDataPreprocessor(), wanted)
    with pytest.raises(TeacherError, match=f'images of {given} channels?,.*images of {wanted} channels?:.*in_channels'):
        bridge(torch.zeros(1, given, 32, 32), [(32, 32)])


def test_preprocessors_that_normalise_other_channels_are_an_error():
    multispectral = DetDataPreprocessor()
    multispectral.mean, multispectral.std, multispectral._enable_normalize = torch.zeros(4), torch.ones(4), True
    with pytest.raises(TeacherError, match='normalises 4 channels, the teacher\'s 3'):
        InputBridge(multispectral, DetDataPreprocessor(**IMAGENET))


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize('student', FORMS)
def test_the_batch_is_padded_as_the_teachers_own_preprocessing_would(student, batch):
    teacher, shapes = DetDataPreprocessor(**GREY_PADDING), ((50, 100), (40, 70))
    student = DetDataPreprocessor(**dict(FORMS[student], pad_size_divisor=1))
    images = student(batch(shapes=shapes))['inputs']
    bridged = InputBridge(student, teacher, 3)(images, shapes)
    assert images.shape[-2:] == (50, 100) and bridged.shape[-2:] == (64, 128)
    torch.testing.assert_close(bridged, teacher(batch(shapes=shapes))['inputs'], rtol=1e-5, atol=2e-4)


def test_each_channel_may_have_its_own_padding():
    """As some own preprocessors pad with the mean."""
    teacher = DetDataPreprocessor(pad_size_divisor=32)
    teacher.pad_value = (1.0, 2.0, 3.0)
    bridged = InputBridge(DetDataPreprocessor(), teacher, 3)(torch.zeros(2, 3, 20, 32), [(20, 32), (10, 16)])
    assert bridged.shape[-2:] == (32, 32) and not bridged[0, :, :20].any() and not bridged[1, :, :10, :16].any()
    for outside in (bridged[0, :, 20:], bridged[1, :, 10:], bridged[1, :, :, 16:]):
        assert torch.equal(outside, torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1).expand_as(outside))


def test_levels_are_cut_back_to_the_cells_that_the_students_batch_has():
    for size in range(1, 300):
        padded = -(-size // 32) * 32
        for stride in (4, 8, 16, 32, 64, 128):
            level = torch.zeros(1, 1, -(-padded // stride), -(-padded // stride))
            assert crop_to_batch(level, (padded, padded), (size, size)).shape[-1] == -(-size // stride), (size, stride)


def test_only_levels_that_do_not_fit_are_explained():
    with pytest.raises(TeacherError, match=r'100 × 96 pixels.*size of tensor a.*pad_size_divisor=32'):
        with explain_size_mismatch((100, 96)):
            torch.zeros(2) + torch.zeros(3)
    for shape, other in (((128, 256), 3), ((100, 96), None)):
        with pytest.raises(RuntimeError) as raised, explain_size_mismatch(shape):
            torch.zeros(2).view(3) if other is None else torch.zeros(2) + torch.zeros(other)
        assert not isinstance(raised.value, TeacherError)


@pytest.mark.parametrize('scale', [0.5, 1.5, 2.0])
def test_a_teacher_may_see_images_larger_or_smaller(scale):
    """As its own preprocessing of the resized images, which are bilinear; padding is filled anew."""
    student, teacher = DetDataPreprocessor(**IMAGENET), DetDataPreprocessor(**GREY_PADDING)
    images = torch.rand(2, 3, 64, 96) * 255
    given = student(dict(inputs=[*images], data_samples=None))['inputs']
    bridge = InputBridge(student, teacher, 3, scale)
    height, width = (round(side * scale) for side in (64, 96))
    resized = F.interpolate(images, (height, width), mode='bilinear', antialias=True)
    expected = teacher(dict(inputs=[*resized], data_samples=None))['inputs']
    torch.testing.assert_close(bridge(given, [(64, 96)] * 2), expected, rtol=1e-4, atol=1e-2)
    padded = bridge(given, [(64, 96), (30, 40)])[1]
    rows, columns = bridge.find_size((30, 40))
    assert (rows, columns) == (round(30 * scale), round(40 * scale))
    assert (padded[:, rows:] == 114).all() and (padded[:, :, columns:] == 114).all()
    assert not (padded[:, :rows, :columns] == 114).all()
