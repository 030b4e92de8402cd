"""What is mended of MMDetection when kd_det is imported. That it is without, tests/packaging shows."""
import copy

import pytest
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmengine.config import Config

from kd_det.compat import mend_mmdetection
from kd_det.config.files import load_config

DISTILLATION = 'kd_det::demo/fgd_faster_rcnn_r101_r18.py'


def test_an_ssd_detects(one_stage, batch):
    config = one_stage('ssd')
    config.test_cfg = dict(nms=dict(type='nms', iou_threshold=0.5), min_bbox_size=0, score_thr=0.0, max_per_img=20)
    detections = MODELS.build(config).eval().test_step(batch())
    assert all(0 < len(sample.pred_instances) <= 20 for sample in detections)


@pytest.mark.parametrize('options', [dict(), *(dict(cfg_options=each) for each in (
    {'model.student.test_cfg.rcnn.max_per_img': 7}, {'model.test_cfg.rcnn.max_per_img': 7},
    dict(model=dict(test_cfg=dict(rcnn=dict(max_per_img=7))))))])
def test_init_detector_takes_the_student_of_a_distillation(options, tmp_path):
    config = load_config(DISTILLATION)
    config.dump(tmp_path / 'saved.py')
    before = copy.deepcopy(config.model.to_dict())
    for given in (config, str(tmp_path / 'saved.py'), tmp_path / 'saved.py'):
        detector = init_detector(given, device='cpu', **options)
        assert type(detector).__name__ == detector.cfg.model.type == 'FasterRCNN'
        assert detector.test_cfg.rcnn.max_per_img == (7 if options else before['student']['test_cfg']['rcnn'][
            'max_per_img'])
        if not options:
            assert config.model.to_dict() == before


def test_init_detector_takes_a_plain_config_as_ever():
    config = load_config('kd_det::demo/baseline_faster_rcnn_r18.py')
    detector = init_detector(config, device='cpu')
    assert type(detector).__name__ == 'FasterRCNN' and detector.cfg is config
    with pytest.raises(TypeError, match='config must be a filename or Config object'):
        init_detector(dict(model={}), device='cpu')


def test_mending_twice_changes_nothing():
    from mmdet.apis import inference
    mended = inference.init_detector
    mend_mmdetection()
    assert inference.init_detector is mended is init_detector
    assert isinstance(load_config(DISTILLATION), Config)
