"""Runs with unlabelled images: alone, and with a teacher's boxes; a resumed one ends as the uninterrupted one."""
import copy
import json
from pathlib import Path

import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

import kd_det
from kd_det.config.classes import find_label_names
from kd_det.distillers.supervision import bring_detections
from kd_det.teachers import TeacherError

TERMS = dict(pkd=dict(type='PKD'), fgd=dict(type='FGD'), classes=dict(type='RoIClassification'))


@pytest.fixture
def runner(faster_rcnn, make_runner, run_config, coco_folder, tmp_path):
    """Makes the runner of a student of two classes and a teacher of three, on three labelled images and five others."""
    content = json.loads((coco_folder / 'all.json').read_text())
    boxes, images = content.pop('annotations'), content['images']
    content['categories'].reverse()  # red comes before blue
    (tmp_path / 'unlabelled.json').write_text(json.dumps(dict(content, images=images[3:])))
    (tmp_path / 'labelled.json').write_text(json.dumps(
        dict(content, images=images[:3], annotations=[box for box in boxes if box['image_id'] < 3])))

    def make(name='run', **options):
        dataset = run_config(faster_rcnn()).train_dataloader.dataset.to_dict()
        dataset.update(metainfo=dict(classes=('red', 'blue')), filter_cfg=dict(filter_empty_gt=False))
        parts = [dict(dataset, ann_file=str(tmp_path / 'labelled.json')),
                 dict(dataset, ann_file=str(tmp_path / 'unlabelled.json'),
                      pipeline=[*dataset['pipeline'], dict(type='Unlabelled')])]
        teacher = dict(config=faster_rcnn(neck=12), random_teacher=True, classes=['blue', 'green', 'red'])
        resume = options.pop('resume', False)
        model = dict(type='DetectionDistiller', student=faster_rcnn(classes=2), teacher=teacher, distill=TERMS,
                     **options)
        run = run_config(model, epochs=2, name=name, resume=resume)
        run.train_dataloader.dataset = dict(type='ConcatDataset', datasets=parts)
        return Runner.from_cfg(run)

    return make


def _steps(runner, monkeypatch):
    seen, loss = [], runner.model.loss

    def record(inputs, data_samples):
        seen.append((loss(inputs, data_samples), [sample.metainfo.get('unlabelled', False) for sample in data_samples],
                     [len(sample.gt_instances) for sample in data_samples]))
        return seen[-1][0]

    monkeypatch.setattr(runner.model, 'loss', record)
    runner.train()
    return seen


@pytest.mark.parametrize('pseudo_labels', [None, dict(score=0.2, images='unlabelled')])
def test_a_run_learns_from_both(runner, monkeypatch, pseudo_labels):
    run = runner(pseudo_labels=pseudo_labels)
    steps = _steps(run, monkeypatch)
    assert sorted(flag for _, flags, _ in steps[:2] for flag in flags) == [False] * 3 + [True] * 5
    for losses, flags, counts in steps:
        assert all(count == 0 for flag, count in zip(flags, counts) if flag)  # what the loader gave is as it was
        assert all(losses[f'loss_{name}'].isfinite() and losses[f'loss_{name}'] > 0 for name in TERMS)
        assert ('distill/pseudo_boxes' in losses) == (pseudo_labels is not None and any(flags))
    if pseudo_labels:
        assert sum(losses.get('distill/pseudo_boxes', 0) for losses, *_ in steps) > 0


def test_a_resumed_run_draws_the_same_boxes(runner, stop_after):
    options = dict(pseudo_labels=dict(score=0.2, weight='score'))
    runner('straight', **options).train()
    first = runner('resumed', **options)
    first.register_hook(stop_after(epochs=1), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        first.train()
    again = runner('resumed', resume=True, **options)
    again.train()
    straight, resumed = (torch.load(Path(again.work_dir).parent / name / 'epoch_2.pth', weights_only=True)['state_dict']
                         for name in ('straight', 'resumed'))
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


# ------------------------------------------------------------------------------------------ boxes of a file


@pytest.fixture
def detections(faster_rcnn, run_config, tmp_path):
    """A teacher's weights, and the boxes that kd-det test writes of it on the training images."""
    torch.manual_seed(3)
    model = MODELS.build(faster_rcnn(neck=12))
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'teacher.pth')
    config = run_config(faster_rcnn(neck=12), name='test', val=True)
    for key in ('dataloader', 'evaluator', 'cfg'):
        config[f'test_{key}'] = config[f'val_{key}']
    config.test_cfg = dict(type='TestLoop')
    kd_det.evaluate(config, tmp_path / 'teacher.pth',
                    options={'test_evaluator.outfile_prefix': str(tmp_path / 'found')})
    return str(tmp_path / 'found.bbox.json')


