"""The whole way from a teacher to a file: each stage once, whatever happens, and a page of it."""
import json
from functools import partial

import pytest
import torch
from mmengine.config import Config

from kd_det.cli.main import main
from kd_det.compat.writing import WritingError
from kd_det.deploy.quantization import quantize
from kd_det.registry import build_detector
from kd_det.study import compression
from kd_det.study.compression import Compression, compress, read_compression
from kd_det.study.report import report

STAGES = ['distilled', 'pruned', 'pruned, distilled', 'quantised', 'quantised, distilled']


@pytest.fixture
def pair(run_config, retinanet, tmp_path):
    """A student's config file, a teacher's, and its weights."""
    student = run_config(retinanet(width=8), val=True, epochs=1)
    del student.default_hooks['distill']
    for key in ('dataloader', 'cfg', 'evaluator'):
        student[f'test_{key}'] = student[f'val_{key}']
    student.test_cfg = dict(type='TestLoop')
    student.dump(tmp_path / 'student.py')
    model = retinanet(width=16)
    Config(dict(model=model)).dump(tmp_path / 'teacher.py')
    torch.manual_seed(0)
    teacher = build_detector(model)
    teacher.init_weights()
    torch.save(dict(state_dict=teacher.state_dict(), meta=dict(dataset_meta=dict(classes=('blue', 'green', 'red')))),
               tmp_path / 'teacher.pth')
    return tmp_path


def test_the_whole_way_and_again(pair, monkeypatch, capsys):
    settings = dict(method='pkd', macs=0.6, int8=True, epochs=1, calibrate=4, runs=2, runtimes=('onnxruntime', ),
                    options={'default_hooks.distill.preflight': None})
    paths = (pair / 'student.py', pair / 'teacher.py', pair / 'teacher.pth', pair / 'out')
    stopped = RuntimeError('stopped')

    def stop(*args, **kwargs):
        raise stopped

    with monkeypatch.context() as patched:
        patched.setattr(compression, 'quantize', stop)
        with pytest.raises(RuntimeError, match='stopped'):
            compress(*paths, **settings)
    assert list(json.loads((pair / 'out/compression.json').read_text())['stages']) == STAGES[:3]
    begun = report(pair / 'out')
    assert 'It has not finished' in begun.file.read_text() and STAGES[2] in begun.file.read_text()
    assert begun.compressions[0].latencies is None and 'Channels were chosen by taylor.' in capsys.readouterr().out
    log = []
    monkeypatch.setattr(compression, 'quantize', partial(quantize, ranges=('minmax', )))
    result = compress(*paths, log=log.append, **settings)
    assert log == ['quantised: file and evaluation …', 'quantised, distilled …',
                   'quantised, distilled: file and evaluation …', 'latencies …']
    assert [stage.name for stage in result.stages] == STAGES and result.file.name == 'quantised_distilled.onnx'
    macs = {latency.file: latency.macs for latency in result.latencies.files}
    stages = {stage.name: stage for stage in result.stages}
    assert macs[stages['pruned'].file] <= 0.65 * macs[stages['distilled'].file]
    assert stages['pruned'].parameters < stages['distilled'].parameters
    assert stages['quantised'].checkpoint == stages['pruned, distilled'].checkpoint
    assert all('coco/bbox_mAP' in stage.metrics for stage in result.stages)
    page = (pair / 'out/report.html').read_text()
    assert all(name in page for name in STAGES) and '<svg' in page
    assert 'http' not in page.replace('http://www.w3.org', '')
    shown = report([pair / 'out', pair / 'out/distilled'], out=pair / 'page.html', images=1)
    assert [each.name for each in shown.compressions[0].stages] == STAGES and read_compression(pair / 'out') == result
    page = shown.file.read_text()
    assert all(name in page for name in (*STAGES, 'ms, onnxruntime', 'loss_pkd')) and page.count('<main') == 2
    assert '<title>kd_det report: distilled, out</title>' in page
    assert shown.to_dict()['compressions'] == [result.to_dict()]
    assert isinstance(result, Compression) and 'quantised, distilled' in result._repr_html_()
    json.dumps(result.to_dict())
    log.clear()
    assert compress(*paths, log=log.append, **settings).stages == result.stages and log == ['latencies …']
    with pytest.raises(WritingError, match='holds a compression of other settings'):
        compress(*paths, **{**settings, 'macs': 0.5})


@pytest.mark.parametrize('record, said', [
    ('{"stages": {}}', 'no stage of the compression has finished'), ('{"stages": {"distilled": {}}}', 'KeyError'),
    ('{', 'compression.json')])
def test_a_record_that_tells_nothing_is_told(record, said, tmp_path, capsys):
    (tmp_path / 'compression.json').write_text(record)
    assert main(['report', str(tmp_path)]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / 'report.html').exists()


def test_the_command(monkeypatch, capsys, tmp_path):
    """It calls the function with what its options say."""
    given = {}

    def remember(*args, **kwargs):
        given.update(kwargs, args=args)
        raise SystemExit(0)

    monkeypatch.setattr(compression, 'compress', remember)
    main(['compress', 'student.py', '--teacher', 'teacher.py', '--teacher-checkpoint', 'teacher.pth', '--out', 'out',
          '--macs', '0.5', '--int8', '--inherit', 'none', '--size', '64', '96'])
    assert [str(each) for each in given['args']] == ['student.py', 'teacher.py', 'teacher.pth', 'out']
    assert (given['macs'], given['int8'], given['inherit'], given['size']) == (0.5, True, (), (64, 96))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(['compress', 'student.py', '--teacher', 'a', '--teacher-checkpoint', 'b', '--out', 'c', '--macs', '1'])
    assert 'expected a number above 0 and below 1' in capsys.readouterr().err
