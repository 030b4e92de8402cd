"""Integers in files: those of training are written as they were, those of calibration are the best of several."""
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mmengine
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.runner import Runner
from onnx import numpy_helper
from torch import nn

import kd_det
from kd_det.compat.writing import WritingError
from kd_det.config import ConfigurationError
from kd_det.config.files import student_model
from kd_det.deploy.checking import Comparison
from kd_det.deploy.export import export
from kd_det.deploy.quantization import Trial, choose, quantize
from kd_det.deploy.runtime import read_info
from kd_det.study.report.detections import load_detector


@pytest.fixture
def make_run(request, one_stage, run_config, tmp_path):
    """Makes the config of a run that trains a student for integers, or as float, and a checkpoint of it."""

    def make(family: str, quantize: dict | None = None, name: str = 'run', **changes):
        student = request.getfixturevalue(family)() if family == 'faster_rcnn' else one_stage(family)
        if family != 'faster_rcnn':
            student.test_cfg.update(score_thr=0.0, nms_pre=50, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10)
        model = student if quantize is None else dict(
            type='DetectionDistiller', student=student, quantize=quantize, distill={},
            teacher=dict(config=student, random_teacher=True))
        detector = MODELS.build(model)
        for path, module in detector.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            if getattr(module, 'bias', None) is not None and not path.startswith('backbone'):
                nn.init.uniform_(module.bias, -0.1, 0.1)  # in a deeper network one integer that differs moves all
        with torch.no_grad():  # a channel without weights: its bias is all there is of it
            detector.backbone.bn1.weight[0] = 0
            detector.backbone.bn1.bias[0] = 5
        saved = dict(state_dict=detector.state_dict(), meta={})
        if quantize is not None:
            plain, samples = detector.quantizer.student, detector_samples()
            detector.train()
            with torch.no_grad():
                for _ in range(2):
                    plain(torch.randn(2, 3, 64, 64), samples, mode='predict')
            saved['distill'] = dict(ranges=detector.quantizer.state())
        torch.save(saved, tmp_path / f'{name}.pth')
        return run_config(model, val=True, name=name, **changes), tmp_path / f'{name}.pth', detector

    return make


def detector_samples():
    from mmdet.structures import DetDataSample
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64), batch_input_shape=(64, 64), scale_factor=(1.0, 1.0))
    return [DetDataSample(metainfo=meta) for _ in range(2)]


def count_nodes(file: Path) -> Counter:
    """The operators that onnxruntime runs, after it has fused what it can."""
    options, fused = onnxruntime.SessionOptions(), file.with_suffix('.fused')
    options.optimized_model_filepath, options.log_severity_level = str(fused), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    counts = Counter(node.op_type for node in onnx.load(fused).graph.node)
    return Counter({name.replace('Fused', ''): 0 for name in counts}) + Counter(
        {kind: sum(count for name, count in counts.items() if name.removeprefix('Fused') == kind)
         for kind in {name.removeprefix('Fused') for name in counts}})


@pytest.mark.parametrize('family, convolutions, kept, sums, pixels, score', [
    ('rtmdet_separate', 32, 9, 10, 64, 0.02), ('faster_rcnn', 33, 10, 11, 0.05, 1e-3)])
def test_a_student_that_was_trained_for_integers_is_exported_as_them(family, convolutions, kept, sums, pixels, score,
                                                                     make_run, tmp_path):
    """Step by step: the file's are those of training, onnxruntime fuses all but the last layers, and finds the same."""
    config, checkpoint, distiller = make_run(family, dict(bits=8))
    exported = export(config, checkpoint, tmp_path / 'student.onnx', images=8)
    assert exported.info.precision == read_info(exported.file).precision == 'int8'
    found = exported.comparison  # few boxes are others: an integer on the other side of a rounding moves all after it
    assert found.real and found.boxes > 50 and found.unmatched < 0.05 * found.boxes
    assert found.box_error < pixels and found.score_error < score

    counts = count_nodes(exported.file)
    assert counts['QLinearConv'] == convolutions and counts['Conv'] == kept and counts['QLinearAdd'] == sums

    graph = onnx.load(exported.file).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    distiller.eval()
    steps = {(np.float32(scale), zero) for scale, zero in distiller.quantizer.steps}
    written = {(constants[node.input[1]].item(), constants[node.input[2]].item()) for node in graph.node
               if node.op_type == 'QuantizeLinear'}
    assert written <= steps and len(steps - written) <= 1
    makers = {name: node for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ('Conv', 'Gemm') and node.input[1] in makers]
    for node in layers:
        weight, bias = (constants[makers[name].input[0]] for name in node.input[1:])
        assert weight.dtype == np.int8 and weight.min() >= -127 and bias.dtype == np.int32
    assert len(layers) == convolutions + (2 if family == 'faster_rcnn' else 0)


