"""Suites: their file, data sets in the layouts that are known, the mean over them, and the command to its end."""
import json
from pathlib import Path

import pytest
from mmengine.config import Config
from scipy.stats import ttest_1samp

import kd_det
from kd_det.checks.doctor import check_config
from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.config.files import load_config
from kd_det.config.layouts import list_sets, put_on, read_classes
from kd_det.study.records import BenchmarkResult, Results, read_results
from kd_det.study.results import summarize
from kd_det.study.runs import Run, check_shape
from kd_det.study.suite import SuiteRecord, read_suite, summarize_suite, tabulate_suite
from kd_det.study.suite_file import read_suite_file

ROOT = {'id': 0, 'name': 'things', 'supercategory': 'none'}


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_data_set_has_the_suites_keys_where_it_has_none_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(Path('suites/my.yml'), '''
        datasets:
          - first
          - {name: second, root: /elsewhere/two, student: kd_det::demo/baseline_gfl_r18.py, epochs: [3, 6],
             teacher_checkpoint: two.pth, options: {model.x: 2}}
        folder: ../data
        student: ../configs/student.py
        teacher: [a.py, mmdet::b/b.py]
        epochs: 12
        options: {model.x: 1, model.y: null}
        methods: none,fgd
        seeds: [3, 4]
    ''')
    suite, (first, second) = read_suite_file(file, dict(methods=['kd']))
    assert suite.methods == ['kd'] and suite.seeds == [3, 4]
    assert (first.name, first.root, first.student) == ('first', 'data/first', 'configs/student.py')
    assert first.teacher == ['suites/a.py', 'mmdet::b/b.py'] and first.teacher_checkpoint == [] and first.epochs == 12
    assert first.options == {'model.x': 1, 'model.y': None}
    assert (second.root, second.student) == ('/elsewhere/two', 'kd_det::demo/baseline_gfl_r18.py')
    assert second.teacher_checkpoint == ['suites/two.pth'] and second.epochs == [3, 6]
    assert second.options == {'model.x': 2, 'model.y': None}
    assert read_suite_file(file, {}, 'other')[1][0].root == 'other/first'


def test_what_a_set_names_itself_is_not_mixed_with_the_suites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(Path('my.yml'), '''
        datasets: [{name: first, pair: own.py}, {name: second, teacher: other.py},
                   {name: third, teacher: other.py, teacher_checkpoint: other.pth}]
        student: student.py
        teacher: teacher.py
        teacher_checkpoint: teacher.pth
    ''')
    first, second, third = read_suite_file(file, {})[1]
    assert (first.pair, first.student, first.teacher, first.teacher_checkpoint) == ('own.py', None, None, [])
    assert (second.student, second.teacher, second.teacher_checkpoint) == ('student.py', ['other.py'], [])
    assert third.teacher_checkpoint == ['other.pth']


def test_all_sets_of_a_folder_take_part(tmp_path, make_set):
    make_set(tmp_path / 'sets' / 'ours')
    make_set(tmp_path / 'sets' / 'a roboflow export', roboflow=True)
    (tmp_path / 'sets' / 'no_set').mkdir()
    _, sets = read_suite_file(write(tmp_path / 'my.yml', 'folder: sets'), {})
    assert [each.name for each in sets] == ['a roboflow export', 'ours'] and sets[1].root == str(tmp_path / 'sets/ours')


@pytest.mark.parametrize('text, message', [
    ('a: [1', "is no YAML in line 2: expected ',' or ']'"),
    ('- a', "expected keys and values, such as datasets: […] and methods: none,fgd, got ['a']"),
    ('', 'expected keys and values'),
    ('datasets: [{name: a, epoch: 3}]', 'datasets[0].epoch: there is no such key. Nearest: epochs'),
    ('datasets: [b, {name: a, epochs: 0}]', 'datasets[1].epochs: expected an integer of at least 1'),
    ('datasets: [{root: a}]', 'datasets[0].name: expected'),
    ('datasets: [a, a]', 'expected data sets, no two of the same name'),
    ('datasets: []', 'expected data sets, no two of the same name'),
    ('datasets: 3', 'datasets: expected'),
    ('method: fgd', 'method: there is no such key. Nearest: methods'),
    ('seeds: [1, 1]\ndatasets: [a]', 'seeds: expected'),
    ('methods: fgd', 'datasets: expected the data sets, or a folder that holds them'),
    ('folder: nowhere', "there is no folder '"),
    ('folder: .', "holds no folder with a COCO set: expected annotations/train.json and annotations/val.json, or"),
], ids=range(14))
def test_what_does_not_fit_is_told_with_file_and_key(text, message, tmp_path):
    file = write(tmp_path / 'my.yml', f'{text}\n')
    with pytest.raises(ConfigurationError) as error:
        read_suite_file(file, {})
    assert str(error.value).startswith(f"'{file}'") and message in str(error.value)


