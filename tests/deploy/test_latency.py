"""Files side by side: times in turns, memory, multiplications."""
import json
import sys
import time

import numpy as np
import onnx
import pytest

import kd_det
from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.deploy.latency import Latencies, Latency, started
from kd_det.deploy.worker import Runner, count_onnx, count_openvino


def test_files_are_measured_side_by_side(files, tmp_path):
    names = ('fixed.onnx', 'fixed.xml', 'plain.pth')
    found = kd_det.measure_latency([files[name] for name in names], runs=7, threads=1, size=(96, 96))
    assert [each.file.name for each in found.files] == list(names)
    assert [each.runtime for each in found.files] == ['onnxruntime', 'openvino', 'torch']
    assert found.threads == 1 and found.processor
    for each in found.files:
        assert len(each.times) == 7 and min(each.times) > 0 and each.size == (96, 96) and each.precision == 'float32'
        assert each.macs == pytest.approx(found.files[0].macs, rel=0.01) and each.macs > 10**6
        if sys.platform == 'linux':
            assert 2**24 < each.memory['before'] < each.memory['loaded'] <= each.memory['peak'] < 2**31
    assert found.files[1].bytes == sum(files['fixed.xml'].with_suffix(end).stat().st_size for end in ('.xml', '.bin'))
    assert found.ratios[0] == (1, 1, 1) and len(found.ratios) == 3
    assert json.loads(json.dumps(found.to_dict()))['files'][2]['runtime'] == 'torch'


def test_each_file_is_run_by_each_runtime_that_can(files, capsys):
    command = ['latency', str(files['fixed.xml']), str(files['open.onnx']), '--runtime', 'onnxruntime', 'openvino',
               '--runs', '2', '--threads', '1', '--size', '96', '96']
    assert main(command) == 0
    rows = [line.split()[:7] for line in capsys.readouterr().out.splitlines() if line.startswith(str(files.folder))]
    assert [row[1:6] for row in rows] == [[runtime, 'float32', '96', '×', '96']
                                          for runtime in ('openvino', 'onnxruntime', 'openvino')]


def test_ratios_are_of_the_same_turn():
    drift = np.array([1., 10., 2., 40.])
    first, second = (Latency('m', 'openvino', (1, 1), 'float32', tuple(times), dict.fromkeys(
        ('before', 'loaded', 'peak')), 2**20, 10**9) for times in (drift, drift * [2, 2.5, 3, 3.5]))
    found = Latencies((first, second), 2, 'a processor')
    assert found.ratios == ((1, 1, 1), (2.375, 2.75, 3.125))
    row = found.tabulate().rows[1]
    assert row[4:] == ('15.5', '5–53.8', '2.750', '2.375–3.125', '–', '–', '–', '1.00', '1.000')
    assert '4 runs of each, 2 threads, a processor' in found._repr_html_()


def small_graph(tmp_path):
    """An ONNX file of every operator that is counted, the last on as many rows as the image has bright ones."""

    def weight(name, *shape):
        return onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)

    node = onnx.helper.make_node
    nodes = [
        node('Conv', ['image', 'w1'], ['a'], group=2, pads=[1, 1, 1, 1], strides=[2, 2]),  # (1, 8, 4, 5)
        node('ConvTranspose', ['a', 'w2'], ['b'], group=2, strides=[2, 2]),  # (1, 6, 8, 10)
        node('Flatten', ['a'], ['c']),  # (1, 160)
        node('Gemm', ['w3', 'w4'], ['d'], transA=1),  # (3, 5) of (7, 3) and (7, 5)
        node('NonZero', ['c'], ['e']),  # (2, 160): ones of ones
        node('Cast', ['e'], ['f'], to=onnx.TensorProto.FLOAT),
        node('MatMul', ['f', 'w5'], ['g']),  # (2, 9)
    ]
    weights = [weight('w1', 8, 2, 3, 3), weight('w2', 8, 3, 2, 2), weight('w3', 7, 3), weight('w4', 7, 5),
               weight('w5', 160, 9)]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(nodes, 'g', [value('image', onnx.TensorProto.FLOAT, [1, 4, 8, 10])], [
        value(name, onnx.TensorProto.FLOAT, None) for name in 'bdg'], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8),
              tmp_path / 'small.onnx')
    return tmp_path / 'small.onnx'


def test_multiplications_are_counted(tmp_path):
    file, image = small_graph(tmp_path), np.ones((1, 4, 8, 10), np.float32)
    convolution, transposed, product, found = 8 * 4 * 5 * 2 * 3 * 3, 8 * 4 * 5 * 3 * 2 * 2, 3 * 5 * 7, 2 * 9 * 160
    assert count_onnx(file, image) == count_openvino(file, image) == convolution + transposed + product + found


@pytest.mark.parametrize('names, arguments, message', [
    (['nowhere.onnx'], {}, 'nowhere.onnx.: there is no such file'),
    (['run.py'], {}, r'expected a file that kd-det export wrote, .onnx, .xml or .pth'),
    (['fixed.xml'], dict(runtimes=['onnxruntime', 'torch']), 'be run by onnxruntime or torch: expected openvino'),
    (['run.pth', 'lonely.pth'], {}, "lonely.pth' has no config beside it"),
    ([], {}, 'There is no file to measure'),
    (['foreign.onnx'], {}, 'foreign.onnx.*was not exported by kd-det'),
    (['fixed.onnx'], dict(size=(64, 64)), 'takes images of 96 × 96: leave --size out'),
])
def test_what_can_not_be_measured_is_told(names, arguments, message, files, tmp_path):
    small_graph(tmp_path).rename(tmp_path / 'foreign.onnx')
    (tmp_path / 'lonely.pth').touch()
    paths = [tmp_path / name if (tmp_path / name).exists() else files.folder / name for name in names]
    for name in {'fixed.onnx', 'fixed.xml'} & set(names):
        files[name]
    with pytest.raises(ConfigurationError, match=message) as error:
        kd_det.measure_latency(paths, threads=1, **arguments)
    assert '\n' not in str(error.value)


def test_a_process_that_ends_is_told_of(files, tmp_path):
    with started(tmp_path / 'some.onnx') as worker:
        worker._process.kill()
        worker._process.wait()  # so that the request meets a closed pipe
        with pytest.raises(ConfigurationError, match='some.onnx. can not be measured: .* has ended .signal 9.'):
            worker.ask(do='count')
    with started(tmp_path / 'some.onnx') as worker, pytest.raises(ConfigurationError, match='has ended .*KeyError'):
        worker.ask(do='load')


def test_what_a_runtime_lacks_is_told(files, tmp_path, monkeypatch):
    (tmp_path / 'openvino.py').write_text("raise ModuleNotFoundError(\"No module named 'openvino'\", name='openvino')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as error:
        kd_det.measure_latency(files['fixed.xml'])
    assert error.value.name == 'openvino'


def test_threads_rest_between_turns(files):
    runner = Runner(str(files['fixed.onnx']), 'onnxruntime', 2, None)
    used = []
    for _ in range(5):
        runner.time(3)
        before = time.process_time()
        time.sleep(0.03)
        used.append(time.process_time() - before)
    assert sorted(used)[2] < 0.004  # seconds; those that spin take 0.02
