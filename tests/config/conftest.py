"""Configs that several tests change."""
import pytest
from mmengine.config import Config


@pytest.fixture
def data_config():
    """Makes a config whose paths begin with a root, and one that does not."""

    def make(root: str) -> Config:
        dataset = dict(type='RepeatDataset', dataset=dict(data_root=root, ann_file='train.json'))
        return Config(dict(data_root=root, train_dataloader=dict(dataset=dataset),
                           val_evaluator=[dict(ann_file=f'{root}val.json')], other='elsewhere/val.json'))

    return make


@pytest.fixture
def distillation():
    """Makes the config of a distillation of terms by name."""

    def make(student: dict, teacher: dict | list, **terms: dict) -> Config:
        return Config(dict(model=dict(type='DetectionDistiller', student=student, teacher=teacher, distill=terms)))

    return make
