"""Work dirs as they are found: benchmarks, finished or not, and single trainings."""
import json

import pytest
import torch
from mmengine.config import Config

from kd_det.cli.main import main
from kd_det.compat import load_checkpoint
from kd_det.config.files import ConfigurationError
from kd_det.study.report.page import render, report
from kd_det.study.report.studies import load_or_make, read_studies
from kd_det.study.report.summary import _compare_classes, _put_in_words, collect, compare_variants

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


def damage(content, path, value):
    """A copy of what JSON holds with another value at a path; none for DELETED."""
    made = json.loads(json.dumps(content))
    node = made
    for key in path[:-1]:
        node = node[key]
    if value == 'DELETED':
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return made


@pytest.fixture
def results(unfinished):
    """What ``results.json`` of that benchmark would hold."""
    study, = read_studies([unfinished])
    teacher = dict(study.results['runs'][0])
    entries = [dict(entry, fidelity=dict(val=dict(found=0.5))) for entry in study.results['runs']]
    return json.loads(json.dumps(dict(study.results, pair={}, runs=entries, teacher=teacher, further_teachers=[])))


@pytest.mark.parametrize('content, place', [
    (b'', 'cut off in line 1'), (b'{"runs": [\n{"vari', 'cut off in line 2'), (b'\xff\xfe', 'got no text'),
    (b'[]', 'expected an object'), (b'{"runs": 3}', 'is not that of kd-det benchmark'),
    (b'{"runs": 3, "pair": 1, "summary": 2}', 'input should be a valid array'),
])
def test_where_the_results_can_not_be_read_those_of_the_runs_are(content, place, unfinished):
    (unfinished / 'results.json').write_bytes(content)
    study, = read_studies([unfinished])
    assert len(study.runs) == 4 and place in study.notes[0] and "results.json'" in study.notes[0]
    assert study.notes[0].endswith('This is what its runs left.')


@pytest.mark.parametrize('path', [
    ('variant', ), ('seed', ), ('status', ), ('folder', ), ('metrics', ), ('metrics', 'bbox_mAP'), ('checkpoint', ),
    ('parameters', ), ('flops', ), ('seconds_per_iteration', ), ('peak_memory', ), ('fidelity', 'val', 'found')])
@pytest.mark.parametrize('value', ['x', [], {'a': 1}, True, 10**400], ids=['text', 'list', 'dict', 'true', 'huge'])
def test_a_run_of_the_results_that_can_not_be_read_is_left_out_and_named(path, value, unfinished, results):
    is_right = (path[0] in ('variant', 'folder', 'checkpoint') and value == 'x'
                or path[-1] in ('bbox_mAP', 'seconds_per_iteration', 'found') and value == 10**400)  # infinite
    (unfinished / 'results.json').write_text(json.dumps(damage(results, ('runs', 1, *path), value)))
    study, = read_studies([unfinished])
    compare_variants(study)
    if not is_right:
        assert len(study.runs) == 3 and any(f'runs.1.{path[0]}' in note for note in study.notes)


@pytest.mark.parametrize('key', ['summary', 'fidelity', 'teacher', 'further_teachers', 'pair', 'versions', 'machine'])
@pytest.mark.parametrize('value', ['x', [1, 'a'], {'a': 1}, 3, 'DELETED'], ids=str)
def test_what_else_the_results_hold_may_be_anything(key, value, unfinished, results):
    if key in results or value != 'DELETED':
        results = damage(results, (key, ), value)
    (unfinished / 'results.json').write_text(json.dumps(results))
    study, = read_studies([unfinished])
    if study.notes[-1:] and 'is not that of' in study.notes[0]:  # then the runs are read
        return
    made = compare_variants(study)
    assert [row['method'] for row in made['table']['rows']][-2:] == ['none', 'fgd']


@pytest.mark.parametrize('name, content, note', [
    ('result.json', '{"identity": ""', "fgd, seed 1 is left out: '"),
    ('result.json', '[]', 'expected an object of JSON'),
    ('result.json', json.dumps(dict(RESULT, metrics={})), 'input should be a valid number'),
    ('fidelity.json', '{"splits": {"val": 3}}', 'fgd, seed 1: its fidelity is left out'),
    ('fidelity.json', '{', 'cut off in line 1'),
    ('config.py', 'model = dict(\n', 'fgd, seed 1: its curves and boxes are left out'),
    ('config.py', 'raise SystemExit(0)', 'it calls sys.exit(0)'),
    ('config.py', '', 'has no model'),
    ('config.py', None, 'There is no config file'),
    ('log/vis_data/scalars.json', b'\xff\xfe\n' * 3, "scalars.json', line 1: expected a JSON object"),
    ('log/vis_data/scalars.json', None, 'the log (scalars.json) of 1 run(s) is missing'),
], ids=range(11))
def test_a_file_of_a_run_that_can_not_be_read_is_named_and_the_rest_shown(name, content, note, unfinished):
    file = unfinished / 'fgd' / 'seed1' / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    made = collect(read_studies([unfinished])[0])
    assert any(note in each for each in made['notes']), made['notes']
    assert [row['method'] for row in made['table']['rows']] == ['none', 'fgd']


def test_a_benchmark_whose_runs_are_all_unfinished_is_told_of(unfinished):
    for file in unfinished.glob('*/seed*/result.json'):
        file.unlink()
    with pytest.raises(ConfigurationError, match='has no run that has finished and can be read.*none, seed 0 has not'):
        read_studies([unfinished])


def test_other_folders_within_a_benchmark_do_not_count(unfinished):
    for name in ('none/seedling', 'none/seed', 'x/seed-1'):
        (unfinished / name).mkdir(parents=True)
    (unfinished / 'none' / 'seed7').write_text('a file')
    assert len(read_studies([unfinished])[0].runs) == 4


@pytest.mark.parametrize('damaged', ['', '{"identity": ', '[]', '{}', 'IDENTITY', 'CONTENT'])
def test_what_was_kept_for_a_report_is_made_anew_where_it_can_not_be_read(damaged, tmp_path):
    file = tmp_path / 'report' / 'boxes.json'
    assert load_or_make(tmp_path, 'boxes', [1], lambda: [2]) == [2]
    assert load_or_make(tmp_path, 'boxes', [1], lambda: pytest.fail('it is there')) == [2]
    stored = json.loads(file.read_text())
    texts = dict(IDENTITY=json.dumps(dict(identity=stored['identity'])), CONTENT=json.dumps(dict(stored, content=[3])))
    file.write_text(texts.get(damaged, damaged))
    assert load_or_make(tmp_path, 'boxes', [1], lambda: [4]) == [4]


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
