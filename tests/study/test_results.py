"""From the runs' numbers to what is printed."""
import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp

from kd_det.study.records import BenchmarkResult
from kd_det.study.results import (
    count_seeds,
    format_difference,
    format_markdown,
    mark_twins,
    summarize,
    summarize_gains,
    summarize_lengths,
    tabulate,
    variant_rows,
)
from kd_det.training.pictures import draw_gains


def entry(variant, seed, ap, **changes):
    run = dict(variant=variant, seed=seed, status='finished', start=f'start {seed}', order=f'order {seed}', flops=None,
               metrics=dict(bbox_mAP=ap, bbox_mAP_50=2 * ap, bbox_mAP_l=-1.0), parameters=2_000_000,
               seconds_per_iteration=0.25, peak_memory=2**30, peak_device_memory=None)
    return dict(run, **changes)


@pytest.fixture
def results():
    runs = [entry('none', seed, ap) for seed, ap in enumerate((0.30, 0.32, 0.34))]
    runs += [entry('better', seed, ap) for seed, ap in enumerate((0.32, 0.342, 0.358))]
    runs += [entry('other', seed, ap) for seed, ap in enumerate((0.35, 0.30, 0.34))]
    runs.append(dict(variant='broken', seed=0, status='failed', error='out of memory', log='log.txt'))
    fidelity = {name: dict(mean=value, std=None) for name, value in dict(found=0.8, cka_8=0.9, cka_16=0.7).items()}
    fidelity['found']['std'] = 0.0123
    return dict(teacher=None, runs=runs, summary=summarize(runs), fidelity=dict(val=dict(better=fidelity)))


def test_summary_is_in_points_and_paired(results):
    better = results['summary']['better']['bbox_mAP']
    assert better['mean'] == pytest.approx(34.0) and better['difference'] == pytest.approx(2.0)
    assert list(better['by_seed'].values()) == pytest.approx([2.0, 2.2, 1.8]) and better['verdict'] == 'gain'
    assert 'bbox_mAP_l' not in results['summary']['better']  # no object is large
    assert 'difference' not in results['summary']['none']['bbox_mAP']


def test_an_interval_with_zero_is_never_printed_as_a_gain(results):
    table, _, fidelity = format_markdown(results).partition('Fidelity on val')
    lines = {line.split(' | ')[0].strip('| '): line for line in table.splitlines() if line.startswith('| ')}
    assert '| +2.0 ± 0.5 |' in lines['better']
    assert 'no difference shown (+1.0 ± ' in lines['other']
    assert '0 of 1' in lines['broken'] and 'broken, seed 0 failed: out of memory' in table
    assert '| better | 0.800 ± 0.012 |  |  |  |  |  |  |  | 0.800 |' in fidelity  # found, and the levels' mean CKA


def test_differences_that_are_equal_by_rounding_are_no_gain():
    """CocoMetric gives mAP in steps of 0.1 points, so that two seeds are often alike by chance."""
    points = dict(none=(0.30, 0.313), kd=(0.303, 0.316), pkd=(0.32, 0.333))
    runs = [entry(name, seed, ap) for name, values in points.items() for seed, ap in enumerate(values)]
    summary = summarize(runs)
    assert summary['kd']['bbox_mAP']['verdict'] == 'no difference shown'
    assert summary['pkd']['bbox_mAP']['verdict'] == 'gain'
    low, high = summary['pkd']['bbox_mAP']['interval']
    assert high - low == pytest.approx(2 * 12.706 * 0.1 / 6**0.5 / 2**0.5, rel=1e-3)


def test_console_shows_the_same(results):
    console = Console(width=200, record=True, file=StringIO())
    for table in tabulate(results):
        console.print(table.to_rich())
    shown = console.export_text()
    assert 'compare only where the machine did nothing else' in shown
    assert 'no difference shown (+1.0' in shown and '1.00 GiB' in shown and '2.00 M' in shown and '0.800' in shown


def test_one_seed_is_no_statement():
    runs = [entry('none', 0, 0.3), entry('better', 0, 0.5)]
    assert format_difference(summarize(runs)['better']['bbox_mAP'], 1) == 'one seed, no statement (+20.0)'


