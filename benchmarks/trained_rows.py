"""Rows of trainings, each with several seeds, that a later call goes on with: what the benchmarks of learners share."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd_det.compat.writing import write_whole
from kd_det.study.results import paired_difference

MAP = 'coco/bbox_mAP'
RECORD = 'row.json'  # of a run's folder


def train_once(folder: Path, measure: Callable[[], Mapping[str, float]]) -> None:
    """Calls what trains and measures, unless its record lies in the folder already; and leaves the record there."""
    record = folder / RECORD
    if not record.is_file():
        print(folder.name, flush=True)
        write_whole(record, json.dumps(dict(measure())))


def keep_maps(metrics: Mapping[str, float]) -> dict[str, float]:
    """The mAP of each learner among the metrics of a run."""
    return {metric: value for metric, value in metrics.items() if metric.endswith(MAP)}


def collect_rows(work_dir: Path, names: Sequence[str],
                 find_plain: Callable[[str], str] = lambda name: 'plain') -> dict[str, dict[str, Any]]:
    """Reads the records of the folders ``NAME_SEED``, and prints a line for each row.

    Args:
        work_dir: The folder of the folders.
        names: Those that count, in their order.
        find_plain: Tells the name of the row that a row is compared with, seed by seed.

    Returns:
        Name, with the learner's where it is not the first -> ``map``: points by seed, ``against_plain``, and whatever
        else the records have, by seed.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    records = [(record.parent.name.rpartition('_'), record) for record in sorted(work_dir.glob(f'*/{RECORD}'))]
    records = [each for each in records if each[0][0] in names]
    for (name, _, seed), record in sorted(records, key=lambda each: names.index(each[0][0])):
        for metric, value in json.loads(record.read_text(encoding='utf-8')).items():
            whose = metric.removesuffix(MAP).rstrip('/') if metric.endswith(MAP) else ''
            row = found.setdefault(f'{name} {whose}'.rstrip(), {})
            kind, value = ('map', round(100 * value, 4)) if metric.endswith(MAP) else (metric, value)
            row.setdefault(kind, {})[int(seed)] = value
    rows = {}
    for name, columns in found.items():
        plain = find_plain(name)
        difference = (paired_difference(found[plain]['map'], columns['map']) if plain in found and name != plain
                      else None)
        rows[name] = dict(columns, against_plain=difference and asdict(difference))
        points = '  '.join(f'{value:5.1f}' for _, value in sorted(columns['map'].items()))
        against = '' if difference is None else f'  {difference.mean:+.1f}, {difference.verdict}'
        print(f'{name:34}{points}{against}')
    return rows


def write_rows(file: Path | None, rows: Mapping[str, Any], **about: object) -> None:
    """Writes rows, and what they are about, as the records of ``docs/results`` are; without a file nothing."""
    if file is not None:
        write_whole(file, json.dumps(dict(about, rows=rows), indent=1))
