"""Work dirs as they are found: benchmarks, finished or not, and single trainings."""
import json

import pytest
import torch
from mmengine.config import Config

from kd_det.cli.main import main
from kd_det.compat import load_checkpoint
from kd_det.config.files import ConfigurationError
from kd_det.study.report.page import render, report
from kd_det.study.report.studies import read_studies
from kd_det.study.report.summary import _compare_classes, _put_in_words, collect

RESULT = dict(identity='', start='', order='', parameters=10, flops=None, seconds_per_iteration=0.1, peak_memory=None,
              peak_device_memory=None, epochs=1, iterations=2, checkpoint='epoch_1.pth',
              scalars='log/vis_data/scalars.json')


def write_run(folder, points: float, config: dict = {}, finished: bool = True):
    (folder / 'log' / 'vis_data').mkdir(parents=True)
    Config(dict(dict(model=dict(type='RetinaNet')), **config)).dump(folder / 'config.py')
    (folder / 'log' / 'vis_data' / 'scalars.json').write_text(
        '{"loss": 2.0, "epoch": 1, "step": 1}\n' + json.dumps({'coco/bbox_mAP': points / 100, 'step': 1}))
    if finished:
        (folder / 'result.json').write_text(json.dumps(dict(RESULT, metrics=dict(bbox_mAP=points / 100))))


@pytest.fixture
def unfinished(tmp_path):
    """A benchmark that was stopped: two seeds of two variants, and one run that has not finished."""
    distilled = dict(model=dict(type='DetectionDistiller', student=dict(type='RetinaNet'),
                                distill=dict(fgd=dict(type='FGD')),
                                teacher=dict(config='teacher.py', checkpoint='teacher.pth')))
    for seed, (plain, fgd) in enumerate(((30, 34), (31, 36))):
        write_run(tmp_path / 'work' / 'none' / f'seed{seed}', plain)
        write_run(tmp_path / 'work' / 'fgd' / f'seed{seed}', fgd, distilled)
    write_run(tmp_path / 'work' / 'pkd' / 'seed0', 0, distilled, finished=False)
    return tmp_path / 'work'


def test_an_unfinished_benchmark_is_told_as_far_as_it_has_come(unfinished):
    study, = read_studies([unfinished])
    assert study.plain == 'none' and {name: len(runs) for name, runs in study.variants.items()} == {'none': 2, 'fgd': 2}
    assert list(study.variants) == ['none', 'fgd']
    assert study.results['summary']['fgd']['bbox_mAP']['difference'] == pytest.approx(4.5)
    assert study.teacher['checkpoint'] == 'teacher.pth'
    assert any('has not finished' in note for note in study.notes) and 'pkd, seed 0 has not finished.' in study.notes


def test_a_finished_benchmark_is_read_from_its_results(unfinished):
    study, = read_studies([unfinished])
    failed = dict(variant='pkd', seed=0, status='failed', error='out of memory', folder='pkd/seed0')
    results = dict(study.results, pair={}, runs=[*study.results['runs'], failed])
    (unfinished / 'results.json').write_text(json.dumps(results))
    study, = read_studies([unfinished])
    assert len(study.runs) == 4 and study.notes == ['pkd, seed 0 failed: out of memory']


def test_without_data_and_checkpoints_the_numbers_and_curves_remain(unfinished):
    study, = read_studies([unfinished])
    made = collect(study)
    assert made['curves']['validation mAP']['fgd'] == [{1: 0.34}, {1: 0.36}]
    assert made['images'] == [] and made['per_class'] is None and made['precision'] is None
    assert any('no val_dataloader' in note for note in made['notes'])
    assert any('--fidelity' in note for note in made['notes'])
    assert [row['method'] for row in made['table']['rows']] == ['none', 'fgd']
    assert made['table']['rows'][1]['Δ mAP'].split(' ± ')[0] == '+4.5'


def test_a_student_that_diverged_is_told_of(unfinished):
    log = unfinished / 'fgd' / 'seed1' / 'log' / 'vis_data' / 'scalars.json'
    log.write_text('{"loss": 2.0, "epoch": 1, "step": 1}\n{"loss": NaN, "epoch": 2, "step": 2}\n')
    made = collect(read_studies([unfinished])[0])
    assert 'fgd diverged: the loss of 1 of 2 runs is not finite, first in epoch 2.' in made['notes']


def test_the_table_is_in_the_order_of_the_differences(unfinished):
    for seed in (0, 1):
        write_run(unfinished / 'afar' / f'seed{seed}', 40 + seed)
    made = collect(read_studies([unfinished])[0])
    assert [each['name'] for each in made['statements']] == ['afar', 'fgd']
    assert [row['method'] for row in made['table']['rows']] == ['none', 'afar', 'fgd']


def test_what_made_a_benchmark_is_told_in_words():
    told = _put_in_words(dict(devices=[], root=None, methods=['a', 'b']))
    assert told == dict(devices='none', root='–', methods='a, b')