def test_a_difference_over_fewer_pairs_than_seeds_tells_how_many():
    failed = dict(variant='none', seed=1, status='failed', error='out of memory', log='log.txt')
    runs = [entry('none', 0, 0.30), failed, entry('none', 2, 0.31)]
    runs += [entry('better', seed, ap) for seed, ap in enumerate((0.34, 0.35, 0.351))]
    summary = summarize(runs)
    better = summary['better']['bbox_mAP']
    assert (summary['none']['bbox_mAP']['seeds'], better['seeds'], better['pairs']) == (2, 3, 2)
    plain, row = variant_rows(dict(teacher=None, runs=runs, summary=summary, fidelity={}))
    assert (plain['seeds'], row['seeds'], row['Δ mAP']) == ('2 of 3', '3', '+4.0 ± 0.6, 2 pairs')


def test_a_number_that_is_none_is_no_seed():
    runs = [entry('none', seed, 0.30 + 0.01 * seed) for seed in range(3)]
    runs += [entry('better', 0, 0.34), entry('better', 1, float('nan')), entry('better', 2, float('inf'))]
    summary = summarize(runs)
    assert summary['better']['bbox_mAP']['mean'] == pytest.approx(34)
    _, row = variant_rows(dict(teacher=None, runs=runs, summary=summary, fidelity={}))
    assert (row['seeds'], row['mAP'], row['Δ mAP']) == ('1 of 3', '34.0', 'one seed, no statement (+4.0)')


def test_runs_that_did_not_begin_like_their_twin_are_marked():
    runs = [entry('none', 0, 0.3), entry('same', 0, 0.3), entry('other', 0, 0.3, start='elsewhere'),
            entry('alone', 1, 0.3)]
    mark_twins(runs)
    assert [run['same_start'] for run in runs] == [True, True, False, None]
    assert [run['same_order'] for run in runs] == [True, True, True, None]


def test_several_teachers_are_one_row(results):
    first, second = entry('teacher', 0, 0.40), entry('teacher', 1, 0.44)
    results.update(teacher=first, further_teachers=[dict(checkpoint='teacher_2.pth', checkpoint_hash='', run=second)])
    row = format_markdown(results).splitlines()[2]
    assert row.startswith('| teacher | 2 | 42.0 ± 2.8 | 84.0 ± 5.7 |')


def test_a_method_is_compared_with_the_plain_student_in_its_setting():
    mixed = '@augment=mosaic'
    runs = [entry('none', 0, 0.30), entry(f'none{mixed}', 0, 0.34), entry(f'better{mixed}', 0, 0.36)]
    summary = summarize(runs)
    assert summary[f'better{mixed}']['bbox_mAP']['difference'] == pytest.approx(2.0)
    assert summary[f'none{mixed}']['bbox_mAP']['difference'] == pytest.approx(4.0)
    mark_twins(runs)
    assert [run['same_order'] for run in runs] == [True] * 3


def test_gains_of_several_lengths_stand_beside_each_other(tmp_path):
    """The twin of each is the plain student that trained as long; the plain one has its own mAP."""
    points = {'none': (0.30, 0.32), 'kd': (0.34, 0.36), 'none@epochs=24': (0.40, 0.42), 'kd@epochs=24': (0.40, 0.44)}
    runs = [entry(name, seed, ap, epochs=24 if '24' in name else 12)
            for name, values in points.items() for seed, ap in enumerate(values)]
    results = dict(teacher=None, runs=runs, summary=summarize(runs), fidelity={})
    lengths = summarize_lengths(results)
    assert list(lengths) == ['none', 'kd'] and list(lengths['kd']) == [12, 24]
    assert [each['difference'] for each in lengths['kd'].values()] == pytest.approx([4.0, 1.0])
    table = next(table for table in tabulate(results) if 'longer' in table.title)
    assert table.columns == ('method', '12 epochs', '24 epochs')
    assert table.rows[0] == ('none', '31.0 ± 1.4', '41.0 ± 1.4')
    assert table.rows[1][2].startswith('no difference shown (+1')
    assert '| kd | +4.0 ± 0.4 | no difference' in format_markdown(results)
    axes, = draw_gains({'kd': lengths['kd']}).axes
    marks = axes.containers[0].lines[0]
    assert marks.get_xdata() == pytest.approx([12, 24]) and marks.get_ydata() == pytest.approx([4.0, 1.0])
    assert not summarize_lengths(dict(results, runs=runs[:4], summary=summarize(runs[:4])))
    BenchmarkResult(tmp_path, results).save()
    assert [file.name for file in BenchmarkResult(tmp_path, results).files if file.is_file()] == [
        'results.json', 'results.md', 'gains.png']
    assert len(BenchmarkResult(tmp_path, dict(results, summary={})).files) == 2
    unfinished = dict(results, runs=runs[:4] + runs[6:], summary=summarize(runs[:4] + runs[6:]))
    assert list(summarize_gains(unfinished)['kd']) == [12]  # the plain student of 24 epochs is not there
    BenchmarkResult(tmp_path / 'new', unfinished).save()
    assert (tmp_path / 'new' / 'gains.png').is_file()
    assert summarize_gains(dict(unfinished, summary=summarize(runs[:2] + runs[6:]))) == {}


