"""Files that are exported run, agree with the detector, and say what they are."""
import json

import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config, ConfigDict

import kd_det
from kd_det.cli.main import main
from kd_det.compat.writing import WritingError
from kd_det.config import ConfigurationError
from kd_det.deploy import export as exporting
from kd_det.deploy.checking import TOLERANCES, Comparison, Example, build_dataset, match, measure_map
from kd_det.deploy.export import find_size
from kd_det.deploy.runtime import Detections, ExportedDetector, ModelInfo, open_model
from kd_det.registry import build_detector

EXPORTED = ('RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3', 'Faster R-CNN', 'Cascade R-CNN',
            'Mask R-CNN', 'DETR', 'Deformable DETR', 'DINO')


@pytest.fixture
def student(lively_detector, tmp_path):
    """Makes the config and the checkpoint of a detector."""

    def make(family: str, **config) -> tuple[Config, str]:
        detector = lively_detector(family)
        file = tmp_path / f'{family}.pth'
        torch.save(dict(state_dict=detector.state_dict(), meta=dict(dataset_meta=dict(classes=('a', 'b', 'c')))), file)
        return Config(dict(model=detector.config, **config)), str(file)

    return make


@pytest.mark.parametrize('family', EXPORTED)
def test_every_family_is_exported_and_agrees(family, student, tmp_path):
    config, checkpoint = student(family)
    model = kd_det.export(config, checkpoint, tmp_path / 'model.onnx', size=(128, 160))
    assert model.comparison.boxes > 10 and model.comparison.box_error < 0.05 and model.comparison.score_error < 1e-3
    assert not model.comparison.unmatched and model.bytes == (tmp_path / 'model.onnx').stat().st_size
    info = open_model(tmp_path / 'model.onnx').info
    assert (info.classes, info.size, info.batch, info.dtype, info.channels, info.version) == (
        ('a', 'b', 'c'), (128, 160), 1, 'uint8', 'rgb', kd_det.__version__)
    domains = {entry.domain for entry in onnx.load(tmp_path / 'model.onnx').opset_import}
    assert domains == {''}  # no runtime's own operators


def test_a_size_may_be_a_list(student, tmp_path):
    info = kd_det.export(*student('RetinaNet'), tmp_path / 'model.onnx', size=[64, 96]).info
    assert info == open_model(tmp_path / 'model.onnx').info and info.size == (64, 96)


def test_a_level_of_one_row(student, tmp_path):
    """The coarsest of a deformable DETR, whose reference points are then a single step."""
    model = kd_det.export(*student('Deformable DETR'), tmp_path / 'model.onnx', size=(64, 96))
    assert model.comparison.box_error < 0.05 and not model.comparison.unmatched


@pytest.mark.parametrize('name, format, file', [
    ('r18_x0.5', 'pth', 'r18_x0.5.pth'), ('r18_x0.25', 'pth', 'r18_x0.25.pth'), ('v1.0.onnx', 'pth', 'v1.0.pth'),
    ('a.pt', 'pth', 'a.pth'), ('a', 'pth', 'a.pth')])
def test_a_dot_in_a_name_is_no_ending(name, format, file, student, tmp_path):
    assert kd_det.export(*student('RetinaNet'), tmp_path / name, format=format).checkpoint == tmp_path / file


@pytest.mark.parametrize('family', ['RetinaNet', 'YOLOX', 'Faster R-CNN'])
def test_openvino_reads_the_same(family, student, tmp_path):
    model = kd_det.export(*student(family), tmp_path / 'model.onnx', format='openvino', size=(128, 160))
    assert model.file == tmp_path / 'model.xml' and not (tmp_path / 'model.onnx').exists()
    assert model.comparison.box_error < 0.05 and not model.comparison.unmatched
    assert open_model(tmp_path / 'model.xml').info == model.info
    assert model.bytes == sum((tmp_path / name).stat().st_size for name in ('model.xml', 'model.bin'))


