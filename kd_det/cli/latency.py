"""``kd-det latency``: exported files side by side, in turns."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kd_det.cli.common import count, path, print_tables
from kd_det.config.choices import RUNTIMES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('models', metavar='MODEL', nargs='+', type=path,
                        help='files that kd-det export wrote: .onnx, .xml; or .pth, with the config beside it')
    parser.add_argument('--runtime', nargs='+', choices=(*RUNTIMES, 'torch'), default=(), metavar='RUNTIME',
                        help=f"run each file by each of these that can: {', '.join(RUNTIMES)}, torch (by default as "
                        'its name says)')
    parser.add_argument('--threads', type=count, metavar='N', help='how many each may use (as many as processors)')
    parser.add_argument('--runs', type=count, default=50, metavar='N', help='of each file that count (50)')
    parser.add_argument('--size', nargs=2, type=count, metavar=('HEIGHT', 'WIDTH'),
                        help="of the image, for files that leave it open (as the detector's test pipeline makes it)")


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.deploy.latency import measure_latency
    found = measure_latency(options.models, runtimes=options.runtime, threads=options.threads, runs=options.runs,
                            size=tuple(options.size) if options.size else None)
    print_tables(PlainConsole(), [found.tabulate()])
    return 0
