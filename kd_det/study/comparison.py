"""Several ``results.json`` together: joined into one, or compared."""
from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np

from kd_det.compat.console import TextTable
from kd_det.compat.writing import refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Names, Positive, declared
from kd_det.study.records import (
    RESULTS_FILE,
    VERSION,
    BenchmarkResult,
    name_file,
    read_results,
    refuse_tables,
    sum_up,
)
from kd_det.study.results import (
    METRICS,
    NONE,
    POWER,
    ROUNDING,
    collect_points,
    count_seeds,
    format_difference,
    format_mean,
    paired_difference,
)
from kd_det.study.runs import describe_environment, read_command_line
from kd_det.study.variants import DISTILLATION_KEYS, PLAIN

ADVICE = 'Give another folder, or replace it with --force.'


@declared
def merge_results(files: Sequence[str | Path], out: str | Path | None = None, force: bool = False) -> BenchmarkResult:
    """Joins the results of benchmarks of the same pair on the same data: more seeds, more methods. Of one, reads it.

    Args:
        files: ``results.json`` of each, or the folders that have them.
        out: Folder for the joint results; None to write nothing.
        force: Write over other results that lie there.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: A file can not be read; pair, data or teacher differ; a method was trained in different
            settings; or a run has two values.
        WritingError: The folder holds results that were not joined of the same data.
    """
    if not files:
        raise ConfigurationError('There is nothing to join: expected the results of one benchmark or more.')
    found = {str(Path(file)): read_results(file) for file in files}
    names = list(found)
    for first, second in combinations(names, 2):  # of three, two may have more teachers than the third
        _check_same_study(first, found[first].results, second, found[second].results)
    root = Path(out) if out is not None else found[names[0]].work_dir
    if len(found) == 1 and out is None:
        return found[names[0]]
    entries: dict[tuple[str, int], tuple[str, dict]] = {}
    for name, each in found.items():
        for entry in each.results['runs']:
            key = entry['variant'], entry['seed']
            moved = _move(entry, each.work_dir, root, each.results)
            entries[key] = (name, moved) if key not in entries else _choose(*entries[key], name, moved)
    _check_same_settings(entries.values())
    order = list(dict.fromkeys(entry['variant'] for _, entry in entries.values()))
    runs = sorted((entry for _, entry in entries.values()), key=lambda run: (run['seed'], order.index(run['variant'])))
    widest = max((each.results for each in found.values()), key=lambda each: len(each['further_teachers']))
    result = BenchmarkResult(root, sum_up(dict(
        version=VERSION, command=read_command_line(), **describe_environment(),
        **{key: widest[key] for key in ('pair', 'data', 'teacher', 'further_teachers')},
        seeds=sorted({run['seed'] for run in runs}), runs=runs,
        sources=list(chain.from_iterable(
            each.results.get('sources') or [dict(file=name, command=each.results['command'],
                                                 seeds=each.results['seeds'])] for name, each in found.items())))))
    if out is not None:
        refuse_to_replace(root / RESULTS_FILE, lambda content: b'"sources": [' in content
                          and widest['data']['hash'].encode() in content, 'joint results on this data', force, ADVICE)
        refuse_tables(root, len(result.files) > 2, force, ADVICE)
        root.mkdir(parents=True, exist_ok=True)
        result.save()
    return result


def _check_same_study(first: str, one: dict, second: str, other: dict) -> None:
    """Refuses what is no part of the same study, and says what differs."""

    def teachers(results: dict) -> list[str]:
        return [results['pair']['checkpoint_hash'],
                *(each['checkpoint_hash'] for each in results['further_teachers'])]

    def differ(what: str, here: object, there: object, why: str = '') -> ConfigurationError:
        return ConfigurationError(f"'{first}' and '{second}' are not of one study: {what}: {here} in the first, "
                                  f'{there} in the second.{why}')

    for key in ('student', 'teacher'):
        unlike = _find_unlike(one['pair'], other['pair'], key)
        if unlike:
            raise differ(f"the {key}'s config", *unlike)
    if one['data']['hash'] != other['data']['hash']:
        raise differ('the data', one['data']['hash'][:12], other['data']['hash'][:12],
                     ' The hashes are those of annotations and images.')
    for here, there in zip(teachers(one), teachers(other)):
        if here != there:
            raise differ("the teacher's weights", here[:12], there[:12], ' Train both with the same checkpoint: '
                         '--teacher-checkpoint.')


def _find_unlike(one: dict, other: dict, key: str) -> tuple[str, str] | None:
    """What tells a config of two pairs apart: their names, or else the hashes of what they hold; None if nothing does.

    The folders may be those of two machines.
    """
    names = name_file(one[key]), name_file(other[key])
    if names[0] != names[1]:
        return names
    hashes = one.get(f'{key}_hash'), other.get(f'{key}_hash')  # earlier versions have none
    if None in hashes or hashes[0] == hashes[1]:
        return None
    return f'{names[0]} of content {hashes[0][:12]}', f'of content {hashes[1][:12]}'