@pytest.mark.parametrize('family', ['GFL', 'YOLOX', 'Cascade R-CNN'])
def test_open_batch_and_size(family, student, tmp_path):
    config, checkpoint = student(family)
    kd_det.export(config, checkpoint, tmp_path / 'open.onnx', dynamic=('batch', 'size'))
    kd_det.export(config, checkpoint, tmp_path / 'fixed.onnx', size=(70, 131))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 70, 131), np.uint8)
    found, one = open_model(tmp_path / 'open.onnx')(images), open_model(tmp_path / 'fixed.onnx')(images[1:2])
    counted = one.scores[0] > 0
    assert found.scores.shape[0] == 3 and counted.sum() > 3
    np.testing.assert_allclose(found.boxes[1, :len(counted)][counted], one.boxes[0][counted], atol=1e-2)
    np.testing.assert_allclose(found.scores[1, :len(counted)], one.scores[0], atol=1e-5)


def test_half_precision_and_other_inputs(student, tmp_path):
    config, checkpoint = student('RetinaNet')
    whole = kd_det.export(config, checkpoint, tmp_path / 'whole.onnx', size=(64, 96))
    half = kd_det.export(config, checkpoint, tmp_path / 'half.onnx', size=(64, 96), half=True, dtype='float32',
                         channels='bgr')
    weights = [entry for entry in onnx.load(tmp_path / 'half.onnx').graph.initializer if len(entry.dims) == 4]
    assert len(weights) > 20 and {entry.data_type for entry in weights} == {onnx.TensorProto.FLOAT16}
    assert half.bytes < whole.bytes and half.info.precision == 'float16'
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96), np.uint8)
    found = open_model(tmp_path / 'half.onnx')(image[:, ::-1].astype(np.float32))
    np.testing.assert_allclose(found.scores, open_model(tmp_path / 'whole.onnx')(image).scores, atol=2e-2)


def test_candidates_in_place_of_suppressed_boxes(student, tmp_path):
    config, checkpoint = student('RetinaNet')
    model = kd_det.export(config, checkpoint, tmp_path / 'model.onnx', size=(64, 96), suppress=False)
    assert not model.info.suppressed and model.comparison.boxes > 30  # more than max_per_img
    assert 'NonMaxSuppression' not in {node.op_type for node in onnx.load(tmp_path / 'model.onnx').graph.node}


def test_a_checked_file_with_its_map(student, run_config, built, tmp_path, capsys):
    """From the command line, on the data of the config, whose pipeline says how large images are."""
    config, checkpoint = student('RetinaNet')
    config = run_config(config.model, val=True)
    config.dump(tmp_path / 'config.py')
    command = ['export', str(tmp_path / 'config.py'), checkpoint, str(tmp_path / 'model.onnx'), '--images', '5']
    assert main(command) == 0
    assert built == ['all.json']  # once
    said = capsys.readouterr().out
    assert '5 validation images' in said and '1 × 64 × 64' in said and 'mAP' in said
    assert 'Average Precision' not in said and 'loading annotations' not in said
    assert main(command) == 0  # its own file it replaces


def test_annotations_without_their_images_are_no_data(student, run_config, coco_folder, tmp_path):
    config = run_config(student('RetinaNet')[0].model, val=True)
    checkpoint, content = str(tmp_path / 'RetinaNet.pth'), (coco_folder / 'all.json').read_bytes()
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'all.json').write_bytes(content)
    config.train_dataloader.dataset.data_root = str(tmp_path / 'data')
    made = kd_det.quantize(config, checkpoint, tmp_path / 'a.onnx', ranges=['minmax'], calibrate=2)
    assert made.chosen.comparison.map is not None  # of the validation images
    config.val_dataloader.dataset.data_root = str(tmp_path / 'data')
    model = kd_det.export(config, checkpoint, tmp_path / 'b.onnx')
    assert not model.comparison.real and 'images of noise' in model.tabulate().to_plain()
    assert model.info.size == (64, 64)
    with pytest.raises(ConfigurationError, match='There are no images to calibrate on'):
        kd_det.quantize(config, checkpoint, tmp_path / 'c.onnx')
    (tmp_path / 'data' / '0.png').write_bytes((coco_folder / '0.png').read_bytes())
    with pytest.raises(FileNotFoundError, match='7.png'):  # of some images the others lack
        kd_det.export(config, checkpoint, tmp_path / 'd.onnx', images=2)


