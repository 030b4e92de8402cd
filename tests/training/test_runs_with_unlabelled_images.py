"""Runs with unlabelled images: alone, and with a teacher's boxes; a resumed one ends as the uninterrupted one."""
import json
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

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
