"""The demo's pairs: one set of data, one schedule, and detectors that look at the same cells."""
import copy

import pytest
import torch

from kd_det.config.composition import distillation_config
from kd_det.config.files import load_config

PAIRS = {
    'baseline_faster_rcnn_r18': 'teacher_faster_rcnn_r101',
    'baseline_retinanet_r18': 'teacher_retinanet_r50',
    'baseline_gfl_r18': 'teacher_gfl_r50',
    'baseline_dino_r18': 'teacher_dino_r50'
}


def load(name: str):
    return load_config(f'kd_det::demo/{name}.py')


@pytest.mark.parametrize('student, teacher', PAIRS.items())
def test_teacher_is_larger_and_trained_longer_and_else_alike(student, teacher):
    from mmdet.registry import MODELS
    student, teacher = load(student), load(teacher)
    sizes = [sum(weight.numel() for weight in MODELS.build(copy.deepcopy(each.model)).parameters())
             for each in (student, teacher)]
    assert sizes[1] > 2 * sizes[0]
    assert teacher.train_cfg.max_epochs == 3 * student.train_cfg.max_epochs
    for key in set(student) - {'model', 'train_cfg', 'param_scheduler'}:
        assert student[key] == teacher[key], key


@pytest.mark.parametrize('other', ['baseline_retinanet_r18', 'baseline_gfl_r18'])
def test_students_differ_in_their_heads_alone(other):
    first, second = load('baseline_faster_rcnn_r18'), load(other)
    assert first.model.backbone == second.model.backbone and first.model.neck == second.model.neck
    assert first.model.data_preprocessor == second.model.data_preprocessor
    strides = [first.model.rpn_head.anchor_generator.strides, second.model.bbox_head.anchor_generator.strides]
    assert strides[0] == strides[1] == [4, 8, 16, 32]
    for key in set(first) - {'model'}:
        assert first[key] == second[key], key


def test_dino_differs_in_its_schedule_too_but_not_in_its_data():
    first, second = load('baseline_faster_rcnn_r18'), load('baseline_dino_r18')
    assert second.model.backbone == dict(first.model.backbone, out_indices=(1, 2, 3))
    assert second.train_dataloader == dict(first.train_dataloader, batch_size=4)
    for key in set(first) - {'model', 'max_epochs', 'train_dataloader', 'train_cfg', 'optim_wrapper',
                             'param_scheduler'}:
        assert first[key] == second[key], key


def test_distilled_student_is_what_kd_det_distill_makes():
    shown = load('fgd_faster_rcnn_r101_r18').model
    made = distillation_config(
        'kd_det::demo/baseline_faster_rcnn_r18.py', shown.teacher.config, shown.teacher.checkpoint, 'fgd')
    assert made.model == shown


@pytest.mark.parametrize('name', PAIRS)
def test_students_train_a_step(name, batch):
    from mmdet.registry import MODELS
    model = MODELS.build(load(name).model)
    model.init_weights()
    data = model.data_preprocessor(batch(), training=True)
    total, _ = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
    assert torch.isfinite(total) and total > 0
