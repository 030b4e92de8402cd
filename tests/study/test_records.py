"""``results.json``: every version is read, what can not be is told; files are joined and compared."""
import json
from pathlib import Path

import pytest
from scipy.stats import ttest_rel

import kd_det
from kd_det.cli.main import main
from kd_det.compat.writing import WritingError
from kd_det.config import ConfigurationError
from kd_det.study.records import VERSION, Results, make_schema, read_results
from kd_det.study.results import paired_difference
from kd_det.study.runs import check_shape

RECORDS = Path(__file__).parents[2] / 'docs' / 'results'
OF_BENCHMARKS = [file.stem for file in sorted(RECORDS.glob('*.json')) for content in [json.loads(file.read_text())]
                 if isinstance(content, dict) and {'runs', 'summary', 'pair', 'data'} <= set(content)]
PAIR = dict(student='a/student.py', teacher='a/teacher.py', checkpoint='teacher.pth', checkpoint_hash='f00d',
            teacher_hash='cafe')


def run(variant, seed, points, **changes):
    made = dict(variant=variant, method=variant, seed=seed, settings={}, twin='none', folder=f'{variant}/seed{seed}',
                status='finished', identity=f'{variant} {seed}', start=f'start {seed}', order=f'order {seed}',
                checkpoint=f'{variant}/seed{seed}/epoch_1.pth', scalars=f'{variant}/seed{seed}/scalars.json',
                metrics=dict(bbox_mAP=points / 100, bbox_mAP_50=points / 50), parameters=10, flops=None,
                seconds_per_iteration=0.1, peak_memory=None, peak_device_memory=None, epochs=1, iterations=2)
    return dict(made, **changes)


def failed(variant, seed):
    return dict(variant=variant, method=variant, seed=seed, settings={}, twin='none', folder=f'{variant}/seed{seed}',
                status='failed', error='out of memory', log='log.txt')


@pytest.fixture
def write(tmp_path):
    """Writes results.json of a folder, as version 1 had it, and returns the folder."""

    def write(name, runs, **changes):
        content = dict(command='kd-det benchmark', versions={}, machine={}, pair=PAIR,
                       data=dict(root=None, hash='d00d'), seeds=[0, 1, 2], teacher=None,
                       runs=runs, summary={})
        (tmp_path / name).mkdir()
        (tmp_path / name / 'results.json').write_text(json.dumps(dict(content, **changes)))
        return tmp_path / name

    return write


def three_seeds(*points, variant='fgd', first=0):
    return [*(run('none', first + index, 30 + index) for index in range(len(points))),
            *(run(variant, first + index, value) for index, value in enumerate(points))]


@pytest.mark.parametrize('record', OF_BENCHMARKS)
def test_records_of_earlier_versions_are_read_and_say_the_same(record):
    stored = json.loads((RECORDS / f'{record}.json').read_text())
    found = read_results(RECORDS / f'{record}.json')
    assert found.results['version'] == VERSION and found.tabulate()
    check_shape(json.loads(json.dumps(found.results)), Results)
    assert all(entry['twin'].startswith('none') for entry in found.results['runs'])
    for variant, metrics in stored['summary'].items():
        for key in ('mean', 'difference'):
            assert found.results['summary'][variant]['bbox_mAP'].get(key) == pytest.approx(metrics['bbox_mAP'].get(key))


def test_there_are_such_records():
    assert len(OF_BENCHMARKS) >= 10


@pytest.mark.parametrize('change, message', [
    (dict(version=VERSION + 1), f'version: expected one of 1 to {VERSION}, got {VERSION + 1}'),
    (dict(version='new'), "got 'new'"),
    (dict(pair={}), 'pair.student: field required'),
    (dict(seeds='three'), "seeds: input should be a valid array, got 'three'"),
    (dict(runs=3), 'runs: input should be a valid array, got 3'),
    (dict(runs=[{}]), 'runs.0'),
    (dict(runs=[run('none', 0, 30, epochs='many')]), 'runs.0.finished.epochs: input should be a valid integer'),
    (dict(runs=[run('none', 0, 30, metrics={})]), 'runs.0.metrics.bbox_mAP: input should be a valid number'),
    (dict(runs=[dict(run('none', 0, 30), status='done')]), 'runs.0'),
    (dict(runs=[dict(failed('none', 0), error=None)]), 'runs.0.failed.error'),
], ids=range(10))
def test_what_does_not_fit_the_schema_is_named(write, change, message):
    folder = write('work', **{**dict(runs=[run('none', 0, 30)]), **change})
    with pytest.raises(ConfigurationError, match='work/results.json') as error:
        read_results(folder)
    assert message in str(error.value)


