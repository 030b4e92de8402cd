"""What each method costs in a step: its terms, and what it runs of the teacher, beside the student's own step.

Usage: python -m benchmarks.methods [--size 320 320] [--batch 2] [--boxes 10] [--repeats 5] [--threads 2] [--json FILE]
"""
from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch

import kd_det  # noqa: F401  registers everything
from benchmarks.engine import processor
from benchmarks.steps import add_batch_options
from kd_det.checks.synthetic import random_distiller, synthetic_batch
from kd_det.config.composition import PAPER, distillation_config
from kd_det.config.methods import methods
from kd_det.registry import prepare_without_runner
from kd_det.study.pair import read_pair
from kd_det.study.step_costs import (
    PLAIN_TEACHER,
    STUDENT,
    TEACHER,
    TERM,
    Cost,
    measure_parts,
    measure_step,
)

FEATURES = {'backbone', 'neck', 'encoder'}  # the parts that are no heads
# One pair of each kind. A method that reads heads is measured on each that it serves, every other one on the first.
PAIRS = {'Faster R-CNN': 'faster_rcnn_r101_r18', 'RetinaNet': 'retinanet_r101_r18', 'GFL': 'gfl_r101_r18',
         'FCOS': 'fcos_r101_r18', 'YOLOX': 'yolox_l_s', 'RTMDet': 'rtmdet_l_s', 'DINO': 'dino_r50_r18'}


def pairs() -> Iterator[tuple[str, str]]:
    """Detector and method, detector by detector."""
    for detector in PAIRS:
        for method in methods():
            served = [each for each in PAIRS if each in method.detectors]
            if detector in (served if set(method.reads) - FEATURES else served[:1]):
                yield detector, method.name


def measure(detector: str, method: str, options: Namespace, with_steps: bool) -> dict[str, Cost]:
    """The parts of a step, at the paper's weights and with random weights of the detectors.

    Args:
        detector: One of :data:`PAIRS`.
        method: Its name.
        options: Of the batch, and the number of rounds.
        with_steps: Measure the steps of student and distiller, too.
    """
    pair = read_pair(f'kd_det::_base_/pairs/{PAIRS[detector]}.py')
    config = distillation_config(pair.student, pair.teacher, 'none: random weights', method, inherit=(), balance=PAPER)
    prepare_without_runner(seed=0)
    distiller = random_distiller(config)
    batch = synthetic_batch(distiller.student, options.batch, tuple(options.size), options.boxes)
    if with_steps:
        return measure_step(distiller, batch, config.optim_wrapper, options.repeats).parts
    return measure_parts(distiller, batch, options.repeats)


def row(parts: dict[str, Cost]) -> dict:
    """Seconds and bytes of the terms together, and of what runs of the teacher."""
    terms = [cost for name, cost in parts.items() if name.startswith(TERM)]
    return dict(terms=sum(cost.seconds for cost in terms), terms_memory=max(cost.memory for cost in terms),
                teacher=parts[TEACHER].seconds, teacher_memory=parts[TEACHER].memory,
                plain_teacher=parts[PLAIN_TEACHER].seconds)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    add_batch_options(parser)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    students, rows = {}, []
    for detector, method in pairs():
        parts = measure(detector, method, options, with_steps=detector not in students)
        student = students.setdefault(detector, parts.get(STUDENT))
        rows.append(dict(detector=detector, method=method, student=student.seconds, student_memory=student.memory,
                         **row(parts)))
        each = rows[-1]
        print(f"| `{method}` | {detector} | {each['terms'] * 1e3:.0f} ms | {each['terms'] / each['student']:.1%} | "
              f"{each['terms_memory'] / 1e6:.0f} MB | {each['teacher'] * 1e3:.0f} ms | "
              f"{each['teacher'] / each['plain_teacher']:.2f} |", flush=True)
    if options.json:
        settings = dict(size=list(options.size), batch=options.batch, boxes=options.boxes, repeats=options.repeats,
                        threads=options.threads, processor=processor(), torch=torch.__version__)
        options.json.write_text(json.dumps(dict(**settings, rows=rows), indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