def test_a_file_that_does_not_agree_is_not_kept(student, tmp_path, monkeypatch):
    def spoil(graph, info, file, write=exporting.write_onnx):
        with torch.no_grad():
            graph.detector.bbox_head.retina_reg.bias += 0.1
        return write(graph, info, file)

    monkeypatch.setattr(exporting, 'write_onnx', spoil)
    with pytest.raises(ConfigurationError, match='does not find what the detector finds.* px between boxes'):
        kd_det.export(*student('RetinaNet'), tmp_path / 'model.onnx', size=(64, 96))
    assert not list(tmp_path.glob('model*'))


def test_an_operator_that_can_not_be_exported_is_named(student, tmp_path):
    config, checkpoint = student('RetinaNet')
    config.model.neck.conv_cfg = dict(type='DCNv2')
    torch.save(dict(state_dict=build_detector(config.model).state_dict()), checkpoint)
    with pytest.raises(ConfigurationError, match='can not be exported: ONNX has no operator .*DeformConv2d'):
        kd_det.export(config, checkpoint, tmp_path / 'model.onnx', size=(64, 96))
    assert not list(tmp_path.glob('model*'))


def test_what_can_not_be_exported_leaves_nothing(student, tmp_path):
    config, checkpoint = student('RetinaNet')
    other, _ = student('FCOS')
    with pytest.raises(ConfigurationError, match='is not of the student in'):
        kd_det.export(other, checkpoint, tmp_path / 'model.onnx', size=(64, 96))
    with pytest.raises(ConfigurationError, match='--size HEIGHT WIDTH'):
        kd_det.export(config, checkpoint, tmp_path / 'model.onnx')
    with pytest.raises(ConfigurationError, match='--dynamic: a DETR is exported for one image of one size'):
        kd_det.export(*student('DETR'), tmp_path / 'model.onnx', dynamic=('size', ))
    (tmp_path / 'mine.onnx').write_text('mine')
    with pytest.raises(WritingError, match="mine.onnx' exists, and is not an exported model"):
        kd_det.export(config, checkpoint, tmp_path / 'mine.onnx', size=(64, 96))
    assert (tmp_path / 'mine.onnx').read_text() == 'mine' and not list(tmp_path.glob('model*'))


@pytest.mark.parametrize('name, settings, message', [
    ('a.pth', dict(half=True, channels='bgr'), "a.pth' is a checkpoint, .*: --channels, --half would change a graph"),
    ('a.pt', dict(size=(64, 96)), '--size would'), ('a.pth', dict(suppress=False), '--no-nms would'),
    ('a.onnx', dict(size=(64, 96), dynamic=('size', )), '--dynamic size leaves height and width open')])
def test_settings_that_nothing_would_read_are_refused(name, settings, message, student, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        kd_det.export(*student('RetinaNet'), tmp_path / name, **settings)
    assert not list(tmp_path.glob('a*'))


def test_a_file_of_another_tool_is_none_of_ours(tmp_path):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node('Identity', ['x'], ['y'])], 'graph',
        *([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])] for name in 'xy'))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    onnx.save(model, tmp_path / 'other.onnx')
    with pytest.raises(ConfigurationError, match="other.onnx' was not exported by kd-det"):
        open_model(tmp_path / 'other.onnx')
    (tmp_path / 'torn.onnx').write_bytes((tmp_path / 'other.onnx').read_bytes()[:40])
    with pytest.raises(ConfigurationError, match="torn.onnx' can not be run"):
        open_model(tmp_path / 'torn.onnx')