def test_the_shipped_suite_is_one():
    _, sets = read_suite_file(Path(__file__).parents[2] / 'configs' / 'suites' / 'real.yml', {}, 'data')
    assert [each.root for each in sets] == ['data/bccd', 'data/raccoon', 'data/coco_mini']
    for each in sets:
        assert load_config(each.student).model.type == load_config(each.teacher[0]).model.type == 'RetinaNet'


# ------------------------------------------------------------------------------------------------------------- layouts


def test_a_config_is_put_on_a_set(pair_files, make_set, faster_rcnn):
    """Its paths, its classes and the heads that tell them; a Roboflow root is no class, and sparse ids stay."""
    categories = [ROOT, *({'id': index, 'name': name, 'supercategory': 'things'}
                          for index, name in ((3, 'blue'), (1, 'green'), (2, 'red'), (40, 'violet')))]
    root = make_set(pair_files / 'set', roboflow=True, categories=categories)
    config = put_on(load_config('student.py'), root)
    assert read_classes(root / 'train/_annotations.coco.json') == ('blue', 'green', 'red', 'violet')
    assert config.model.bbox_head.num_classes == 4 and load_config('student.py').model.bbox_head.num_classes == 3
    dataset = config.val_dataloader.dataset
    assert (dataset.ann_file, dataset.data_prefix.img) == ('valid/_annotations.coco.json', 'valid/')
    assert config.val_evaluator.ann_file == f'{root}/valid/_annotations.coco.json'
    check_config(config, ('train', 'val'))
    config.model = faster_rcnn()
    model = put_on(config, root).model
    assert model.roi_head.bbox_head.num_classes == 4 and 'num_classes' not in model.rpn_head


def test_a_folder_in_no_layout_takes_the_place_of_the_configs_own(pair_files):
    (pair_files / 'other').mkdir()
    config = load_config('student.py')
    moved = put_on(Config(dict(config.to_dict(), data_root=config.train_dataloader.dataset.data_root)), 'other')
    assert moved.train_dataloader.dataset.data_root == 'other/' and moved.val_evaluator.ann_file == 'other/all.json'
    config.train_dataloader.dataset.data_root = ''
    with pytest.raises(ConfigurationError, match="'other' holds no COCO set: expected annotations/train.json and"):
        put_on(config, 'other')
    with pytest.raises(ConfigurationError, match="there is no folder 'nowhere'"):
        put_on(config, 'nowhere')


@pytest.mark.parametrize('text', ['{', '[]', '{"images": []}', '{"annotations": [], "categories": []}', '[1'])
def test_annotations_without_classes_are_told(text, tmp_path):
    with pytest.raises(ConfigurationError, match='train.json'):
        read_classes(write(tmp_path / 'train.json', text))


def test_joined_data_sets_are_refused(pair_files, make_set):
    root, config = make_set(pair_files / 'set'), load_config('student.py')
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[config.train_dataloader.dataset] * 2)
    with pytest.raises(ConfigurationError, match='joins 2 data sets in its train_dataloader'):
        put_on(config, root)
    assert list_sets(pair_files) == [root]


# --------------------------------------------------------------------------------------------------------- the summary


def entry(variant, seed, points):
    return dict(variant=variant, seed=seed, status='finished', metrics=dict(bbox_mAP=points / 100))


