"""What it costs to balance: a step that compares the terms' gradients with the task's, beside one that does not.

Usage: python -m benchmarks.balance [--cases faster_rcnn_r101_r18:fgd dino_r50_r18:querykd] [--rounds 4] [--json FILE]

All weights are random; the two kinds of step take turns. How often one compares is as the method's Balance says.
"""
from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from mmengine.optim import build_optim_wrapper

import kd_det  # noqa: F401  registers everything
from benchmarks.steps import add_batch_options
from kd_det.checks.synthetic import random_distiller, synthetic_batch
from kd_det.config.composition import distillation_config
from kd_det.context import Progress
from kd_det.registry import prepare_without_runner
from kd_det.study.pair import read_pair
from kd_det.study.step_costs import measure_seconds

CASES = ('faster_rcnn_r101_r18:fgd', 'gfl_r101_r18:fgd+ld', 'dino_r50_r18:querykd')


def measure(pair: str, method: str, options: Namespace) -> dict:
    """Seconds of a step without the comparison and with it, and the share that it adds to all steps.

    That is ``share`` as long as the ratio moves, and ``settled`` where it does not, see the argument ``longest``.

    Args:
        pair: Name of a file in ``configs/_base_/pairs``.
        method: A method, or a sum of methods.
        options: Of the batch, and the number of rounds.
    """
    prepare_without_runner(seed=0)
    pair_config = read_pair(f'kd_det::_base_/pairs/{pair}.py')
    config = distillation_config(pair_config.student, pair_config.teacher, 'none: random weights', method, inherit=(),
                                 balance=1.0)
    distiller = random_distiller(config)
    wrapper = build_optim_wrapper(distiller, config.optim_wrapper)
    batch = synthetic_batch(distiller.student, options.batch, tuple(options.size), options.boxes)
    balances = distiller.monitor.balances.values()
    interval, longest = max(each.interval for each in balances), max(each.longest for each in balances)
    for each in balances:
        each.steps = each.start  # as after the first steps, which all compare
        each.longest = each.interval  # of this one it is known when a step compares

    def step(iteration: int) -> Callable[[], object]:
        def call() -> None:
            distiller.progress = Progress(iteration)
            distiller.train_step(dict(batch), wrapper)
        return call

    step(0)()  # whatever is done once; the first step always compares
    rounds = [(measure_seconds(step(1), repeats=1, warmup=0), measure_seconds(step(interval), repeats=1, warmup=0))
              for _ in range(options.rounds)]
    plain, comparing = (median(times) for times in zip(*rounds))
    share = median(other - own for own, other in rounds) / plain
    return dict(pair=pair, method=method, step=plain, comparing_step=comparing, interval=interval, longest=longest,
                share=share / interval, settled=share / longest)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', nargs='+', default=CASES, metavar='PAIR:METHOD')
    add_batch_options(parser)
    parser.add_argument('--rounds', type=int, default=4)
    parser.add_argument('--json', type=Path, help='write the numbers to this file')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in options.cases:
        rows.append(measure(*case.split(':'), options))
        print('{pair}, {method}: a step {step:.3f} s, one that compares {comparing_step:.3f} s, on average '
              '{share:+.1%}, settled {settled:+.1%}'.format(**rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(dict(vars(options), json=None, rows=rows), indent=2) + '\n',
                               encoding='utf-8')


if __name__ == '__main__':
    main()
