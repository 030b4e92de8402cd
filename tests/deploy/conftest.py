"""Detectors whose random weights say something, and files of one, each exported once."""
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import ConfigDict

import kd_det
from kd_det.deploy import checking
from kd_det.registry import build_detector

TEST_CFG = dict(nms_pre=60, score_thr=0.3, conf_thr=0.4, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.6),
                max_per_img=30)
SCALE = (128, 96)  # within which the pipeline brings its images, so that 64 × 64 become 96 × 96
EXPORTS = {
    'fixed.onnx': dict(size=(96, 96)),
    'fixed.xml': dict(size=(96, 96)),
    'open.onnx': dict(dynamic=('batch', 'size'), channels='bgr', dtype='float32'),
    'small.onnx': dict(size=(64, 96)),
    'candidates.onnx': dict(size=(96, 96), suppress=False),
    'plain.pth': {},
}


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


@pytest.fixture
def built(monkeypatch) -> list[str]:
    """The annotation files of the data sets that were built to compare or calibrate on."""
    files, build = [], DATASETS.build

    def remember(config, **options):
        files.append(config['ann_file'])
        return build(config, **options)

    monkeypatch.setattr(checking, 'DATASETS', SimpleNamespace(build=remember))
    return files


class Files(NamedTuple):
    """A detector, and how to get its files by name, see :data:`EXPORTS`."""
    config: str
    checkpoint: str
    folder: Path

    def __getitem__(self, name: str) -> Path:
        file = self.folder / name
        if not file.is_file():
            kd_det.export(self.config, self.checkpoint, file, images=2, **EXPORTS[name])
        return file


@pytest.fixture(scope='session')
def files_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('exported')


@pytest.fixture
def files(files_folder, run_config, lively_detector) -> Files:
    """A RetinaNet with a config that tests it on the images of :func:`coco_folder`."""
    made = Files(str(files_folder / 'run.py'), str(files_folder / 'run.pth'), files_folder)
    if not Path(made.config).is_file():
        detector = lively_detector('RetinaNet', seed=3)
        config = run_config(detector.config, val=True)
        config.val_dataloader.dataset.pipeline[2].update(scale=SCALE, keep_ratio=True)
        config.update({f'test_{key}': config[f'val_{key}'] for key in ('dataloader', 'evaluator')})
        config.test_cfg = dict(type='TestLoop')
        torch.save(dict(meta=dict(dataset_meta=dict(classes=('blue', 'green', 'red'))),
                        state_dict=detector.state_dict()), made.checkpoint)
        config.dump(made.config)
    return made


@pytest.fixture
def photographs(coco_folder) -> list[Path]:
    return [coco_folder / each['file_name'] for each in json.loads((coco_folder / 'all.json').read_text())['images']]