def test_the_seeds_that_a_difference_needs_follow_from_the_spread(results):
    """Of simulated studies with so many seeds four in five show the difference, of those with one less not as many."""
    seeds, random = count_seeds(1.5), np.random.default_rng(0)
    shown = {number: np.mean(ttest_1samp(random.normal(1.0, 1.5, (number, 20000)), 0.0).pvalue < 0.05)
             for number in (seeds - 1, seeds)}
    assert shown[seeds - 1] < 0.805 and shown[seeds] > 0.795 and shown[seeds] - shown[seeds - 1] > 0.01
    assert count_seeds(0.0) == 2 and count_seeds(3.0, 2.0) == seeds
    assert count_seeds(50.0) == pytest.approx(2.8**2 * 50**2, rel=0.01)  # by the normal distribution; at once
    caption = tabulate(results)[0].caption
    assert 'in 80 of 100 cases: better 3, other ' in caption  # spreads of 0.2 and 3.6
    assert 'broken' not in caption and caption.splitlines()[1] in format_markdown(results)


def test_a_result_is_json_and_tables_of_a_notebook(results, tmp_path):
    result = BenchmarkResult(tmp_path, results)
    assert [run['variant'] for run in result.failed_runs] == ['broken']
    assert json.loads(json.dumps(result.to_dict()))['summary']['better']['bbox_mAP']['verdict'] == 'gain'
    html = result._repr_html_()
    assert html.count('<table>') == 3 and '>+2.0 ± 0.5</td>' in html and 'no difference shown (+1.0 ± ' in html


def test_classes_that_nobody_labelled_stand_beside_the_others(results):
    """In points; nothing where all classes were labelled."""
    assert not any('saw labelled' in table.title for table in tabulate(results))
    spoiled = '@without=disc'
    runs = [entry('none', seed, 0.3, class_ap=dict(disc=0.4, ring=0.2, star=0.3 + 0.02 * seed)) for seed in range(2)]
    runs += [entry(f'{name}{spoiled}', seed, ap, settings=dict(without=('disc', )),
                   class_ap=dict(disc=ap, ring=0.2, star=0.4)) for name, ap in (('none', 0.0), ('kd', 0.1))
             for seed in range(2)]
    runs.append(entry(f'pkd{spoiled}', 0, 0.1, settings=dict(without=('disc', ))))  # of a version that noted none
    results = dict(teacher=None, runs=runs, summary=summarize(runs), fidelity={})
    table = next(table for table in tabulate(results) if 'saw labelled' in table.title)
    assert table.columns == ('method', 'disc', 'others')
    assert table.rows == [['none', '40.0 ± 0.0', '25.5 ± 0.7'], [f'none{spoiled}', '0.0 ± 0.0', '30.0 ± 0.0'],
                          [f'kd{spoiled}', '10.0 ± 0.0', '30.0 ± 0.0']]
    assert f'| kd{spoiled} | 10.0 ± 0.0 | 30.0 ± 0.0 |' in format_markdown(results)