def test_classes_are_compared_with_the_plain_student_in_the_same_setting(unfinished):
    accuracies = {variant: {0: dict(per_class=[ap, None]), 1: dict(per_class=[ap + 0.02, None])} for variant, ap in (
        ('none', 0.1), ('none@augment=mixup', 0.3), ('fgd', 0.15), ('fgd@augment=mixup', 0.29), ('teacher', 0.9))}
    made = _compare_classes(read_studies([unfinished])[0], ['cat', 'dog'], accuracies)
    assert {variant: [(each['name'], round(each['difference'], 6)) for each in classes]
            for variant, classes in made.items()} == {
        'none@augment=mixup': [('cat', 20)], 'fgd': [('cat', 5)], 'fgd@augment=mixup': [('cat', -1)]}


def test_fidelity_is_told_of_students_and_of_their_teacher_once(unfinished):
    for variant, found in (('none', 0.5), ('fgd', 0.75)):
        for seed in (0, 1):
            splits = dict(val=dict(found=found + 0.01 * seed, teacher_errors=0.4, teacher_ece=0.125, cka_8=0.5))
            (unfinished / variant / f'seed{seed}' / 'fidelity.json').write_text(json.dumps(dict(splits=splits)))
    made = collect(read_studies([unfinished])[0])
    assert 'teacher_ece' not in made['fidelity']['val']['columns']
    page = render([made])
    assert '<td>0.755 ± 0.007</td>' in page
    assert '<th scope="col">stride 8</th>' in page and '<td>0.500 ± 0.000</td>' in page
    assert '40 of 100 are wrong; its calibration error (ece) is 0.125' in page


def test_single_trainings_claim_no_difference(tmp_path):
    for name in ('plain', 'other'):
        write_run(tmp_path / name, 30, finished=False)
        (tmp_path / name / 'config.py').rename(tmp_path / name / 'log' / 'vis_data' / 'config.py')
    study, = read_studies([tmp_path / 'plain', tmp_path / 'other'])
    assert study.results is None and study.plain is None  # which of the two would it be?
    made = collect(study)
    assert 'no benchmark' in made['verdict'] and made['statements'] == [] and made['table'] is None
    assert read_studies([tmp_path / 'plain'])[0].plain == 'plain'


def test_what_is_no_work_dir_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match='no work dir of a benchmark'):
        read_studies([tmp_path])
    with pytest.raises(FileNotFoundError, match='nowhere'):
        read_studies([tmp_path / 'nowhere'])
    (tmp_path / 'results.json').write_text('{"gain": 1}')  # the demo's
    with pytest.raises(ConfigurationError, match='not that of kd-det benchmark'):
        read_studies([tmp_path])


def test_the_command_makes_a_page_of_a_training(run_config, retinanet, make_runner, tmp_path, capsys):
    """From a run with distillation to report.html: its curves, its term, boxes, attentions and masks."""
    from mmengine.runner import Runner
    distilled = dict(type='DetectionDistiller', student=retinanet(), distill=dict(fgd=dict(type='FGD', levels=(0, 1))),
                     teacher=dict(config=retinanet(depth=50), checkpoint=str(tmp_path / 'teacher' / 'epoch_1.pth')))
    Runner.from_cfg(run_config(retinanet(depth=50), name='teacher', epochs=1)).train()
    Runner.from_cfg(run_config(distilled, name='run', epochs=2, val=True,
                               visualizer=dict(vis_backends=[dict(type='LocalVisBackend')]))).train()
    assert main(['report', str(tmp_path / 'run'), '--images', '2']) == 0
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert 'Learning curves' in page and 'fgd: its parts' in page
    assert page.count('class="picker"') == 1 and page.count('<button type="button" data-image=') == 2
    assert '"fgd, box foreground"' in page and '"attention"' in page and '"teacher"' in page
    detections = tmp_path / 'run' / 'report' / 'detections.json'
    kept = detections.stat().st_mtime_ns
    teacher = load_checkpoint(tmp_path / 'teacher' / 'epoch_1.pth')
    teacher['meta']['dataset_meta']['classes'] = ('red', 'blue', 'green')
    torch.save(teacher, tmp_path / 'teacher' / 'epoch_1.pth')
    made = report(tmp_path / 'run', out=tmp_path / 'one.html', images=1, log=lambda text: None)
    assert list(made.verdicts) == ['run'] and 'no benchmark' in made.verdicts['run'] and made.file.is_file()
    assert json.loads(json.dumps(made.to_dict()))['studies'][0]['variants'] == ['run']
    assert 'no benchmark' in made._repr_html_() and '<iframe srcdoc="&lt;!DOCTYPE html&gt;' in made._repr_html_()
    assert main(['report', str(tmp_path / 'run'), '--show', '5', '--out', str(tmp_path / 'small.html')]) == 0
    assert detections.stat().st_mtime_ns == kept
    shown = (tmp_path / 'small.html').read_text()
    assert shown.count('<button type="button" data-image=') == 1 and 'alt="5.png"' in shown
    assert 'asked for by name' in shown
    assert 'in another order; its outputs follow the names' in capsys.readouterr().out
