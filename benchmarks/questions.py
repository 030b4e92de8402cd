"""Questions of the field, asked of detectors: gains by a setting or teacher, fidelity, more unlabelled images.

Usage: python -m benchmarks.questions gains RESULTS --by noise --picture PNG
       python -m benchmarks.questions teachers RESULTS --teachers KIND:MAP … --picture PNG
       python -m benchmarks.questions classes RESULTS --picture PNG
       python -m benchmarks.questions fidelity [RECORD …] [--json FILE] [--picture PNG]
       python -m benchmarks.questions unlabelled STUDENT TEACHER CHECKPOINT [--json FILE] [--picture PNG]

``gains`` draws results.json of a benchmark or a sweep against one of its settings, ``teachers`` against the mAP of the
teacher that each variant has, and ``classes`` the AP of classes that some never saw labelled beside that of the others.
``fidelity`` takes all records that hold fidelity, by default those of docs/results, and correlates it with mAP.
``unlabelled`` trains, on generated images; what is finished in its work dir is not done again, and a training that was
interrupted goes on.
"""
from __future__ import annotations

import copy
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from mmengine.config import Config

from benchmarks.trained_rows import collect_rows, keep_maps, train_once, write_rows
from kd_det import RunResult, distill, train
from kd_det.compat.writing import write_whole
from kd_det.config import ConfigurationError
from kd_det.config.files import load_config, set_data_root
from kd_det.config.options import set_epochs
from kd_det.datasets import generate_shapes
from kd_det.study.fidelity import measure_fidelity
from kd_det.study.records import read_results
from kd_det.study.results import summarize_classes
from kd_det.study.variants import PLAIN
from kd_det.training.pictures import draw_gains, escape_formula, save_figure

RECORDS = Path('docs/results')
FIDELITY = ('found', 'copied_errors', 'agreement', 'teacher_iou', 'class_kl', 'student_ece', 'cka')
UNTAUGHT = (PLAIN, 'inherit')  # methods without a term
AT_ZERO = ('noise', 'shift')  # settings that a variant without them has at 0
DRAWS = 2000  # of a bootstrap
FEWEST = 4  # variants that one draws from


# ------------------------------------------------------------------------------------------------- gains by a setting


def sort_gains(results: Mapping[str, Any], setting: str) -> dict[str, dict[float, dict]]:
    """Sorts the differences of a benchmark by the value of a setting.

    Args:
        results: What ``results.json`` holds.
        setting: Its name, such as ``noise``; of a dotted key the last parts are enough: ``kd.temperature``.

    Returns:
        Variant without the setting, terms by their own names -> value -> ``difference`` and ``interval``, of mAP in
        points, against its twin; nothing where that has no number. Of the plain student, whose twin is the one without
        the setting, that is what the setting does by itself.
    """
    found: dict[str, dict[float, dict]] = {}
    for variant, metrics in results['summary'].items():
        parts = [part.partition('=') for part in variant.split('@')]
        values = [value for key, _, value in parts if f'.{key}'.endswith(f'.{setting}')]
        name = '@'.join(''.join(part) for part in parts if not f'.{part[0]}'.endswith(f'.{setting}'))
        if not values and setting not in AT_ZERO:
            continue
        summary = metrics.get('bbox_mAP', {}) if variant != PLAIN else dict(difference=0.0, interval=None)
        if 'difference' not in summary:
            continue
        try:
            value = float(values[0]) if values else 0.0
        except ValueError:
            raise ConfigurationError(f"--by {setting}: expected a setting whose values are numbers, got '{values[0]}' "
                                     f'in {variant}.') from None
        found.setdefault(name.replace('@model.distill.', '@'), {})[value] = summary
    if setting in AT_ZERO:  # what was never tried with it
        found = {name: by_value for name, by_value in found.items() if set(by_value) != {0.0}}
    if not any(found.values()):
        raise ConfigurationError(f"--by {setting}: no variant of these results has a setting of that name; they are "
                                 f"{', '.join(results['summary'])}.")
    return {name: dict(sorted(by_value.items())) for name, by_value in found.items()}