@pytest.mark.parametrize('resize, size', [
    (dict(type='Resize', scale=(1333, 800), keep_ratio=True), (1344, 1344)),
    (dict(type='Resize', scale=(640, 416), keep_ratio=False), (416, 640)),
    (dict(type='mmdet.Resize', scale=(416, 416), keep_ratio=True), (416, 416))])
def test_the_size_that_holds_every_image(resize, size):
    dataset = dict(type='CocoDataset', ann_file='none.json', pipeline=[dict(type='LoadImageFromFile'), resize])
    config = Config(dict(val_dataloader=dict(dataset=dataset)))
    assert find_size(config, 32, build_dataset(config)) == size


def test_the_size_that_holds_the_validation_images(run_config, retinanet, coco_folder):
    """Which are 64 pixels square, as far as they say so."""
    config = run_config(retinanet(), val=True)
    config.val_dataloader.dataset.pipeline[2].update(scale=(200, 100), keep_ratio=True)
    assert find_size(config, 32, build_dataset(config)) == (128, 128)
    content = json.loads((coco_folder / 'all.json').read_text())
    for image in content['images']:
        image.update(width=80, height=40)
    config.val_dataloader.dataset.ann_file = str(coco_folder / 'wide.json')
    (coco_folder / 'wide.json').write_text(json.dumps(content))
    assert find_size(config, 32, build_dataset(config)) == (128, 224)
    resize = config.val_dataloader.dataset.pipeline.pop(2)  # photographs are left as large as they are
    without = list(config.val_dataloader.dataset.pipeline)
    for factor, size in ((None, (64, 96)), (1.0, (64, 96)), (0.5, (32, 64)), ((1.5, 3.0), (128, 128))):
        step = dict(type='Resize', scale_factor=factor)
        config.val_dataloader.dataset.pipeline = [*without[:2], *([step] if factor else []), *without[2:]]
        assert find_size(config, 32, build_dataset(config)) == size
    unknown = dict(type='RandomChoiceResize', scales=[(1, 2)])
    config.val_dataloader.dataset.pipeline = [*without[:2], unknown, step, *without[2:]]
    with pytest.raises(ConfigurationError, match='does not say how large'):
        find_size(config, 32, build_dataset(config))
    config.val_dataloader.dataset.pipeline = without
    config.val_dataloader.dataset.pipeline.insert(2, resize)
    config.val_dataloader.dataset.ann_file = 'none.json'
    assert find_size(config, 32, build_dataset(config)) == (224, 224)


def test_the_colour_of_the_padding_is_what_the_detector_pads_with(student, tmp_path):
    config, checkpoint = student('RetinaNet')
    config.model.data_preprocessor = ConfigDict(type='DetDataPreprocessor', mean=[110, 120, 130], std=[50, 60, 70],
                                                bgr_to_rgb=True, pad_value=0.5, pad_size_divisor=32)
    info = kd_det.export(config, checkpoint, tmp_path / 'a.onnx', size=(64, 96)).info
    assert info.padding == (135, 150, 165) and info.mean == (110, 120, 130)
    info = kd_det.export(config, checkpoint, tmp_path / 'b.onnx', size=(64, 96), channels='bgr').info
    assert info.padding == (165, 150, 135)
    config.val_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='none.json', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='Pad', size=(96, 64), pad_val=dict(img=(1, 2, 3)))]))
    assert kd_det.export(config, checkpoint, tmp_path / 'c.onnx', size=(64, 96)).info.padding == (3, 2, 1)


@pytest.mark.parametrize('channels, normalization', [
    (1, {}), (1, dict(mean=[110.0], std=[50.0])), (3, dict(mean=[110.0], std=[50.0])), (3, dict(std=[50.0], mean=[
        110, 120, 130])), (4, {})], ids=['gray', 'gray_mean', 'one_mean', 'one_std', 'four'])