def test_other_files_are_told_apart(tmp_path):
    with pytest.raises(ConfigurationError, match='not that of kd-det benchmark: it has no summary'):
        read_results(RECORDS / 'demo_fidelity.json')
    with pytest.raises(FileNotFoundError, match='There is no file'):
        read_results(tmp_path)


def test_the_schema_names_every_key():
    schema = make_schema()
    assert set(schema['properties']) == set(Results.__annotations__)
    assert set(schema['required']) == set(schema['properties']) - {'budget', 'sources', 'note'}


def test_more_seeds_are_joined(tmp_path):
    files = [RECORDS / f'{name}.json' for name in ('bccd_methods', 'bccd_more_seeds')]
    found = kd_det.merge_results(files, out=tmp_path / 'six')
    results = read_results(tmp_path / 'six').results
    assert json.dumps(results, sort_keys=True) == json.dumps(found.results, sort_keys=True)
    assert results['seeds'] == [1, 2, 3, 4, 5, 6] and [each['seeds'] for each in results['sources']] == [
        [1, 2, 3], [4, 5, 6]]
    points = {}
    for file in files:
        for each in json.loads(file.read_text())['runs']:
            points.setdefault(each['variant'], {})[each['seed']] = 100 * each['metrics']['bbox_mAP']
    expected = paired_difference(points['none'], points['inherit'])
    summary = results['summary']['inherit']['bbox_mAP']
    assert summary['pairs'] == 6 and summary['interval'] == pytest.approx(expected.interval)
    assert all(each['environment']['versions']['torch'] for each in results['runs'])  # of the files
    assert kd_det.merge_results(files, out=tmp_path / 'six').results['runs'] == found.results['runs']  # again


def test_more_methods_are_joined_and_what_failed_gives_way(write, tmp_path):
    first = write('first', [*three_seeds(33, 34), failed('fgd', 2)])
    second = write('second', [*three_seeds(35, 35, 37, variant='kd'), run('fgd', 2, 36)])
    found = kd_det.merge_results([first, second], out=tmp_path / 'both')
    assert [(each['variant'], each['seed']) for each in found.results['runs']] == [
        (variant, seed) for seed in range(3) for variant in ('none', 'fgd', 'kd')]
    assert not found.failed_runs
    paths = {each['variant']: each['checkpoint'] for each in found.results['runs'] if each['seed'] == 2}
    assert paths == dict(none='../second/none/seed2/epoch_1.pth', fgd='../second/fgd/seed2/epoch_1.pth',
                         kd='../second/kd/seed2/epoch_1.pth')
    with pytest.raises(WritingError, match='is not joint results on this data'):
        kd_det.merge_results([first, second], out=first)


@pytest.mark.parametrize('runs, change, message', [
    (three_seeds(33), dict(data=dict(root=None, hash='other')), 'not of one study: the data: d00d in the first, other'),
    (three_seeds(33), dict(pair=dict(PAIR, checkpoint_hash='beef')), "the teacher's weights: f00d in the first, beef"),
    (three_seeds(33), dict(pair=dict(PAIR, student='b/other.py')), "the student's config: student.py in the first"),
    (three_seeds(33), dict(pair=dict(PAIR, teacher_hash='beef')), "the teacher's config: .* of content cafe in the fi"),
    ([run('fgd', 0, 34)], {}, 'fgd, seed 0 has two values, 33.0 and 34.0 mAP'),
    ([run('fgd', 0, 33, identity='of other settings')], {}, 'fgd, seed 0 has two values'),
    ([run('fgd', 1, 34, epochs=2)], {}, r'fgd is not the same in .*: epochs differs \(1 and 2\)'),
    ([run('fgd', 1, 34, settings=dict(balance=0.5))], {}, 'fgd is not the same in .*: settings differs'),
    ([run('fgd', 1, 34, environment=dict(machine=dict(processes=4)))], {}, r'fgd is not .*: processes differs \(1 and'),
], ids=range(9))
def test_what_is_not_of_one_study_is_not_joined(write, tmp_path, runs, change, message):
    first, second = write('first', three_seeds(33)), write('second', runs, **change)
    with pytest.raises(ConfigurationError, match=message):
        kd_det.merge_results([first, second], out=tmp_path / 'both')
    assert not (tmp_path / 'both').exists()