def test_a_student_that_was_trained_for_integers_is_tested_in_them(make_run, tmp_path):
    """As it was validated in training; its float weights are tested on request, and where there are no ranges."""
    config, checkpoint, distiller = make_run('retina', dict(bits=4))
    config.update({f'test_{key}': config[f'val_{key}'] for key in ('dataloader', 'evaluator')}, log_level='INFO',
                  test_cfg=dict(type='TestLoop'))

    def test(name: str, **arguments) -> tuple[torch.Tensor, str]:
        """The scores of all images, and what the log says."""
        work_dir = tmp_path / name
        config.experiment_name = f'{tmp_path.name}_{name}'  # MMEngine's loggers go by it, and by the second
        kd_det.evaluate(config, arguments.pop('checkpoint', checkpoint), work_dir=work_dir,
                        out=tmp_path / f'{name}.pkl', **arguments)
        return (torch.cat([each['pred_instances']['scores'] for each in mmengine.load(tmp_path / f'{name}.pkl')]),
                ''.join(each.read_text() for each in work_dir.glob('*/*.log')))

    data, found = Runner.build_dataloader(config.val_dataloader), {}
    for name, detector in (('integers', distiller.eval()), ('float', MODELS.build(student_model(config)).eval())):
        detector.load_state_dict(torch.load(checkpoint)['state_dict'])
        with torch.no_grad():
            found[name] = torch.cat([each.pred_instances.scores for batch in data for each in detector.val_step(batch)])
    assert found['integers'].shape != found['float'].shape or not torch.allclose(*found.values(), atol=1e-4)

    scores, said = test('integers')
    torch.testing.assert_close(scores, found['integers'])
    assert 'The student computes in integers of 4 bits' in said
    scores, said = test('float', options={'model.quantize': None})
    torch.testing.assert_close(scores, found['float'])
    assert 'computes in' not in said
    torch.save(dict(state_dict=distiller.state_dict(), meta={}), tmp_path / 'plain.pth')
    scores, said = test('plain', checkpoint=tmp_path / 'plain.pth')
    torch.testing.assert_close(scores, found['float'])
    assert "plain.pth' holds no ranges, so that the student computes in float" in said
    shown = load_detector(config, str(checkpoint))  # by the report
    with torch.no_grad():
        torch.testing.assert_close(
            torch.cat([each.pred_instances.scores for batch in data for each in shown.val_step(batch)]),
            found['integers'])
    with pytest.raises(ConfigurationError, match=r'model.quantize: expected None or dict\(bits=8, …\), got 8'):
        test('wrong', options={'model.quantize': 8})


def test_what_can_not_be_exported_as_integers_is_told(make_run, tmp_path):
    config, checkpoint, _ = make_run('retina', dict(bits=4))
    out = tmp_path / 'student.onnx'
    with pytest.raises(ConfigurationError, match=r'bits=4 is a simulation.*model.quantize=None'):
        export(config, checkpoint, out)
    config.model.quantize.bits = 8
    with pytest.raises(ConfigurationError, match='--half: the student was trained for integers'):
        export(config, checkpoint, out, half=True)
    with pytest.raises(ConfigurationError, match='kd-det export writes those'):
        quantize(config, checkpoint, out)
    saved = torch.load(checkpoint)
    torch.save(dict(saved, distill={}), checkpoint)
    with pytest.raises(ConfigurationError, match=r'run.pth. holds no ranges'):
        export(config, checkpoint, out)
    assert not out.exists()


