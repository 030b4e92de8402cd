"""Budgets: how long trainings take, which seeds fit, and that these are trained and no others."""
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from mmengine.config import Config

import kd_det
from kd_det.cli.benchmark import _duration
from kd_det.cli.main import main
from kd_det.config import ConfigurationError
from kd_det.config.files import load_config
from kd_det.study.planning import (
    STARTUP,
    Estimate,
    Plan,
    estimate_by_runs,
    estimate_by_trial,
    format_duration,
    make_trial,
)
from kd_det.study.records import read_results
from kd_det.study.runs import Run
from kd_det.study.scheduling import Job


def plan(budget, needed, before=0.0):
    return Plan(budget, {'fgd': Estimate(60.0, 'a finished run')}, before, dict(enumerate(needed)),
                dict.fromkeys(range(len(needed)), 3))


@pytest.mark.parametrize('budget, needed, before, fitting', [
    (100, [30, 30, 30], 0, [0, 1, 2]), (100, [30, 30, 30], 20, [0, 1]), (100, [0, 30, 0], 90, [0, 2]),
    (20, [30, 30], 0, []), (90, [30, 30, 30], 0, [0, 1, 2]),
])
def test_whole_seeds_fit_until_the_time_is_up(budget, needed, before, fitting):
    made = plan(budget, needed, before)
    assert made.fitting == fitting and made.total == before + sum(needed)
    estimates, seeds = made.tabulate()
    assert [row[-1] for row in seeds.rows] == ['yes' if seed in fitting else 'no' for seed in range(len(needed))]
    assert estimates.rows == [('fgd', '1 min', 'a finished run')]


@pytest.mark.parametrize('text, seconds', [('2h', 7200), ('90m', 5400), ('1h30m', 5400), ('1.5h', 5400), ('1d', 86400),
                                           ('45s', 45)])
def test_a_budget_is_a_time(text, seconds):
    assert _duration(text) == seconds


@pytest.mark.parametrize('text', ['2', '', 'soon', '2 hours', '0h', '-1h', '30m1h'])
def test_what_is_no_time_is_told(text, capsys):
    with pytest.raises(SystemExit):
        main(['benchmark', 'pair.py', f'--budget={text}'])
    assert f"expected a time such as 2h, 90m or 1h30m, got '{text}'" in capsys.readouterr().err


def test_times_are_written_as_they_are_said():
    assert [format_duration(each) for each in (0, 59, 59.7, 3600, 3660, 86400)] == [
        '0 s', '59 s', '1 min', '1 h', '1 h 1 min', '24 h']


def test_a_trial_tells_of_steps_validations_and_all_that_is_beside_them(pair_files):
    config = load_config('student.py')
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=10, val_interval=3)
    (pair_files / 'scalars.json').write_text('{"loss": 9.0, "data_time": 0.5, "time": 2.5, "step": 2}\n'
                                             '{"coco/bbox_mAP": 0.1, "time": 0.25, "step": 1}\n')
    trial = Run('', '', '', '', str(pair_files / 'scalars.json'), dict(bbox_mAP=0.1), 1, None, 2.0, None, None, 1, 10,
                seconds=40.0)
    # 25 steps of an epoch at batches of 4, and 5 of a validation; 4 validations: after 3, 6, 9 and 10 epochs.
    beside = 40 - 10 * 2.5 - 5 * 0.25
    assert estimate_by_trial(config, trial, (98, 20)).seconds == pytest.approx(
        STARTUP + beside + 250 * 2.5 + 4 * 5 * 0.25)


@pytest.mark.parametrize('loop, expected', [
    (dict(type='IterBasedTrainLoop', max_iters=3000), 900), (dict(type='EpochBasedTrainLoop', max_epochs=24), 1200)])
def test_finished_runs_tell_of_other_lengths_by_what_the_config_counts(loop, expected, tmp_path):
    """MMEngine says of a loop that counts iterations that it has one epoch."""
    file = tmp_path / 'seed0' / 'result.json'
    file.parent.mkdir()
    file.write_text(json.dumps(asdict(Run(
        'i', 's', 'o', 'a.pth', 's.json', dict(bbox_mAP=0.3), 1, None, 0.1, None, None,
        epochs=1 if 'max_iters' in loop else 12, iterations=2000, seconds=600.0))))
    job = Job('kd, seed 1', tmp_path / 'seed1', Config(dict(train_cfg=loop)), [])
    assert estimate_by_runs(job).seconds == expected + STARTUP


def test_a_trial_of_a_few_steps_trains(pair_files, pool_here, monkeypatch):
    """Of the real thing: a teacher's weights of a few steps serve the trial of a distillation."""
    monkeypatch.setattr('kd_det.study.planning.TRIAL_STEPS', 1)
    trial = make_trial(load_config('student.py'))
    assert trial.train_dataloader.dataset.indices == trial.val_dataloader.dataset.indices == 4
    pool = pool_here()
    said = []
    with pytest.raises(ConfigurationError, match='--budget: in 1 s not even the first seed fits, which takes about'):
        kd_det.benchmark(student='student.py', teacher='teacher.py', methods='pkd', seeds=2, budget=1.0,
                         work_dir='work', log=said.append)
    assert pool.trained == [f'{name}: trial of 1 steps' for name in ('teacher', 'none, seed 0', 'pkd, seed 0')]
    assert any('a trial of 1 steps' in text for text in said)
    assert not list((pair_files / 'work').glob('trials')) and not list((pair_files / 'work').glob('*/seed*'))


