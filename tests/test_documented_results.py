"""The tables of docs/results.md against the records in docs/results: every number, interval, mark and the order."""
import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from benchmarks.questions import FIDELITY
from kd_det.config.fitting import _find_cost
from kd_det.config.methods import MEASURED
from kd_det.study.results import ROUNDING, paired_difference

DOCS = Path(__file__).parents[1] / 'docs'
INHERIT, PLAIN = 'neck and heads inherited, no term', 'plain student'
DINO = {'inherit': 'all but the backbone inherited, no term'}
RECORDS = {'demo_faster_rcnn': {}, 'demo_faster_rcnn_new': {}, 'demo_retinanet': {'rm': 'rm@balance=1'},
           'demo_retinanet_new': {}, 'demo_gfl': {}, 'demo_gfl_new': {}, 'demo_rtmdet': {}, 'bccd_methods': {},
           'bccd_more_seeds': {}, 'demo_dino': DINO, 'demo_dino_new': DINO, 'demo_dino_more_seeds': DINO}
FURTHER_SEEDS_OF = {'bccd_more_seeds': 'bccd_methods', 'demo_dino_more_seeds': 'demo_dino'}


def documented(record: str) -> list[list[str]]:
    """The cells of the first table after the link to a record, without its two lines of heading."""
    text = (DOCS / 'results.md').read_text(encoding='utf-8').partition(f'(results/{record}.json)')[2]
    table = re.search(r'(?:^\|.*\|\n)+', text, re.MULTILINE).group()
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]]


def points(record: str) -> dict[str, dict[int, float]]:
    """Variant -> seed -> mAP in points."""
    by_variant: dict[str, dict[int, float]] = {}
    for run in json.loads((DOCS / 'results' / f'{record}.json').read_text(encoding='utf-8'))['runs']:
        by_variant.setdefault(run['variant'], {})[run['seed']] = 100 * run['metrics']['bbox_mAP']
    return by_variant


def difference(baseline: dict[int, float], other: dict[int, float]) -> str:
    found = paired_difference(baseline, other, ROUNDING)
    text = f'{found.mean:+.1f} ({found.interval[0]:+.1f} to {found.interval[1]:+.1f})'
    return text if found.verdict in ('gain', 'loss') else f'{text}, {found.verdict}'


@pytest.mark.parametrize('record', RECORDS)
def test_a_table_is_its_record(record):
    by_variant = points(record)
    if record in FURTHER_SEEDS_OF:
        before = points(FURTHER_SEEDS_OF[record])
        by_variant = {variant: {**before[variant], **by_seed} for variant, by_seed in by_variant.items()}
    plain, inherit = by_variant['none'], by_variant['inherit']
    names = {'none': PLAIN, 'inherit': RECORDS[record].get('inherit', INHERIT)}
    expected = []
    for variant, by_seed in sorted(by_variant.items(), key=lambda each: -sum(each[1].values())):
        assert by_seed.keys() == plain.keys()
        alike = variant not in names and '@inherit=none' not in variant
        expected.append([names.get(variant) or f'`{RECORDS[record].get(variant, variant)}`',
                         *_seeds_and_mean(by_seed),
                         '' if variant == 'none' else difference(plain, by_seed),
                         difference(inherit, by_seed) if alike else ''])
    assert documented(record) == expected


@pytest.mark.parametrize('record', ['deploy_bccd', 'deploy_demo', 'deploy_rtmdet'])
def test_the_way_to_a_device_is_its_record(record):
    seeds = json.loads((DOCS / 'results' / f'{record}.json').read_text(encoding='utf-8'))['seeds']
    values = {name: {number: seed[name]['map'] for number, seed in enumerate(seeds) if name in seed}
              for name in seeds[0] if not name.endswith(', training')}
    assert documented(record) == [
        [name, *_seeds_and_mean(by_seed), '' if name == 'float' else difference(values['float'], by_seed)]
        for name, by_seed in values.items()]


def test_the_chain_is_its_record():
    seeds = json.loads((DOCS / 'results' / 'deploy_chain_seeds.json').read_text(encoding='utf-8'))['seeds']
    rows = {stage: {int(seed): values[stage] for seed, values in seeds.items()} for stage in seeds['0']}
    assert documented('deploy_chain_seeds') == [
        [stage, *_seeds_and_mean(by_seed), '' if stage == 'distilled' else difference(rows['distilled'], by_seed)]
        for stage, by_seed in rows.items()]