def test_all_files_have_the_same_teachers(write, tmp_path):
    """The second and the third, too, of which the first has fewer."""

    def further(digest):
        return [dict(checkpoint='second.pth', checkpoint_hash=digest, run=None)]

    files = [write('a', three_seeds(33)),
             *(write(name, three_seeds(34, variant='kd@teachers=2', first=seed), further_teachers=further(name))
               for seed, name in enumerate('bc'))]
    with pytest.raises(ConfigurationError, match=r"b' and '.*c' are not of one study: the teacher's weights: b in"):
        kd_det.merge_results(files)
    assert kd_det.merge_results(files[:2]).results['further_teachers'] == further('b')


def test_of_a_run_in_two_files_both_fidelities_count(write):
    measured = dict(environment=dict(commit=None, versions={}, machine={}))
    first = write('first', [run('none', 0, 30, **measured), run('kd', 0, 31, fidelity=dict(val=dict(found=0.5)))])
    second = write('second', [run('none', 0, 30, fidelity=dict(train=dict(found=0.25)), class_ap=dict(cat=0.1)),
                              run('kd', 0, 31, fidelity=dict(train=dict(found=0.75)))])
    for files in ((first, second), (second, first)):
        plain, kd = kd_det.merge_results(files).results['runs']
        assert kd['fidelity'] == dict(val=dict(found=0.5), train=dict(found=0.75))
        assert plain['fidelity'] == dict(train=dict(found=0.25)) and plain['class_ap'] == dict(cat=0.1)


@pytest.mark.parametrize('name', ['results.md', 'gains.png'])
def test_joint_results_replace_nobodys_file(name, write, tmp_path):
    longer = [run(f'{method}@epochs=2', 0, 30, epochs=2) for method in ('none', 'fgd')]
    first = write('first', [*three_seeds(33, 34), *longer])
    out = tmp_path / 'out'
    out.mkdir()
    (out / name).write_text('mine')
    with pytest.raises(WritingError, match=f'{name}.*that kd_det wrote. Give another folder, or replace'):
        kd_det.merge_results([first], out)
    assert [file.name for file in out.iterdir()] == [name] and (out / name).read_text() == 'mine'
    kd_det.merge_results([first], out, force=True)
    assert kd_det.merge_results([first], out).files[1].read_text().startswith('| method |')


def test_a_folder_elsewhere_is_the_same_pair(write, tmp_path):
    second = write('second', three_seeds(35, first=1), pair=dict(PAIR, student='/elsewhere/student.py'))
    found = kd_det.merge_results([write('first', three_seeds(33)), second], tmp_path / 'both')
    assert found.results['summary']['fgd']['bbox_mAP']['pairs'] == 2


def test_two_variants_are_compared_seed_by_seed(write):
    points = dict(fgd=(33, 34, 36), kd=(34, 34.5, 37.5))
    folder = write('work', [*three_seeds(*points['fgd']), *three_seeds(*points['kd'], variant='kd')[3:],
                            run('kd', 3, 90)])
    found = kd_det.compare_results([folder], ['fgd', 'kd'], size=0.5)
    row, = found.rows.values()
    assert row['bbox_mAP']['difference'] == pytest.approx(1.0) and list(row['bbox_mAP']['by_seed']) == [0, 1, 2]
    assert row['bbox_mAP']['interval'] == pytest.approx(ttest_rel(points['kd'], points['fgd']).confidence_interval())
    assert row['bbox_mAP']['first'] == pytest.approx(103 / 3) and 'bbox_mAP_l' not in row
    needed = {size: kd_det.compare_results([folder], ['fgd', 'kd'], size=size).rows['fgd → kd']['bbox_mAP']['needed']
              for size in (0.25, 0.5, 1.0)}
    assert needed[0.25] > needed[0.5] > needed[1.0] > 2 and row['bbox_mAP']['needed'] == needed[0.5]
    table = found.tabulate()
    assert table.rows[0][:3] == ('fgd → kd', 'mAP', '3') and 'difference of 0.5 points' in table.caption
    assert json.loads(json.dumps(found.to_dict()))['size'] == 0.5 and found._repr_html_().startswith('<table>')


def test_two_files_are_compared_in_all_that_both_have(write):
    before = write('before', three_seeds(33, 34, 36))
    after = write('after', [*three_seeds(34, 35.5, 36.5), run('kd', 0, 40)])
    found = kd_det.compare_results([before, after])
    assert list(found.rows) == ['none', 'fgd'] and not found.notes
    assert found.rows['none']['bbox_mAP']['difference'] == 0
    assert found.rows['fgd']['bbox_mAP']['difference'] == pytest.approx(1.0)
    crossed = kd_det.compare_results([before, after], ['fgd', 'kd'])
    assert crossed.rows['fgd → kd']['bbox_mAP']['by_seed'] == {0: pytest.approx(7.0)}
    assert crossed.rows['fgd → kd']['bbox_mAP']['needed'] is None