@pytest.fixture
def run(pair_files, pool_here, pool_of_writing):
    """Runs a benchmark whose trainings are written, and returns the pool, the results and what was said."""

    def run(**arguments):
        pool, said = pool_here(pool_of_writing(lambda job: 30 + 2 * ('pkd' in job.name))), []
        found = kd_det.benchmark(student='student.py', teacher='teacher.py', work_dir='work', log=said.append,
                                 **{**dict(methods='pkd', seeds=4), **arguments})
        return pool, found.results, '\n'.join(said)

    return run


def test_seeds_that_fit_are_trained_and_the_others_told(run):
    """By the trials one takes about 108 s: the teacher and two seeds of two 540, each seed more 216."""
    pool, results, said = run(budget=650.0)
    assert pool.trained[3:] == ['teacher', 'none, seed 0', 'pkd, seed 0', 'none, seed 1', 'pkd, seed 1']
    assert results['seeds'] == [0, 1] and results['budget']['not_run'] == [2, 3]
    assert results['budget']['seconds'] == 650 and results['budget']['needed'] > 900
    assert 'What fits into 11 min' in said and 'Not run, for the budget had no room: seeds 2, 3' in (
        kd_det.merge_results(['work']).tabulate()[0].caption)
    # With more time it goes on, and knows from the finished runs how long the others take.
    pool, results, said = run(budget=2000.0)
    assert pool.trained == ['none, seed 2', 'pkd, seed 2', 'none, seed 3', 'pkd, seed 3']
    assert results['seeds'] == [0, 1, 2, 3] and results['budget']['not_run'] == [] and '2 finished runs' in said
    assert 'budget' not in run()[1] and 'no room' not in read_results('work').tabulate()[0].caption


def test_one_trial_tells_of_all_lengths(run):
    pool, _, said = run(budget=10_000.0, seeds=1, epochs=[1, 3])
    assert [name for name in pool.trained if 'trial' in name] == [
        f'{name}: trial of 10 steps' for name in ('teacher', 'none, seed 0', 'pkd, seed 0')]
    rows = [line.split() for line in said.splitlines() if 'a trial of' in line]
    minutes = {row[0]: int(row[1]) for row in rows}
    assert minutes['pkd@epochs=3'] == pytest.approx(3 * minutes['pkd'], abs=2)


def test_trainings_that_take_longer_than_planned_end_it(run, monkeypatch):
    """By a clock on which each seed takes ten times as long as was planned."""
    times = iter([0.0, 10.0, 20.0, *range(3000, 10**6, 3000)])
    monkeypatch.setattr('kd_det.study.series.time', SimpleNamespace(monotonic=lambda: next(times)))
    pool, results, said = run(budget=2000.0, seeds=3)
    assert 'Seed 1 is left out: the trainings take longer than planned.' in said
    assert results['seeds'] == [0] and results['budget']['not_run'] == [1, 2]


def test_what_was_there_tells_nothing_of_the_pace(run, monkeypatch):
    """By a clock on which a seed that is kept takes a minute."""
    run(seeds=1)
    times = iter([0.0, 10.0, *range(60, 10**6, 60)])
    monkeypatch.setattr('kd_det.study.series.time', SimpleNamespace(monotonic=lambda: next(times)))
    pool, results, said = run(budget=2000.0, seeds=2)
    assert pool.trained == ['none, seed 1', 'pkd, seed 1'] and 'left out' not in said


def test_the_teacher_counts(run):
    with pytest.raises(ConfigurationError, match='takes about 5 min'):
        run(budget=250.0)  # of which the teacher takes 108, and the first seed 216
    assert run(budget=400.0, seeds=1)[1]['teacher'] is not None


def test_what_trains_nothing_has_no_budget(pair_files):
    with pytest.raises(ConfigurationError, match='--budget plans what to train, and --collect trains nothing'):
        kd_det.benchmark(student='student.py', teacher='teacher.py', budget=1.0, collect=True)


def test_a_trial_that_fails_is_told(run, pair_files, pool_of_writing, pool_here):
    class Pool(pool_of_writing):
        def train(self, job, identity, log):
            if job.name.startswith('pkd'):
                return kd_det.study.scheduling.Failure('out of memory', 'log.txt')
            return super().train(job, identity, log)

    pool_here(Pool())
    said = []
    found = kd_det.benchmark(student='student.py', teacher='teacher.py', work_dir='work', methods='pkd', seeds=1,
                             budget=1000.0, log=said.append)
    assert 'its trial failed: out of memory' in '\n'.join(said) and len(found.failed_runs) == 1