def _move(entry: dict, old: Path, new: Path, results: dict) -> dict:
    """The entry of a run, its paths as seen from another folder, and with where it ran, if only the file tells."""
    moved = {key: _see_from(new, Path(old, entry[key])) for key in ('folder', 'checkpoint', 'scalars', 'log')
             if key in entry}
    if entry['status'] == 'finished' and not entry.get('environment'):
        moved['environment'] = {key: results[key] for key in ('commit', 'versions', 'machine')}
    return dict(entry, **moved)


def _see_from(folder: Path, file: Path) -> str:
    with suppress(ValueError):  # of another drive
        return os.path.relpath(file, folder)
    return str(file)


def _choose(first: str, one: dict, second: str, other: dict) -> tuple[str, dict]:
    """Which of two entries of the same run counts: the one that finished; both, where they are the same."""
    if other['status'] != 'finished':
        return first, one
    if one['status'] != 'finished':
        return second, other
    for key in ('identity', 'metrics'):
        if one[key] != other[key]:
            values = ' and '.join(f"{100 * run['metrics']['bbox_mAP']:.1f}" for run in (one, other))
            raise ConfigurationError(f"{one['variant']}, seed {one['seed']} has two values, {values} mAP, in '{first}' "
                                     f"and '{second}': leave one of the files out, or compare them with kd-det results "
                                     'compare.')
    joint = {key: {**other.get(key, {}), **one.get(key, {})} for key in ('fidelity', 'class_ap')}
    return first, dict(one, **{key: value for key, value in joint.items() if value})


def _check_same_settings(entries: Iterable[tuple[str, dict]]) -> None:
    """Refuses a method that is not the same in all files."""
    seen: dict[str, tuple[str, dict]] = {}
    for file, entry in entries:
        if entry['status'] == 'finished':
            name, before = seen.setdefault(entry['variant'], (file, entry))
            there = _describe_training(entry)
            for key, here in _describe_training(before).items():
                if here != there[key]:
                    raise ConfigurationError(f"{entry['variant']} is not the same in '{name}' and '{file}': {key} "
                                             f'differs ({here} and {there[key]}).')


def _describe_training(entry: dict) -> dict[str, Any]:
    """What is the same for all seeds of a method; of several processes, too, which draw other numbers than one."""
    machine = (entry.get('environment') or {}).get('machine', {})
    settings = _complete(entry['settings'])
    if entry['method'] == PLAIN and 'inherit' not in settings:  # whom those do not reach, which earlier versions noted
        settings = {key: value for key, value in settings.items() if not key.startswith(DISTILLATION_KEYS)}
    return dict({key: entry[key] for key in ('method', 'epochs', 'iterations', 'parameters')},
                settings=settings, processes=machine.get('processes', 1))


def _complete(settings: dict) -> dict:
    """Settings with those that earlier versions did not note."""
    return dict(dict(augment=[]), **settings, **({} if 'teachers' in settings or 'inherit' not in settings
                                                 else dict(teachers=1)))