def sort_by_teacher(results: Mapping[str, Any], teachers: Sequence[str]) -> dict[str, dict[float, dict]]:
    """Sorts the differences of a benchmark by the mAP of the teacher.

    Args:
        results: What ``results.json`` holds.
        teachers: ``'R50:40.8'`` for each variant with a term, in the order of the results.

    Returns:
        Kind of teacher, as given -> its mAP in points -> ``difference`` and ``interval`` of the student.
    """
    taught = [name for name in results['summary'] if name.partition('@')[0] not in UNTAUGHT]
    if len(taught) != len(teachers):
        raise ConfigurationError(f'--teachers: expected {len(taught)}, for {", ".join(taught)}, got {len(teachers)}.')
    found: dict[str, dict[float, dict]] = {}
    for name, teacher in zip(taught, teachers):
        kind, _, points = teacher.rpartition(':')
        summary = results['summary'][name].get('bbox_mAP', {})
        if 'difference' in summary:
            found.setdefault(kind, {})[float(points)] = summary
    return {kind: dict(sorted(by_points.items())) for kind, by_points in sorted(found.items())}


def draw_classes(results: Mapping[str, Any]) -> Figure:
    """Draws the AP of each class that some variant never saw labelled, and the mean of the others, with deviations."""
    found = summarize_classes(results)
    if not found:
        raise ConfigurationError('no variant of these results was trained @without a class.')
    figure = Figure(figsize=(6.4, 0.8 + 0.42 * len(found)), layout='constrained')
    axes = figure.subplots()
    columns = list(dict.fromkeys(name for by_name in found.values() for name in by_name))
    for place, column in enumerate(columns):
        known = [(row, by_name[column]) for row, by_name in enumerate(found.values()) if column in by_name]
        axes.errorbar([each['mean'] for _, each in known], [row + 0.12 * place for row, _ in known],
                      xerr=[each['std'] or 0 for _, each in known], label=escape_formula(column), linestyle='',
                      marker='os^v'[place % 4], capsize=3)
    axes.set_yticks(range(len(found)), map(escape_formula, found))
    axes.invert_yaxis()
    axes.set(xlabel='AP, mean ± standard deviation over seeds')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside upper right', ncols=len(columns), frameon=False)
    return figure


# ------------------------------------------------------------------------------------------- fidelity and accuracy


def read_runs(files: Sequence[Path]) -> dict[str, list[dict]]:
    """Reads the runs of records whose fidelity was measured, each run once.

    Returns:
        Student and teacher -> runs, with ``variant``, ``seed``, ``map`` in points, and ``fidelity``: split -> number ->
        value; ``cka`` is the mean over the levels.
    """
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for file in files:
        record = json.loads(file.read_text(encoding='utf-8'))
        runs, pair = (record.get('runs'), record.get('pair')) if isinstance(record, dict) else ((), None)
        for run in runs if isinstance(runs, list) and pair else ():
            if run.get('fidelity'):
                fidelity = {split: dict(numbers, cka=float(np.mean(
                    [value for name, value in numbers.items() if name.startswith('cka_')] or [np.nan])))
                            for split, numbers in run['fidelity'].items()}
                points = 100 * run.get('bbox_mAP', run.get('metrics', {}).get('bbox_mAP', np.nan))
                names = Path(pair['student']).stem, pair['checkpoint_hash'][:8]
                found.setdefault(names, {})[run['identity']] = dict(
                    variant=run['variant'], seed=run['seed'], map=points, fidelity=fidelity)
    return {f'{student}, teacher {digest}': list(runs.values()) for (student, digest), runs in found.items()}


def correlate(numbers: np.ndarray, points: np.ndarray, variants: Sequence[str]) -> dict[str, Any]:
    """Correlates ranks (Spearman), with intervals of 95 % by bootstrap.

    Args:
        numbers: (n,) of fidelity.
        points: (n,) of mAP.
        variants: Of each run.

    Returns:
        ``rho``; its ``interval`` where runs are drawn, as if each were independent; and ``interval_by_variant`` where
        variants are drawn with all their seeds, which is what a statement about other methods needs; None of fewer
        than :data:`FEWEST`, which can hardly be drawn in different ways.
    """
    random, names = np.random.default_rng(0), list(dict.fromkeys(variants))
    members = np.array([[variant == name for variant in variants] for name in names], float)  # (variants, runs)

    def find_interval(units: int, runs: np.ndarray) -> list[float] | None:
        counts = random.multinomial(units, np.full(units, 1 / units), size=DRAWS) @ runs
        drawn = find_rho(numbers, points, counts)
        drawn = drawn[np.isfinite(drawn)]
        return np.quantile(drawn, (0.025, 0.975)).tolist() if len(drawn) > DRAWS / 2 else None

    return dict(runs=len(points), variants=len(names), rho=find_rho(numbers, points, np.ones((1, len(points)))).item(),
                interval=find_interval(len(points), np.eye(len(points))),
                interval_by_variant=find_interval(len(names), members) if len(names) >= FEWEST else None)