@pytest.mark.parametrize('record', ['bccd_rate', 'bccd_mobilenet'])
def test_another_learning_rate_and_another_start_are_their_records(record):
    by_variant = {name.partition('@')[0]: by_seed for name, by_seed in points(record).items()
                  if '@' in name or record != 'bccd_rate'}
    names = {'none': PLAIN, 'inherit': INHERIT}
    assert documented(record) == [
        [names.get(name, f'`{name}`'), *_seeds_and_mean(by_seed),
         '' if name == 'none' else difference(by_variant['none'], by_seed),
         '' if name in names else difference(by_variant['inherit'], by_seed)]
        for name, by_seed in sorted(by_variant.items(), key=lambda each: -sum(each[1].values()))]


def test_the_published_weights_are_their_record():
    by_variant, expected = points('bccd_paper_weights'), []
    for rate in ('0.001', '0.002'):
        for clip in ('10', '1000000.0'):
            setting = f'@optim_wrapper.optimizer.lr={rate}@optim_wrapper.clip_grad.max_norm={clip}'
            plain, fgd = (by_variant[method + setting] for method in ('none', 'fgd@paper@inherit=none'))
            expected.append([rate, clip if clip == '10' else 'none', *_seeds_and_mean(plain), *_seeds_and_mean(fgd),
                             difference(plain, fgd)])
    assert documented('bccd_paper_weights') == expected


@pytest.mark.parametrize('record, lengths', [('bccd_long', (12, 48)), ('demo_long', (8, 32)),
                                             ('raccoon_long', (12, 48))])
def test_what_remains_is_its_record(record, lengths):
    by_variant, expected = points(record), []
    for length, ending in zip(lengths, ('', '@epochs=')):
        of_length = {name.partition('@')[0]: by_seed for name, by_seed in by_variant.items()
                     if name.partition('@epochs')[1] == ending[:7]}
        names = {'none': PLAIN, 'inherit': INHERIT}
        for name, by_seed in sorted(of_length.items(), key=lambda each: -sum(each[1].values())):
            expected.append([str(length), names.get(name, f'`{name}`'), *_seeds_and_mean(by_seed),
                             '' if name == 'none' else difference(of_length['none'], by_seed),
                             '' if name in names else difference(of_length['inherit'], by_seed)])
    assert documented(record) == expected


def test_parts_under_noise_are_their_record():
    by_variant, expected = points('demo_noise'), []
    of_dkd = {'beta=0': 'target part alone', 'alpha=0@model.distill.dkd.beta=1': 'other classes alone',
              'beta=1': 'both, decoupled', 'form=coupled@model.distill.dkd.beta=1': 'coupled'}
    names = {'none': PLAIN, 'inherit': INHERIT,
             **{f'dkd@model.distill.dkd.{key}': name for key, name in of_dkd.items()}}
    for spoiled, ending in {'none': '', **{f'{share} % wrong': f'@noise={share / 100}' for share in (10, 20, 30)},
                            'moved by 20 %': '@shift=0.2'}.items():
        of_share = {name: by_variant[name + ending] for name in names}
        expected += [[spoiled, shown, *_seeds_and_mean(of_share[name]),
                      '' if name == 'none' else difference(of_share['none'], of_share[name]),
                      difference(of_share['inherit'], of_share[name]) if name.startswith('dkd') else '']
                     for name, shown in names.items()]
    assert documented('demo_noise') == expected


def test_the_scale_of_the_teachers_images_is_its_record():
    plain, same, larger = points('demo_teacher_scale').values()
    assert documented('demo_teacher_scale') == [
        ['1', *_seeds_and_mean(same), difference(plain, same), ''],
        ['1.5', *_seeds_and_mean(larger), difference(plain, larger), difference(same, larger)]]


def test_choosing_names_the_methods_and_costs_of_the_records():
    """Each method once, on the side that its interval says."""
    stored = json.loads(MEASURED.read_text(encoding='utf-8'))
    table = (DOCS / 'choosing.md').read_text(encoding='utf-8').partition('| gain shown |')[2]
    rows = {line.split('[')[1].split(']')[0]: line.strip('|').split('|')[1:] for line in table.splitlines()[2:8]}
    assert rows.keys() >= stored['gains'].keys()
    for kind, gains in stored['gains'].items():
        shown, others = (re.findall(r'`(\w+)` ([+-][\d.]+)(?: \(([\d.]+)\))?', cell) for cell in rows[kind])
        cost = {name: f'{_find_cost(stored["costs"], name, (kind, )):.2f}' for name in gains}
        is_shown = {name: low > 0 for name, (_, low, _) in gains.items()}
        means = {name: f'{mean:+.1f}' for name, (mean, *_) in gains.items()}
        assert sorted(shown) == sorted((name, means[name], cost[name]) for name in gains if is_shown[name])
        assert others == [(name, means[name], '') for name in sorted(gains, key=lambda name: (-gains[name][0], name))
                          if not is_shown[name]]


