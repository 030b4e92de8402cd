"""The script that asks the questions of the field: its sums, and a training of each kind."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from scipy.stats import spearmanr

import kd_det
from benchmarks import questions
from kd_det.config import ConfigurationError
from kd_det.datasets import generate_shapes
from kd_det.study.results import summarize


def ask(monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['questions', *options])
    questions.main()


def test_gains_are_sorted_by_a_setting(tmp_path, monkeypatch, capsys):
    points = {'none': 0.30, 'none@noise=0.2': 0.20, 'kd': 0.36, 'kd@noise=0.2': 0.30,
              'dkd@model.distill.dkd.beta=0@noise=0.2': 0.25}
    runs = [dict(variant=name, seed=seed, status='finished', metrics=dict(bbox_mAP=value + 0.01 * seed * (name > 'l')))
            for name, value in points.items() for seed in range(2)]
    results = dict(summary=summarize(runs))
    gains = questions.sort_gains(results, 'noise')
    assert list(gains) == ['none', 'kd', 'dkd@dkd.beta=0']
    assert [each['difference'] for each in gains['none'].values()] == pytest.approx([0.0, -10.0])
    assert {value: round(each['difference'], 1) for value, each in gains['kd'].items()} == {0.0: 5.5, 0.2: 9.5}
    of_term = questions.sort_gains(results, 'dkd.beta')
    assert list(of_term) == ['dkd@noise=0.2'] and list(of_term['dkd@noise=0.2']) == [0.0]
    with pytest.raises(ConfigurationError, match='--by temperature: no variant of these results has'):
        questions.sort_gains(results, 'temperature')
    with pytest.raises(ConfigurationError, match='--by shift: no variant of these results has'):
        questions.sort_gains(results, 'shift')
    runs = [dict(run, variant=f"{run['variant']}@without=cat") for run in runs]
    with pytest.raises(ConfigurationError, match="--by without: expected .* numbers, got 'cat' in kd@"):
        questions.sort_gains(dict(summary=summarize(runs)), 'without')
    file = tmp_path / 'results.json'
    file.write_text(json.dumps(results))
    ask(monkeypatch, 'gains', str(file), '--by', 'noise', '--picture', str(tmp_path / 'noise.png'))
    assert '0: +5.5  0.2: +9.5' in capsys.readouterr().out and (tmp_path / 'noise.png').stat().st_size > 5000


def test_gains_are_sorted_by_the_teacher(tmp_path, monkeypatch):
    record = Path('docs/results/bccd_teachers.json')
    maps = ['R18:37.6', 'R50:32.0', 'R101:40.2', 'R50:40.8', 'R18:39.3', 'R50:45.6', 'R50:43.4']
    ask(monkeypatch, 'teachers', str(record), '--teachers', *maps, '--picture', str(tmp_path / 'teachers.png'))
    assert (tmp_path / 'teachers.png').stat().st_size > 5000
    results = json.loads(record.read_text())
    found = questions.sort_by_teacher(results, maps)
    assert {kind: list(by_points) for kind, by_points in found.items()} == {
        'R101': [40.2], 'R18': [37.6, 39.3], 'R50': [32.0, 40.8, 43.4, 45.6]}
    assert found['R50'][43.4] is results['summary']['pkd']['bbox_mAP']
    del results['summary']['pkd']['bbox_mAP']  # it did not finish
    assert 43.4 not in questions.sort_by_teacher(results, maps)['R50']
    with pytest.raises(ConfigurationError, match='--teachers: expected 7, for pkd@.*, got 1'):
        questions.sort_by_teacher(results, maps[:1])


def test_classes_that_nobody_labelled_are_drawn(tmp_path, monkeypatch, capsys):
    results = Path('docs/results/demo_missing_class.json')
    ask(monkeypatch, 'classes', str(results), '--picture', str(tmp_path / 'classes.png'))
    assert (tmp_path / 'classes.png').stat().st_size > 5000
    axes, = questions.draw_classes(json.loads(results.read_text())).axes
    unseen, others = ({label.get_text(): points[0].get_xdata()[row] for row, label in enumerate(axes.get_yticklabels())}
                      for points in axes.containers)
    runs = [run for run in json.loads(results.read_text())['runs'] if run['method'] == 'kd']
    expected = 100 * np.mean([run['class_ap']['striped_disc'] for run in runs])
    assert unseen['kd@without=striped_disc'] == pytest.approx(expected)
    assert others['kd@without=striped_disc'] > expected
    with pytest.raises(ConfigurationError, match='no variant of these results'):
        questions.draw_classes(json.loads(Path('docs/results/bccd_long.json').read_text()))


def test_ranks_are_correlated_as_scipy_does_and_intervals_hold_it():
    random = np.random.default_rng(1)
    numbers = random.normal(size=24).round(1)  # with ties
    points = (numbers + random.normal(size=24)).round(1)
    found = questions.correlate(numbers, points, [f'method {index // 3}' for index in range(24)])
    assert found['rho'] == pytest.approx(spearmanr(numbers, points).statistic)
    assert (found['runs'], found['variants']) == (24, 8)
    for low, high in (found['interval'], found['interval_by_variant']):
        assert low < found['rho'] < high <= 1
    of_three = questions.correlate(numbers, points, [f'method {index // 8}' for index in range(24)])
    assert of_three['interval_by_variant'] is None and of_three['interval'] == found['interval']
    assert np.isnan(questions.find_rho(np.ones(4), np.arange(4.0), np.ones((1, 4))))
    counts = random.integers(0, 3, (1, 24))  # a sample that holds some twice and some not at all
    assert questions.find_rho(numbers, points, counts).item() == pytest.approx(
        spearmanr(numbers.repeat(counts[0]), points.repeat(counts[0])).statistic)


def test_seeds_of_one_variant_are_not_taken_for_as_many_methods():
    """Of four methods whose seeds hardly differ, the interval by variants is the wider one."""
    random = np.random.default_rng(0)
    centres = np.array([0.0, 2.0, 1.0, 3.0]).repeat(20)
    noise = [random.normal(scale=0.01, size=80) for _ in range(2)]
    found = questions.correlate(np.arange(4.0).repeat(20) + noise[0], centres + noise[1], list(map(str, centres)))
    assert np.ptp(found['interval_by_variant']) > 2 * np.ptp(found['interval'])


def test_fidelity_of_the_records_is_correlated(tmp_path, monkeypatch, capsys):
    """Each run once, however many records have it."""
    (tmp_path / 'rows.json').write_text('[{}]')  # a record of another kind
    records = ['docs/results/demo_fidelity.json'] * 2 + [str(tmp_path / 'rows.json')]
    ask(monkeypatch, 'fidelity', *records, '--json', str(tmp_path / 'found.json'), '--picture',
        str(tmp_path / 'found.png'))
    (pair, found), = json.loads((tmp_path / 'found.json').read_text())['pairs'].items()
    assert pair.startswith('fgd_faster_rcnn_r101_r18, teacher 306bd302')
    runs = json.loads(Path('docs/results/demo_fidelity.json').read_text())['runs']
    for kind, kept in (('all', runs), ('taught', [run for run in runs if run['variant'] not in ('none', 'inherit')])):
        each = found[kind]['train']['agreement']
        assert each['runs'] == len(kept) and each['variants'] == len({run['variant'] for run in kept})
        assert each['rho'] == pytest.approx(spearmanr([run['fidelity']['train']['agreement'] for run in kept],
                                                      [run['bbox_mAP'] for run in kept]).statistic)
    assert 'taught runs, val images' in capsys.readouterr().out and (tmp_path / 'found.png').stat().st_size > 5000
    with pytest.raises(ConfigurationError, match='No pair has runs of 4 methods or more'):
        questions.draw_correlations({pair: found}, 'taught')


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    generate_shapes(root, train_images=4, val_images=2, size=64)
    return root


def test_unlabelled_images_come_beside_as_many_labelled_in_as_many_steps(shapes, tmp_path):
    root = tmp_path / 'more'
    assert questions.generate_more(shapes / 'annotations' / 'train.json', root, times=2) == 4
    images = [sorted((each / 'train').iterdir()) for each in (shapes, root)]
    assert [each.read_bytes() for each in images[0]] == [each.read_bytes() for each in images[1][:4]]
    config = Config.fromfile('configs/demo/baseline_retinanet_r18.py')
    seen = {}
    for times in (0, 1, 2):
        made = questions.add_unlabelled(config, root, 4, times)
        dataset = DATASETS.build(made.train_dataloader.dataset)
        samples = [dataset[index]['data_samples'] for index in range(len(dataset))]
        labelled = [sample.img_id for sample in samples if not sample.metainfo.get('unlabelled')]
        others = [sample.img_id for sample in samples if sample.metainfo.get('unlabelled')]
        seen[times] = [made.train_cfg.max_epochs * count for count in (len(labelled), len(others))]
        assert set(labelled) == {1, 2, 3, 4} and set(others) == set(range(5, 5 + 4 * times))
        assert made.param_scheduler[1].T_max == made.train_cfg.max_epochs
    assert seen == {0: [64, 0], 1: [32, 32], 2: [32, 32]}
    with pytest.raises(ConfigurationError, match='3 times as many images do not divide 8 epochs'):
        questions.add_unlabelled(config, root, 4, 3)
    (tmp_path / 'own.json').write_text('{}')
    with pytest.raises(ConfigurationError, match='was not written by kd-det demo'):
        questions.generate_more(tmp_path / 'own.json', root, 1)


def test_students_are_trained_with_unlabelled_images(shapes, tmp_path, monkeypatch, retinanet):
    """Of one epoch; what is finished is not done again."""
    config = Config.fromfile('configs/demo/baseline_retinanet_r18.py')
    config.model = retinanet(classes=6)
    config.train_dataloader.batch_size = 2
    config.dump(tmp_path / 'student.py')
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), tmp_path / 'teacher.pth')
    trained, measured = [], []

    def distill_at_once(*arguments, options, **others):  # a teacher that has learnt nothing would be refused
        trained.append(others['work_dir'].name)
        return kd_det.distill(*arguments, options={**options, 'default_hooks.distill.preflight': None}, **others)

    def measure(student, checkpoint, teacher, split):
        measured.append((Path(checkpoint).parent.name, student.val_dataloader.dataset.data_root, split))
        return dict(found=0.5, cka_8=0.1)

    monkeypatch.setattr(questions, 'distill', distill_at_once)
    monkeypatch.setattr(questions, 'measure_fidelity', measure)
    for _ in range(2):
        ask(monkeypatch, 'unlabelled', *(str(tmp_path / name) for name in ('student.py', 'student.py', 'teacher.pth')),
            '--data-root', str(shapes), '--times', '1', '--methods', 'pseudo_labels', '--seeds', '0', '--epochs', '1',
            '--work-dir', str(tmp_path / 'work'), '--json', str(tmp_path / 'rows.json'), '--picture',
            str(tmp_path / 'rows.png'))
    assert trained == ['pseudo_labels_1_0']
    assert measured == [(name, f'{shapes}/', split) for name in ('plain_0', 'pseudo_labels_1_0')
                        for split in ('val', 'train')]
    rows = json.loads((tmp_path / 'rows.json').read_text())['rows']
    assert list(rows) == ['plain', 'pseudo_labels_1'] and rows['plain']['found_train'] == {'0': 0.5}
    assert list(questions.sort_rows(rows)['pseudo_labels']) == [1.0] and 'cka_8_val' not in rows['plain']
    assert (tmp_path / 'rows.png').stat().st_size > 5000
    with_teacher = Config.fromfile(tmp_path / 'work' / 'pseudo_labels_1_0' / 'student_none.py')
    assert with_teacher.model.pseudo_labels == dict(score=0.5, images='unlabelled')