@dataclass(frozen=True)
class Comparison:
    """Paired differences of what two variants, or two files, have.

    Attributes:
        names: What is compared; differences are the second less the first.
        size: The difference, in points, that ``needed`` is about.
        rows: What is compared -> metric -> ``first`` and ``second``, means in points over the seeds that both have;
            ``difference``, ``interval``, ``verdict`` and ``by_seed``, as in ``results.json``; and ``needed``, the seeds
            by which a difference of that size would be shown in 80 of 100 cases, None of one seed.
        notes: What makes it less than a paired comparison.
    """
    names: tuple[str, str]
    size: float
    rows: dict[str, dict[str, dict[str, Any]]]
    notes: tuple[str, ...] = ()

    def tabulate(self) -> TextTable:
        """Makes a table, a row for each metric of each pair."""
        rows = [(name, METRICS[metric], f"{len(each['by_seed'])}", format_mean(each['first']),
                 format_mean(each['second']), format_difference(each, len(each['by_seed'])),
                 NONE if each['needed'] is None else f"{each['needed']}")
                for name, metrics in self.rows.items() for metric, each in metrics.items()]
        caption = ['Δ: paired mean over the seeds that both have ± half of its 95 % interval. needed: seeds by which a '
                   f'difference of {self.size:g} points would be shown in {100 * POWER:.0f} of 100 cases, by the '
                   'spread of Δ', *self.notes]
        return TextTable(f'{self.names[1]} against {self.names[0]}',
                         ('', '', 'seeds', self.names[0], self.names[1], 'Δ', 'needed'), rows, '\n'.join(caption),
                         words=(0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON can hold it."""
        return dict(names=list(self.names), size=self.size, rows=self.rows, notes=list(self.notes))

    def _repr_html_(self) -> str:
        return self.tabulate().to_html()


@declared
def compare_results(files: Sequence[str | Path], variants: Names = (), size: Positive = 1.0) -> Comparison:
    """Compares two variants of a benchmark, or what two benchmarks on the same data have in common.

    Args:
        files: ``results.json``, or the folder that has it: one, or two.
        variants: Of one file the two to compare, the second with the first. Of two files those to compare between them,
            all that both have by default; or one of the first and one of the second, where no name is in both.
        size: The difference in points of which to tell how many seeds it needs.

    Raises:
        FileNotFoundError: There is no such file.
        ConfigurationError: A file can not be read, they are of different data, a variant is in none, or no seed is in
            both.
    """
    if len(files) not in (1, 2) or len(files) == 1 and len(variants) != 2:
        raise ConfigurationError('expected one file and two variants of it, or two files, got '
                                 f"{len(files)} file{'s' * (len(files) != 1)} and {len(variants)} "
                                 f"variant{'s' * (len(variants) != 1)}.")
    results = [read_results(file).results for file in files]
    names = [str(file) for file in files] if len(files) == 2 else list(variants)
    if len({each['data']['hash'] for each in results}) > 1:
        raise ConfigurationError(f"'{files[0]}' and '{files[1]}' are of different data: their numbers can not be "
                                 'compared.')
    points = [collect_points(each['runs']) for each in results]
    pairs = _pair_variants(files, variants, points)
    one, other, alone = points[0], points[-1], list[str]()
    rows: dict[str, dict[str, dict]] = {}
    for name, (first, second) in list(pairs.items()):
        compared = {metric: _compare(one[first][metric], other[second][metric], size) for metric in METRICS
                    if metric in one[first] and metric in other[second]}
        rows[name] = {metric: each for metric, each in compared.items() if each}
        if not rows[name]:
            alone.append(f'{name}: no seed has finished in both')
            del rows[name], pairs[name]
    if alone and (variants or not rows):
        raise ConfigurationError(f'{alone[0]}, so there is nothing to compare.')
    return Comparison((names[0], names[1]), size, rows, (*_tell_unpaired(results[0], results[-1], pairs), *alone))


def _pair_variants(files: Sequence[str | Path], variants: Sequence[str],
                   points: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """What to compare: name -> variant of the first file and of the second."""
    is_crossed = len(variants) == 2 and (len(files) == 1 or not all(each in found for each in variants
                                                                    for found in points))
    chosen = variants or [name for name in points[0] if name in points[-1]]
    pairs = {name: (name, name) for name in chosen}
    if is_crossed:
        pairs = {' → '.join(variants): (variants[0], variants[1])}
    for pair in pairs.values():
        for file, variant, found in zip((files[0], files[-1]), pair, (points[0], points[-1])):
            if variant not in found:
                raise ConfigurationError(f"'{file}' has no '{variant}': expected one of {', '.join(found)}.")
    if not pairs:
        raise ConfigurationError(f"'{files[0]}' and '{files[1]}' have no variant in common: name one of each.")
    return pairs


def _compare(one: Mapping[int, float], other: Mapping[int, float], size: float) -> dict[str, Any] | None:
    found = paired_difference(one, other, ROUNDING)
    if found is None:
        return None
    values = list(found.by_seed.values())
    needed = count_seeds(float(np.std(values, ddof=1)), size) if len(values) > 1 else None
    first, second = (float(np.mean([each[seed] for seed in found.by_seed])) for each in (one, other))
    return dict(first=first, second=second, difference=found.mean, interval=found.interval, verdict=found.verdict,
                by_seed=dict(found.by_seed), needed=needed)


def _tell_unpaired(one: dict, other: dict, pairs: Mapping[str, tuple[str, str]]) -> list[str]:
    """What tells that runs of one seed are no pairs: other configs, another order of the images."""
    unlike = {key: _find_unlike(one['pair'], other['pair'], key) for key in ('student', 'teacher')}
    notes = [f"The {key}'s config differs: {' and '.join(names)}" for key, names in unlike.items() if names]
    orders = [{(run['variant'], run['seed']): run['order'] for run in each['runs'] if run['status'] == 'finished'}
              for each in (one, other)]
    for name, (first, second) in pairs.items():
        unlike = [seed for (variant, seed), order in orders[0].items()
                  if variant == first and orders[1].get((second, seed), order) != order]
        if unlike:
            notes.append(f"{name}: seeds {', '.join(map(str, unlike))} saw the images in another order, so that they "
                         'are no pairs')
    return notes
