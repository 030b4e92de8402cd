"""Detectors whose random weights say something."""
import pytest
import torch
from mmengine.config import ConfigDict

from kd_det.registry import build_detector

TEST_CFG = dict(nms_pre=60, score_thr=0.3, conf_thr=0.4, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.6),
                max_per_img=30)


@pytest.fixture
def lively_detector(detector_config):
    """Makes a detector of a family with scores above and below the threshold; its model dict is its ``config``."""

    def make(family: str, seed: int = 0, **test_cfg):
        scale = 0.1 if family == 'SSD' else 1  # else its scores are all 0 or 1
        model = detector_config(family)
        if 'roi_head' not in model and 'decoder' not in model:
            model.test_cfg = ConfigDict(TEST_CFG, **test_cfg)
        torch.manual_seed(seed)
        built = build_detector(model)
        built.init_weights()
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if name.endswith('weight') and parameter.dim() > 1 and 'head' in name:
                    parameter.normal_(0, scale * (2 / parameter[0].numel())**0.5)
                if name.endswith('bias') and 'head' in name:
                    parameter.normal_(0, 0.5)
        built.config = model
        return built.eval()

    return make