@pytest.mark.parametrize('order', ['rgb', 'bgr'])
def test_images_have_as_many_channels_as_the_detector_reads(channels, normalization, order, student, tmp_path):
    config, checkpoint = student('RetinaNet')
    config.model.backbone.in_channels = channels
    config.model.data_preprocessor = ConfigDict(type='DetDataPreprocessor', bgr_to_rgb=channels == 3, pad_value=0.5,
                                                pad_size_divisor=32, **normalization)
    state = torch.load(checkpoint)
    first = state['state_dict']['backbone.conv1.weight']
    scale = 0.1 if normalization else 0.002
    state['state_dict']['backbone.conv1.weight'] = scale * torch.randn(len(first), channels, 7, 7)
    torch.save(state, checkpoint)
    model = kd_det.export(config, checkpoint, tmp_path / 'a.onnx', size=(64, 96), channels=order)
    assert model.comparison.boxes > 10 and not model.comparison.unmatched
    assert len(model.info.mean) == len(model.info.std) == len(model.info.padding) == channels


def test_an_image_is_made_to_fit():
    info = ModelInfo('RetinaNet', ('a', ), (64, 96), None, False, 1, 'rgb', 'uint8', (7.4, 8.0, 9.0), (0., ) * 3,
                     (1., ) * 3, True, 'float32', '1')
    model = ExportedDetector(None, info, 'onnxruntime', None)
    small = np.full((32, 40, 3), 200, np.uint8)
    fitted, scale = model.fit(small)
    assert fitted.shape == (1, 3, 64, 96) and (scale == 1).all()
    assert (fitted[0, :, :32, :40] == 200).all() and (fitted[0, :, 32:] == np.array([7, 8, 9])[:, None, None]).all()
    large, scale = model.fit(np.full((128, 300, 3), 200, np.uint8))
    assert large.shape == (1, 3, 64, 96) and scale == pytest.approx([96 / 300, 41 / 128] * 2)
    assert (large[0, :, :41] == 200).all() and (large[0, 0, 41:] == 7).all()
    assert ModelInfo.from_texts(info.to_texts(), 'a') == info
    json.dumps(info.to_texts())


def test_a_detector_that_finds_nothing_has_no_map():
    example = Example(np.zeros((8, 8, 3), np.uint8), shape=(8, 8), objects=[dict(bbox=[0., 0, 4, 4], bbox_label=0,
                                                                                 ignore_flag=0)])
    nothing = Detections(np.zeros((1, 3, 4), np.float32), np.zeros((1, 3), np.float32), np.full((1, 3), -1))
    assert measure_map([example], [nothing], 1) == 0


def test_what_is_paired_and_what_is_a_fault():
    boxes = np.array([[[0, 0, 10, 10], [20, 20, 40, 40], [20, 20, 40, 41]]], np.float32)
    expected = Detections(boxes, np.array([[0.9, 0.5, 0.4]], np.float32), np.array([[0, 1, 1]]))
    found = Detections(boxes[:, [0, 2, 1]] + 0.01, expected.scores[:, [0, 2, 1]], np.array([[1, 1, 1]]))
    assert match(found, expected, TOLERANCES['float32']).tolist() == [-1, 2, 1]
    info = ModelInfo('RetinaNet', ('a', ), None, None, False, None, 'rgb', 'uint8', (), (), (), True, 'float32', '1')
    Comparison(4, True, 1000, 5, 0.05, 1e-3, 30.0, 30.1).require_agreement(info)
    for fault, said in ((dict(unmatched=6), '6 of 1000 boxes'), (dict(box_error=0.06), '0.06 px'),
                        (dict(score_error=2e-3), '0.002 between scores'), (dict(map=29.8), 'mAP 29.80')):
        values = dict(images=4, real=True, boxes=1000, unmatched=5, box_error=0.05, score_error=1e-3, expected_map=30.0,
                      map=30.1)
        with pytest.raises(ConfigurationError, match=said):
            Comparison(**{**values, **fault}).require_agreement(info)
