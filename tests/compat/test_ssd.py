"""MMDetection's SSD head lacks what its own prediction asks for."""
from mmdet.registry import MODELS


def test_an_ssd_detects(one_stage, batch):
    config = one_stage('ssd')
    config.test_cfg = dict(nms=dict(type='nms', iou_threshold=0.5), min_bbox_size=0, score_thr=0.0, max_per_img=20)
    detections = MODELS.build(config).eval().test_step(batch())
    assert all(0 < len(sample.pred_instances) <= 20 for sample in detections)