@pytest.fixture
def benchmarks(tmp_path):
    """Three data sets of two seeds; on the last kd has failed."""
    gains = dict(one=(2.0, 3.0), two=(4.0, 5.0), three=(1.0, 0.0))
    made = {}
    for name, of_fgd in gains.items():
        runs = [entry('none', seed, 30 + seed) for seed in (0, 1)]
        runs += [entry('fgd', seed, 30 + seed + gain) for seed, gain in enumerate(of_fgd)]
        runs += [entry('kd', seed, 31 + seed) for seed in (0, 1) if name != 'three']
        made[name] = BenchmarkResult(tmp_path / name, dict(runs=runs, summary=summarize(runs)))
    return made


def test_the_mean_gain_counts_each_data_set_once(benchmarks):
    summary = summarize_suite(benchmarks)
    mean = summary['fgd']['mean']
    assert mean['by_dataset'] == pytest.approx(dict(one=2.5, two=4.5, three=0.5)) and mean['datasets'] == 3
    assert mean['difference'] == pytest.approx(2.5) and mean['mean'] == pytest.approx(33.0)
    assert mean['interval'] == pytest.approx(ttest_1samp([2.5, 4.5, 0.5], 0).confidence_interval())
    assert mean['verdict'] == 'no difference shown' and 'difference' not in summary['none']['mean']
    assert summary['kd']['mean']['datasets'] == 2 and summary['kd']['mean']['difference'] == pytest.approx(1.0)
    alone = summarize_suite({'one': benchmarks['one']})['fgd']['mean']
    assert alone['interval'] is None and alone['verdict'] == 'one data set, no statement'


def test_the_tables_tell_each_data_set_and_the_mean(benchmarks):
    datasets = [*(dict(name=name) for name in benchmarks), dict(name='four', error='No teacher.')]
    points, gains = tabulate_suite(dict(datasets=datasets, summary=summarize_suite(benchmarks),
                                        budget=dict(not_run=[2])))
    assert points.columns == gains.columns == ('method', 'one', 'two', 'three', 'four', 'mean')
    assert points.rows[0] == ['none', '30.5 ± 0.7', '30.5 ± 0.7', '30.5 ± 0.7', '–', '30.5, 3 of 4']
    fgd, kd = gains.rows
    assert fgd[1] == 'no difference shown (+2.5 ± 6.4)' and fgd[-1] == ('no difference shown (+2.5 ± 5.0), '
                                                                         '3 of 4 data sets')
    assert kd[1] == '+1.0 ± 0.4' and kd[3] == '–' and kd[-1].endswith(', 2 of 4 data sets')
    assert 'Data sets by which a difference of 1 point would be shown in 80 of 100 cases: fgd ' in gains.caption
    assert 'four: nothing. No teacher.' in gains.caption and 'no room: seeds 2' in gains.caption


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def suite_file(pair_files, make_set):
    """Two sets: one in our layout, and one of two classes as Roboflow exports it."""
    make_set(pair_files / 'sets' / 'ours')
    two = [ROOT, dict(id=1, name='cold', supercategory='things'), dict(id=2, name='green', supercategory='things'),
           dict(id=3, name='warm', supercategory='things'), dict(id=9, name='none here', supercategory='things')]
    make_set(pair_files / 'sets' / 'theirs', roboflow=True, categories=two)
    return write(pair_files / 'my.yml', '''
        student: student.py
        teacher: teacher.py
        methods: inherit
        seeds: 1
        options: {default_hooks.distill.preflight: null}
        datasets: [ours, {name: theirs, epochs: 1}]
    ''')