def test_fidelity_and_accuracy_are_their_record():
    pairs = json.loads((DOCS / 'results' / 'fidelity_and_map.json').read_text(encoding='utf-8'))['pairs']
    expected = {}
    for pair, kinds in pairs.items():
        numbers = kinds.get('taught', {}).get('val')
        if numbers:
            cells = [' '.join([f"{each['rho']:+.2f}", *(['({:+.2f} to {:+.2f})'.format(*each['interval_by_variant'])]
                                                         if each['interval_by_variant'] else [])])
                     for each in (numbers[name] for name in FIDELITY)]
            expected[pair] = [f"{numbers['found']['runs']} of {numbers['found']['variants']}", *cells]
    rows = documented('fidelity_and_map')
    assert sorted(row[1:] for row in rows) == sorted(expected.values()) and len(rows) == 5

def test_unlabelled_images_are_their_record():
    rows = json.loads((DOCS / 'results' / 'demo_unlabelled.json').read_text(encoding='utf-8'))['rows']
    maps, expected = {name: {int(seed): value for seed, value in row['map'].items()} for name, row in rows.items()}, []
    for name, by_seed in maps.items():
        method, _, times = name.rpartition('_')
        agreement = [f"{mean(rows[name][f'agreement_{split}'].values()):.2f}" for split in ('train', 'val')]
        shown = [PLAIN, '0'] if name == 'plain' else [f'`{method}`', times]
        expected.append([*shown, *_seeds_and_mean(by_seed),
                         '' if name == 'plain' else difference(maps['plain'], by_seed),
                         difference(maps[f'{method}_0'], by_seed) if method in ('kd', 'pkd') and times != '0' else '',
                         *agreement])
    assert documented('demo_unlabelled') == expected


def test_the_class_that_nobody_labelled_is_its_record():
    runs = json.loads((DOCS / 'results' / 'demo_missing_class.json').read_text(encoding='utf-8'))['runs']
    unseen, others = {}, {}
    for run in runs:
        of_classes = {name: 100 * value for name, value in run['class_ap'].items()}
        unseen.setdefault(run['variant'], {})[run['seed']] = of_classes.pop('striped_disc')
        others.setdefault(run['variant'], {})[run['seed']] = mean(of_classes.values())
    twin = 'none@without=striped_disc'
    names = {'none': 'plain student, the class labelled', twin: PLAIN, 'inherit': 'neck and head inherited, no term'}
    assert documented('demo_missing_class') == [
        [names.get(variant) or names.get(variant.split('@')[0], f"`{variant.split('@')[0]}`"),
         *_seeds_and_mean(unseen[variant]), *_seeds_and_mean(by_seed),
         '' if variant in names else difference(others[twin], by_seed)] for variant, by_seed in others.items()]


def test_teachers_of_all_strengths_are_their_record():
    by_variant = points('bccd_teachers')
    plain = by_variant.pop('none')
    teachers = {
        'inherit': (f'{INHERIT}, R50 of 36 epochs', '43.4'), 'pkd': ('R50, 36 epochs', '43.4'),
        't_r18_12': ('R18, 12 epochs', '37.6'), 't_r18_48': ('R18, 48 epochs', '39.3'),
        't_r50_4': ('R50, 4 epochs', '32.0'), 'teacher': ('R50, 12 epochs', '40.8'),
        't_r50_72': ('R50, 72 epochs', '45.6'), 't_r101_12': ('R101, 12 epochs', '40.2')}
    assert sorted(documented('bccd_teachers')) == sorted([
        [PLAIN, '', *_seeds_and_mean(plain), ''],
        *([*teachers[name.partition('work_dirs/')[2].partition('/')[0] or name], *_seeds_and_mean(by_seed),
           difference(plain, by_seed)] for name, by_seed in by_variant.items())])