def find_rho(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The correlation of ranks, ties sharing theirs, in samples that hold each pair so many times.

    Args:
        first: (n,).
        second: (n,).
        counts: (samples, n).

    Returns:
        (samples,); not a number where one of the two does not vary.
    """
    ranks = [counts @ (each[:, None] < each) + counts @ (each[:, None] == each) / 2 - counts.sum(1, keepdims=True) / 2
             for each in (first, second)]
    with np.errstate(invalid='ignore', divide='ignore'):
        return (counts * ranks[0] * ranks[1]).sum(1) / np.sqrt(
            (counts * ranks[0]**2).sum(1) * (counts * ranks[1]**2).sum(1))


def correlate_records(pairs: Mapping[str, Sequence[dict]]) -> dict[str, dict]:
    """Correlates mAP with each number of fidelity, pair by pair.

    Returns:
        Pair -> ``'all'`` runs, and the ``'taught'`` ones: without the students that no term teaches, the plain ones and
        those that inherit alone, for between these and all others the correlation is the gain of teaching itself ->
        split -> number -> see :func:`correlate`.
    """
    found: dict[str, dict] = {}
    for pair, runs in pairs.items():
        taught = [run for run in runs if run['variant'].split('@')[0] not in UNTAUGHT]
        for kind, chosen in (('all', runs), ('taught', taught)):
            for split in sorted({split for run in chosen for split in run['fidelity']}):
                for number in FIDELITY:
                    rows = [run for run in chosen if np.isfinite(run['fidelity'].get(split, {}).get(number, np.nan))
                            and np.isfinite(run['map'])]
                    if len({run['variant'] for run in rows}) > 2:
                        found.setdefault(pair, {}).setdefault(kind, {}).setdefault(split, {})[number] = correlate(
                            np.array([run['fidelity'][split][number] for run in rows]),
                            np.array([run['map'] for run in rows]), [run['variant'] for run in rows])
    return found


def draw_correlations(found: Mapping[str, dict], kind: str = 'all') -> Figure:
    """Draws each correlation with its interval over variants, a panel for each split, a colour for each pair."""
    found = {pair: kinds for pair, kinds in found.items() if any(
        each['interval_by_variant'] for numbers in kinds.get(kind, {}).values() for each in numbers.values())}
    if not found:
        raise ConfigurationError(f'No pair has runs of {FEWEST} methods or more: there is no interval to draw.')
    splits = sorted({split for kinds in found.values() for split in kinds[kind]})
    figure = Figure(figsize=(5 * len(splits), 4.2), layout='constrained')
    panels = figure.subplots(1, len(splits), squeeze=False)[0]
    for axes, split in zip(panels, splits):
        for place, (pair, kinds) in enumerate(found.items()):
            numbers = kinds[kind].get(split, {})
            known = {name: each for name, each in numbers.items() if each['interval_by_variant']}
            rows = [FIDELITY.index(name) + 0.14 * (place - (len(found) - 1) / 2) for name in known]
            values = [each['rho'] for each in known.values()]
            bars = [[max(0.0, each['rho'] - each['interval_by_variant'][0]) for each in known.values()],
                    [max(0.0, each['interval_by_variant'][1] - each['rho']) for each in known.values()]]
            axes.errorbar(values, rows, xerr=bars, label=escape_formula(pair), linestyle='', marker='o', markersize=4,
                          capsize=3)
        axes.axvline(0, linewidth=1, color='grey')
        axes.set(xlim=(-1.05, 1.05), xticks=(-1, -0.5, 0, 0.5, 1), title=f'{split} images',
                 xlabel="Spearman's rank correlation with mAP")
        axes.set_yticks(range(len(FIDELITY)), FIDELITY)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)
    figure.legend(handles=panels[0].containers, loc='outside lower center', frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- unlabelled images


def generate_more(annotations: Path, root: Path, times: int) -> int:
    """Writes the images of generated data again, with so many times as many after them.

    Args:
        annotations: Of the training images.
        root: Where to.
        times: How many more.

    Returns:
        The number of images that are labelled: the first.

    Raises:
        ConfigurationError: The data is not generated.
    """
    info = json.loads(annotations.read_text(encoding='utf-8')).get('info') or {}
    if not {'images', 'size', 'seed'} <= set(info):
        raise ConfigurationError(f"'{annotations}' was not written by kd-det demo: more images are generated.")
    generate_shapes(root, train_images=info['images'] * (1 + times), val_images=1, size=info['size'], seed=info['seed'])
    return info['images']


def add_unlabelled(config: Config, root: Path, labelled: int, times: int) -> Config:
    """The same training with unlabelled images beside the labelled ones, in as many steps whatever their number.

    Each labelled image is seen as often as in the config's own training, and an unlabelled one beside each; with more
    of these, each is seen less. Without any, labelled ones take their place, which are then seen twice as often.

    Args:
        config: The student's; stays as it is.
        root: Of the data, see :func:`generate_more`.
        labelled: How many images are labelled, the first.
        times: How many times as many are not; a divisor of the epochs.

    Raises:
        ConfigurationError: It is no divisor.
    """
    config = copy.deepcopy(config)
    epochs, dataset = config.train_cfg.max_epochs, config.train_dataloader.dataset
    if times and epochs % times:
        raise ConfigurationError(f'{times} times as many images do not divide {epochs} epochs: give --epochs.')
    own = dict(copy.deepcopy(dataset), data_root=str(root), indices=list(range(labelled)))
    repeated = dict(type='RepeatDataset', times=times or 2, dataset=own)
    others = dict(copy.deepcopy(dataset), data_root=str(root), filter_cfg=dict(filter_empty_gt=False),
                  indices=list(range(labelled, labelled * (1 + times))),
                  pipeline=[*dataset.pipeline, dict(type='Unlabelled')])
    config.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[repeated, others]) if times else repeated
    if times:
        set_epochs(config, epochs // times)
    return config


def make_runs(options: Namespace) -> dict[str, Callable[..., RunResult]]:
    """The trainings by name; each is given a seed, a work dir and whether to go on."""
    student = load_config(options.student)
    if options.data_root:
        set_data_root(student, options.data_root)
    if options.epochs:
        set_epochs(student, options.epochs)
    dataset = student.train_dataloader.dataset
    root = options.work_dir / 'data'
    labelled = generate_more(Path(dataset.data_root, dataset.ann_file), root, max(options.times))
    configs = {times: add_unlabelled(student, root, labelled, times) for times in options.times}

    def learn(method: str, config: Config, **run: Any) -> RunResult:
        settings: dict[str, Any] = {}
        if method == 'pseudo_labels':
            method, settings = PLAIN, {'model.pseudo_labels': dict(score=0.5, images='unlabelled')}
        return distill(config, options.teacher, options.checkpoint, method, inherit=(), check_images=0,
                       options=settings, **run)

    plain = add_unlabelled(student, root, labelled, 0)
    return {'plain': partial(train, plain, check_images=0),
            **{f'{method}_{times}': partial(learn, method, config) for method in options.methods
               for times, config in configs.items() if times or method != 'pseudo_labels'}}


def measure(options: Namespace, run: Callable[..., RunResult], seed: int, folder: Path) -> dict[str, float]:
    """Trains one student; returns its mAP, and its fidelity on validation images and on labelled training images."""
    result = run(seed=seed, work_dir=folder, resume=folder.is_dir())
    student = load_config(options.student)
    if options.data_root:
        set_data_root(student, options.data_root)
    teacher = dict(config=options.teacher, checkpoint=options.checkpoint)
    fidelity = {f'{name}_{split}': value for split in ('val', 'train')
                for name, value in measure_fidelity(student, str(result.checkpoint), teacher, split).items()
                if name in FIDELITY}
    return {**keep_maps(result.metrics), **fidelity}


def sort_rows(rows: Mapping[str, Any]) -> dict[str, dict[float, dict]]:
    """The gains over the plain student, by method and how many times as many images are unlabelled."""
    found: dict[str, dict[float, dict]] = {}
    for name, row in rows.items():
        method, _, times = name.rpartition('_')
        if row['against_plain']:
            found.setdefault(method, {})[float(times)] = dict(difference=row['against_plain']['mean'],
                                                              interval=row['against_plain']['interval'])
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='question', required=True)
    gains = commands.add_parser('gains')
    gains.add_argument('results', type=Path)
    gains.add_argument('--by', required=True, metavar='SETTING', help='such as noise, shift or kd.temperature')
    teachers = commands.add_parser('teachers')
    teachers.add_argument('results', type=Path)
    teachers.add_argument('--teachers', nargs='+', required=True, metavar='KIND:MAP', help='of each taught variant')
    classes = commands.add_parser('classes')
    classes.add_argument('results', type=Path)
    fidelity = commands.add_parser('fidelity')
    fidelity.add_argument('records', nargs='*', type=Path)
    fidelity.add_argument('--taught', action='store_true', help='draw the runs that a term teaches alone')
    unlabelled = commands.add_parser('unlabelled')
    unlabelled.add_argument('student')
    unlabelled.add_argument('teacher')
    unlabelled.add_argument('checkpoint')
    unlabelled.add_argument('--data-root')
    unlabelled.add_argument('--times', nargs='+', type=int, default=[0, 1, 2, 4], help='unlabelled for each labelled')
    unlabelled.add_argument('--methods', nargs='+', default=['kd', 'pkd', 'pseudo_labels'])
    unlabelled.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    unlabelled.add_argument('--epochs', type=int, help='through the labelled images')
    unlabelled.add_argument('--work-dir', type=Path, default=Path('work_dirs/unlabelled'))
    for command in (fidelity, unlabelled):
        command.add_argument('--json', type=Path)
    for command in (gains, teachers, classes, fidelity, unlabelled):
        command.add_argument('--picture', type=Path)
    options = parser.parse_args()
    answers = dict(gains=answer_gains, teachers=answer_teachers, classes=answer_classes, fidelity=answer_fidelity,
                   unlabelled=answer_unlabelled)
    figure = answers[options.question](options)
    if options.picture:
        save_figure(figure, options.picture)


def answer_gains(options: Namespace) -> Figure:
    gains = sort_gains(json.loads(options.results.read_text(encoding='utf-8')), options.by)
    for name, by_value in gains.items():
        print(f'{name:50}' + '  '.join(f"{value:g}: {each['difference']:+.1f}" for value, each in by_value.items()))
    return draw_gains(gains, options.by, 'difference to the plain student in the same setting')


def answer_teachers(options: Namespace) -> Figure:
    gains = sort_by_teacher(read_results(options.results).results, options.teachers)
    figure = draw_gains(gains, "the teacher's mAP", 'gain over the plain student')
    figure.axes[0].set(xscale='linear')  # whose ticks are no longer those of each teacher, which would overlap
    return figure


def answer_classes(options: Namespace) -> Figure:
    return draw_classes(read_results(options.results).results)


def answer_fidelity(options: Namespace) -> Figure:
    found = correlate_records(read_runs(options.records or sorted(RECORDS.glob('*.json'))))
    for pair, kinds in found.items():
        for kind, splits in kinds.items():
            for split, numbers in splits.items():
                print(f'{pair}, {kind} runs, {split} images')
                for name, each in numbers.items():
                    bars = [f'({each[key][0]:+.2f} to {each[key][1]:+.2f})' if each[key] else '–'
                            for key in ('interval', 'interval_by_variant')]
                    print(f"  {name:14}{each['rho']:+.2f}  {'  '.join(bars)}  {each['runs']} runs of "
                          f"{each['variants']} variants")
    if options.json:
        write_whole(options.json, json.dumps(dict(pairs=found), indent=1) + '\n')
    return draw_correlations(found, 'taught' if options.taught else 'all')


def answer_unlabelled(options: Namespace) -> Figure:
    runs = make_runs(options)
    for seed in options.seeds:
        for name in runs:
            folder = options.work_dir / f'{name}_{seed}'
            train_once(folder, partial(measure, options, runs[name], seed, folder))
    rows = collect_rows(options.work_dir, list(runs))
    write_rows(options.json, rows, student=options.student, teacher=options.teacher)
    return draw_gains(sort_rows(rows), 'unlabelled images for each labelled one', 'gain over the plain student')


if __name__ == '__main__':
    main()
