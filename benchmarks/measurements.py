"""What ``kd-det methods --for`` tells of measurements: takes them out of the records of docs/results.

Usage: python -m benchmarks.measurements

It writes configs/_base_/methods/measured.json, which travels with the package. A test holds the two together.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_det.config.methods import MEASURED
from kd_det.study.results import paired_difference

RESULTS = Path(__file__).parents[1] / 'docs' / 'results'
# By kind of detector, one upon the other: of a method that stands in several the last counts. A + joins two of the same
# teacher that differ in their seeds.
RECORDS = {'Faster R-CNN': ('demo_faster_rcnn', 'demo_faster_rcnn_new'),
           'RetinaNet': ('demo_retinanet', 'demo_retinanet_new'), 'GFL': ('demo_gfl', 'demo_gfl_new'),
           'RTMDet': ('demo_rtmdet', ), 'DINO': ('demo_dino+demo_dino_more_seeds', 'demo_dino_new')}
TWINS = {'RTMDet': 'none'}  # of that pair nothing can be inherited; else the student that inherits alone
# Settings beside which a row still tells of its method.
OWN = ('', 'balance=0.2', 'model.distill.freekd.iterations=300')  # a fifth is what the file of rm says


def collect() -> dict[str, Any]:
    """By the kind of detector: what each method has gained beside its twin, which twin that is, and what it costs."""
    gains: dict[str, dict[str, Any]] = {}
    twins = {kind: TWINS.get(kind, 'inherit') for kind in RECORDS}
    for kind, joint in ((kind, joint) for kind, records in RECORDS.items() for joint in records):
        by_variant: dict[str, dict[int, float]] = {}
        for record in joint.split('+'):
            for run in json.loads((RESULTS / f'{record}.json').read_text(encoding='utf-8'))['runs']:
                by_variant.setdefault(run['variant'], {})[run['seed']] = 100 * run['metrics']['bbox_mAP']
        twin = by_variant[twins[kind]]
        for variant, by_seed in by_variant.items():
            name, _, options = variant.partition('@')
            if name not in ('none', 'inherit') and '+' not in name and options in OWN:
                found = paired_difference(twin, by_seed)
                gains.setdefault(kind, {})[name] = [round(each, 1) for each in (found.mean, *found.interval)]
    costs: dict[str, dict[str, float]] = {}
    for row in json.loads((RESULTS / 'method_costs.json').read_text(encoding='utf-8'))['rows']:
        cost = (row['terms'] + row['teacher']) / row['student']
        costs.setdefault(row['detector'], {})[row['method']] = round(cost, 2)
    return dict(gains=gains, twins=twins, costs=costs)


if __name__ == '__main__':
    MEASURED.write_text(json.dumps(collect(), indent=1) + '\n', encoding='utf-8')