def test_the_temperature_of_sigmoids_is_its_record():
    by_variant = points('demo_sweep_sigmoid_temperature')
    plain, *others = by_variant.values()
    assert list(by_variant)[0] == 'none' and documented('demo_sweep_sigmoid_temperature') == [
        [temperature, *_seeds_and_mean(by_seed), difference(plain, by_seed),
         '' if temperature == '1' else difference(others[0], by_seed)] for temperature, by_seed in zip('124', others)]


@pytest.mark.parametrize('record', ['learners', 'generations'])
def test_learners_are_their_record(record):
    rows = {name: {int(seed): value for seed, value in row['map'].items()} for name, row in json.loads(
        (DOCS / 'results' / f'{record}.json').read_text(encoding='utf-8'))['rows'].items()}
    assert documented(record) == [
        [f'`{name}`', *_seeds_and_mean(by_seed), '' if name == 'plain' else 'one seed' if len(by_seed) == 1 else
         difference(rows['plain'], by_seed)] for name, by_seed in rows.items() if ' peer' not in name]


def test_who_teaches_when_is_its_record():
    rows = json.loads((DOCS / 'results' / 'policies.json').read_text(encoding='utf-8'))['rows']
    values = {name: {int(seed): value for seed, value in row['map'].items()} for name, row in rows.items()}
    assert documented('policies') == [
        [f'`{name}`', *_seeds_and_mean(by_seed),
         '' if name == 'plain' else difference(values['kd' if name.endswith('_trained') else 'plain'], by_seed),
         f"{sum(rows[name]['forwards'].values()) / len(by_seed):.0f}"] for name, by_seed in values.items()]


def test_what_students_start_from_is_its_record():
    rows = json.loads((DOCS / 'results' / 'starts.json').read_text(encoding='utf-8'))['rows']
    values = {name: {int(seed): value for seed, value in row['map'].items()} for name, row in rows.items()}
    twins = {name: f"start_plain_{name.rpartition('_')[2]}" for name in values}
    assert documented('starts') == [
        [f'`{name}`', *_seeds_and_mean(by_seed),
         '' if name == twins[name] else difference(values[twins[name]], by_seed)] for name, by_seed in values.items()]


def test_latencies_are_those_of_their_record():
    rows = json.loads((DOCS / 'results' / 'deploy_latency.json').read_text(encoding='utf-8'))['rows']
    assert documented('deploy_latency') == [
        [Path(row['config']).stem, row['runtime'], str(row['threads']),
         *(f'{each:.1f}' for each in row['milliseconds']),
         '{1:.2f} ({0:.2f} to {2:.2f})'.format(*row['speedup']), f"{row['bytes'][1] / row['bytes'][0]:.3f}"]
        for row in rows]


def test_the_readme_shows_what_remains():
    by_variant = points('bccd_long')
    lines = (DOCS.parent / 'README.md').read_text(encoding='utf-8').replace('*', '').splitlines()
    first = lines.index('| | 12 epochs | against the plain student | 48 epochs | against the plain student |') + 2
    rows = [[cell.strip() for cell in line.split('|')[2:-1]] for line in lines[first:first + 3]]
    assert rows == [[cell for ending in ('', '@epochs=48') for cell in (
        f"{mean(by_variant[name + ending].values()):.1f} ± {stdev(by_variant[name + ending].values()):.1f}",
        '' if name == 'none' else difference(by_variant['none' + ending], by_variant[name + ending]))]
        for name in ('none', 'inherit', 'cwd')]


def test_the_readme_shows_its_record():
    results = json.loads((DOCS / 'results' / 'demo_faster_rcnn.json').read_text(encoding='utf-8'))
    lines = (DOCS.parent / 'README.md').read_text(encoding='utf-8').replace('*', '').splitlines()
    rows = {line.split('|')[1].strip(): [cell.strip() for cell in line.split('|')[3:6]] for line in lines
            if line.startswith('| ') and line.endswith(' M |')}
    of_teacher = results['teacher']['metrics']
    assert rows.pop('teacher R101') == [*(f'{100 * of_teacher[name]:.1f}' for name in ('bbox_mAP', 'bbox_mAP_50')), '']
    for variant, (name, cells) in zip(('none', 'inherit', 'fgd'), rows.items()):
        summary = results['summary'][variant]
        assert cells[:2] == [f"{summary[metric]['mean']:.1f} ± {summary[metric]['std']:.1f}"
                             for metric in ('bbox_mAP', 'bbox_mAP_50')], name
        if variant != 'none':
            gain = summary['bbox_mAP']
            low, high = gain['interval']
            assert cells[2] == f"{gain['difference']:+.1f} (95 %: {low:+.1f} to {high:+.1f})", name
    assert len(rows) == 3


