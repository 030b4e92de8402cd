"""The graph finds what MMDetection's own decoding finds, for every family."""
import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import PAAHead

from kd_det.config import ConfigurationError
from kd_det.config.choices import DETECTOR_FAMILIES
from kd_det.deploy.checking import TOLERANCES, match, predict_with
from kd_det.deploy.graph import DetectorGraph


@pytest.mark.parametrize('size', [(64, 96), (70, 90)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('family', DETECTOR_FAMILIES)
def test_the_graph_finds_what_mmdetection_finds(family, size, lively_detector):
    detector = lively_detector(family)
    images = np.random.default_rng(1).integers(0, 256, (2, 3, *size), np.uint8)
    with torch.no_grad():
        found = DetectorGraph(detector, 'bgr')(torch.from_numpy(images))
    found = type(found)(*(each.numpy() for each in found))
    expected = predict_with(detector, 'bgr')(images)
    for image in range(2):
        one, other = (type(each)(*(part[image:image + 1] for part in each)) for each in (found, expected))
        rows = match(one, other, TOLERANCES['float32']._replace(pixels=1e-3, score=1e-5, reach=1))
        assert len(rows) > 3 and (rows >= 0).all()
        assert (one.scores[0] > 0).sum() == len(rows) and (np.diff(one.scores[0]) <= 0).all()


@pytest.mark.parametrize('size', [(64, 96), (70, 90)], ids=lambda size: f'{size[0]}x{size[1]}')
@pytest.mark.parametrize('family', ['RetinaNet', 'YOLOX', 'Faster R-CNN'])
def test_open_sizes_change_nothing(family, size, lively_detector):
    detector = lively_detector(family)
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        for fixed, opened in zip(*(DetectorGraph(detector, fixed=fixed)(images) for fixed in (True, False))):
            assert torch.equal(fixed, opened[:, :fixed.shape[1]])


def test_the_order_of_channels(lively_detector):
    detector = lively_detector('RetinaNet')
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        found, flipped = DetectorGraph(detector, 'rgb')(images), DetectorGraph(detector, 'bgr')(images.flip(1))
        assert all(map(torch.equal, found, flipped))
        assert not torch.equal(found.scores, DetectorGraph(detector, 'rgb')(images.flip(1)).scores)


def test_it_takes_a_copy(lively_detector):
    detector = lively_detector('Faster R-CNN')
    forward = detector.roi_head.bbox_roi_extractor.forward
    DetectorGraph(detector)
    assert detector.roi_head.bbox_roi_extractor.forward == forward


def test_regions_of_one_level_or_none(lively_detector):
    """An extractor that is asked for no region of a level, whatever an exporter saw."""
    detector = lively_detector('Faster R-CNN')
    extractor = DetectorGraph(detector).detector.roi_head.bbox_roi_extractor
    features = [torch.randn(1, 16, 64 // 2**level, 64 // 2**level) for level in range(4)]
    for rois in ([[0., 4, 4, 20, 30], [0, 1, 2, 9, 9]], [[0., 0, 0, 600, 600], [0, 1, 1, 4, 4]], []):
        rois = torch.tensor(rois).view(-1, 5)
        assert torch.equal(extractor(features, rois), detector.roi_head.bbox_roi_extractor(features, rois))


def _with_soft_suppression(detector):
    detector.bbox_head.test_cfg.nms = dict(type='soft_nms', iou_threshold=0.5)


def _with_a_head_that_votes(detector):
    detector.bbox_head.__class__ = type('VotingHead', (PAAHead, ), {})


def _with_a_forward_of_its_own(detector):
    kind = type(detector.bbox_head)
    detector.bbox_head.__class__ = type('OwnHead', (kind, ), dict(forward=lambda self, features: features))


def _without_suppression(detector):
    del detector.bbox_head.test_cfg['nms']


def _without_test_settings(detector):
    detector.bbox_head.test_cfg = None


def _with_branches(detector):
    detector.test_branch_idx = -1  # of a TridentNet


def _with_language(detector):
    detector.language_model = torch.nn.Identity()


@pytest.mark.parametrize('change, said', [
    (_with_soft_suppression, "expected 'nms', got 'soft_nms'"), (_with_a_head_that_votes, 'VotingHead'),
    (_without_suppression, r'test_cfg.nms: expected dict\(.*, got None'), (_without_test_settings, 'got no test_cfg'),
    (_with_branches, 'Export one: --cfg-options model.backbone.test_branch_idx=1'),
    (_with_a_forward_of_its_own, 'OwnHead'), (_with_language, 'reads more than an image')])
def test_what_can_not_be_exported_is_named(change, said, lively_detector):
    detector = lively_detector('ATSS')
    change(detector)
    with pytest.raises(ConfigurationError, match=f'A SingleStageDetector can not be exported: .*{said}'):
        DetectorGraph(detector)
