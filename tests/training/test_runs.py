"""The calls that train, distil, evaluate, export and diagnose: what they do with their arguments, and their results."""
import copy
import json
import re

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config

import kd_det
from kd_det.compat import load_checkpoint
from kd_det.compat.checkpoint import NotFiniteError
from kd_det.config import ConfigurationError
from kd_det.training import runs
from kd_det.training.pictures import read_scalars

NO_PREFLIGHT = {'default_hooks.distill.preflight': None}


@pytest.fixture
def student_config(run_config, retinanet):
    """Makes a student's config: it trains, validates and tests on eight images, and logs to files."""

    def make(**changes) -> Config:
        config = run_config(retinanet(), val=True, visualizer=dict(vis_backends=[dict(type='LocalVisBackend')]),
                            **changes)
        config.test_dataloader, config.test_evaluator = (copy.deepcopy(config[f'val_{each}'])
                                                         for each in ('dataloader', 'evaluator'))
        config.test_cfg = dict(type='TestLoop')
        return config

    return make


@pytest.fixture
def teacher(retinanet, tmp_path):
    """A teacher's config and weights, in files."""
    model = retinanet(depth=50)
    Config(dict(default_scope='mmdet', model=model)).dump(tmp_path / 'teacher.py')
    torch.save(dict(state_dict=MODELS.build(model).state_dict()), tmp_path / 'teacher.pth')
    return tmp_path / 'teacher.py', tmp_path / 'teacher.pth'


def as_json(result) -> dict:
    """A result after a way through JSON."""
    return json.loads(json.dumps(result.to_dict()))


# ---------------------------------------------------------------- what a result shows


def test_a_result_is_json_and_a_table(tmp_path):
    result = kd_det.RunResult(tmp_path, checkpoint=tmp_path / 'epoch_<3>.pth', metrics={'coco/bbox_mAP': 0.25},
                              epochs=3, iterations=6)
    assert as_json(result) == dict(
        work_dir=str(tmp_path), config=None, checkpoint=str(tmp_path / 'epoch_<3>.pth'), best_checkpoint=None,
        metrics={'coco/bbox_mAP': 0.25}, epochs=3, iterations=6, scalars=[])
    html = result._repr_html_()
    assert '<table' in html and '<img' not in html
    assert all(each in html for each in ('coco/bbox_mAP', '0.25', 'epoch_&lt;3&gt;.pth'))


def test_a_result_with_logs_shows_the_curves_of_its_loss_and_metrics(tmp_path, monkeypatch):
    first, second = tmp_path / 'first.json', tmp_path / 'second.json'
    first.write_text('{"loss": 2.0, "lr": 0.1, "epoch": 1, "step": 1}\n{"coco/bbox_mAP": 0.1, "step": 1}\n')
    second.write_text('{"loss": 1.0, "lr": 0.1, "epoch": 2, "step": 2}\n{"coco/bbox_mAP": 0.3, "step": 2}\n')
    drawn, draw = [], runs.draw_curves
    monkeypatch.setattr(runs, 'draw_curves', lambda panels: drawn.append(panels) or draw(panels))
    result = kd_det.RunResult(tmp_path, metrics={'coco/bbox_mAP': 0.3, 'other': 1.0}, scalars=(first, second))
    assert re.search(r'<table.*</table><img [^>]*src="data:image/png;base64,\w', result._repr_html_(), re.DOTALL)
    assert drawn == [{'loss': {tmp_path.name: [{1: 2.0, 2: 1.0}]},
                      'coco/bbox_mAP': {tmp_path.name: [{1: 0.1, 2: 0.3}]}}]


# ---------------------------------------------------------------- training


def test_a_config_object_is_trained_resumed_and_stays_as_it_is(student_config, retinanet, tmp_path):
    config, work_dir = student_config(epochs=3), tmp_path / 'here'
    before = copy.deepcopy(config.to_dict())
    result = kd_det.train(config, epochs=1, seed=5, work_dir=work_dir)
    assert config.to_dict() == before
    assert (result.work_dir, result.epochs, result.iterations) == (work_dir, 1, 2)
    assert result.checkpoint == work_dir / 'epoch_1.pth' and result.best_checkpoint is None
    assert 'coco/bbox_mAP' in result.metrics and as_json(result)['epochs'] == 1
    MODELS.build(retinanet()).load_state_dict(load_checkpoint(str(result.checkpoint))['state_dict'])
    saved = Config.fromfile(result.config)
    assert result.config.parent == work_dir
    assert (saved.randomness.seed, saved.train_cfg.max_epochs, saved.work_dir) == (5, 1, str(work_dir))

    again = kd_det.train(config, epochs=2, seed=5, work_dir=work_dir, resume=True)
    assert (again.epochs, again.iterations, again.checkpoint) == (2, 4, work_dir / 'epoch_2.pth')
    assert set(read_scalars(again.scalars)['coco/bbox_mAP']) == {1, 2}  # the first run's log and its own

    elsewhere = kd_det.train(config, epochs=2, options={'train_cfg.max_epochs': 1, 'val_cfg': None,
                                                        'val_dataloader': None, 'val_evaluator': None},
                             work_dir=tmp_path / 'elsewhere')
    assert (elsewhere.epochs, elsewhere.metrics) == (1, {})  # options count last
    assert [set(read_scalars(each)['loss']) for each in elsewhere.scalars] == [{1}]
    assert config.to_dict() == before