def test_the_sweeps_are_their_records():
    by_variant = points('demo_sweep_temperature')
    expected = [[variant.rpartition('=')[2], *_seeds_and_mean(by_seed), difference(by_variant['none'], by_seed)]
                for variant, by_seed in sorted(by_variant.items()) if variant != 'none']
    assert documented('demo_sweep_temperature') == expected and len(expected) == 4
    by_variant = points('demo_sweep_augment')
    expected = []
    for name, distilled, plain in (('no augmentation', 'fgd@augment=none', 'none'),
                                   ('Mosaic', 'fgd@augment=mosaic', 'none@augment=mosaic'),
                                   ('MixUp', 'fgd@augment=mixup', 'none@augment=mixup')):
        own = by_variant[plain]
        expected.append([name, *_seeds_and_mean(by_variant[distilled]), _seeds_and_mean(own)[1],
                         difference(own, by_variant[distilled])])
    assert documented('demo_sweep_augment') == expected
    by_variant = points('demo_sweep_teachers')
    plain, one = by_variant['none'], by_variant['bckd@teachers=1']
    assert documented('demo_sweep_teachers') == [
        [str(count), *_seeds_and_mean(by_seed), difference(plain, by_seed),
         difference(one, by_seed) if count > 1 else '']
        for count, by_seed in ((count, by_variant[f'bckd@teachers={count}']) for count in (1, 3, 5))]


def test_the_tables_by_the_logs_are_their_records():
    by_run: dict[str, dict[int, float]] = {}
    for run in json.loads((DOCS / 'results' / 'bccd.json').read_text(encoding='utf-8'))['runs']:
        by_run.setdefault(run['run'], {})[run['seed']] = run['bbox_mAP']
    table = documented('bccd')
    assert len(table) == 9
    for name, *cells in table:
        run, _, of_teacher = name.partition(' (')  # its mAP, where it is first named
        assert cells == [f'{by_run[run][seed]:.3f}' if seed in by_run[run] else '' for seed in range(3)], name
        if of_teacher:
            assert of_teacher == f"{by_run[run.rpartition(', ')[2]][0]:.3f})", name

    runs = json.loads((DOCS / 'results' / 'demo.json').read_text(encoding='utf-8'))['runs']
    plain, distilled = ({seed: run['metrics']['bbox_mAP'] for seed, run in enumerate(runs[name])}
                        for name in ('plain', 'distilled'))
    found = paired_difference(plain, distilled)
    low, high = found.interval
    assert documented('demo') == [
        _seeds_and_spread('plain', plain), _seeds_and_spread('FGD', distilled),
        ['difference', *(f'{distilled[seed] - plain[seed]:+.3f}' for seed in range(3)),
         f'{found.mean:+.3f} ({low:+.3f} to {high:+.3f}), {found.verdict}']]


def test_the_table_of_balances_weights_is_its_record():
    """Beside the control's median, how far from it the weights are, kind by kind."""
    summary = json.loads((DOCS / 'results' / 'balance_empty_images.json').read_text(encoding='utf-8'))['summary']
    text = (DOCS / 'methods.md').read_text(encoding='utf-8').partition('(results/balance_empty_images.json)')[2]
    expected = {}
    for row in summary:
        name = f"`{row['term']}`" + (f" of `{row['method']}`" if row['method'] != row['term'] else '')
        shares = f"{row['low_share']:.2f} to {row['high_share']:.2f}"
        expected.setdefault(name, [f"{row['control']:.2f}"]).append(shares)
    assert len(expected) == 4
    for name, cells in expected.items():
        assert f"| {name} | {' | '.join(cells)} |" in text


def _seeds_and_spread(name: str, by_seed: dict[int, float]) -> list[str]:
    values = list(by_seed.values())
    return [name, *(f'{value:.3f}' for value in values), f'{mean(values):.3f} ± {stdev(values):.3f}']


def _seeds_and_mean(by_seed: dict[int, float]) -> list[str]:
    return [', '.join(f'{by_seed[seed]:.1f}' for seed in sorted(by_seed)),
            f'{sum(by_seed.values()) / len(by_seed):.1f}']