def _supervise(model, batch):
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model._find_supervision(data['inputs'], data['data_samples'])


def test_a_teachers_boxes_in_a_file_are_its_own_pseudo_labels(detections, faster_rcnn, run_config, tmp_path):
    """To the box: those that the teacher finds in the step, where it sees the images as when the file was written."""

    def make(teacher):
        return MODELS.build(dict(type='DetectionDistiller', student=faster_rcnn(), teacher=teacher, distill={},
                                 pseudo_labels=dict(score=0.2, mode='replace')))

    def load(*transforms):
        settings = run_config(faster_rcnn()).train_dataloader.dataset
        settings.pipeline = [*settings.pipeline[:2], *transforms, settings.pipeline[-1]]
        return DATASETS.build(settings)

    live = make(dict(config=faster_rcnn(neck=12), checkpoint=str(tmp_path / 'teacher.pth')))
    filed = make(dict(type='Detections', file=detections))
    seen = load(dict(type='Resize', scale=(64, 64)))
    expected = _supervise(live, pseudo_collate([seen[index] for index in range(8)]))
    assert sum(map(len, expected.boxes)) > 20
    for size, flip in ((64, 0.0), (64, 1.0), (160, 0.0), (160, 1.0)):
        dataset = load(dict(type='Resize', scale=(size, size)), dict(type='RandomFlip', prob=flip))
        bring_detections(filed.pseudo_labels, filed.build_teachers(), dataset)
        filed.match_classes(find_label_names(dataset))
        found = _supervise(filed, pseudo_collate([dataset[index] for index in range(8)]))
        for boxes, labels, own, own_labels in zip(found.boxes, found.labels, expected.boxes, expected.labels):
            own = own * (size / 64)
            if flip:
                own = torch.stack([size - own[:, 2], own[:, 1], size - own[:, 0], own[:, 3]], dim=1)
            assert torch.equal(labels, own_labels) and torch.allclose(boxes, own, atol=1e-3)
        assert torch.equal(found.log['distill/pseudo_boxes'], expected.log['distill/pseudo_boxes'])


@pytest.fixture
def run_with_a_file(retinanet, run_config, coco_folder, tmp_path, monkeypatch):
    """Trains two steps with the ground truth in a file, and returns what each was worth."""
    content = json.loads((coco_folder / 'all.json').read_text())
    (tmp_path / 'results.json').write_text(json.dumps([
        dict(image_id=each['image_id'], category_id=each['category_id'], bbox=each['bbox'], score=1 - each['id'] / 100)
        for each in content['annotations']]))  # the best first, as in NMS

    def train(name='run', unlabelled=False, settings={}, **options):
        model = dict(type='DetectionDistiller', student=retinanet(), distill={}, teacher=dict(
            type='Detections', file=str(tmp_path / 'results.json')), pseudo_labels=dict(nms_iou=1.0, **options))
        run = run_config(model, epochs=1, name=name, preflight={}, **copy.deepcopy(settings))
        if unlabelled:
            run.train_dataloader.dataset.pipeline.append(dict(type='Unlabelled'))
            run.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
        return [losses for losses, *_ in _steps(Runner.from_cfg(run), monkeypatch)]

    return train


def test_a_run_learns_from_boxes_of_a_file(run_with_a_file):
    """The ground truth from a file, for images that nobody labelled, teaches what it does from the annotations.

    So the boxes of the file are none of the ground truth while they have no weight, and workers that start with the
    loop, before any hook runs, bring them.
    """
    settings = {'train_cfg': dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2, val_interval=9),
                'train_dataloader.sampler': dict(_delete_=True, type='InfiniteSampler'),
                'train_dataloader.num_workers': 1, 'train_dataloader.persistent_workers': True}
    own = run_with_a_file('own', weight=dict(type='Start', value=1.0, epochs=9), settings=settings)
    filed = run_with_a_file('filed', unlabelled=True, settings=settings)
    assert len(own) == len(filed) == 2
    for mine, theirs in zip(own, filed):
        assert 'distill/pseudo_boxes' not in mine and theirs['distill/pseudo_boxes'] == 2
        for key in ('loss_cls', 'loss_bbox'):
            assert mine[key] == theirs[key] and sum(mine[key]) > 0


def test_a_file_of_other_boxes_ends_the_run(run_with_a_file, tmp_path):
    results = json.loads((tmp_path / 'results.json').read_text())
    (tmp_path / 'results.json').write_text(json.dumps([
        dict(each, category_id=each['category_id'] % 3 + 1) for each in results]))
    with pytest.raises(TeacherError, match=r'Pre-flight: .* reach mAP 0\..*less than min_map=0\.01'):
        run_with_a_file()
