"""What a benchmark found out, as ``results.json`` holds it::

    command                         what made it
    commit, versions, machine       of that command, see kd_det.benchmark.environment; runs that were kept from before
                                    have their own
    pair                            student and teacher: their configs, the teacher's weights and their hash
    data                            data root (null: the config's) and the hash of the data
    seeds                           list of numbers
    teacher                         its run, or null where a checkpoint was given
    further_teachers                of @teachers=N, without the first: checkpoint, checkpoint_hash, and run, as above
    runs                            one object for each variant and seed:
        variant, method, seed, settings     which it is; settings: augment, what else was set of the config, and, but
                                            for plain students, balance (null: each method's own ratio; "paper": the
                                            published weights), inherit, teachers
        twin                                the plain student that it is compared with, see
                                            kd_det.benchmark.variants.twin_of
        folder                              its work dir
        status                              "finished" or "failed"; with error and log where it failed
        identity … environment              those of kd_det.benchmark.runs.Run; checkpoint and scalars within its folder
        same_start, same_order              whether the first weights and the images' order are those of its twin of
                                            that seed; null where that is missing. Inherited weights start otherwise.
    summary                         variant -> metric (bbox_mAP, bbox_mAP_50, …) -> seeds (the number of those that
                                    count), mean, std, and, but for "none", against its twin: pairs (of seeds that both
                                    have), by_seed, difference, interval (95 %, null for one pair), verdict. In points
                                    (0 to 100). A run that failed, or whose number is none, does not count; metrics that
                                    no object counts for are left out.
    fidelity                        split (val, train) -> variant -> number of FidelityMetric -> mean, std; only what
                                    --fidelity asked for. Each run has its own under fidelity: split -> number -> value.

Paths are relative to the work dir of the benchmark.
"""
from __future__ import annotations

import os
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Dict, List, Mapping

from kd_det.benchmark.runs import Run
from kd_det.benchmark.scheduling import Failure, Outcome
from kd_det.benchmark.statistics import mean_and_std, paired_difference
from kd_det.benchmark.variants import PLAIN, Variant, twin_of

METRICS = {'bbox_mAP': 'mAP', 'bbox_mAP_50': 'AP50', 'bbox_mAP_75': 'AP75', 'bbox_mAP_s': 'APs', 'bbox_mAP_m': 'APm',
           'bbox_mAP_l': 'APl'}


def run_entry(variant: Variant, seed: int, folder: Path, outcome: Outcome, root: Path) -> dict:
    """One element of ``runs``."""
    distillation = dict(balance=variant.balance, inherit=variant.inherit, teachers=variant.teachers)
    settings = dict({} if variant.is_plain else distillation, augment=variant.augment, **variant.settings)
    entry = dict(variant=variant.name, method=variant.method, seed=seed, settings=settings, twin=twin_of(variant.name),
                 folder=os.path.relpath(folder, root))
    if isinstance(outcome, Failure):
        return dict(entry, status='failed', error=outcome.error, log=os.path.relpath(outcome.log, root))
    return dict(entry, status='finished', **relative(outcome, root))


def relative(run: Run, root: Path) -> dict:
    """A run as a dict, with paths relative to a folder."""
    paths = {name: os.path.relpath(getattr(run, name), root) for name in ('checkpoint', 'scalars')}
    return dict(asdict(run), **paths)


def mark_twins(entries: List[dict]) -> None:
    """Notes of each run whether it began as its twin of the same seed, and saw the images in the same order."""
    finished = {(entry['variant'], entry['seed']): entry for entry in entries if entry['status'] == 'finished'}
    for entry in entries:
        if entry['status'] == 'finished':
            twin = finished.get((twin_of(entry['variant']), entry['seed']))
            for key in ('start', 'order'):
                entry[f'same_{key}'] = None if twin is None else entry[key] == twin[key]


def counts(entry: dict, metric: str = 'bbox_mAP') -> bool:
    """Whether a run has a number of a metric: it finished, objects count for the metric, and it is finite."""
    return entry['status'] == 'finished' and 0 <= entry['metrics'].get(metric, -1) < inf


def summarize(entries: List[dict]) -> Dict[str, Dict[str, dict]]:
    """Mean and spread of every variant, and its paired difference to its twin, by metric."""
    values: Dict[str, Dict[str, Dict[int, float]]] = {}  # variant -> metric -> seed -> points
    for entry in entries:
        by_metric = values.setdefault(entry['variant'], {})
        for metric in METRICS:
            if counts(entry, metric):
                by_metric.setdefault(metric, {})[entry['seed']] = 100 * entry['metrics'][metric]
    return {variant: {metric: _summary(variant, by_seed, values.get(twin_of(variant), {}).get(metric, {}))
                      for metric, by_seed in by_metric.items()} for variant, by_metric in values.items()}


def _summary(variant: str, by_seed: Mapping[int, float], twin: Mapping[int, float]) -> dict:
    summary = dict(seeds=len(by_seed), **mean_and_std(list(by_seed.values())))
    difference = None if variant == PLAIN else paired_difference(twin, by_seed)
    if difference is not None:
        summary.update(pairs=len(difference.by_seed), by_seed=difference.by_seed, difference=difference.mean,
                       interval=difference.interval, verdict=difference.verdict)
    return summary
