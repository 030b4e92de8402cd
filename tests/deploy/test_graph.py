"""The graph finds what MMDetection's own decoding finds, for every family."""
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict

from kd_det.deploy.graph import DetectorGraph
from kd_det.registry import build_detector

FAMILIES = ('RetinaNet', 'ATSS', 'GFL', 'FCOS', 'RTMDet', 'YOLOX', 'SSD', 'YOLOv3', 'Faster R-CNN', 'Cascade R-CNN',
            'Mask R-CNN', 'DETR', 'Conditional DETR', 'DAB-DETR', 'Deformable DETR', 'DINO')
TEST_CFG = dict(nms_pre=60, score_thr=0.3, conf_thr=0.4, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.6),
                max_per_img=30)


@pytest.fixture
def detector(detector_config):
    """Makes a detector of a family whose random weights say something: scores above and below the threshold."""

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
        return built.eval()

    return make


@torch.no_grad()
def predict(detector, images: torch.Tensor) -> list:
    """MMDetection's own boxes for (N, 3, H, W) images of its channels' order."""
    shape = tuple(images.shape[-2:])
    samples = [DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1., 1.))) for _ in images]
    data = detector.data_preprocessor(dict(inputs=list(images), data_samples=samples), False)
    return [sample.pred_instances for sample in detector(**data, mode='predict')]


@pytest.mark.parametrize('size', [(64, 96), (70, 90)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('family', FAMILIES)
def test_the_graph_finds_what_mmdetection_finds(family, size, detector):
    model = detector(family)
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    channels = 'bgr' if model.data_preprocessor._channel_conversion else 'rgb'
    with torch.no_grad():
        found = DetectorGraph(model, channels)(images)
    counts = []
    for image, expected in enumerate(predict(model, images)):
        expected = expected[:found.scores.shape[1]]  # YOLOX's own decoding has no limit
        count = len(expected)
        counts.append(count)
        torch.testing.assert_close(found.scores[image, :count], expected.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.boxes[image, :count], expected.bboxes, atol=1e-3, rtol=1e-5)
        assert torch.equal(found.labels[image, :count], expected.labels)
        assert not found.scores[image, count:].any()
    assert min(counts) > 3
