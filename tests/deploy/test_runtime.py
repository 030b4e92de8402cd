"""What exported files say of themselves, how images are fitted to them, and which files are refused."""
from dataclasses import replace
from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from kd_det.config import ConfigurationError
from kd_det.deploy.export import find_resize
from kd_det.deploy.runtime import Detections, ExportedDetector, ModelInfo, open_model, read_info

INFO = ModelInfo('RetinaNet', ('a', 'b'), (96, 128), (72, 120), True, 1, 'rgb', 'uint8', (10., 20., 30.), (0., 0., 0.),
                 (1., 1., 1.), True, 'float32', '0.1.0')


def detector(run=None, **changes) -> ExportedDetector:
    return ExportedDetector(Path('model.onnx'), replace(INFO, **changes), 'onnxruntime', run)


def noise(height, width, channels=3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize('height, width', [(50, 70), (70, 50), (300, 401), (72, 120)])
def test_photographs_are_resized_as_pipelines_do(height, width):
    image = noise(height, width)
    for keep_ratio in (True, False):
        expected = mmcv.imrescale(image, (120, 72)) if keep_ratio else mmcv.imresize(image, (120, 72))
        fitted, scale = detector(size=None, keep_ratio=keep_ratio).fit(image, photograph=True)
        np.testing.assert_array_equal(fitted[0].transpose(1, 2, 0), expected)
        np.testing.assert_allclose(scale, [expected.shape[1] / width, expected.shape[0] / height] * 2)
    untouched, _ = detector(size=None).fit(image)
    np.testing.assert_array_equal(untouched[0].transpose(1, 2, 0), image)


@pytest.mark.parametrize('step, size, keep_ratio', [
    (dict(type='Resize', scale=(1333, 800), keep_ratio=True), (800, 1333), True),
    (dict(type='mmdet.Resize', scale=[300, 200]), (200, 300), False),
    (dict(type='Resize', scale=320), (320, 320), False),
    (dict(type='FixScaleResize', scale=(800, 1333), keep_ratio=True), (1333, 800), True),
    (dict(type='FixShapeResize', width=64, height=32), (32, 64), False),
    (dict(type='ResizeShortestEdge', scale=480, max_size=640), (480, 640), True),
    (dict(type='ResizeShortestEdge', scale=480), None, False),
    (dict(type='RandomChoiceResize', scales=[(1, 2)]), None, False),
    (dict(type='PackDetInputs'), None, False),
])
def test_how_the_pipeline_resizes_is_known(step, size, keep_ratio):
    config = Config(dict(val_dataloader=dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile'), step]))))
    assert find_resize(config) == (size, keep_ratio, (1, 1))
    if size and step['type'] != 'FixScaleResize':  # which rounds down
        made = TRANSFORMS.build(step)(dict(img=noise(90, 170)))
        fitted, _ = detector(size=None, resize=size, keep_ratio=keep_ratio).fit(noise(90, 170), photograph=True)
        np.testing.assert_array_equal(fitted[0].transpose(1, 2, 0), made['img'])


@pytest.mark.parametrize('steps, resize, factor', [
    ([dict(type='Resize', scale_factor=2.0)], None, (2, 2)),
    ([dict(type='mmdet.Resize', scale_factor=(0.5, 1.5))], None, (1.5, 0.5)),
    ([dict(type='Resize', scale_factor=0.25), dict(type='Resize', scale_factor=3.0)], None, (0.75, 0.75)),
    ([dict(type='Resize', scale=(120, 72)), dict(type='Resize', scale_factor=0.5)], (72, 120), (0.5, 0.5)),
    ([dict(type='Resize', scale_factor=2.0), dict(type='Resize', scale=(120, 72))], (72, 120), (1, 1)),
])
def test_pipelines_that_resize_by_a_factor(steps, resize, factor):
    config = Config(dict(val_dataloader=dict(dataset=dict(pipeline=steps))))
    assert find_resize(config) == (resize, False, factor)
    made = dict(img=noise(90, 170))
    for step in steps:
        made = TRANSFORMS.build(step)(made)
    model = detector(size=None, resize=resize, keep_ratio=False, factor=factor)
    fitted, scale = model.fit(noise(90, 170), photograph=True)
    np.testing.assert_allclose(fitted.shape[2:], made['img'].shape[:2], atol=2)  # which several steps round each
    np.testing.assert_allclose(scale, [fitted.shape[3] / 170, fitted.shape[2] / 90] * 2)
    if len(steps) == 1:
        np.testing.assert_array_equal(fitted[0].transpose(1, 2, 0), made['img'])
    assert model.fit(noise(90, 170))[0].shape[2:] == (90, 170)


def test_what_is_smaller_is_filled_up_and_what_is_larger_shrinks():
    fitted, scale = detector().fit(noise(90, 100))
    np.testing.assert_array_equal(fitted[0, :, :90, :100].transpose(1, 2, 0), noise(90, 100))
    assert fitted.shape == (1, 3, 96, 128) and (scale == 1).all()
    assert (fitted[0, :, 90:].reshape(3, -1).T == (10, 20, 30)).all()
    assert (fitted[0, :, :, 100:].reshape(3, -1).T == (10, 20, 30)).all()
    for shape, used in (((192, 128), (96, 64)), ((96, 512), (24, 128))):
        fitted, scale = detector().fit(noise(*shape))
        assert fitted.shape == (1, 3, 96, 128)
        np.testing.assert_allclose(scale, [used[1] / shape[1], used[0] / shape[0]] * 2)
        assert (fitted[0, :, used[0]:, used[1]:].reshape(3, -1).T == (10, 20, 30)).all()
        assert (fitted[0, :, used[0] - 1, used[1] - 1] != (10, 20, 30)).any()


def test_boxes_are_of_the_image_and_within_it():
    boxes = np.array([[[-4, 2, 40, 20], [60, 30, 90, 60], [70, 8, 80, 9], [0, 0, 5, 5]]], np.float32)
    found = Detections(boxes, np.array([[0.9, 0.5, 0.4, 0]], np.float32), np.array([[1, 0, 1, -1]]))
    seen = []
    model = detector(lambda images: seen.append(images) or found, size=(64, 64), keep_ratio=False, resize=(32, 64))
    boxes, scores, labels = model.detect(noise(64, 32), photograph=True)  # twice as wide and half as high
    assert seen[0].shape == (1, 3, 64, 64) and seen[0].dtype == np.uint8 and seen[0].flags.c_contiguous
    np.testing.assert_allclose(boxes, [[0, 4, 20, 40], [30, 60, 32, 64]])
    assert scores.tolist() == [np.float32(0.9), 0.5] and labels.tolist() == [1, 0]


def test_images_of_other_types():
    wide = noise(96, 128).astype(np.float32) + 0.4
    np.testing.assert_array_equal(detector().fit(wide.clip(0, 255))[0], detector().fit(noise(96, 128))[0])
    assert detector(dtype='float32').fit(300 * wide)[0].max() > 255
    with pytest.raises(ConfigurationError, match='takes uint8 images, got uint16 from 0 to 510: export it with'):
        detector().fit(2 * noise(96, 128).astype(np.uint16))
    with pytest.raises(ConfigurationError, match='images of 3 channels, got one of 4'):
        detector().fit(noise(96, 128, 4))
    grey = detector(mean=(0., ), padding=(7., ))
    fitted, _ = grey.fit(noise(192, 256, 1))
    assert fitted.shape == (1, 1, 96, 128)


def test_what_a_file_says_of_itself_is_read_back():
    assert ModelInfo.from_texts(INFO.to_texts(), 'model.onnx') == INFO
    bare = replace(INFO, size=None, resize=None, batch=None)
    assert ModelInfo.from_texts(bare.to_texts(), 'model.onnx') == bare
    texts = replace(INFO, factor=(0.5, 2.0)).to_texts()
    assert ModelInfo.from_texts(texts, 'model.onnx').factor == (0.5, 2)
    texts.pop('factor')  # as files of earlier versions
    assert ModelInfo.from_texts(texts, 'model.onnx') == INFO
    texts.pop('classes')
    with pytest.raises(ConfigurationError, match="model.onnx' was not exported by kd-det: it does not say its classes"):
        ModelInfo.from_texts(texts, 'model.onnx')


def test_both_kinds_of_files_say_the_same(files):
    info = read_info(files['fixed.onnx'])
    assert read_info(files['fixed.xml']) == info == open_model(files['fixed.onnx'], 'openvino', 1).info
    assert (info.size, info.resize, info.keep_ratio) == ((96, 96), (96, 128), True)
    assert read_info(files['open.onnx']) == replace(info, size=None, batch=None, channels='bgr', dtype='float32',
                                                    padding=info.padding[::-1])


@pytest.mark.parametrize('name, runtime, message', [
    ('nowhere.onnx', None, 'there is no such file'),
    ('folder.onnx', None, 'there is no such file'),
    ('student.pth', None, 'expected a file that kd-det export wrote, .onnx or .xml'),
    ('empty.onnx', None, 'was not exported by kd-det|can not be run'),
    ('text.onnx', None, 'can not be run'),
    ('text.onnx', 'openvino', 'can not be run'),
    ('cut.onnx', None, 'can not be run'),
    ('cut.onnx', 'openvino', 'can not be run'),
    ('foreign.onnx', None, 'was not exported by kd-det: it does not say its detector'),
    ('foreign.onnx', 'openvino', 'was not exported by kd-det: it does not say its detector'),
    ('foreign.xml', None, 'was not exported by kd-det: it does not say its detector'),
    ('text.xml', None, 'can not be run: it is no XML file'),
    ('cut.xml', None, 'can not be run: .* at offset'),
    ('alone.xml', None, "can not be run: its weights are missing, there is no 'alone.bin'"),
    ('short.xml', None, 'can not be run: Incorrect weights'),
    ('alone.xml', 'onnxruntime', 'can not be run by onnxruntime: expected openvino'),
    ('text.onnx', 'tensorrt', 'can not be run by tensorrt: expected onnxruntime or openvino'),
])
def test_files_that_can_not_be_run_are_refused_in_one_line(name, runtime, message, files, tmp_path):
    import onnx
    import openvino
    (tmp_path / 'folder.onnx').mkdir()
    (tmp_path / 'student.pth').touch()
    (tmp_path / 'empty.onnx').touch()
    (tmp_path / 'text.onnx').write_text('no model')
    (tmp_path / 'text.xml').write_text('no model')
    whole, text = files['fixed.onnx'].read_bytes(), files['fixed.xml'].read_bytes()
    (tmp_path / 'cut.onnx').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'cut.xml').write_bytes(text[:len(text) // 2])
    for stem in ('alone', 'short', 'cut'):
        if stem != 'cut':
            (tmp_path / f'{stem}.xml').write_bytes(text)
        if stem != 'alone':  # of 'cut' too, which is cut enough
            (tmp_path / f'{stem}.bin').write_bytes(files['fixed.xml'].with_suffix('.bin').read_bytes()[:1000])
    value = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', [value], [
        onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8),
              tmp_path / 'foreign.onnx')
    if name == 'foreign.xml':
        openvino.save_model(openvino.convert_model(tmp_path / 'foreign.onnx'), tmp_path / name)
    with pytest.raises(ConfigurationError, match=message) as error:
        open_model(tmp_path / name, runtime)
    assert name in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 500