def test_a_suite_from_its_file_to_its_page(suite_file, pool_here, pool_of_writing, tmp_path, capsys):
    """Every data set has an ordinary benchmark on its own classes; what has finished is kept; the page shows all.

    Trained is on the second set, whose classes are others than the config's.
    """
    class Pool(pool_of_writing):
        def train(self, job, identity, log):
            kind = super() if 'ours' in job.folder.parts else super(pool_of_writing, self)
            return kind.train(job, identity, log)

    pool = pool_here(Pool())
    command = ['benchmark', '--suite', 'my.yml', '--data', 'sets', '--work-dir', 'work']
    assert main(command) == 0
    said = capsys.readouterr().out
    assert 'What each gains, in points of mAP' in said and 'Saved work/suite.json, work/suite.md.' in said
    assert pool.trained == ['teacher', 'none, seed 0', 'inherit, seed 0'] * 2
    suite = json.loads((tmp_path / 'work' / 'suite.json').read_text())
    check_shape(suite, SuiteRecord)
    for name in ('ours', 'theirs'):
        found = read_results(tmp_path / 'work' / name).results
        written = json.loads((tmp_path / 'work' / name / 'results.json').read_text())
        assert set(written) <= set(Results.__annotations__) and written['version'] == 2
        declared = {*Run.__annotations__, *('variant method seed settings twin folder status same_start same_order '
                                           'fidelity'.split())}
        assert all(set(run) <= declared and run['seconds'] > 0 for run in written['runs'])
        point = suite['summary']['inherit']['by_dataset'][name]['mean']
        assert point == found['summary']['inherit']['bbox_mAP']['mean']
    config = load_config('work/theirs/inherit/seed0/config.py')
    assert config.model.student.bbox_head.num_classes == 4 == load_config(
        config.model.teacher.config).model.bbox_head.num_classes
    assert suite['summary']['inherit']['mean']['datasets'] == 2
    assert (tmp_path / 'work' / 'suite.md').read_text().startswith('| method | ours | theirs | mean |')

    pool = pool_here()
    found = kd_det.benchmark_suite('my.yml', data_root='sets', work_dir='work', log=lambda text: None)
    assert pool.trained == [] and json.loads(json.dumps(found.to_dict()))['summary'] == suite['summary']
    assert found.benchmarks['ours'].work_dir == Path('work/ours') and found._repr_html_().count('<table>') == 2
    assert read_suite(tmp_path / 'work').results['summary'] == found.results['summary']
    assert main(['results', 'show', 'work', '--markdown']) == 0
    assert capsys.readouterr().out == (tmp_path / 'work' / 'suite.md').read_text()

    pool.collect = True
    assert kd_det.benchmark_suite('my.yml', data_root='sets', work_dir='work', collect=True,
                                  log=lambda text: None).results['summary'] == found.results['summary']

    made = kd_det.report('work', images=0, log=lambda text: None)
    page = made.file.read_text(encoding='utf-8')
    assert [each['name'] for each in made.studies] == ['theirs'] and len(made.suites) == 1
    assert page.index('What each gains, in points of mAP') < page.index('What is missing') < page.index('Does it help?')
    assert '&#39;work/ours&#39; has no run that has finished and can be read' in page  # they are but written


def test_a_set_whose_teacher_fails_is_told_and_stops_no_other(suite_file, pool_here, pool_of_writing, tmp_path, capsys):
    class Pool(pool_of_writing):
        def train(self, job, identity, log):
            if job.folder.parts[-2:] == ('ours', 'teacher'):
                return kd_det.study.scheduling.Failure('out of memory', 'log.txt')
            return super().train(job, identity, log)

    pool = pool_here(Pool(lambda job: 30 + 2 * ('inherit' in job.name)))
    command = ['benchmark', '--suite', 'my.yml', '--data', 'sets', '--work-dir', 'work']
    assert main([*command, '--seeds', '2', '--methods', 'none,fgd']) == 1
    assert 'ours: Without a teacher there is nothing to compare.' in capsys.readouterr().out
    assert 'fgd, seed 1' in pool.trained and 'inherit, seed 0' not in pool.trained
    suite = read_suite(tmp_path / 'work')
    assert [each.get('error', '')[:17] for each in suite.results['datasets']] == ['Without a teacher', '']
    assert suite.failed_runs[0]['dataset'] == 'ours' and list(suite.benchmarks) == ['theirs']


@pytest.mark.parametrize('options, message', [
    (['--student', 'student.py'], '--student: the file of --suite names the pairs'),
    (['--data', 'nowhere'], "'my.yml', ours: there is no folder 'nowhere/ours'"),
    (['--data', 'sets', '--methods', 'fgdd'], "'my.yml', ours: "),
    (['--data', 'sets', '--budget', 'soon'], "expected a time such as 2h, 90m or 1h30m, got 'soon'"),
    (['--suite', 'gone.yml'], "There is no suite 'gone.yml'"),
])
def test_what_can_not_serve_is_told_before_anything_trains(suite_file, pool_here, options, message, capsys):
    pool = pool_here()
    try:
        status = main(['benchmark', '--suite', 'my.yml', '--work-dir', 'work', *options])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2 and message in capsys.readouterr().err and not pool.trained