def test_runs_that_are_no_pairs_are_told(write):
    other = [dict(each, order='another') for each in three_seeds(34, 35)]
    found = kd_det.compare_results([write('before', three_seeds(33, 34)),
                                    write('after', other, pair=dict(PAIR, student='larger.py'))], ['fgd'])
    assert found.notes == ("The student's config differs: student.py and larger.py",
                           'fgd: seeds 0, 1 saw the images in another order, so that they are no pairs')
    assert found.notes[1] in found.tabulate().caption


@pytest.mark.parametrize('count, variants, message', [
    (1, (), 'expected one file and two variants of it, or two files, got 1 file and 0 variants'),
    (1, ('fgd', 'pkd'), "has no 'pkd': expected one of none, fgd"),
    (2, ('pkd', ), "first' has no 'pkd'"),
])
def test_what_can_not_be_compared_is_told(write, count, variants, message):
    folders = [write(name, three_seeds(33)) for name in ('first', 'second')[:count]]
    with pytest.raises(ConfigurationError) as error:
        kd_det.compare_results(folders, variants)
    assert message in str(error.value)


def test_other_data_and_other_seeds_are_not_compared(write):
    first = write('first', three_seeds(33))
    with pytest.raises(ConfigurationError, match='are of different data'):
        kd_det.compare_results([first, write('second', three_seeds(33), data=dict(root=None, hash='other'))])
    with pytest.raises(ConfigurationError, match='none: no seed has finished in both'):
        kd_det.compare_results([first, write('third', three_seeds(33, first=5))])


def test_what_has_not_finished_is_told_and_the_rest_compared(write):
    folders = [write(name, [*three_seeds(33, 34), *pkd]) for name, pkd in (
        ('first', [run('pkd', 0, 35)]), ('second', [failed('pkd', 0)]))]
    found = kd_det.compare_results(folders)
    assert list(found.rows) == ['none', 'fgd'] and found.notes == ('pkd: no seed has finished in both', )
    with pytest.raises(ConfigurationError, match='pkd: no seed has finished in both, so there is nothing to compare'):
        kd_det.compare_results(folders, ('pkd', ))


def test_settings_of_a_distillation_are_none_of_the_plain_students(write):
    """Earlier versions noted them."""
    settings = {'model.distill.kd.temperature': 1}
    first = write('first', [run('none', 0, 30, settings=settings), run('kd', 0, 33, settings=settings)])
    joint = kd_det.merge_results([first, write('second', three_seeds(34, first=1))]).results
    assert len(joint['runs']) == 4
    with pytest.raises(ConfigurationError, match='kd is not the same'):
        kd_det.merge_results([first, write('third', three_seeds(34, variant='kd', first=1))])


def test_results_of_windows_are_of_the_same_pair(write):
    pair = {**PAIR, 'student': f"C:\\work\\{PAIR['student'].split('/')[-1]}"}
    folders = [write('first', three_seeds(33)), write('second', three_seeds(34, first=1), pair=pair)]
    assert len(kd_det.merge_results(folders).results['runs']) == 4


def test_the_command_shows_joins_and_compares(write, tmp_path, capsys):
    first, second = write('first', three_seeds(33)), write('second', three_seeds(35, 36, first=1))
    both = tmp_path / 'both'
    assert main(['results', 'merge', str(first), str(second), '--out', str(both)]) == 0
    assert f'Saved {both}/results.json, {both}/results.md.' in capsys.readouterr().out.replace('\n', ' ')
    assert main(['results', 'show', str(both), '--markdown']) == 0
    assert capsys.readouterr().out == (both / 'results.md').read_text()
    assert main(['results', 'show', str(both), str(first)]) == 0
    assert capsys.readouterr().out.count('COCO metric') == 2
    assert main(['results', 'compare', str(both), '--variants', 'none', 'fgd', '--json', str(tmp_path / 'c.json')]) == 0
    assert 'none → fgd' in capsys.readouterr().out and json.loads((tmp_path / 'c.json').read_text())['rows']
    assert main(['results', 'schema']) == 0
    assert json.loads(capsys.readouterr().out) == make_schema()


@pytest.mark.parametrize('arguments, message', [
    (['show'], 'expected results.json, or a work dir'),
    (['merge', 'x'], 'expected --out DIR'),
    (['show', 'x', '--out', 'y'], '--out is of kd-det results merge, not of show'),
    (['compare', 'gone', '--variants', 'a', 'b'], "There is no file 'gone'"),
])
def test_wrong_command_lines_are_told(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['results', *arguments]) == 2 and message in capsys.readouterr().err
