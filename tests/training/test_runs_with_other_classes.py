"""Runs whose teacher knows other classes than the student: pre-flight, training, and what the log says."""
import json

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.structures import InstanceData

from kd_det.checks.environment import DiagnosisError
from kd_det.checks.preflight import evaluate_teacher
from kd_det.teachers import Teacher, TeacherError

TEACHERS = ('blue', 'green', 'red')
STUDENTS = ('red', 'blue')  # as the annotation file of these tests orders them


@pytest.fixture
def checkpoint(faster_rcnn, tmp_path):
    torch.manual_seed(7)
    model = MODELS.build(faster_rcnn(neck=12))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=TEACHERS))),
               tmp_path / 'teacher.pth')
    return str(tmp_path / 'teacher.pth')


@pytest.fixture
def reordered(coco_folder, tmp_path):
    """The annotation file with its categories in reverse order."""
    content = json.loads((coco_folder / 'all.json').read_text())
    content['categories'].reverse()
    (tmp_path / 'reordered.json').write_text(json.dumps(content))
    return str(tmp_path / 'reordered.json')


@pytest.fixture
def runner(faster_rcnn, checkpoint, make_runner, reordered):
    """Makes the runner of a student of two classes, and of a teacher of three in another order."""

    def make(distill, **options):
        model = dict(type='DetectionDistiller', student=faster_rcnn(classes=2), distill=distill,
                     teacher=dict(config=faster_rcnn(neck=12), checkpoint=checkpoint))
        data = dict(metainfo=dict(classes=STUDENTS), ann_file=reordered)
        return make_runner(model, val=True, epochs=1, **{
            **{f'{split}_dataloader.dataset.{key}': value for split in ('train', 'val') for key, value in data.items()},
            'val_evaluator.ann_file': reordered, **options})

    return make


def test_training_follows_the_names(runner, monkeypatch):
    terms = dict(fgd=dict(type='FGD'), classes=dict(type='RoIClassification'), boxes=dict(type='RoIRegression'))
    run, said, steps = runner(terms), [], []
    monkeypatch.setattr(run.logger, 'info', lambda message, *_: said.append(str(message)))
    loss = run.model.loss
    monkeypatch.setattr(run.model, 'loss', lambda *args, **kwargs: steps.append(loss(*args, **kwargs)) or steps[-1])
    run.train()
    assert run.model.class_sets.matches[0].of_teacher == (2, 0)
    assert any("Classes: 2 of the student's 2 are among the teacher's 3" in message for message in said)
    assert steps and all(step[f'loss_{name}'].isfinite() for step in steps for name in terms)


def test_preflight_counts_detections_by_name(runner, faster_rcnn, checkpoint, monkeypatch):
    """A teacher that finds every box, in its own labels; those of a class that the student lacks do not matter."""
    run = runner(dict(fgd=dict(type='FGD')))
    teacher = Teacher(faster_rcnn(neck=12), checkpoint, taps=['neck'], student_preprocessor=run.model.data_preprocessor)

    def detect(images, samples):
        for sample in samples:
            truth = sample.gt_instances
            theirs = torch.tensor([2, 0])[truth.labels]
            boxes = torch.cat([truth.bboxes, torch.tensor([[1., 1., 5., 5.]])])
            labels = torch.cat([theirs, torch.tensor([1])])
            sample.pred_instances = InstanceData(bboxes=boxes, labels=labels, scores=torch.ones(len(boxes)))
        return samples

    monkeypatch.setattr(teacher, 'predict', detect)
    skill = evaluate_teacher(run, teacher, images=8)
    assert skill.metrics['coco/bbox_mAP'] == 1 and skill.shared == 1
    teacher.classes = ('blue', 'green', 'crimson')
    skill = evaluate_teacher(run, teacher, images=8)
    assert skill.metrics['coco/bbox_mAP'] == pytest.approx(0.5) and skill.shared == 0.5
    teacher.classes = None
    with pytest.raises(TeacherError, match='3 classes apart, but the data has 2, and neither .* teacher.classes='):
        evaluate_teacher(run, teacher, images=8)


def test_an_evaluator_of_another_order_is_told_before_the_first_step(runner, coco_folder):
    run = runner(dict(fgd=dict(type='FGD')), **{'val_evaluator.ann_file': str(coco_folder / 'all.json')})
    with pytest.raises(DiagnosisError, match='(?s)val evaluator classes: .*0  blue   red'):
        run.train()
    assert run.iter == 0