@pytest.mark.parametrize('family, convolutions', [('faster_rcnn', 33)])
def test_a_float_student_is_quantised_by_calibration(family, convolutions, make_run, tmp_path):
    """The network and nothing of what decodes boxes, with the last layers as float and as integers."""
    config, checkpoint, _ = make_run(family)
    quantized = quantize(config, checkpoint, tmp_path / 'student.onnx', calibrate=4, ranges=['minmax'])
    assert [(trial.ranges, trial.float_predictors) for trial in quantized.trials] == [
        ('minmax', False), ('minmax', True)]
    assert quantized.chosen in quantized.trials and quantized.info == replace(quantized.info, precision='int8')
    assert quantized.bytes == quantized.file.stat().st_size == quantized.chosen.bytes < quantized.float_bytes
    assert quantized.info.classes == ('blue', 'green', 'red') and not list(tmp_path.glob('*.tmp*'))
    counts, predictors = count_nodes(quantized.file), 10 if family == 'faster_rcnn' else 6
    assert counts['QLinearConv'] == convolutions + predictors * (not quantized.chosen.float_predictors)
    assert counts['Conv'] == predictors * quantized.chosen.float_predictors
    graph = onnx.load(quantized.file).graph
    makers = {name: node for node in graph.node for name in node.output}
    decoding = [node for node in graph.node if node.op_type in ('NonMaxSuppression', 'TopK', 'RoiAlign', 'Exp')]
    assert decoding
    for node in decoding:
        assert not any(makers[name].op_type == 'DequantizeLinear' for name in node.input[:1]
                       if name in makers) or node.op_type == 'RoiAlign'
    assert 'integers' in str(quantized.tabulate().to_plain()) and quantized.to_dict()['file'].endswith('student.onnx')


def test_symmetric_ranges_have_no_offset(make_run, built, tmp_path):
    """Which TensorRT asks for. Found on validation images, whose data set is built once."""
    config, checkpoint, _ = make_run('retina')
    config.train_dataloader.dataset.ann_file = 'none.json'
    quantize(config, checkpoint, tmp_path / 'symmetric.onnx', calibrate=4, ranges=['minmax'], symmetric=True)
    assert built == ['all.json', 'none.json']
    model = onnx.load(tmp_path / 'symmetric.onnx')
    values = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    offsets = [values[node.input[2]] for node in model.graph.node if node.op_type == 'QuantizeLinear']
    assert len(offsets) > 20 and all(each.dtype == np.int8 and not each.any() for each in offsets)


def test_what_can_not_be_quantised_is_told_and_nothing_is_written(make_run, tmp_path):
    config, checkpoint, _ = make_run('retina')
    other, its_checkpoint, _ = make_run('faster_rcnn', name='other')
    out, foreign = tmp_path / 'student.onnx', tmp_path / 'foreign.onnx'
    foreign.write_text('mine')
    with pytest.raises(WritingError, match='foreign.onnx'):
        quantize(config, checkpoint, foreign)
    with pytest.raises(ConfigurationError, match='expected the name of a file that ends in .onnx'):
        quantize(config, checkpoint, tmp_path / 'student.xml')
    with pytest.raises(ConfigurationError, match='is not of the student in'):
        quantize(config, its_checkpoint, out)
    with pytest.raises(ConfigurationError, match='ranges: expected at least one of minmax'):
        quantize(config, checkpoint, out, ranges=[])
    with pytest.raises(ConfigurationError, match='There are no images to calibrate on'):
        quantize(config, checkpoint, out, data_root=str(tmp_path / 'nowhere'), size=(64, 64))
    assert not out.exists() and foreign.read_text() == 'mine'


def test_the_last_layers_are_integers_where_that_costs_nothing():
    def trial(ranges: str, kept: bool, points: float | None, error: float = 0.0) -> Trial:
        return Trial(ranges, kept, 1, Comparison(4, True, 9, 0, 0.0, error, points, points))

    best, near, far = trial('entropy', True, 50.0), trial('minmax', False, 49.95), trial('percentile', False, 49.0)
    assert choose([far, best, near]) is near and choose([far, best]) is best
    assert choose([trial('entropy', True, None, 0.3), sure := trial('minmax', True, None, 0.1)]) is sure