def test_the_saved_config_holds_what_was_set_and_the_file_that_was_read_stays(student_config, tmp_path):
    file = tmp_path / 'detector.py'
    student_config(epochs=3).dump(file)
    before, options = file.read_text(), {'optim_wrapper.optimizer.lr': 0.02}
    result = kd_det.train(file, epochs=1, options=options, work_dir=tmp_path / 'here')
    assert file.read_text() == before and result.config == tmp_path / 'here' / 'detector.py'
    saved = Config.fromfile(result.config)
    assert saved.optim_wrapper.optimizer.lr == 0.02 and saved.train_cfg.max_epochs == 1


# ---------------------------------------------------------------- distilling, and what follows


def test_distill_then_evaluate_then_export(student_config, retinanet, teacher, tmp_path):
    config = student_config(epochs=3)
    before = copy.deepcopy(config.to_dict())
    result = kd_det.distill(config, *teacher, 'pkd', epochs=1, seed=1, balance=0.5, inherit_by='selection',
                            work_dir=tmp_path / 'distilled', options=NO_PREFLIGHT)
    assert config.to_dict() == before
    assert (result.config, result.epochs) == (tmp_path / 'distilled' / 'student_pkd.py', 1)
    saved = Config.fromfile(result.config)
    assert saved.model.type == 'mmdet.DetectionDistiller' and saved.model.distill.pkd.weight.ratio == 0.5
    assert (saved.randomness.seed, saved.train_cfg.max_epochs) == (1, 1)
    assert 'loss_pkd' in read_scalars(result.scalars)
    student = MODELS.build(retinanet())
    student.load_state_dict(load_checkpoint(str(result.checkpoint))['state_dict'])

    evaluated = kd_det.evaluate(result.config, result.checkpoint)
    assert evaluated.metrics == pytest.approx(result.metrics) and evaluated.metrics
    assert evaluated.work_dir == result.work_dir and evaluated.config.name == 'student_pkd_test.py'
    assert evaluated.checkpoint == result.checkpoint and as_json(evaluated)['checkpoint'] == str(result.checkpoint)

    exported = kd_det.export(result.config, result.checkpoint, tmp_path / 'plain' / 'student.pth')
    assert (exported.detector, exported.config) == ('RetinaNet', tmp_path / 'plain' / 'student.py')
    assert exported.parameters == sum(parameter.numel() for parameter in student.parameters())
    assert Config.fromfile(exported.config).model.type == 'RetinaNet'
    weights = load_checkpoint(str(exported.checkpoint))['state_dict']
    assert all(torch.equal(value, weights[name]) for name, value in student.state_dict().items())
    assert as_json(exported)['checkpoint'] == str(exported.checkpoint)
    assert all(each in exported._repr_html_() for each in ('<table', 'RetinaNet', 'student.pth'))


def test_weights_that_are_not_finite_are_neither_exported_nor_evaluated(student_config, retinanet, tmp_path):
    state, file = MODELS.build(retinanet()).state_dict(), tmp_path / 'student.pth'
    state['bbox_head.retina_cls.bias'][0] = float('nan')
    torch.save(dict(state_dict=state), file)
    said = r"student.pth' of the student holds weights that are not finite: 1 of \d+ tensors, first bbox_head.retina"
    with pytest.raises(NotFiniteError, match=f"^The checkpoint '.*{said}"):
        kd_det.export(student_config(), file, tmp_path / 'out' / 'plain.pth')
    assert not (tmp_path / 'out').exists()
    with pytest.raises(NotFiniteError, match=said):
        kd_det.evaluate(student_config(), file)


def test_several_checkpoints_are_an_ensemble(student_config, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, '_train', lambda config, *_: config)
    file, checkpoint = teacher
    config = kd_det.distill(student_config(), file, [checkpoint, str(checkpoint)], 'pkd',
                            work_dir=tmp_path / 'distilled', options=NO_PREFLIGHT)
    assert config.filename == str(tmp_path / 'distilled' / 'student_pkd_2_teachers.py')
    assert [each.checkpoint for each in config.model.teacher] == [str(checkpoint)] * 2
    assert {name: term.teacher for name, term in config.model.distill.items()} == dict(pkd_1=0, pkd_2=1)


def test_what_can_not_be_distilled_is_told(student_config, teacher, tmp_path):
    file, _ = teacher
    with pytest.raises(ConfigurationError, match='no checkpoint of the teacher'):
        kd_det.distill(student_config(), file, [])
    distillation = Config(dict(model=dict(type='DetectionDistiller')))
    with pytest.raises(ConfigurationError, match='is a distillation already'):
        kd_det.distill(distillation, *teacher)


# ---------------------------------------------------------------- doctor


def test_doctor_looks_at_a_config_object(student_config, tmp_path):
    config = student_config()
    before = copy.deepcopy(config.to_dict())
    diagnosis = kd_det.doctor(config)
    assert isinstance(diagnosis, kd_det.Diagnosis) and config.to_dict() == before
    described = as_json(diagnosis)
    assert described['faults'] == diagnosis.faults == 0
    assert [each['subject'] for each in described['findings']] == [each.subject for each in diagnosis.findings]
    assert {'torch', 'mmdet', 'config'} <= {each.subject for each in diagnosis.findings}

    wrong = kd_det.doctor(config, options={'model.bbox_head.num_classes': 80})
    assert wrong.faults >= 1 and 'num_classes=80' in wrong._repr_html_()
    assert config.to_dict() == before
