"""``kd-det sweep``: one method over a grid of settings; a benchmark whose methods are made of the settings."""
from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from functools import partial

from kd_det.cli import benchmark
from kd_det.config.choices import split_values


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--method', required=True, help='a method, or a sum of methods: a+b')
    axes = parser.add_argument_group('what is tried; several of these make a grid')
    axes.add_argument('--set', nargs='+', type=_setting, default=[], metavar='KEY=A,B,C',
                      help='values such as kd.temperature=1,2,4: of a term by its name, or of the config by its dotted '
                      'key')
    axes.add_argument('--teachers', type=split_values, metavar='1,3,5', help='sizes of an ensemble of teachers')
    axes.add_argument('--augment', type=split_values, metavar='none,mixup,mosaic',
                      help='what is done to the training images beside their pipeline: none, mosaic, mixup, '
                      'mosaic+mixup; each is compared with a plain student of the same augmentation')
    axes.add_argument('--noise', type=split_values, metavar='0,0.1,0.2',
                      help='shares of the training boxes with a wrong class')
    axes.add_argument('--shift', type=split_values, metavar='0,0.1',
                      help='by which share of their size training boxes move')
    axes.add_argument('--without', type=split_values, metavar='none,CLASS',
                      help='classes that no training box has; A+B: two of them')
    benchmark.add_common_arguments(parser)


def run(options: Namespace) -> int:
    from kd_det.study.benchmark import sweep
    named = {name: getattr(options, name) for name in ('teachers', 'augment', 'noise', 'shift', 'without')}
    settings = [*options.set, *((key, values) for key, values in named.items() if values)]
    return benchmark.print_benchmark(partial(sweep, method=options.method, settings=settings), options)


def _setting(text: str) -> tuple[str, list[str]]:
    key, _, values = text.partition('=')
    if '.' not in key or not split_values(values):
        raise ArgumentTypeError(f"expected KEY=A,B,C with a dotted key, such as kd.temperature=1,2,4, got '{text}'")
    return key, split_values(values)
